package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

// StreamConfig configures a TCP or DoT listener.
type StreamConfig struct {
	Common
	Limits
	// TLS makes it DoT (RFC 7858). It needs a certificate or GetCertificate; the lowest version (TLS 1.2) and the ALPN
	// protocol are set here. Nil means plain TCP.
	TLS *tls.Config
	// Pipeline is the number of unanswered queries on one connection. At the limit the listener stops reading until an
	// answer is there; it drops nothing. 100 by default.
	Pipeline int
	// Message is how long a client may take to send one message to its end; 10 s by default.
	Message time.Duration
	// Handshake is how long a TLS handshake may take; 10 s by default.
	Handshake time.Duration
}

const (
	defaultPipeline  = 100
	defaultMessage   = 10 * time.Second
	defaultHandshake = 10 * time.Second
	// alpnDoT is registered by RFC 7858 as "dot" in IANA's list of ALPN protocols.
	alpnDoT = "dot"
)

// Stream is a TCP listener (RFC 7766), or a DoT listener when it has a TLS configuration.
//
// A DoT client that offers ALPN has to offer "dot", else the handshake ends with no_application_protocol (RFC 7301,
// section 3.2): a TLS connection meant for another protocol must not be taken for DNS. RFC 7858 asks for no ALPN, so a
// client that offers none is welcome.
type Stream struct {
	cfg     StreamConfig
	ln      *acceptor
	addr    net.Addr
	streams *streams
	shaking sync.WaitGroup // handshakes
	life
}

// Connections returns how many connections are open.
func (s *Stream) Connections() int { return s.ln.limit.open() }

// ListenStream binds a TCP socket. Connections wait in the kernel until Serve.
func ListenStream(ctx context.Context, cfg StreamConfig) (*Stream, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	ln, err := bindTCP(ctx, cfg.Addr)
	if err != nil {
		return nil, err
	}
	return newStream(cfg, ln), nil
}

// complete checks cfg and fills in its defaults.
func (cfg *StreamConfig) complete() error {
	if err := cfg.Common.check(); err != nil {
		return err
	}
	if err := cfg.Limits.check(); err != nil {
		return err
	}
	if cfg.Pipeline < 0 || cfg.Message < 0 || cfg.Handshake < 0 {
		return errors.New("negative limit on a stream listener")
	}
	cfg.Limits = cfg.Limits.withDefaults()
	if cfg.Pipeline == 0 {
		cfg.Pipeline = defaultPipeline
	}
	if cfg.Message == 0 {
		cfg.Message = defaultMessage
	}
	if cfg.Handshake == 0 {
		cfg.Handshake = defaultHandshake
	}
	if cfg.TLS != nil {
		cfg.TLS = serverTLS(cfg.TLS, alpnDoT)
	}
	return nil
}

// serverTLS returns a copy of cfg that speaks the given protocols over TLS 1.2 and later (RFC 9325, section 3.1.1).
func serverTLS(cfg *tls.Config, alpn ...string) *tls.Config {
	cfg = cfg.Clone()
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS12)
	cfg.NextProtos = alpn
	// All answers that are sent at once are one record: they are there already, and small records would only cost.
	cfg.DynamicRecordSizingDisabled = true
	return cfg
}

func newStream(cfg StreamConfig, ln net.Listener) *Stream {
	s := &Stream{cfg: cfg, addr: ln.Addr()}
	s.init()
	limit := newConnLimit(cfg.Limits)
	s.ln = newAcceptor(ln, limit, cfg.Logger)
	s.streams = newStreams(s.ctx, &s.cfg.Common, limit, cfg.Idle, cfg.Message)
	return s
}

// Addr implements Server.
func (s *Stream) Addr() net.Addr { return s.addr }

// Name implements Server.
func (s *Stream) Name() string { return s.cfg.Name }

// Serve implements Server.
func (s *Stream) Serve() error {
	if !s.begin() {
		return nil
	}
	defer s.end()
	shaking, cancel := context.WithCancel(s.ctx)
	for {
		nc, err := s.ln.Accept()
		if err != nil {
			break
		}
		if s.cfg.TLS == nil {
			s.streams.add(nc, nil, newDNSMachine(newPeer(&s.cfg.Common, nc, wire.TCP), s.cfg.Pipeline))
			continue
		}
		s.shaking.Go(func() { s.handshake(shaking, nc) })
	}
	cancel() // no query of these has been read
	s.shaking.Wait()
	if !s.halted() {
		// The socket is gone, and not by us: the clients that are there must not go on as if all were well.
		s.cancel()
		s.streams.abort()
		s.streams.wait()
		return net.ErrClosed
	}
	s.streams.wait()
	return nil
}

// handshake makes nc a TLS connection, until ctx is done.
func (s *Stream) handshake(ctx context.Context, nc net.Conn) {
	p := newPeer(&s.cfg.Common, nc, wire.DoT)
	tc, err := shakeHands(ctx, nc, s.cfg.TLS, s.cfg.Handshake)
	if err != nil {
		s.cfg.Logger.Debug("TLS handshake", "client", p.client, "err", err)
		_ = nc.Close()
		return
	}
	s.streams.add(nc, tc, newDNSMachine(p, s.cfg.Pipeline))
}

// Shutdown implements Server. Queries that a connection has read are answered before it is closed.
func (s *Stream) Shutdown(ctx context.Context) error {
	first, serving := s.halt()
	_ = s.ln.Close()
	if !serving {
		return nil
	}
	if first {
		s.streams.drain()
	}
	return s.wait(ctx, s.streams.abort)
}
