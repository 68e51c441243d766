package listen

// DoQ (RFC 9250) runs on the framework's server, github.com/AdguardTeam/dnsproxy v0.84.1, with our handler. This is the
// only file of the package that imports it. What it relies on, all of it read in that version's source:
//
//   - Proxy.Start binds and begins to accept at once; there is no bound but silent state. So ListenQUIC starts the
//     framework's goroutines, and queries wait at our handler's door until Serve.
//   - It unpacks the query, and answers, drops or closes the connection by itself in these cases: what does not unpack
//     or carries edns-tcp-keepalive closes the connection with DOQ_PROTOCOL_ERROR (RFC 9250, section 4.3.3); QR=1
//     ends the stream without an answer. Octets behind the message's last record are not noticed.
//   - validateRequest answers by itself when QDCOUNT is not 1, and for PTR, SOA and NS below private addresses
//     (isForbiddenARPA). It does so with a message from the MessageConstructor, and goes on to the handler when that is
//     nil: noMessages makes every query reach our handler. The empty PrivateSubnets does the same for the second check.
//   - A handler that returns ErrDrop has the last word: nothing is packed, written or closed but the stream. So we
//     write our own octets, which keeps padding as it was computed.
//   - Drafts without the two-octet length are told apart by DNSContext.DoQVersion.
//   - A stream's read and write deadlines are set to 10 s when it is accepted; we set the latter anew before writing.
//   - It recovers from nothing: a panic in a handler would end the process. Our calls recover.
//   - It logs what clients do at error and info level. Its logger is quiet.
//   - Shutdown closes the sockets at once with everything in flight. We wait first.
//   - New wants an upstream; ours is never asked, because only Proxy.Resolve would.
//   - Request coalescing (PendingRequests), its cache and MaxGoroutines stay off; the last one can deadlock with DoQ.
//   - It binds with network "udp", which makes both families of 0.0.0.0 in package net. Clients of the other family are
//     refused in the handshake.
//   - Nothing in it bounds connections. One that asks nothing is closed after 30 s, and has at most 100 streams, which
//     have 10 s to bring their query and a buffer of 64 KiB each. Ours is the bound on connections that ask, and on
//     queries in flight.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/AdguardTeam/dnsproxy/proxy"
	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"

	"dnsgateway/gateway/wire"
)

// QUICConfig configures a DoQ listener.
type QUICConfig struct {
	Common
	// Limits bound the connections that ask something. Idle is not among them: it is the framework's 30 s.
	PerClient int // connections of one client prefix; 0 means no limit
	PrefixV4  int // bits that make one IPv4 client; 32 by default
	PrefixV6  int // bits that make one IPv6 client; 56 by default
	Total     int // connections of all clients; 10000 by default
	// Inflight is the number of queries that may be in Resolve at once; a stream beyond it is reset with
	// DOQ_EXCESSIVE_LOAD. 10000 by default.
	Inflight int
	// TLS needs a certificate or GetCertificate; QUIC sets the version and the framework sets ALPN.
	TLS *tls.Config
}

// DoQ error codes, RFC 9250, section 4.3.
const (
	doqInternalError = 0x1
	doqProtocolError = 0x2
	doqExcessiveLoad = 0x4
	doqUnspecified   = 0x5
)

// QUIC is a DoQ listener.
type QUIC struct {
	cfg    QUICConfig
	proxy  *proxy.Proxy
	addr   net.Addr
	limit  *connLimit
	open   chan struct{} // closed by Serve: now queries are answered
	misses atomic.Int64
	flight flight
	pool   sync.Pool // of *exchange
	known  sync.Map  // of *quic.Conn: the connections that are in limit
	life
}

