package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/certs"
)

// zoneName is the zone that all names of the lab are in, without the root's dot.
const zoneName = "lab.test"

// rebindWait is how long a healed server waits for its port; another program may have caught it.
const rebindWait = 3 * time.Second

// Server is one upstream server. All its methods may be called at once.
type Server struct {
	lab    *Lab
	name   string
	scheme Scheme
	addr   netip.AddrPort
	certs  map[mode]*tls.Certificate

	queries atomic.Uint64
	conns   connCount
	stuck   atomic.Uint64 // connections up to this number never answer again
	fault   atomic.Pointer[Fault]

	setting  sync.Mutex // held by SetFault and close, never by what they wait for
	stopFlap func()     // nil while nothing flaps
	closed   bool

	mu     sync.Mutex // guards what is listening
	mode   mode
	fronts []front
}

// front is one listening socket and its connections.
type front interface {
	// close ends all of it and returns when none of its goroutines is left.
	close()
}

func (l *Lab) newServer(c ServerConfig, issuers *issuers) (*Server, error) {
	switch {
	case c.Name == "" || certs.CheckName(c.Name+"."+zoneName) != nil:
		return nil, fmt.Errorf("%q cannot be a server's name", c.Name)
	case l.Server(c.Name) != nil:
		return nil, errors.New("there is a server of this name already")
	case !c.Scheme.known():
		return nil, fmt.Errorf("unknown scheme %q", c.Scheme)
	}
	if err := c.Fault.check(c.Scheme); err != nil {
		return nil, err
	}
	s := &Server{lab: l, name: c.Name, scheme: c.Scheme, addr: c.Addr, mode: down}
	if !s.addr.IsValid() {
		s.addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	}
	s.fault.Store(&Fault{})
	if c.Scheme.encrypted() {
		var err error
		if s.certs, err = issuers.certificates(s.HostName()); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// start takes a port and begins with f.
func (s *Server) start(f Fault) error {
	const tries = 20
	for try := 1; ; try++ {
		addr := s.addr
		if addr.Port() == 0 {
			port, err := FreePort()
			if err != nil {
				return err
			}
			addr = netip.AddrPortFrom(addr.Addr(), uint16(port))
		}
		fronts, err := s.open(serving, addr)
		if err == nil { // even a server that begins dead takes its port once, so that no other lab has it
			s.addr, s.mode, s.fronts = addr, serving, fronts
			break
		}
		if s.addr.Port() != 0 || try == tries {
			return err
		}
	}
	return s.SetFault(f)
}

// Name returns the server's name in the lab, such as "tier1".
func (s *Server) Name() string { return s.name }

// Scheme returns what the server speaks.
func (s *Server) Scheme() Scheme { return s.scheme }

// HostName returns the name in the server's certificate, such as "tier1.lab.test".
func (s *Server) HostName() string { return s.name + "." + zoneName }

// Addr returns where the server listens; it stays the same through all faults.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// URL returns the server as the gateway's file wants it, such as "tls://127.0.0.1:853#tier1.lab.test".
func (s *Server) URL() string {
	u := string(s.scheme) + "://" + s.addr.String()
	switch s.scheme {
	case UDP, TCP:
		return u
	case HTTPS, H3:
		u += dohPath
	}
	return u + "#" + s.HostName()
}

// Certificate returns the certificate that the server shows when it is well, or nil if it is not encrypted.
func (s *Server) Certificate() *x509.Certificate {
	if !s.scheme.encrypted() {
		return nil
	}
	return s.certs[serving].Leaf
}

// Queries returns how many messages have reached the server, whatever became of them.
func (s *Server) Queries() uint64 { return s.queries.Load() }

// Conns returns how many connections the server has accepted; of UDP there are none. A QUIC connection counts after its
// handshake, one over TCP before it.
func (s *Server) Conns() uint64 { return s.conns.accepted() }

// OpenConns returns how many of these connections are open, and how many at most were at once. One counts as long as both
// ends keep it: a client that has closed it no longer waits for anything, though the server may still be busy with a question.
func (s *Server) OpenConns() (now, most int) { return s.conns.open() }

// Fault returns the fault in force.
func (s *Server) Fault() Fault { return *s.fault.Load() }

// SetFault changes how the server misbehaves; the zero Fault heals it. When it returns the change is in force, on
// connections that were open before, too. After an error, the server is as it was, or dead if its port is lost.
func (s *Server) SetFault(f Fault) error {
	if err := f.check(s.scheme); err != nil {
		return fmt.Errorf("server %s: %w", s.name, err)
	}
	s.setting.Lock()
	defer s.setting.Unlock()
	if s.closed {
		return fmt.Errorf("server %s: %w", s.name, net.ErrClosed)
	}
	s.endFlap()
	if err := s.enter(f.mode()); err != nil {
		s.fault.Store(&Fault{Kind: Dead})
		return fmt.Errorf("server %s: %w", s.name, err)
	}
	if f.Kind == Stuck {
		s.stuck.Store(s.conns.accepted())
	}
	s.fault.Store(&f)
	if f.Kind == Flap {
		s.beginFlap(f.Duration)
	}
	return nil
}

// enter makes m the mode of the listening side. A change closes all connections.
func (s *Server) enter(m mode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m == s.mode {
		return nil
	}
	s.closeFronts()
	s.mode = down
	deadline := time.Now().Add(rebindWait)
	for {
		fronts, err := s.open(m, s.addr)
		if err == nil {
			s.mode, s.fronts = m, fronts
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond) // the kernel tells nobody when a port becomes free
	}
}

func (s *Server) closeFronts() {
	var all sync.WaitGroup
	for _, f := range s.fronts {
		all.Go(f.close)
	}
	all.Wait()
	s.fronts = nil
}

func (s *Server) beginFlap(period time.Duration) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(period)
		defer tick.Stop()
		for next := serving; ; {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			if err := s.enter(next); err != nil {
				s.lab.log.Debug("flapping server stays dead", "server", s.name, "err", err)
				continue
			}
			if next == serving {
				next = down
			} else {
				next = serving
			}
		}
	}()
	s.stopFlap = func() { close(stop); <-done }
}

