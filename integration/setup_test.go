package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dnsgateway/gateway/lab"
)

// setup is a lab with a gateway in front of it, which listens for every transport on free ports of loopback.
type setup struct {
	lab     *lab.Lab
	gateway *process
	roots   *x509.CertPool
	dir     string // holds ca.crt, server.crt, server.key

	plain, dot, doh, doq, admin string // "127.0.0.1:port"; doh speaks h1, h2 and h3
}

// yaml are the parts of a configuration that a test may replace.
type yaml struct {
	upstreams string // by default the lab's servers, each a tier
	cache     string // "8MB" by default
	more      string // further sections
}

func newSetup(t *testing.T, y yaml) *setup {
	t.Helper()
	s := new(setup)
	s.start(t, func() yaml { return y })
	return s
}

// start fills in s. What y returns may name the lab's servers, which are there by then.
func (s *setup) start(t *testing.T, y func() yaml) {
	t.Helper()
	s.prepare(t)
	s.gateway = startGateway(t, s.config(y()))
}

// prepare fills in s but for the gateway.
func (s *setup) prepare(t *testing.T) {
	t.Helper()
	l, err := lab.Start(context.WithoutCancel(t.Context()), lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	s.lab, s.roots, s.dir = l, l.Roots(), t.TempDir()
	cert, key, err := l.CA().Issue([]string{"localhost", "127.0.0.1", "::1"})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"ca.crt": l.CAPEM(), "server.crt": cert, "server.key": key} {
		if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.plain, s.dot, s.doh, s.doq, s.admin = freePort(t), freePort(t), freePort(t), freePort(t), freePort(t)
}

// file returns the path of a file of the setup.
func (s *setup) file(name string) string { return filepath.Join(s.dir, name) }

// config returns the gateway's configuration.
func (s *setup) config(y yaml) string {
	if y.upstreams == "" {
		y.upstreams = s.tiers("")
	}
	if y.cache == "" {
		y.cache = "8MB"
	}
	return fmt.Sprintf(`
listen:
  - dns://%s
  - tls://%s
  - {name: doh, url: "https://%s/dns-query", http: [h1, h2, h3]}
  - quic://%s
tls: {cert: %s, key: %s}
upstreams:
%s
cache: %s
admin: {listen: %s}
log: {level: info, format: json}
%s`, s.plain, s.dot, s.doh, s.doq, s.file("server.crt"), s.file("server.key"), y.upstreams, y.cache, s.admin, y.more)
}

// tiers returns the group "default" with each of the lab's servers as a tier of its own, and more keys of the group.
func (s *setup) tiers(more string) string {
	var b strings.Builder
	b.WriteString("  default:\n    try:\n")
	for _, server := range s.lab.Servers() {
		fmt.Fprintf(&b, "      - [{url: %q, ca: %s}]\n", server.URL(), s.file("ca.crt"))
	}
	b.WriteString(more)
	return b.String()
}

// fault makes the first upstream misbehave as lab.ParseFault reads it.
func (s *setup) fault(t *testing.T, text string) {
	t.Helper()
	s.faultOf(t, "tier1", text)
}

func (s *setup) faultOf(t *testing.T, server, text string) {
	t.Helper()
	f, err := lab.ParseFault(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.lab.Server(server).SetFault(f); err != nil {
		t.Fatal(err)
	}
}

func (s *setup) tls(alpn ...string) *tls.Config {
	return &tls.Config{RootCAs: s.roots, ServerName: "localhost", NextProtos: alpn, MinVersion: tls.VersionTLS12}
}

// freePort returns an address of loopback whose port was free for UDP and TCP a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	for range 50 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp", ln.Addr().String())
		_ = ln.Close()
		if err == nil {
			_ = pc.Close()
			return ln.Addr().String()
		}
	}
	t.Fatal("no port is free for UDP and TCP")
	return ""
}

func port(addr string) string {
	_, p, _ := net.SplitHostPort(addr)
	return p
}
