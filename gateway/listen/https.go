package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sync/errgroup"

	"dnsgateway/gateway/wire"
)

// HTTPSConfig configures a DoH listener.
type HTTPSConfig struct {
	Common
	Limits
	// TLS needs a certificate or GetCertificate; versions and ALPN protocols are set here.
	TLS *tls.Config
	// Path is the path of the DoH resource, "/dns-query" by default.
	Path string
	// HTTP names the HTTP versions: of "h1", "h2" and "h3"; h1 and h2 by default. With h3 the UDP port of the same
	// number is bound too, and the TCP side says so in Alt-Svc; h3 alone binds no TCP port.
	HTTP []string
}

const (
	defaultPath = "/dns-query"
	// maxHeader bounds a request's header. A GET carries the query there: 16 KiB hold one of 12 KB, far more than any
	// question with its options; more is answered with 431.
	maxHeader = 16 << 10
	// headerTimeout bounds the TLS handshake and the header, bodyTimeout the header and the body.
	headerTimeout = 10 * time.Second
	bodyTimeout   = 15 * time.Second
	// maxStreams is how many requests one HTTP/2 or HTTP/3 connection may have open, RFC 9113, section 6.5.2 asks for
	// at least 100.
	maxStreams = 100
	// streamWindow bounds what one request may send ahead of its being read; a query is far smaller.
	streamWindow = 64 << 10
	connWindow   = 1 << 20
	// maxUniStreams is room for HTTP/3's control and QPACK streams (RFC 9114, section 6.2) and some that mean nothing.
	maxUniStreams = 8
	// quicSilence is how long a QUIC connection may be silent; it is never less than the idle time.
	quicSilence = 30 * time.Second
	// altSvcAge is how long in seconds a client may remember that there is HTTP/3 here; a day, as RFC 7838, section
	// 3.1 has for its default.
	altSvcAge = 86400
)

// HTTPS is a DoH listener (RFC 8484). What it answers to which request is said at [doh].
type HTTPS struct {
	cfg   HTTPSConfig
	doh   *doh
	addr  net.Addr
	limit *connLimit // of both sides together
	// The TCP side, nil with h3 alone.
	ln      *acceptor
	tls     *tls.Config
	streams *streams       // HTTP/2
	wg      sync.WaitGroup // connections before and in HTTP/2
	srv     *http.Server   // HTTP/1.1, nil without h1
	h1      *handover
	// The HTTP/3 side, nil without h3.
	udp    *net.UDPConn
	tr     *quic.Transport
	quicLn *quicListener
	h3     *http3.Server
	life
}

// ListenHTTPS binds a TCP socket, and with h3 a UDP socket on the same port.
func ListenHTTPS(ctx context.Context, cfg HTTPSConfig) (*HTTPS, error) {
	versions, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	s := &HTTPS{cfg: cfg, limit: newConnLimit(cfg.Limits)}
	ln, err := s.bind(ctx, versions["h1"] || versions["h2"], versions["h3"])
	if err != nil {
		return nil, err
	}
	s.init()
	altSvc := ""
	if ln != nil {
		s.addr = ln.Addr()
	}
	if s.udp != nil {
		s.addr = s.udp.LocalAddr()
		altSvc = fmt.Sprintf(`h3=":%d"; ma=%d`, addrPort(s.addr).Port(), altSvcAge)
	}
	s.doh = newDoH(s.ctx, cfg.Common, cfg.Path, altSvc)
	if s.udp != nil {
		s.newHTTP3()
	}
	if ln != nil {
		s.ln = newAcceptor(ln, s.limit, cfg.Logger)
		s.streams = newStreams(s.ctx, &s.doh.cfg, s.limit, cfg.Idle, bodyTimeout)
		s.newTCP(versions)
	}
	return s, nil
}

// bindTries is how often a port is looked for that is free for TCP and UDP alike, when the system may choose it.
const bindTries = 20

// bind binds the sockets that are asked for, to the same port; the UDP socket is kept in s.
func (s *HTTPS) bind(ctx context.Context, tcp, udp bool) (ln net.Listener, err error) {
	for try := 1; ; try++ {
		addr := s.cfg.Addr
		if tcp {
			if ln, err = bindTCP(ctx, addr); err != nil {
				return nil, err
			}
			addr = netip.AddrPortFrom(addr.Addr(), addrPort(ln.Addr()).Port())
		}
		if !udp {
			return ln, nil
		}
		if s.udp, err = bindUDP(ctx, addr); err == nil {
			return ln, nil
		}
		if ln != nil {
			_ = ln.Close()
		}
		if s.cfg.Addr.Port() != 0 || try == bindTries {
			return nil, err
		}
	}
}

