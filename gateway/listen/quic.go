package listen

// DoQ (RFC 9250) is our own accept loop on quic-go, and no longer the server of github.com/AdguardTeam/dnsproxy, whose
// v0.84.1 was measured to fall short of what the other transports do here:
//
//   - It bounds no connections. One client held 200 idle ones, and half-sent queries on all their streams.
//   - It takes 0-RTT, so it answers before the client's address is proven, and replays count as queries.
//   - It unpacks queries and packs them again. A header with QDCOUNT 0 or opcode 5 and nothing else got no answer instead
//     of FORMERR or NOTIMP; octets behind the last record, or a record too few, got NOERROR instead of FORMERR; a bad
//     EDNS option closed the connection.

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"dnsgateway/gateway/wire"
)

// QUICConfig configures a DoQ listener.
type QUICConfig struct {
	Common
	PerClient int // connections of one client prefix; 0 means no limit
	PrefixV4  int // bits that make one IPv4 client; 32 by default
	PrefixV6  int // bits that make one IPv6 client; 56 by default
	Total     int // connections of all clients; 10000 by default
	// Idle is how long a connection may ask nothing until it is closed, even one that is kept alive by PINGs. 30 s by
	// default: a handshake costs more than TCP's. RFC 9250, section 5.5.2 recommends no value.
	Idle time.Duration
	// Inflight is the number of queries that may be in Resolve at once; a stream beyond it is reset with
	// DOQ_EXCESSIVE_LOAD. 10000 by default.
	Inflight int
	// TLS needs a certificate or GetCertificate; QUIC sets the version, and ALPN is set here.
	TLS *tls.Config
}

const (
	defaultQUICIdle = 30 * time.Second
	// alpnDoQ is registered by RFC 9250, section 8.1. The drafts' names are not spoken.
	alpnDoQ = "doq"
	// queryTimeout is how long a stream may take to bring its query and its end.
	queryTimeout = 10 * time.Second
	// queryBuffer holds any usual query; a longer one makes it grow as octets arrive.
	queryBuffer = 512
	// doqStreamWindow bounds what a stream may hold that we have not read yet, doqConnWindow the same for a connection. A
	// query is at most 65537 octets long and is read as it comes, so a window of that size would only cost memory.
	doqStreamWindow = 16 << 10
	doqConnWindow   = 128 << 10
)

// DoQ error codes, RFC 9250, section 4.3.
const (
	doqNoError          = 0x0
	doqInternalError    = 0x1
	doqProtocolError    = 0x2
	doqRequestCancelled = 0x3
	doqExcessiveLoad    = 0x4
	doqUnspecified      = 0x5
)

// QUIC is a DoQ listener.
//
// One goroutine per connection accepts its streams, and each stream has one, which reads the query, waits for the answer
// and writes it: QUIC's limit on streams is the limit on those goroutines.
type QUIC struct {
	cfg    QUICConfig
	udp    *net.UDPConn
	tr     *quic.Transport
	ln     *quicListener
	misses atomic.Int64
	flight flight    // queries that were read to their end and have no answer yet
	pool   sync.Pool // of *exchange
	life
}

// ListenQUIC binds a UDP socket. Connections wait in the kernel until Serve.
func ListenQUIC(ctx context.Context, cfg QUICConfig) (*QUIC, error) {
	if err := cfg.Common.check(); err != nil {
		return nil, err
	}
	if cfg.Idle == 0 {
		cfg.Idle = defaultQUICIdle
	}
	limits := Limits{
		PerClient: cfg.PerClient, PrefixV4: cfg.PrefixV4, PrefixV6: cfg.PrefixV6, Total: cfg.Total, Idle: cfg.Idle,
	}
	if err := limits.check(); err != nil {
		return nil, err
	}
	if cfg.TLS == nil {
		return nil, errors.New("DoQ listener without TLS")
	}
	if cfg.Inflight < 0 {
		return nil, errors.New("negative number of queries in flight")
	}
	if cfg.Inflight == 0 {
		cfg.Inflight = defaultInflight
	}
	udp, err := bindUDP(ctx, cfg.Addr)
	if err != nil {
		return nil, err
	}
	s := &QUIC{cfg: cfg, udp: udp}
	s.pool.New = func() any { return &exchange{in: make([]byte, 0, queryBuffer), out: make([]byte, 0, maxDatagram)} }
	s.init()
	s.ln = &quicListener{
		limit: newConnLimit(limits.withDefaults()), excessive: doqExcessiveLoad,
		log: cfg.Logger, addr: udp.LocalAddr(), stop: s.stop,
	}
	s.tr = &quic.Transport{Conn: udp, VerifySourceAddress: s.ln.verify, ConnContext: s.ln.admit}
	return s, nil
}

