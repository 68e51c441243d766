package listen

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

const (
	// prefixLen is the two-octet length field in front of every message, RFC 1035, section 4.2.2.
	prefixLen = 2
	// readSize is the first read buffer: dozens of queries. It grows to hold one whole message when that is longer.
	readSize = 4 << 10
	// flushSize is how much is collected before it is written although more queries are waiting.
	flushSize = 16 << 10
	// maxPending is how much may wait for a writer before the connection is no longer read.
	maxPending = 64 << 10
	// maxUnsent is how much may wait for a writer at all: misses that are in flight already append their answers
	// although the connection is no longer read, 100 of 64 KiB each in the worst case. Hits alone stay below 144 KiB,
	// which is maxPending, flushSize and one answer of 64 KiB; what is left holds a pipeline of ordinary answers. A
	// client that has more waiting, behind kernel buffers that are full, does not read.
	maxUnsent = 4 * maxPending
)

// streamConn is one TCP or DoT connection.
//
// One goroutine reads it and answers hits into a buffer that it writes when no whole message is left to serve. Misses
// have a goroutine each. Whoever has bytes to send while nobody writes becomes the writer, and writes on until nothing
// is pending; the others append to pending and go. So answers leave in the order in which they are ready, several in
// one segment when there are several (RFC 7766, sections 6.2.1.1 and 8), and no goroutine is there only to write.
type streamConn struct {
	s         *Stream
	raw       net.Conn // the accepted connection
	nc        net.Conn // raw, or TLS over it
	client    netip.AddrPort
	local     netip.AddrPort
	transport wire.Transport

	// The reader's own.
	q       wire.Query
	buf     []byte
	out     []byte
	partial time.Time // also read under mu; when the first octet of an unfinished message came, else zero

	mu       sync.Mutex
	changed  sync.Cond // any of the below has changed
	inflight int       // misses without an answer
	writing  bool
	pending  []byte // complete, framed answers for the one who writes
	spare    []byte
	broken   bool // nothing can be written any more
	draining bool
	talking  bool // the handshake is over
}

func newStreamConn(s *Stream, nc net.Conn) *streamConn {
	c := &streamConn{
		s: s, raw: nc, nc: nc, client: addrPort(nc.RemoteAddr()), local: addrPort(nc.LocalAddr()), transport: wire.TCP,
	}
	c.changed.L = &c.mu
	if s.cfg.TLS != nil {
		c.nc, c.transport = tls.Server(nc, s.cfg.TLS), wire.DoT
	}
	return c
}

// serve runs the connection from the handshake to the end.
func (c *streamConn) serve() {
	defer c.raw.Close()
	if t, ok := c.nc.(*tls.Conn); ok {
		ctx, cancel := context.WithTimeout(c.s.ctx, c.s.cfg.Handshake)
		err := t.HandshakeContext(ctx)
		cancel()
		if err != nil {
			c.s.cfg.Logger.Debug("TLS handshake", "client", c.client, "err", err)
			return
		}
	}
	c.mu.Lock()
	c.talking = true
	c.mu.Unlock()
	c.read()
	c.finish()
}

// read serves queries until the client has no more, breaks the rules, or has been idle for too long, or until drain.
func (c *streamConn) read() {
	c.buf = make([]byte, readSize)
	begin, end := 0, 0
	for {
		served := 0
		for end-begin >= prefixLen {
			n := int(binary.BigEndian.Uint16(c.buf[begin:]))
			if end-begin < prefixLen+n {
				break
			}
			begin += prefixLen
			if !c.query(c.buf[begin : begin+n]) {
				return
			}
			begin += n
			served++
		}
		if !c.flush() {
			return
		}
		end = copy(c.buf, c.buf[begin:end])
		begin = 0
		c.makeRoom(end)
		c.arm(served, end)
		n, err := c.nc.Read(c.buf[end:])
		end += n
		if err != nil && n == 0 && !c.idling(err) {
			return
		}
	}
}

// makeRoom lets there be room to read behind what is there, which is no whole message, and gives a large buffer back when
// it is empty. The buffer doubles as octets arrive, and is not made as long as a length prefix promises: two octets of a
// client that sends no more must not cost us 64 KiB.
func (c *streamConn) makeRoom(have int) {
	switch {
	case have == len(c.buf):
		need := prefixLen + int(binary.BigEndian.Uint16(c.buf)) // more than have, or it would be a whole message
		grown := make([]byte, min(need, 2*len(c.buf)))
		copy(grown, c.buf)
		c.buf = grown
	case have == 0 && len(c.buf) > readSize:
		c.buf = make([]byte, readSize)
	}
}

// query serves one message, or starts a goroutine that does. It returns false when the connection is beyond use.
func (c *streamConn) query(msg []byte) bool {
	if !c.wait() {
		return false
	}
	c.fill(&c.q, msg)
	at := len(c.out)
	out, verdict := c.s.cfg.serveWire(append(c.out, 0, 0), &c.q)
	if verdict == wire.Answered && setPrefix(out[at:]) {
		c.out = out
	} else {
		c.out = out[:at]
	}
	if verdict == wire.Miss {
		j := c.s.jobs.Get().(*job)
		j.in = append(j.in[:0], msg...)
		c.fill(&j.q, j.in)
		j.q.Received = c.q.Received
		c.mu.Lock()
		c.inflight++
		c.mu.Unlock()
		go c.resolve(j)
	}
	return len(c.out) < flushSize || c.flush()
}