// complete checks cfg, fills in its defaults and returns the set of HTTP versions.
func (cfg *HTTPSConfig) complete() (map[string]bool, error) {
	if err := cfg.Common.check(); err != nil {
		return nil, err
	}
	if err := cfg.Limits.check(); err != nil {
		return nil, err
	}
	cfg.Limits = cfg.Limits.withDefaults()
	if cfg.TLS == nil {
		return nil, errors.New("HTTPS listener without TLS")
	}
	if cfg.Path == "" {
		cfg.Path = defaultPath
	}
	if !strings.HasPrefix(cfg.Path, "/") {
		return nil, fmt.Errorf("path %q does not begin with a slash", cfg.Path)
	}
	if len(cfg.HTTP) == 0 {
		cfg.HTTP = []string{"h1", "h2"}
	}
	versions := make(map[string]bool)
	for _, v := range cfg.HTTP {
		switch v {
		case "h1", "h2", "h3":
			versions[v] = true
		default:
			return nil, fmt.Errorf("unknown HTTP version %q", v)
		}
	}
	return versions, nil
}

// newTCP sets up HTTP/1.1 and HTTP/2.
func (s *HTTPS) newTCP(versions map[string]bool) {
	var alpn []string
	if versions["h2"] {
		alpn = append(alpn, alpnHTTP2)
	}
	if versions["h1"] {
		alpn = append(alpn, "http/1.1")
		var protocols http.Protocols
		protocols.SetHTTP1(true)
		s.h1 = newHandover(s.ln.Addr())
		s.srv = &http.Server{
			Handler:           s.doh,
			Protocols:         &protocols,
			ReadHeaderTimeout: headerTimeout,
			ReadTimeout:       bodyTimeout,
			IdleTimeout:       s.cfg.Idle,
			MaxHeaderBytes:    maxHeader,
			// There is no WriteTimeout, which would count the time of the upstreams too: the handler sets a deadline when
			// it has something to write. Whatever the server has to say about clients is for debugging.
			ErrorLog: slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug),
		}
	}
	s.tls = serverTLS(s.cfg.TLS, alpn...)
}

const alpnHTTP2 = "h2" // RFC 9113, section 3.1

// handover is a net.Listener for connections that somebody else has accepted.
type handover struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	stop  chan struct{}
}

func newHandover(addr net.Addr) *handover {
	return &handover{addr: addr, conns: make(chan net.Conn), stop: make(chan struct{})}
}

// give hands nc over, or closes it when the listener is closed.
func (h *handover) give(nc net.Conn) {
	select {
	case h.conns <- nc:
	case <-h.stop:
		_ = nc.Close()
	}
}

// Accept implements net.Listener.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case nc := <-h.conns:
		return nc, nil
	case <-h.stop:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handover) Close() error {
	h.once.Do(func() { close(h.stop) })
	return nil
}

// Addr implements net.Listener.
func (h *handover) Addr() net.Addr { return h.addr }

// newHTTP3 sets up the HTTP/3 server on s.udp.
func (s *HTTPS) newHTTP3() {
	s.quicLn = &quicListener{
		limit: s.limit, excessive: quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad),
		log: s.cfg.Logger, addr: s.udp.LocalAddr(), stop: s.stop,
	}
	s.h3 = &http3.Server{
		Handler:        s.doh,
		MaxHeaderBytes: maxHeader,
		IdleTimeout:    s.cfg.Idle,
		Logger:         quietLogger(s.cfg.Logger),
	}
	s.tr = &quic.Transport{
		Conn:                s.udp,
		VerifySourceAddress: s.quicLn.verify,
		ConnContext:         s.quicLn.admit,
	}
}

// Addr implements Server.
func (s *HTTPS) Addr() net.Addr { return s.addr }

// Name implements Server.
func (s *HTTPS) Name() string { return s.cfg.Name }

// Serve implements Server. The goroutines of idle HTTP/1.1 and HTTP/3 connections, which belong to libraries, end a moment
// later.
func (s *HTTPS) Serve() error {
	if !s.begin() {
		return nil
	}
	defer s.end()
	var sides errgroup.Group
	if s.ln != nil {
		sides.Go(func() error { return s.side(s.serveTCP) })
	}
	if s.h3 != nil {
		sides.Go(func() error { return s.side(s.serveHTTP3) })
	}
	return sides.Wait()
}