// Addr implements Server.
func (s *QUIC) Addr() net.Addr { return s.ln.addr }

// Connections returns how many connections are open.
func (s *QUIC) Connections() int { return s.ln.limit.open() }

// Name implements Server.
func (s *QUIC) Name() string { return s.cfg.Name }

// Serve implements Server.
func (s *QUIC) Serve() error {
	if !s.begin() {
		return nil
	}
	defer s.end()
	defer s.udp.Close()
	defer s.tr.Close()
	// Listen and not ListenEarly, and no Allow0RTT: RFC 9250, section 4.5 lets 0-RTT carry replays.
	ln, err := s.tr.Listen(serverTLS(s.cfg.TLS, alpnDoQ), &quic.Config{
		MaxIdleTimeout:                 max(s.cfg.Idle, quicSilence), // Idle itself is counted in serveConn
		MaxIncomingStreams:             maxStreams,
		MaxIncomingUniStreams:          -1, // DoQ has none, RFC 9250, section 4.2
		InitialStreamReceiveWindow:     doqStreamWindow,
		MaxStreamReceiveWindow:         doqStreamWindow,
		InitialConnectionReceiveWindow: doqConnWindow,
		MaxConnectionReceiveWindow:     doqConnWindow,
	})
	if err != nil {
		return fmt.Errorf("starting DoQ: %w", err)
	}
	s.ln.ln = ln

	// Connections outlive the accept loop, so that what is in flight can be answered.
	ctx, cancel := context.WithCancel(context.Background())
	var conns sync.WaitGroup
	for {
		var conn *quic.Conn
		if conn, err = s.ln.Accept(ctx); err != nil {
			break
		}
		conns.Go(func() { s.serveConn(ctx, conn) })
	}
	_ = ln.Close() // no handshakes any more
	if s.halted() {
		err = nil
		s.drain()
	} else {
		s.cancel()
	}
	cancel()
	conns.Wait()
	return err
}

// drain waits until nothing is in flight and what was written had time to leave, or until Shutdown has lost patience.
func (s *QUIC) drain() {
	select {
	case <-s.flight.wait():
	case <-s.ctx.Done():
		return
	}
	t := time.NewTimer(linger)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
}

// Shutdown implements Server. Queries that come in meanwhile have their stream reset.
func (s *QUIC) Shutdown(ctx context.Context) error {
	if _, serving := s.halt(); !serving {
		_ = s.udp.Close()
		return nil
	}
	return s.wait(ctx, func() {})
}

// serveConn accepts conn's streams until it ends, has been idle for too long or ctx is done, closes it, and returns when
// its streams have ended.
func (s *QUIC) serveConn(ctx context.Context, conn *quic.Conn) {
	var streams sync.WaitGroup
	defer streams.Wait()
	defer conn.CloseWithError(doqNoError, "") // does nothing to a closed connection
	var open atomic.Int64
	for {
		wait, cancel := context.WithTimeout(ctx, s.cfg.Idle)
		stream, err := conn.AcceptStream(wait)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && open.Load() > 0 {
			continue
		}
		if err != nil {
			return
		}
		open.Add(1)
		streams.Go(func() {
			defer open.Add(-1)
			s.serveStream(conn, stream)
		})
	}
}