// fill makes q the query in msg.
func (c *streamConn) fill(q *wire.Query, msg []byte) {
	q.Client, q.Local, q.Transport, q.Listener = c.client, c.local, c.transport, c.s.cfg.Name
	q.Received = time.Now().UnixNano()
	q.Parse(msg)
}

// setPrefix writes the length field of one message with room for it in front. It returns false for what cannot be sent:
// nothing, or more than a length field can say.
func setPrefix(framed []byte) bool {
	n := len(framed) - prefixLen
	if n <= 0 || n > wire.MaxMessage {
		return false
	}
	binary.BigEndian.PutUint16(framed, uint16(n))
	return true
}

// wait blocks while the connection has as many unanswered queries as it may have. What was answered is sent before.
func (c *streamConn) wait() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inflight < c.s.cfg.Pipeline {
		return !c.broken
	}
	c.mu.Unlock()
	ok := c.flush()
	c.mu.Lock()
	for ok && c.inflight >= c.s.cfg.Pipeline && !c.broken {
		c.changed.Wait()
	}
	return ok && !c.broken
}

// resolve answers the miss in j, which it owns.
func (c *streamConn) resolve(j *job) {
	defer c.answered()
	out, err := c.s.cfg.resolve(c.s.ctx, append(j.out[:0], 0, 0), &j.q)
	if err == nil && setPrefix(out) {
		c.write(out)
	}
	if cap(out) <= keepBuffer {
		j.out = out
	}
	if cap(j.in) <= keepBuffer {
		c.s.jobs.Put(j)
	}
}

// answered takes a miss out of the count; with the last one the idle time begins.
func (c *streamConn) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inflight--; c.inflight == 0 {
		c.setReadDeadline()
	}
	c.changed.Broadcast()
}

// flush sends the reader's answers. It blocks while too much is pending: a client that does not read is not read.
func (c *streamConn) flush() bool {
	if len(c.out) > 0 {
		c.write(c.out)
		if c.out = c.out[:0]; cap(c.out) > 2*flushSize {
			c.out = nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.writing && len(c.pending) > maxPending && !c.broken {
		c.changed.Wait()
	}
	return !c.broken
}

// write sends b, which consists of whole framed answers, or leaves it to the goroutine that is writing. It does not keep
// b.
func (c *streamConn) write(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		return
	}
	if c.writing {
		if len(c.pending)+len(b) > maxUnsent {
			c.s.cfg.Logger.Debug("closing the connection of a client that does not read", "client", c.client)
			c.broken = true
			c.pending = nil
			_ = c.raw.Close() // which ends the write that goes on
			c.changed.Broadcast()
			return
		}
		c.pending = append(c.pending, b...)
		return
	}
	c.writing = true
	for len(b) > 0 && !c.broken {
		c.mu.Unlock()
		_ = c.raw.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := c.nc.Write(b)
		c.mu.Lock()
		if err != nil {
			// A part of an answer may be out: what follows could not be told from it.
			c.broken = true
			_ = c.raw.Close()
		}
		b = c.pending
		c.pending, c.spare = c.spare[:0], b[:0]
		c.changed.Broadcast()
	}
	c.writing = false
	if cap(c.pending) > keepBuffer {
		c.pending = nil
	}
	if cap(c.spare) > keepBuffer {
		c.spare = nil
	}
	c.changed.Broadcast()
}

// arm sets the deadline for the next read: after served more messages, have octets of an unfinished one are there.
func (c *streamConn) arm(served, have int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case have == 0:
		c.partial = time.Time{}
	case served > 0 || c.partial.IsZero():
		c.partial = time.Now()
	}
	c.setReadDeadline()
}

// setReadDeadline gives the client the time that it has to send the next octets. mu is held.
//
// A connection is idle when it has nothing to send and nothing to wait for (RFC 7766, section 6.2.3): while a query is
// in flight there is no deadline, unless a message was begun, which has to come to its end.
func (c *streamConn) setReadDeadline() {
	var at time.Time
	switch {
	case c.draining:
		return // drain has set it
	case !c.partial.IsZero():
		at = c.partial.Add(c.s.cfg.Message)
	case c.inflight == 0:
		at = time.Now().Add(c.s.cfg.Idle)
	}
	_ = c.raw.SetReadDeadline(at)
}

// idling reports whether err is a deadline that no longer holds, and reading goes on.
func (c *streamConn) idling(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inflight > 0 && c.partial.IsZero() && !c.draining && !c.broken
}

// drain makes the connection stop reading soon. During a handshake it ends at once: no query has been read.
func (c *streamConn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if !c.talking {
		_ = c.raw.Close()
		return
	}
	_ = c.raw.SetReadDeadline(time.Now().Add(drainRead))
}

// finish waits for the answers of what was read, sends them, and says goodbye in the way that lets them arrive.
func (c *streamConn) finish() {
	_ = c.flush()
	c.mu.Lock()
	for c.inflight > 0 || c.writing && !c.broken {
		c.changed.Wait()
	}
	broken := c.broken
	c.mu.Unlock()
	if broken {
		return
	}
	_ = c.raw.SetWriteDeadline(time.Now().Add(writeTimeout))
	if t, ok := c.nc.(*tls.Conn); ok {
		_ = t.CloseWrite()
	}
	if h, ok := c.raw.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		// Octets that we have not read would turn the close into a reset, and that takes our last answers with it.
		_ = c.raw.SetReadDeadline(time.Now().Add(linger))
		_, _ = io.CopyN(io.Discard, c.raw, maxPending)
	}
}