// side runs one of the two servers. One that ends by itself takes the other along.
func (s *HTTPS) side(serve func() error) error {
	err := serve()
	if err == nil {
		return nil
	}
	s.halt()
	s.cancel()
	s.closeTCP()
	return err
}

// serveTCP serves HTTP/1.1 and HTTP/2 until Shutdown, and then drains.
func (s *HTTPS) serveTCP() error {
	defer func() {
		s.wg.Wait()
		s.streams.wait()
	}()
	var h1 sync.WaitGroup
	defer h1.Wait()
	if s.srv != nil {
		h1.Go(func() { _ = s.srv.Serve(s.h1) })
	}
	shaking, cancel := context.WithCancel(s.ctx)
	for {
		nc, err := s.ln.Accept()
		if err != nil {
			break
		}
		s.wg.Go(func() { s.serveConn(shaking, nc) })
	}
	cancel() // nothing was asked yet
	if !s.halted() {
		s.closeTCP()
		return net.ErrClosed
	}
	s.streams.drain()
	if s.srv != nil {
		ctx, cancel := s.patience()
		defer cancel()
		_ = s.srv.Shutdown(ctx) // the end of what is idle
		_ = s.srv.Close()
	}
	return nil
}

// serveConn makes the handshake, until ctx is done, and gives the connection to who speaks its protocol. One without ALPN is
// HTTP/1.1.
func (s *HTTPS) serveConn(ctx context.Context, nc net.Conn) {
	conn, err := shakeHands(ctx, nc, s.tls, headerTimeout)
	switch {
	case err != nil:
		s.cfg.Logger.Debug("TLS handshake", "client", addrPort(nc.RemoteAddr()), "err", err)
		_ = nc.Close()
	case conn.ConnectionState().NegotiatedProtocol == alpnHTTP2:
		p := newPeer(&s.doh.cfg, nc, wire.DoH)
		s.streams.add(nc, conn, newH2(&p, s.doh))
	case s.h1 != nil:
		s.h1.give(conn)
	default:
		_ = nc.Close()
	}
}

// serveHTTP3 does the same for HTTP/3. Shutdown of the library is called when nothing accepts connections any more: a
// connection that came in between would let it close a channel twice (quic-go v0.60).
func (s *HTTPS) serveHTTP3() error {
	defer s.udp.Close()
	defer s.tr.Close()
	ln, err := s.tr.Listen(http3.ConfigureTLSConfig(serverTLS(s.cfg.TLS)), &quic.Config{
		MaxIdleTimeout:             max(s.cfg.Idle, quicSilence),
		MaxIncomingStreams:         maxStreams,
		MaxIncomingUniStreams:      maxUniStreams,
		InitialStreamReceiveWindow: streamWindow,
		MaxStreamReceiveWindow:     streamWindow,
		MaxConnectionReceiveWindow: connWindow,
	})
	if err != nil {
		return fmt.Errorf("starting HTTP/3: %w", err)
	}
	s.quicLn.ln = ln
	err = s.h3.ServeListener(s.quicLn)
	_ = ln.Close()
	if !s.halted() {
		_ = s.h3.Close()
		return err
	}
	ctx, cancel := s.patience()
	defer cancel()
	_ = s.h3.Shutdown(ctx)
	return nil
}

// patience returns a context that ends when nothing has been in flight and what was written had time to leave, or when
// Shutdown's own context has ended.
func (s *HTTPS) patience() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(s.ctx)
	go func() {
		defer cancel()
		select {
		case <-s.doh.flight.wait():
		case <-ctx.Done():
			return
		}
		t := time.NewTimer(linger)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// Connections returns how many connections are open, over all HTTP versions.
func (s *HTTPS) Connections() int { return s.limit.open() }

// Shutdown implements Server.
func (s *HTTPS) Shutdown(ctx context.Context) error {
	_, serving := s.halt()
	if s.ln != nil {
		_ = s.ln.Close()
	}
	if !serving {
		if s.udp != nil {
			_ = s.udp.Close()
		}
		return nil
	}
	return s.wait(ctx, s.closeTCP)
}

func (s *HTTPS) closeTCP() {
	if s.ln != nil {
		_ = s.ln.Close()
	}
	if s.srv != nil {
		_ = s.srv.Close()
	}
	if s.streams != nil {
		s.streams.abort()
	}
}