// serveStream answers the one query of a stream.
func (s *QUIC) serveStream(conn *quic.Conn, stream *quic.Stream) {
	x := s.pool.Get().(*exchange)
	defer func() {
		if cap(x.in) <= keepBuffer && cap(x.out) <= keepBuffer {
			s.pool.Put(x)
		}
	}()
	_ = stream.SetReadDeadline(time.Now().Add(queryTimeout))
	framed, err := readQuery(stream, x.in[:0])
	x.in = framed
	if err == errFraming {
		s.violated(conn, err)
		return
	}
	if err != nil {
		code := quic.StreamErrorCode(doqUnspecified)
		if serr := new(quic.StreamError); errors.As(err, &serr) {
			code = doqRequestCancelled // by the client, RFC 9250, section 4.3.1
		}
		stream.CancelRead(code)
		stream.CancelWrite(code)
		return
	}
	// The order matters: whoever sees that we are not halted is in flight before drain looks.
	s.flight.enter()
	defer s.flight.leave()
	if s.halted() {
		stream.CancelWrite(doqExcessiveLoad)
		return
	}
	s.answer(conn, stream, x, framed[prefixLen:])
}

// violated ends a connection whose client broke the protocol (RFC 9250, section 4.3.3).
func (s *QUIC) violated(conn *quic.Conn, why error) {
	s.cfg.Logger.Debug("DoQ protocol error", "client", addrPort(conn.RemoteAddr()), "err", why)
	_ = conn.CloseWithError(doqProtocolError, "")
}

var (
	errFraming   = errors.New("a stream is not one whole message")
	errMessageID = errors.New("a message ID other than 0")
	errKeepalive = errors.New("edns-tcp-keepalive in a query")
	errTooMany   = errors.New("too many queries in flight")
)

// readQuery appends to buf, which is empty and has room for the prefix, what r brings until its end: the length prefix and
// one message. It waits for the end, as RFC 9250, section 4.2 allows, because only that shows that there is no second
// message. It returns errFraming when r ends too early or goes on too long, which section 4.3.3 makes fatal.
//
// The buffer doubles as octets arrive, so that a prefix alone costs nothing.
func readQuery(r io.Reader, buf []byte) ([]byte, error) {
	for {
		if len(buf) == cap(buf) {
			buf = append(make([]byte, 0, max(2*cap(buf), queryBuffer)), buf...)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		missing := prefixLen - len(buf)
		if missing <= 0 {
			missing += int(binary.BigEndian.Uint16(buf))
		}
		switch {
		case missing < 0, err == io.EOF && missing > 0:
			return buf, errFraming
		case err == io.EOF:
			return buf, nil
		case err != nil:
			return buf, err
		}
	}
}

// answer asks the Handler and writes its response in one piece.
func (s *QUIC) answer(conn *quic.Conn, stream *quic.Stream, x *exchange, raw []byte) {
	if len(raw) >= 2 && binary.BigEndian.Uint16(raw) != 0 {
		s.violated(conn, errMessageID) // RFC 9250, section 4.2.1
		return
	}
	q := &x.q
	q.Client, q.Local = addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr())
	q.Transport, q.Listener = wire.DoQ, s.cfg.Name
	q.Received = time.Now().UnixNano()
	q.Parse(raw)
	if q.Keepalive {
		s.violated(conn, errKeepalive) // RFC 9250, section 5.5.2
		return
	}
	out, verdict := s.cfg.serveWire(append(x.out[:0], 0, 0), q)
	if verdict == wire.Miss {
		var err error
		if out, err = s.miss(append(x.out[:0], 0, 0), q); err != nil {
			stream.CancelWrite(resetCode(err))
			return
		}
	}
	x.out = out[:0]
	if verdict == wire.Dropped || !setPrefix(out) {
		stream.CancelWrite(doqUnspecified)
		return
	}
	_ = stream.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := stream.Write(out)
	if err == nil {
		err = stream.Close()
	}
	if err != nil {
		s.cfg.Logger.Debug("cannot send an answer", "client", q.Client, "err", err)
		stream.CancelWrite(doqUnspecified) // else the stream would count as open for ever
	}
}

// resetCode tells the client why its stream has no answer.
func resetCode(err error) quic.StreamErrorCode {
	switch err {
	case errTooMany:
		return doqExcessiveLoad
	case errPanic:
		return doqInternalError
	}
	return doqUnspecified
}

// miss resolves q within the bound. The stream's goroutine may wait: it serves no other query.
func (s *QUIC) miss(dst []byte, q *wire.Query) ([]byte, error) {
	defer s.misses.Add(-1)
	if s.misses.Add(1) > int64(s.cfg.Inflight) {
		return dst, errTooMany
	}
	return s.cfg.resolve(s.ctx, dst, q)
}
