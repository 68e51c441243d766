package listen

import (
	"io"
	"net"
	"time"
)

// cipherConn is what a TLS connection stands on: during the handshake the accepted connection nc, and then, when nc is nil,
// memory. A loop puts the records in that it has read, and takes those out that are to be sent.
//
// crypto/tls gives up on a connection after an error of Read, unless it is a temporary net.Error: then the next call goes
// on where this one has ended, in the middle of a record too.
type cipherConn struct {
	nc    net.Conn
	in    []byte  // what Read has not taken
	end   bool    // nothing comes after in
	out   *[]byte // where Write appends
	whole int     // records that were read to their end, see count
	// Where in a record the last octet was that was read: how many octets of its header are known, and how many follow.
	header [5]byte
	known  int
	rest   int
}

// count looks for the ends of records in b, which was read (RFC 8446, section 5.1). Whoever reads the plaintext takes one
// off whole for each, and knows without another call of Read when there is no more.
func (c *cipherConn) count(b []byte) {
	for len(b) > 0 {
		if c.known < len(c.header) {
			n := copy(c.header[c.known:], b)
			c.known, b = c.known+n, b[n:]
			if c.known < len(c.header) {
				return
			}
			c.rest = int(c.header[3])<<8 | int(c.header[4])
		}
		n := min(c.rest, len(b))
		c.rest, b = c.rest-n, b[n:]
		if c.rest == 0 {
			c.whole++
			c.known = 0
		}
	}
}

// empty is the error of a Read from memory that has no more.
type empty struct{}

func (empty) Error() string   { return "no more was received" }
func (empty) Timeout() bool   { return true }
func (empty) Temporary() bool { return true }

var errEmpty net.Error = empty{}

// Read implements net.Conn.
func (c *cipherConn) Read(b []byte) (int, error) {
	switch {
	case c.nc != nil:
		n, err := c.nc.Read(b)
		c.count(b[:n])
		return n, err
	case len(c.in) > 0:
		n := copy(b, c.in)
		c.in = c.in[n:]
		return n, nil
	case c.end:
		return 0, io.EOF
	}
	return 0, errEmpty
}

// Write implements net.Conn.
func (c *cipherConn) Write(b []byte) (int, error) {
	if c.nc != nil {
		return c.nc.Write(b)
	}
	*c.out = append(*c.out, b...)
	return len(b), nil
}

// Close implements net.Conn. Memory belongs to a loop, which closes the socket.
func (c *cipherConn) Close() error {
	if c.nc != nil {
		return c.nc.Close()
	}
	return nil
}

// LocalAddr implements net.Conn. Memory has no address.
func (c *cipherConn) LocalAddr() net.Addr {
	if c.nc != nil {
		return c.nc.LocalAddr()
	}
	return nil
}

// RemoteAddr implements net.Conn. Memory has no address.
func (c *cipherConn) RemoteAddr() net.Addr {
	if c.nc != nil {
		return c.nc.RemoteAddr()
	}
	return nil
}

// SetDeadline implements net.Conn. Memory takes no time.
func (c *cipherConn) SetDeadline(t time.Time) error {
	if c.nc != nil {
		return c.nc.SetDeadline(t)
	}
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *cipherConn) SetReadDeadline(t time.Time) error {
	if c.nc != nil {
		return c.nc.SetReadDeadline(t)
	}
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *cipherConn) SetWriteDeadline(t time.Time) error {
	if c.nc != nil {
		return c.nc.SetWriteDeadline(t)
	}
	return nil
}

// CloseWrite sends FIN where the connection has that.
func (c *cipherConn) CloseWrite() error {
	if h, ok := c.nc.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return nil
}
