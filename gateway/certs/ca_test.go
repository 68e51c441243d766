package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const day = 24 * time.Hour

func TestNewCA(t *testing.T) {
	c := testCA(t).Certificate()
	if !c.IsCA || !c.MaxPathLenZero || c.MaxPathLen != 0 {
		t.Errorf("got IsCA %v, path length %d (zero %v), want a CA of path length 0", c.IsCA, c.MaxPathLen, c.MaxPathLenZero)
	}
	if key, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Errorf("got a %T, want ECDSA P-256", c.PublicKey)
	}
	if got, want := c.NotAfter, now.Add(3650*day); !got.Equal(want) {
		t.Errorf("got end %v, want %v", got, want)
	}
	if got, want := c.Subject.CommonName, "dnsgateway development CA"; got != want {
		t.Errorf("got name %q, want %q", got, want)
	}
	if _, err := NewCA(CAConfig{Validity: -1}); err == nil {
		t.Error("a negative validity was taken")
	}
}

func TestIssue(t *testing.T) {
	ca := testCA(t)
	cert, key, err := ca.Issue([]string{"localhost", "*.Lan.", "127.0.0.1", "::1", "::ffff:127.0.0.1", "LOCALHOST"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewStore([]Pair{{CertPEM: cert, KeyPEM: key}})
	if err != nil {
		t.Fatal(err)
	}
	leaf := s.Leaves()[0]
	if diff := cmp.Diff(leaf.DNSNames, []string{"localhost", "*.lan"}); diff != "" {
		t.Errorf("names (-got +want):\n%s", diff)
	}
	var addrs []string
	for _, ip := range leaf.IPAddresses {
		addrs = append(addrs, ip.String())
	}
	if diff := cmp.Diff(addrs, []string{"127.0.0.1", "::1"}); diff != "" {
		t.Errorf("addresses (-got +want):\n%s", diff)
	}
	if got, want := leaf.NotAfter, now.Add(90*day); !got.Equal(want) {
		t.Errorf("got end %v, want %v", got, want)
	}
	for _, name := range []string{"localhost", "nas.lan", "127.0.0.1", "::1"} {
		opts := x509.VerifyOptions{DNSName: name, Roots: ca.Pool(), CurrentTime: now}
		if _, err := leaf.Verify(opts); err != nil {
			t.Errorf("verifying %s: %v", name, err)
		}
	}
	if _, err := leaf.Verify(x509.VerifyOptions{DNSName: "other.test", Roots: ca.Pool(), CurrentTime: now}); err == nil {
		t.Error("the certificate serves a name that it does not hold")
	}
}

func TestIssueValidity(t *testing.T) {
	ca := testCA(t)
	young, err := NewCA(CAConfig{Validity: 5 * day, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name     string
		ca       *CA
		names    []string
		validity time.Duration
		want     time.Duration // 0: an error
	}{
		{"default", ca, []string{"a.test"}, 0, 90 * day},
		{"longest", ca, []string{"a.test"}, 397 * day, 397 * day},
		{"too long", ca, []string{"a.test"}, 398 * day, 0},
		{"negative", ca, []string{"a.test"}, -day, 0},
		{"not beyond the CA", young, []string{"a.test"}, 90 * day, 5 * day},
		{"no name", ca, nil, day, 0},
		{"bad name", ca, []string{"a b"}, day, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cert, key, err := tt.ca.Issue(tt.names, tt.validity)
			if tt.want == 0 {
				if err == nil {
					t.Error("no error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			s, err := NewStore([]Pair{{CertPEM: cert, KeyPEM: key}})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := s.Leaves()[0].NotAfter, now.Add(tt.want); !got.Equal(want) {
				t.Errorf("got end %v, want %v", got, want)
			}
			if got := s.Leaves()[0].NotBefore; got.After(now) {
				t.Errorf("got begin %v, after now", got)
			}
		})
	}
}

// An expired certificate is served: the caller warns, and starts all the same.
func TestExpiredLeafIsServed(t *testing.T) {
	p := testPair(t, testCA(t), "a", "a.test") // ends in 2026
	s, err := NewStore([]Pair{p})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.Leaves()[0].NotAfter, now.Add(90*day); !got.Equal(want) {
		t.Errorf("got end %v, want %v", got, want)
	}
}

func TestLoadCA(t *testing.T) {
	ca := testCA(t)
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	clock := func() time.Time { return now }
	again, err := LoadCA(ca.CertPEM(), key, CAConfig{Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewStore([]Pair{testPair(t, again, "a", "a.test")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Leaves()[0].Verify(x509.VerifyOptions{Roots: ca.Pool(), DNSName: "a.test", CurrentTime: now}); err != nil {
		t.Errorf("a leaf of the loaded CA: %v", err)
	}

	leaf := testPair(t, ca, "a", "a.test")
	late := func() time.Time { return now.Add(20 * 365 * day) }
	for _, tt := range []struct {
		name      string
		cert, key []byte
		clock     func() time.Time
		want      string
	}{
		{"a leaf", leaf.CertPEM, leaf.KeyPEM, clock, "CA certificate: CN=a.test is not a CA"},
		{"key of another", ca.CertPEM(), leaf.KeyPEM, clock,
			"CA key: the key does not belong to the certificate in CA certificate"},
		{"empty", nil, nil, clock, "CA certificate: it is empty"},
		{"expired", ca.CertPEM(), key, late, "CA certificate: CN=dnsgateway development CA expired on 2036-02-27"},
	} {
		if _, err := LoadCA(tt.cert, tt.key, CAConfig{Now: tt.clock}); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want %q", tt.name, err, tt.want)
		}
	}
}

// A handshake over a real connection: the chain that is sent is trusted by who trusts the root.
func TestHandshake(t *testing.T) {
	ca, err := NewCA(CAConfig{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewStore([]Pair{testPair(t, ca, "a", "a.test"), testPair(t, ca, "local", "127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: s.Get})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			if err := conn.(*tls.Conn).Handshake(); err != nil {
				t.Errorf("handshake: %v", err)
			}
			conn.Close()
		}
	}()
	defer func() { ln.Close(); <-done }()
	for _, name := range []string{"a.test", "127.0.0.1"} { // Go sends no SNI for an address
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", ln.Addr().String(),
			&tls.Config{RootCAs: ca.Pool(), ServerName: name})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		conn.Close()
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.key")
	if err := os.WriteFile(path, []byte("old and longer"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "new" {
		t.Errorf("got %q, %v", got, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); runtime.GOOS != "windows" && got != 0o600 {
		t.Errorf("got mode %o, want 600", got)
	}

	// A folder stands in the way of the rename: the error names the path and nothing is left behind.
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "x", "y"), 0o700); err != nil {
		t.Fatal(err)
	}
	err = WriteFile(filepath.Join(dir, "x"), []byte("new"), 0o600)
	if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "x")) {
		t.Errorf("got error %v, want one with the path", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("got %v, want only the folder", entries)
	}
	if err := WriteFile(filepath.Join(dir, "none", "z"), nil, 0o600); err == nil {
		t.Error("no error for a folder that is not there")
	}
}
