package forward

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/quic-go/quic-go"
)

// DoQ error codes, RFC 9250, section 4.3.
const (
	doqNoError          = 0
	doqProtocolError    = 2
	doqRequestCancelled = 3
)

// quicDialer returns what opens a QUIC connection to one address. There is no 0-RTT: it can be replayed, and would tell
// who repeats it what was asked (RFC 9250, section 7.1).
func quicDialer(cfg *tls.Config, timeout time.Duration) func(context.Context, netip.AddrPort) (*quic.Conn, error) {
	conf := &quic.Config{
		HandshakeIdleTimeout: timeout,
		MaxIdleTimeout:       2 * idleAfter, // the pulse ends it sooner
		MaxIncomingStreams:   -1,            // only the client opens streams for requests
	}
	return func(ctx context.Context, addr netip.AddrPort) (*quic.Conn, error) {
		conn, err := quic.DialAddr(ctx, addr.String(), cfg, conf)
		if err != nil {
			if cause := ctx.Err(); cause != nil {
				err = cause
			}
			return nil, classify(KindConnect, "QUIC handshake", err)
		}
		return conn, nil
	}
}

func closeQUIC(conn *quic.Conn) { conn.CloseWithError(doqNoError, "") }

// bornQUIC ties the link's life to conn's, each to the other.
func (p *pulse) bornQUIC(conn *quic.Conn, goodbye quic.ApplicationErrorCode) {
	p.born(func(err error) {
		code := goodbye
		if kindOf(err) == KindMismatch {
			code = doqProtocolError
		}
		conn.CloseWithError(code, "")
	})
	context.AfterFunc(conn.Context(), func() {
		p.die(fault(KindIO, "QUIC connection: %w", context.Cause(conn.Context())))
	})
}

// quicLink is one DoQ connection, RFC 9250: a stream for each query.
type quicLink struct {
	pulse
	conn *quic.Conn
}

func newQUICClient(s Server, t *target, env environment) *poolClient {
	cfg := s.tlsConfig("doq")
	dial := func(ctx context.Context, _ func(func())) (link, error) {
		conn, err := race(ctx, t, quicDialer(cfg, env.timeout), closeQUIC)
		if err != nil {
			return nil, err
		}
		l := &quicLink{conn: conn}
		l.bornQUIC(conn, doqNoError)
		return l, nil
	}
	return &poolClient{identity{s.URL, env.timeout}, newPool(env, dial), false}
}

func (l *quicLink) vitals() *pulse { return &l.pulse }

// ask implements link.
func (l *quicLink) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	if !l.begin() {
		return nil, &brokenError{err: fault(KindIO, "connection closed"), again: true}
	}
	resp, err := l.exchange(ctx, q)
	kind := kindOf(err)
	dead := kind == KindIO && ctx.Err() == nil && gone(l.conn) != nil
	if dead {
		err = l.broken(err)
	}
	l.end(err == nil || kind == KindMalformed)
	if dead || kind == KindMismatch {
		l.die(err)
	}
	return resp, err
}

// gone returns why conn is closed, or nil if only a stream failed. The streams of a connection learn of its end a moment
// before the connection itself says so; that is waited for.
func gone(conn *quic.Conn) error {
	timer := time.NewTimer(5 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-conn.Context().Done():
		return context.Cause(conn.Context())
	case <-timer.C:
		return nil
	}
}

func (l *quicLink) exchange(ctx context.Context, q *query) (*wire.Answer, error) {
	str, err := l.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, l.streamError(ctx, err)
	}
	// Whatever happens, the stream is not left half open; after a whole answer this says nothing.
	defer str.CancelRead(doqRequestCancelled)
	stop := context.AfterFunc(ctx, func() {
		str.CancelRead(doqRequestCancelled)
		str.CancelWrite(doqRequestCancelled)
	})
	defer stop()
	size := q.size(padded)
	frame := binary.BigEndian.AppendUint16(make([]byte, 0, 2+size), uint16(size))
	if _, err := str.Write(q.appendTo(frame, 0, padded)); err != nil {
		return nil, l.streamError(ctx, err)
	}
	if err := str.Close(); err != nil { // RFC 9250, section 4.2: a FIN ends the query
		return nil, l.streamError(ctx, err)
	}
	var prefix [2]byte
	if _, err := io.ReadFull(str, prefix[:]); err != nil {
		return nil, l.streamError(ctx, err)
	}
	msg := make([]byte, binary.BigEndian.Uint16(prefix[:]))
	if _, err := io.ReadFull(str, msg); err != nil {
		return nil, l.streamError(ctx, err)
	}
	resp, _, err := q.check(msg, 0)
	if err == nil && resp.Truncated() {
		return nil, malformed("truncated over a stream")
	}
	return resp, err
}

func (l *quicLink) streamError(ctx context.Context, err error) error {
	switch cause := ctx.Err(); {
	case cause != nil:
		err = cause
	case errors.Is(err, net.ErrClosed): // the connection's end, be it by a timeout
		return fault(KindIO, "QUIC connection: %w", err)
	}
	return classify(KindIO, "QUIC stream", err)
}