// ListenQUIC binds a UDP socket. Unlike the other constructors it starts goroutines, the framework's, because the
// framework binds and accepts in one step; no query is answered before Serve, and Shutdown ends them even when Serve was
// never called.
func ListenQUIC(ctx context.Context, cfg QUICConfig) (*QUIC, error) {
	if err := cfg.Common.check(); err != nil {
		return nil, err
	}
	limits := Limits{PerClient: cfg.PerClient, PrefixV4: cfg.PrefixV4, PrefixV6: cfg.PrefixV6, Total: cfg.Total}
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
	s := &QUIC{cfg: cfg, limit: newConnLimit(limits.withDefaults()), open: make(chan struct{})}
	s.pool.New = func() any { return &exchange{out: make([]byte, 0, maxDatagram)} }
	s.init()
	addr := &net.UDPAddr{IP: cfg.Addr.Addr().AsSlice(), Port: int(cfg.Addr.Port()), Zone: cfg.Addr.Addr().Zone()}
	if cfg.Addr.Addr() == netip.IPv6Unspecified() {
		addr.IP = nil // both families, or the one that there is
	}
	var err error
	s.proxy, err = proxy.New(&proxy.Config{
		Logger:             quietLogger(cfg.Logger),
		QUICListenAddr:     []*net.UDPAddr{addr},
		TLSConfig:          s.tls(),
		RequestHandler:     proxy.HandlerFunc(s.handle),
		UpstreamConfig:     &proxy.UpstreamConfig{Upstreams: []upstream.Upstream{noUpstream{}}},
		PrivateSubnets:     noSubnets{},
		MessageConstructor: noMessages{},
		PendingRequests:    &proxy.PendingRequestsConfig{Enabled: false},
	})
	if err != nil {
		return nil, fmt.Errorf("preparing the DoQ server: %w", err)
	}
	if err := s.proxy.Start(ctx); err != nil {
		return nil, startError(cfg.Addr, err)
	}
	s.addr = s.proxy.Addr(proxy.ProtoQUIC)
	return s, nil
}

// startError tells a socket that cannot be bound from the rest of what may be wrong.
func startError(addr netip.AddrPort, err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "listen" {
		return &BindError{Network: "udp", Addr: addr, Err: op}
	}
	return fmt.Errorf("starting the DoQ server: %w", err)
}

// tls returns the TLS configuration, which refuses IPv6 clients when the address is 0.0.0.0.
func (s *QUIC) tls() *tls.Config {
	cfg := serverTLS(s.cfg.TLS)
	if s.cfg.Addr.Addr() != netip.IPv4Unspecified() {
		return cfg
	}
	before := cfg.GetConfigForClient
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if hello.Conn != nil && !addrPort(hello.Conn.RemoteAddr()).Addr().Is4() {
			return nil, errors.New("listening for IPv4 only")
		}
		if before != nil {
			return before(hello)
		}
		return nil, nil
	}
	return cfg
}

// Addr implements Server.
func (s *QUIC) Addr() net.Addr { return s.addr }

// Connections returns how many open connections have asked something.
func (s *QUIC) Connections() int { return s.limit.open() }

// Name implements Server.
func (s *QUIC) Name() string { return s.cfg.Name }

// Serve implements Server. The framework's goroutines end a moment later.
func (s *QUIC) Serve() error {
	if !s.begin() {
		return nil
	}
	defer s.end()
	close(s.open)
	<-s.stop
	select {
	case <-s.flight.wait():
		t := time.NewTimer(linger) // for what quic-go has not sent yet
		defer t.Stop()
		select {
		case <-t.C:
		case <-s.ctx.Done():
		}
	case <-s.ctx.Done():
	}
	s.close()
	<-s.flight.wait()
	return nil
}

// Shutdown implements Server. Queries that come in meanwhile have their stream reset.
func (s *QUIC) Shutdown(ctx context.Context) error {
	if _, serving := s.halt(); !serving {
		s.close()
		return nil
	}
	return s.wait(ctx, func() {})
}

func (s *QUIC) close() {
	if err := s.proxy.Shutdown(context.Background()); err != nil {
		s.cfg.Logger.Debug("closing the DoQ server", "err", err)
	}
}

