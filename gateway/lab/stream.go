package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// pipeline is how many unanswered queries a connection may have before no more are read.
const pipeline = 1024

// streamFront serves plain TCP and DoT. Queries of one connection are answered as each is ready, RFC 7766,
// section 6.2.1.1.
type streamFront struct {
	s      *Server
	ln     net.Listener
	tls    *tls.Config // nil: plain
	hole   bool        // read and forget
	ctx    context.Context
	cancel context.CancelFunc
	all    sync.WaitGroup
}

func (s *Server) openStream(addr netip.AddrPort, m mode) (front, error) {
	ln, err := net.Listen("tcp", addr.String())
	if err != nil {
		return nil, err
	}
	f := &streamFront{s: s, ln: ln, hole: m == hole}
	if s.scheme == TLS && !f.hole {
		f.tls = s.tlsConfig(m, "dot")
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.all.Go(f.accept)
	return f, nil
}

func (f *streamFront) close() {
	f.cancel()
	f.ln.Close()
	f.all.Wait()
}

func (f *streamFront) accept() {
	for {
		conn, err := f.ln.Accept()
		if err != nil {
			if f.ctx.Err() != nil || errors.Is(err, net.ErrClosed) || !pause(f.ctx, 5*time.Millisecond) {
				return
			}
			continue // out of file descriptors: some connection will end
		}
		number := f.s.conns.enter(conn)
		f.all.Go(func() { f.serve(conn.(*net.TCPConn), number) })
	}
}

func (f *streamFront) serve(tcp *net.TCPConn, number uint64) {
	defer tcp.Close()
	defer f.s.conns.leave(number)
	ctx, cancel := context.WithCancel(withNumber(f.ctx, number))
	defer cancel()
	defer context.AfterFunc(ctx, func() { tcp.Close() })()
	if f.hole {
		io.Copy(io.Discard, tcp)
		return
	}
	via, conn := TCP, net.Conn(tcp)
	if f.tls != nil {
		via = TLS
		secured := tls.Server(tcp, f.tls)
		if err := secured.HandshakeContext(ctx); err != nil {
			f.s.lab.log.Debug("handshake", "server", f.s.name, "err", err)
			return
		}
		conn = secured
	}
	var writing sync.Mutex
	var answering sync.WaitGroup
	defer answering.Wait()
	defer f.s.conns.leave(number) // before that wait: the client's end is all that counts
	slots := make(chan struct{}, pipeline)
	in := bufio.NewReader(conn)
	for {
		raw, err := readFrame(in)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				cancel()
			}
			return // at EOF, a half-closed client still gets what it has asked for
		}
		slots <- struct{}{}
		answering.Go(func() {
			defer func() { <-slots }()
			msg, act := f.s.respond(ctx, via, raw)
			if act == drop {
				return
			}
			writing.Lock()
			defer writing.Unlock()
			if !writeFrame(conn, tcp, msg, act) {
				cancel()
			}
		})
	}
}

// readFrame reads one message with its length before it. A clean end between messages is io.EOF.
func readFrame(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	raw := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, raw); err != nil {
		return nil, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return raw, nil
}

// writeFrame sends msg on conn, which runs over tcp, and reports whether the connection lives on.
func writeFrame(conn net.Conn, tcp *net.TCPConn, msg []byte, act action) bool {
	framed := frame(msg)
	switch act {
	case cut:
		conn.Write(framed[:len(framed)/2])
		conn.Close()
		return false
	case reset:
		conn.Write(framed[:len(framed)/2])
		tcp.SetLinger(0) // closing now sends RST
		tcp.Close()
		return false
	}
	_, err := conn.Write(framed)
	return err == nil
}
