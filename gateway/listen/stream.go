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
	cfg   StreamConfig
	ln    *acceptor
	addr  net.Addr
	conns map[*streamConn]struct{} // guarded by life.mu
	wg    sync.WaitGroup           // connections; each waits for its own misses
	jobs  sync.Pool                // of *job
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
	return cfg
}

func newStream(cfg StreamConfig, ln net.Listener) *Stream {
	s := &Stream{cfg: cfg, addr: ln.Addr(), conns: make(map[*streamConn]struct{})}
	s.ln = newAcceptor(ln, newConnLimit(cfg.Limits), cfg.Logger)
	s.jobs.New = func() any { return new(job) }
	s.init()
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
	for {
		nc, err := s.ln.Accept()
		if err != nil {
			break
		}
		c := newStreamConn(s, nc)
		if !s.track(c) {
			_ = nc.Close()
			break
		}
		s.wg.Go(func() {
			defer s.untrack(c)
			c.serve()
		})
	}
	s.wg.Wait()
	if !s.halted() {
		return net.ErrClosed
	}
	return nil
}

// Shutdown implements Server. Queries that a connection has read are answered before it is closed.
func (s *Stream) Shutdown(ctx context.Context) error {
	first, serving := s.halt()
	_ = s.ln.Close()
	if !serving {
		return nil
	}
	if first {
		for _, c := range s.all() {
			c.drain()
		}
	}
	return s.wait(ctx, func() {
		for _, c := range s.all() {
			_ = c.raw.Close()
		}
	})
}

func (s *Stream) track(c *streamConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Stream) untrack(c *streamConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func (s *Stream) all() []*streamConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*streamConn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// job is a miss with everything that its answer needs; it belongs to the goroutine that resolves it.
type job struct {
	in  []byte
	out []byte
	q   wire.Query
}