// handle is the framework's door: it answers d on d's stream and always returns ErrDrop.
func (s *QUIC) handle(_ context.Context, _ *proxy.Proxy, d *proxy.DNSContext) error {
	select {
	case <-s.open:
	case <-s.stop:
	}
	s.flight.enter()
	defer s.flight.leave()
	switch {
	case d.DoQVersion == proxy.DoQv1 && d.Req.Id != 0:
		// RFC 9250, section 4.2.1 and 4.3.3: a fatal error, which the framework leaves to us.
		_ = d.QUICConnection.CloseWithError(doqProtocolError, "")
	case !s.halted() && s.admit(d.QUICConnection):
		s.answer(d)
	default:
		d.QUICStream.CancelWrite(doqExcessiveLoad)
	}
	return proxy.ErrDrop
}

// admit counts a connection with its first query. One over the limit is closed.
func (s *QUIC) admit(conn *quic.Conn) bool {
	if _, ok := s.known.LoadOrStore(conn, nil); ok {
		return true
	}
	client := addrPort(conn.RemoteAddr()).Addr()
	if !s.limit.acquire(client) {
		s.cfg.Logger.Debug("connection over the limit", "client", client)
		_ = conn.CloseWithError(doqExcessiveLoad, "")
		context.AfterFunc(conn.Context(), func() { s.known.Delete(conn) })
		return false
	}
	context.AfterFunc(conn.Context(), func() {
		s.known.Delete(conn)
		s.limit.release(client)
	})
	return true
}

// answer asks the Handler and writes its response in one piece.
func (s *QUIC) answer(d *proxy.DNSContext) {
	x := s.pool.Get().(*exchange)
	defer func() {
		if cap(x.in) <= keepBuffer && cap(x.out) <= keepBuffer {
			s.pool.Put(x)
		}
	}()
	raw, err := pack(d.Req, x)
	if err != nil {
		s.cfg.Logger.Debug("packing a query again", "err", err)
		d.QUICStream.CancelWrite(doqInternalError)
		return
	}
	q := &x.q
	q.Client, q.Local = unmap(d.Addr), addrPort(d.QUICConnection.LocalAddr())
	q.Transport, q.Listener = wire.DoQ, s.cfg.Name
	q.Received = time.Now().UnixNano()
	q.Parse(raw)
	out, verdict := s.cfg.serveWire(append(x.out[:0], 0, 0), q)
	if verdict == wire.Miss {
		if out, err = s.miss(append(x.out[:0], 0, 0), q); err != nil {
			d.QUICStream.CancelWrite(resetCode(err))
			return
		}
	}
	x.out = out[:0]
	if verdict == wire.Dropped || !setPrefix(out) {
		d.QUICStream.CancelWrite(doqUnspecified)
		return
	}
	if d.DoQVersion == proxy.DoQv1Draft {
		out = out[prefixLen:]
	}
	_ = d.QUICStream.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := d.QUICStream.Write(out); err != nil {
		s.cfg.Logger.Debug("cannot send an answer", "client", q.Client, "err", err)
	}
}

var errTooMany = errors.New("too many queries in flight")

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

// pack returns m as octets in x's buffer.
func pack(m *dns.Msg, x *exchange) ([]byte, error) {
	raw, err := m.PackBuffer(x.in[:cap(x.in)])
	if err == nil {
		x.in = raw[:0]
	}
	return raw, err
}

// noUpstream is the upstream that the framework wants to have and never asks.
type noUpstream struct{}

func (noUpstream) Exchange(*dns.Msg) (*dns.Msg, error) {
	return nil, errors.New("the DoQ server has no upstreams")
}
func (noUpstream) Address() string { return "none" }
func (noUpstream) Close() error    { return nil }

// noSubnets is an empty set of networks.
type noSubnets struct{}

func (noSubnets) Contains(netip.Addr) bool { return false }

// noMessages constructs no messages: the framework then leaves the query to the handler.
type noMessages struct{}

func (noMessages) NewMsgNXDOMAIN(*dns.Msg) *dns.Msg       { return nil }
func (noMessages) NewMsgSERVFAIL(*dns.Msg) *dns.Msg       { return nil }
func (noMessages) NewMsgNOTIMPLEMENTED(*dns.Msg) *dns.Msg { return nil }
func (noMessages) NewMsgNODATA(*dns.Msg) *dns.Msg         { return nil }
func (noMessages) NewMsgFORMERR(*dns.Msg) *dns.Msg        { return nil }