func (s *Server) endFlap() {
	if s.stopFlap != nil {
		s.stopFlap()
		s.stopFlap = nil
	}
}

func (s *Server) close() {
	s.setting.Lock()
	defer s.setting.Unlock()
	s.closed = true
	s.endFlap()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeFronts()
	s.mode = down
}

// open binds addr and serves it in mode m. After an error nothing is bound.
func (s *Server) open(m mode, addr netip.AddrPort) (fronts []front, err error) {
	if m == down {
		return nil, nil
	}
	defer func() {
		if err != nil {
			for _, f := range fronts {
				f.close()
			}
			fronts = nil
		}
	}()
	add := func(f front, err error) error {
		if err == nil {
			fronts = append(fronts, f)
		}
		return err
	}
	switch s.scheme {
	case UDP:
		if err := add(s.openPacket(addr)); err != nil {
			return fronts, err
		}
		return fronts, add(s.openStream(addr, m))
	case TCP, TLS:
		return fronts, add(s.openStream(addr, m))
	case HTTPS:
		return fronts, add(s.openHTTPS(addr, m))
	default: // newServer has checked it
		return fronts, add(s.openQUIC(addr, m))
	}
}

// tlsConfig returns the TLS side of a server in mode m. Each one has its own session ticket keys, so that nobody can
// resume a session and so miss a certificate that has become bad.
func (s *Server) tlsConfig(m mode, alpn ...string) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*s.certs[m]}, NextProtos: alpn, MinVersion: tls.VersionTLS12}
}

// pause waits for d and reports whether ctx is still alive then.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
