// Package lab is a small internet on loopback: upstream DNS servers of every kind with their own CA, one zone of awkward
// names, and faults that are switched while it runs. The tests and `dnsgateway lab` stand on it.
//
// It owns servers, names and misbehaviour; the gateway in front of it is the caller's. But for the making of certificates it shares no
// code with the parts that it tests: the servers are miekg/dns, crypto/tls, net/http and quic-go, so that a mistake cannot hide in both ends.
//
// What surprises a newcomer: an answer depends on the question alone, never on the server, the time or what was asked
// before, so every server can stand in for every other; and a dead server's port is refused, but stays its own.
package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"dnsgateway/gateway/certs"
)

// Scheme is what a server speaks, in the words of the gateway's URLs.
type Scheme string

// The schemes.
const (
	UDP   Scheme = "udp" // and TCP on the same port, for truncated answers
	TCP   Scheme = "tcp"
	TLS   Scheme = "tls"   // DoT
	HTTPS Scheme = "https" // DoH over HTTP/1.1 and HTTP/2
	H3    Scheme = "h3"    // DoH over HTTP/3
	QUIC  Scheme = "quic"  // DoQ
)

func (s Scheme) encrypted() bool { return s != UDP && s != TCP }

func (s Scheme) known() bool {
	switch s {
	case UDP, TCP, TLS, HTTPS, H3, QUIC:
		return true
	}
	return false
}

// Config says which servers a lab has. The zero value is three: tier1 speaks DoT, tier2 DoH, tier3 DoQ.
type Config struct {
	Servers []ServerConfig
	Logger  *slog.Logger // nil: none; all that servers say is at debug level
	// OnQuery, if not nil, is called with every message that reaches a server, before the answer is made. It is called
	// from many goroutines at once and owns raw.
	OnQuery func(server string, raw []byte)
}

// ServerConfig is one server.
type ServerConfig struct {
	Name   string // "tier1"; its certificate is for NAME.lab.test
	Scheme Scheme
	Addr   netip.AddrPort // 127.0.0.1 and a free port by default
	Fault  Fault          // from the start
}

// Lab is a set of running servers. All its methods may be called at once.
type Lab struct {
	servers []*Server
	ca      *certs.CA
	zone    *zone
	log     *slog.Logger
	onQuery func(server string, raw []byte)

	stopWatching func() bool
	closing      sync.Once
}

// Start starts the servers of c. The lab runs until Close, or until ctx ends.
func Start(ctx context.Context, c Config) (*Lab, error) {
	if len(c.Servers) == 0 {
		c.Servers = []ServerConfig{
			{Name: "tier1", Scheme: TLS}, {Name: "tier2", Scheme: HTTPS}, {Name: "tier3", Scheme: QUIC},
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	z, err := loadZone(zoneText)
	if err != nil {
		return nil, err
	}
	issuers, err := newIssuers()
	if err != nil {
		return nil, err
	}
	l := &Lab{ca: issuers.good, zone: z, log: c.Logger, onQuery: c.OnQuery}
	for _, sc := range c.Servers {
		s, err := l.newServer(sc, issuers)
		if err == nil {
			l.servers = append(l.servers, s)
			err = s.start(sc.Fault)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("starting server %s: %w", sc.Name, err), l.Close())
		}
	}
	l.stopWatching = context.AfterFunc(ctx, func() { l.closeServers() })
	return l, nil
}

// Close stops every server and closes every connection. When it returns no goroutine of the lab is left.
func (l *Lab) Close() error {
	if l.stopWatching != nil {
		l.stopWatching()
	}
	l.closeServers()
	return nil
}

func (l *Lab) closeServers() {
	l.closing.Do(func() {
		var all sync.WaitGroup
		for _, s := range l.servers {
			all.Go(s.close)
		}
		all.Wait()
	})
}

// Servers returns the servers in the order of the Config.
func (l *Lab) Servers() []*Server { return append([]*Server(nil), l.servers...) }

// Server returns the server called name, or nil.
func (l *Lab) Server(name string) *Server {
	for _, s := range l.servers {
		if s.name == name {
			return s
		}
	}
	return nil
}

// CA returns the CA that the servers' certificates are from; it can issue more.
func (l *Lab) CA() *certs.CA { return l.ca }

// CAPEM returns the CA's certificate in PEM. The caller must not modify it.
func (l *Lab) CAPEM() []byte { return l.ca.CertPEM() }

// Roots returns a new pool that holds the CA alone.
func (l *Lab) Roots() *x509.CertPool { return l.ca.Pool() }

// issuers are the CAs behind the good certificates and the bad ones.
type issuers struct {
	good, past, stranger *certs.CA
}

// newIssuers makes the lab's CA, the same CA as of half a year ago, and one that nobody trusts.
func newIssuers() (*issuers, error) {
	const year = 365 * 24 * time.Hour
	ago := func(d time.Duration) func() time.Time { return func() time.Time { return time.Now().Add(-d) } }
	ca, err := certs.NewCA(certs.CAConfig{Name: "dnsgateway lab CA", Now: ago(year)})
	if err != nil {
		return nil, err
	}
	key, err := ca.KeyPEM()
	if err != nil {
		return nil, err
	}
	var i issuers
	if i.good, err = certs.LoadCA(ca.CertPEM(), key, certs.CAConfig{}); err != nil {
		return nil, err
	}
	if i.past, err = certs.LoadCA(ca.CertPEM(), key, certs.CAConfig{Now: ago(year / 2)}); err != nil {
		return nil, err
	}
	i.stranger, err = certs.NewCA(certs.CAConfig{Name: "nobody's CA"})
	return &i, err
}

// certificates makes the certificates that a server called host may show, by mode.
func (i *issuers) certificates(host string) (map[mode]*tls.Certificate, error) {
	out := make(map[mode]*tls.Certificate)
	for _, want := range []struct {
		mode mode
		ca   *certs.CA
		name string
	}{
		{serving, i.good, host}, {wrongName, i.good, "wrong." + zoneName},
		{expired, i.past, host}, {unknownRoot, i.stranger, host},
	} {
		cert, key, err := want.ca.Issue([]string{want.name})
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		out[want.mode] = &pair
	}
	return out, nil
}
