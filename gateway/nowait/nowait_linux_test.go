package nowait

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns the two ends of a TCP connection, the first as Conn makes it.
func pair(t *testing.T) (near net.Conn, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	near, far = Conn(dialled), accepted.(*net.TCPConn)
	if _, ok := near.(*quickConn); !ok {
		t.Fatalf("Conn gave %T", near)
	}
	for _, c := range []net.Conn{near, far} {
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil { // or a failure would wait for go test's
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		near.Close()
		far.Close()
	})
	return near, far
}

// checkError holds err to what package net gives.
func checkError(t *testing.T, err error, op string, want error) {
	t.Helper()
	var e *net.OpError
	if !errors.As(err, &e) || e.Op != op || e.Source == nil || e.Addr == nil || !errors.Is(err, want) {
		t.Errorf("got %#v (%v), want a net.OpError of %s that is %v", err, err, op, want)
	}
}

// TestConn sends far more than the buffers hold both ways at once: every write waits for room, and every read for octets.
func TestConn(t *testing.T) {
	near, far := pair(t)
	sent := bytes.Repeat([]byte("0123456789abcde"), 1<<20)
	echoed := make(chan error, 1)
	go func() {
		_, err := io.Copy(far, struct{ io.Reader }{far})
		if err == nil {
			err = far.CloseWrite()
		}
		echoed <- err
	}()
	wrote := make(chan error, 1)
	go func() {
		n, err := near.Write(sent)
		if err == nil && n != len(sent) {
			err = io.ErrShortWrite
		}
		wrote <- err
	}()
	got := make([]byte, len(sent))
	if n, err := io.ReadFull(near, got); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d octets came back of %d, or others: %v", n, len(sent), err)
	}
	if err := <-wrote; err != nil {
		t.Errorf("writing: %v", err)
	}
	if n, err := near.Read(nil); n != 0 || err != nil {
		t.Errorf("a read of no octets: %d, %v", n, err)
	}
	if n, err := near.Write(nil); n != 0 || err != nil {
		t.Errorf("a write of no octets: %d, %v", n, err)
	}
	if err := near.(*quickConn).Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-echoed; err != nil {
		t.Errorf("the other end: %v", err)
	}
	if n, err := near.Read(got); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d, %v, want EOF", n, err)
	}
}

func TestConnErrors(t *testing.T) {
	t.Run("read deadline", func(t *testing.T) {
		near, far := pair(t)
		near.SetReadDeadline(time.Unix(1, 0))
		_, err := near.Read(make([]byte, 1))
		checkError(t, err, "read", os.ErrDeadlineExceeded)
		// And then it goes on.
		near.SetReadDeadline(time.Time{})
		far.Write([]byte("x"))
		if n, err := near.Read(make([]byte, 9)); n != 1 || err != nil {
			t.Errorf("got %d, %v", n, err)
		}
	})
	t.Run("write deadline", func(t *testing.T) {
		near, far := pair(t)
		far.SetReadBuffer(64 << 10)
		done := make(chan bool)
		go func() {
			defer close(done)
			far.Read(make([]byte, 1)) // it is writing
			near.SetWriteDeadline(time.Unix(1, 0))
		}()
		b := make([]byte, 64<<20)
		n, err := near.Write(b)
		<-done
		if n == 0 || n == len(b) {
			t.Errorf("%d octets left of %d", n, len(b))
		}
		checkError(t, err, "write", os.ErrDeadlineExceeded)
	})
	t.Run("closed here", func(t *testing.T) {
		near, _ := pair(t)
		read := make(chan error, 1)
		go func() {
			_, err := near.Read(make([]byte, 1))
			read <- err
		}()
		near.Close()
		checkError(t, <-read, "read", net.ErrClosed)
		_, err := near.Write([]byte("x"))
		checkError(t, err, "write", net.ErrClosed)
	})
	t.Run("reset", func(t *testing.T) {
		near, far := pair(t)
		far.SetLinger(0)
		far.Close()
		_, err := near.Read(make([]byte, 1))
		checkError(t, err, "read", syscall.ECONNRESET)
		_, err = near.Write([]byte("x")) // and no SIGPIPE
		checkError(t, err, "write", syscall.EPIPE)
	})
}

// TestConnAllocations: nothing is allocated, be there something at once or not.
func TestConnAllocations(t *testing.T) {
	near, far := pair(t)
	out, in := make([]byte, 100), make([]byte, 100)
	turn, done := make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		for range turn {
			if _, err := io.ReadFull(far, in); err != nil {
				t.Error(err)
			}
			if _, err := far.Write(out); err != nil {
				t.Error(err)
			}
		}
	}()
	defer func() {
		close(turn)
		<-done
	}()
	buf := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := near.Write(out); err != nil {
			t.Error(err)
		}
		turn <- true
		if n, err := near.Read(buf); n != len(out) || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for a write and a read", n)
	}
}

func TestConnLeavesOthersAlone(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if got := Conn(a); got != a {
		t.Errorf("a pipe became %T", got)
	}
	near, _ := pair(t)
	if got := Conn(near); got != near {
		t.Errorf("it was wrapped twice: %T", got)
	}
}

// TestNoWait: the calls themselves, on descriptors of the blocking kind too.
func TestNoWait(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	defer unix.Close(fds[0])
	defer peer.Close()
	buf := make([]byte, 1<<20)
	if n, err := Receive(fds[0], buf); n != 0 || err != unix.EAGAIN {
		t.Errorf("nothing there: %d, %v", n, err)
	}
	n, errno := Send(fds[0], make([]byte, 8<<20))
	if n == 0 || n == 8<<20 || errno != unix.EAGAIN {
		t.Errorf("more than there is room for: %d, %v", n, errno)
	}
	got := 0
	for {
		r, err := Receive(fds[1], buf)
		if err == unix.EAGAIN {
			break
		}
		if err != 0 || r == 0 {
			t.Fatalf("read %d, %v", r, err)
		}
		got += r
	}
	if got != n {
		t.Errorf("%d octets came, %d were sent", got, n)
	}
	if n, err := Send(fds[0], nil); n != 0 || err != 0 {
		t.Errorf("nothing to send: %d, %v", n, err)
	}
	if err := peer.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := Receive(fds[0], buf); n != 0 || err != 0 {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := Send(fds[0], buf); n != 0 || err != unix.EPIPE {
		t.Errorf("nobody reads: %d, %v", n, err)
	}
}
