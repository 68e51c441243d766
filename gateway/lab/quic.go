package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// Error codes: RFC 9250, section 4.3, and RFC 9114, section 8.1.
const (
	doqNoError       quic.ApplicationErrorCode = 0x0
	doqInternalError quic.ApplicationErrorCode = 0x1
	doqProtocolError quic.ApplicationErrorCode = 0x2
	h3InternalError  quic.ApplicationErrorCode = 0x102
)

// quicFront serves DoQ, or DoH over HTTP/3.
type quicFront struct {
	s         *Server
	transport *quic.Transport
	ln        *quic.Listener
	h3        *http3.Server // nil: DoQ
	ctx       context.Context
	cancel    context.CancelFunc
	numbers   sync.Map // of connections: *quic.Conn to uint64
	all       sync.WaitGroup
}

func (s *Server) openQUIC(addr netip.AddrPort, m mode) (front, error) {
	if m == hole {
		return openPacketHole(addr)
	}
	conn, err := listenUDP(addr)
	if err != nil {
		return nil, err
	}
	f := &quicFront{s: s, transport: &quic.Transport{Conn: conn}}
	tlsConfig := s.tlsConfig(m, "doq")
	if s.scheme == H3 {
		tlsConfig = http3.ConfigureTLSConfig(tlsConfig)
		f.h3 = &http3.Server{
			Handler: &dohHandler{s: s, via: H3},
			ConnContext: func(ctx context.Context, c *quic.Conn) context.Context {
				number, _ := f.numbers.Load(c)
				return withNumber(context.WithValue(ctx, connKey{}, c), number.(uint64))
			},
		}
	}
	f.ln, err = f.transport.Listen(tlsConfig, &quic.Config{
		MaxIdleTimeout:     30 * time.Second,
		MaxIncomingStreams: 1 << 16, // a silent server holds a stream for each question
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.all.Go(f.accept)
	return f, nil
}

// close ends the connections with a CONNECTION_CLOSE, so that clients see a server going and not one that fell silent.
func (f *quicFront) close() {
	f.cancel()
	f.ln.Close()
	f.all.Wait()
	f.transport.Close()
	f.transport.Conn.Close()
}

func (f *quicFront) accept() {
	for {
		conn, err := f.ln.Accept(f.ctx)
		if err != nil {
			return
		}
		number := f.s.conns.enter(nil)
		f.numbers.Store(conn, number)
		f.all.Go(func() {
			defer f.s.conns.leave(number)
			defer f.numbers.Delete(conn)
			defer context.AfterFunc(f.ctx, func() { conn.CloseWithError(doqNoError, "") })()
			if f.h3 != nil {
				f.h3.ServeQUICConn(conn) // returns when the requests have ended, too
			} else {
				f.serveDoQ(conn, number)
			}
			<-conn.Context().Done()
		})
	}
}

func (f *quicFront) serveDoQ(conn *quic.Conn, number uint64) {
	var streams sync.WaitGroup
	defer streams.Wait()
	for {
		stream, err := conn.AcceptStream(conn.Context())
		if err != nil {
			return
		}
		streams.Go(func() { f.serveStream(withNumber(stream.Context(), number), conn, stream) })
	}
}

// serveStream answers the one query of a stream, RFC 9250, section 4.2; ctx is the stream's.
func (f *quicFront) serveStream(ctx context.Context, conn *quic.Conn, stream *quic.Stream) {
	defer stream.CancelRead(quic.StreamErrorCode(doqNoError))
	raw, err := readOnly(stream)
	if cancelled := new(quic.StreamError); errors.As(err, &cancelled) {
		stream.CancelWrite(quic.StreamErrorCode(doqNoError))
		return // the client does not want an answer any more, RFC 9250, section 4.3.1
	}
	if err != nil || len(raw) >= 2 && binary.BigEndian.Uint16(raw) != 0 {
		// RFC 9250, section 4.3.3: a missing FIN, a second message or an ID are fatal.
		conn.CloseWithError(doqProtocolError, "")
		return
	}
	msg, act := f.s.respond(ctx, QUIC, raw)
	framed := frame(msg)
	switch act {
	case drop:
		<-ctx.Done() // the client cancels, or the connection ends
		return
	case cut:
		stream.Write(framed[:len(framed)/2])
	case reset:
		stream.Write(framed[:len(framed)/2])
		conn.CloseWithError(doqInternalError, "")
		return
	default:
		stream.Write(framed)
	}
	stream.Close()
}

// readOnly reads the one message of a stream and the end behind it.
func readOnly(r io.Reader) ([]byte, error) {
	raw, err := readFrame(r)
	if err != nil {
		return nil, err
	}
	var more [1]byte
	if n, err := r.Read(more[:]); n != 0 || !errors.Is(err, io.EOF) {
		return nil, errors.New("no end behind the message")
	}
	return raw, nil
}
