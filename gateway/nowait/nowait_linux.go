package nowait

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Receive reads once from the socket fd what is there into b, which is not empty: n octets, none at the end of the stream.
// The error is EAGAIN where nothing is there. It does not wait for the peer, and a signal does not end it.
func Receive(fd int, b []byte) (n int, _ unix.Errno) {
	for {
		n, _, err := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
			unix.MSG_DONTWAIT, 0, 0)
		switch err {
		case 0:
			written(b[:n])
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, err
		}
	}
}

// Send writes to the socket fd as much of b as there is room for: n octets. The error is EAGAIN where that is not all. It does
// not wait for the peer, a signal does not end it, and no SIGPIPE comes from it.
func Send(fd int, b []byte) (n int, _ unix.Errno) {
	read(b)
	for n < len(b) {
		w, _, err := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[n])), uintptr(len(b)-n),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch err {
		case 0:
			n += int(w)
		case unix.EINTR:
		default:
			return n, err
		}
	}
	return n, 0
}

// Conn returns conn with Receive and Send in its Read and Write where it is a [net.TCPConn], else conn itself. Deadlines,
// Close and the kinds of errors are as before, but one goroutine at a time may read, and one write. [crypto/tls] keeps to
// that.
func Conn(conn net.Conn) net.Conn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return conn
	}
	q := &quickConn{Conn: conn, raw: raw}
	q.in.try, q.out.try = q.in.receive, q.out.send
	return q
}

type quickConn struct {
	net.Conn // what it does not do itself
	raw      syscall.RawConn
	in, out  transfer
}

// transfer is a Read or a Write.
type transfer struct {
	b   []byte
	n   int                   // octets that were moved
	err unix.Errno            // the call's; the poller has its own
	try func(fd uintptr) bool // once for ever: a closure made for each call would be an allocation
}

// Read implements net.Conn.
func (q *quickConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := q.move(&q.in, b, q.raw.Read, "read", "recvfrom")
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// Write implements net.Conn.
func (q *quickConn) Write(b []byte) (int, error) {
	return q.move(&q.out, b, q.raw.Write, "write", "sendto")
}

// move moves b and waits where it has to. Its errors are as package net has them.
func (q *quickConn) move(t *transfer, b []byte, wait func(func(fd uintptr) bool) error, op, call string) (int, error) {
	t.b, t.n, t.err = b, 0, 0
	err := wait(t.try)
	t.b = nil
	if err == nil && t.err != 0 {
		err = os.NewSyscallError(call, t.err)
	}
	if err == nil {
		return t.n, nil
	}
	var raw *net.OpError // the poller's
	if errors.As(err, &raw) {
		err = raw.Err
	}
	return t.n, &net.OpError{Op: op, Net: "tcp", Source: q.LocalAddr(), Addr: q.RemoteAddr(), Err: err}
}

// receive is tried until something is there.
func (t *transfer) receive(fd uintptr) (done bool) {
	t.n, t.err = Receive(int(fd), t.b)
	return t.settled()
}

// send is tried until all has left.
func (t *transfer) send(fd uintptr) (done bool) {
	var n int
	n, t.err = Send(int(fd), t.b[t.n:])
	t.n += n
	return t.settled()
}

// settled reports whether the last call has ended the transfer.
func (t *transfer) settled() bool {
	if t.err == unix.EAGAIN {
		t.err = 0
		return false
	}
	return true
}
