package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// now is the tests' clock; certificates are made and looked at by it.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func testCA(t testing.TB) *CA {
	t.Helper()
	ca, err := NewCA(CAConfig{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func testPair(t testing.TB, ca *CA, source string, names ...string) Pair {
	t.Helper()
	cert, key, err := ca.Issue(names)
	if err != nil {
		t.Fatal(err)
	}
	return Pair{CertPEM: cert, KeyPEM: key, Source: source + ".crt", KeySource: source + ".key"}
}

// addrConn is a connection that only knows where it arrived.
type addrConn struct {
	net.Conn
	local net.Addr
}

func (c addrConn) LocalAddr() net.Addr { return c.local }

func TestGetChoosesByName(t *testing.T) {
	ca := testCA(t)
	first := testPair(t, ca, "first", "dns.example.org", "192.0.2.1", "2001:db8::1")
	wild := testPair(t, ca, "wild", "*.example.org", "*.Example.NET")
	lan := testPair(t, ca, "lan", "lan.test", "192.0.2.9")
	lan.Names = []string{"Configured.test.", "*.lan", "192.0.2.2"}
	s, err := NewStore([]Pair{first, wild, lan})
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		sni   string
		local net.Addr
		want  int // index of the pair
	}{
		{"exact", "dns.example.org", nil, 0},
		{"exact in other letters", "DNS.Example.ORG", nil, 0},
		{"root's dot", "dns.example.org.", nil, 0},
		{"wildcard", "other.example.org", nil, 1},
		{"wildcard in other letters", "x.example.net", nil, 1},
		{"wildcard stands for one label", "a.b.example.org", nil, 0},
		{"wildcard is not its parent", "example.net", nil, 0},
		{"literal star", "*.example.org", nil, 1},
		{"second exact", "lan.test", nil, 2},
		{"configured name", "configured.test", nil, 2},
		{"configured wildcard", "nas.lan", nil, 2},
		{"unknown", "nobody.test", nil, 0},
		{"one label", "localhost", nil, 0},
		{"no name, no connection", "", nil, 0},
		{"no name, address of the first", "", &net.TCPAddr{IP: net.ParseIP("192.0.2.1")}, 0},
		{"no name, address in the third certificate", "", &net.TCPAddr{IP: net.ParseIP("192.0.2.9")}, 2},
		{"no name, mapped configured address", "", &net.UDPAddr{IP: net.ParseIP("::ffff:192.0.2.2")}, 2},
		{"no name, other address", "", &net.UDPAddr{IP: net.ParseIP("192.0.2.77")}, 0},
		{"no name, no IP address", "", &net.UnixAddr{Name: "x"}, 0},
		{"address as the name", "192.0.2.9", nil, 2},
		{"IPv6 address as the name", "2001:db8::1", nil, 0},
		{"unknown address as the name", "192.0.2.88", nil, 0},
	}
	leaves := s.Leaves()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := &tls.ClientHelloInfo{ServerName: tt.sni}
			if tt.local != nil {
				h.Conn = addrConn{local: tt.local}
			}
			got, err := s.Get(h)
			if err != nil {
				t.Fatal(err)
			}
			if got.Leaf != leaves[tt.want] {
				t.Errorf("got %v, want %v", got.Leaf.DNSNames, leaves[tt.want].DNSNames)
			}
		})
	}
	if got, err := s.Get(nil); err != nil || got.Leaf != leaves[0] {
		t.Errorf("without a hello: got %v, %v, want the first pair", got, err)
	}
}

// A name may have an RSA and an ECDSA certificate: each client is shown the one that it can use.
func TestGetChoosesByAlgorithm(t *testing.T) {
	ca := testCA(t)
	p256 := testPair(t, ca, "ecdsa", "dns.test")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template, err := ca.template([]string{"dns.test"}, DefaultValidity)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, rsaKey.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	old := Pair{CertPEM: encodeCert(der), Source: "rsa.crt",
		KeyPEM: pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)})}
	s, err := NewStore([]Pair{p256, old})
	if err != nil {
		t.Fatal(err)
	}
	hello := func(schemes ...tls.SignatureScheme) *tls.ClientHelloInfo {
		return &tls.ClientHelloInfo{
			ServerName: "dns.test", SignatureSchemes: schemes, SupportedVersions: []uint16{tls.VersionTLS13},
			CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256}, SupportedCurves: []tls.CurveID{tls.X25519},
		}
	}
	for _, tt := range []struct {
		name   string
		scheme tls.SignatureScheme
		want   int
	}{
		{"ecdsa", tls.ECDSAWithP256AndSHA256, 0},
		{"rsa", tls.PSSWithSHA256, 1},
		{"neither", tls.Ed25519, 0},
	} {
		if got, _ := s.Get(hello(tt.scheme)); got.Leaf != s.Leaves()[tt.want] {
			t.Errorf("%s: got %v, want pair %d", tt.name, got.Leaf.PublicKeyAlgorithm, tt.want)
		}
	}
}

func TestNewStoreNamesTheFileToMend(t *testing.T) {
	ca := testCA(t)
	a, b := testPair(t, ca, "a", "a.test"), testPair(t, ca, "b", "b.test")
	chain := append(bytes.Clone(ca.CertPEM()), a.CertPEM...)
	with := func(change func(*Pair)) []Pair {
		p := a
		change(&p)
		return []Pair{p}
	}
	tests := []struct {
		name  string
		pairs []Pair
		want  string
	}{
		{"no pair", nil, "no certificate"},
		{"empty certificate", with(func(p *Pair) { p.CertPEM = []byte(" \n") }), "a.crt: it is empty"},
		{"empty key", with(func(p *Pair) { p.KeyPEM = nil }), "a.key: it is empty"},
		{"no PEM", with(func(p *Pair) { p.CertPEM = []byte("hello") }), "a.crt: it holds no certificate in PEM form"},
		{"no PEM key", with(func(p *Pair) { p.KeyPEM = []byte("hello") }), "a.key: it holds no private key in PEM form"},
		{"swapped", with(func(p *Pair) { p.CertPEM, p.KeyPEM = p.KeyPEM, p.CertPEM }),
			"a.crt: it holds a private key and no certificate; are cert and key swapped?"},
		{"two certificates", with(func(p *Pair) { p.KeyPEM = p.CertPEM }),
			"a.key: it holds a certificate and no private key; are cert and key swapped?"},
		{"other block", with(func(p *Pair) { p.CertPEM = []byte("-----BEGIN X-----\nAA==\n-----END X-----\n") }),
			"a.crt: it holds a X block and no certificate"},
		{"other key block", with(func(p *Pair) { p.KeyPEM = []byte("-----BEGIN X-----\nAA==\n-----END X-----\n") }),
			"a.key: it holds a X block and no private key"},
		{"broken certificate", with(func(p *Pair) { p.CertPEM = encodeCert([]byte{1, 2}) }),
			"a.crt: reading certificate 1: x509: malformed certificate"},
		{"broken key", with(func(p *Pair) { p.KeyPEM = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte{1}}) }),
			"a.key: reading private key: "},
		{"encrypted key", with(func(p *Pair) {
			p.KeyPEM = pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}})
		}), "a.key: the private key is encrypted; decrypt it with openssl pkey, "},
		{"old encrypted key", with(func(p *Pair) {
			p.KeyPEM = pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte{1},
				Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}})
		}), "a.key: the private key is encrypted; "},
		{"key of another", with(func(p *Pair) { p.KeyPEM = b.KeyPEM }),
			"a.key: the key does not belong to the certificate in a.crt (CN=a.test)"},
		{"key of another, unnamed source", with(func(p *Pair) { p.KeyPEM, p.KeySource = b.KeyPEM, "" }),
			"key of a.crt: the key does not belong to the certificate in a.crt (CN=a.test)"},
		{"no source", with(func(p *Pair) { p.KeyPEM, p.Source, p.KeySource = nil, "", "" }), "key: it is empty"},
		{"chain in the wrong order", with(func(p *Pair) { p.CertPEM = chain }),
			"a.crt: the key belongs to certificate 2 (CN=a.test); the server's own certificate has to come first"},
		{"bad configured name", with(func(p *Pair) { p.Names = []string{"a b"} }),
			`a.crt: "a b" is neither a host name nor an IP address`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewStore(tt.pairs)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}

	_, err := NewStore([]Pair{{Source: "x.crt"}, a, {Source: "y.crt"}})
	if got, want := err.Error(), "x.crt: it is empty\ny.crt: it is empty"; got != want {
		t.Errorf("all at once: got %q, want %q", got, want)
	}
}

func TestStoreTakesKeysOfEveryForm(t *testing.T) {
	ca := testCA(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template, err := ca.template([]string{"a.test"}, DefaultValidity)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	parameters := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
	for name, form := range map[string][]byte{
		"SEC 1": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}),
		"SEC 1 behind openssl's parameters": append([]byte(parameters),
			pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})...),
		"PKCS 8": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
	} {
		if _, err := NewStore([]Pair{{CertPEM: encodeCert(der), KeyPEM: form}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Replace during handshakes: each sees the old pair or the new one; a bad pair changes nothing.
func TestReplace(t *testing.T) {
	ca := testCA(t)
	before, after := testPair(t, ca, "before", "dns.test"), testPair(t, ca, "after", "dns.test")
	s, err := NewStore([]Pair{before})
	if err != nil {
		t.Fatal(err)
	}
	old := s.Leaves()[0]
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 1000 {
				if c, err := s.Get(&tls.ClientHelloInfo{ServerName: "dns.test"}); c == nil || err != nil {
					t.Errorf("got %v, %v", c, err)
				}
			}
		})
	}
	if err := s.Replace([]Pair{{Source: "bad.crt"}}); err == nil {
		t.Error("a bad pair was taken")
	}
	if got := s.Leaves()[0]; got != old {
		t.Error("a bad pair changed the store")
	}
	if err := s.Replace([]Pair{after}); err != nil {
		t.Error(err)
	}
	readers.Wait()
	if got := s.Leaves()[0]; got.Equal(old) {
		t.Error("the new pair is not there")
	}
}

func TestGetDoesNotAllocate(t *testing.T) {
	ca := testCA(t)
	s, err := NewStore([]Pair{testPair(t, ca, "a", "dns.example.org")})
	if err != nil {
		t.Fatal(err)
	}
	h := &tls.ClientHelloInfo{ServerName: "dns.example.org"}
	if n := testing.AllocsPerRun(100, func() { s.Get(h) }); n != 0 {
		t.Errorf("exact name: %v allocs, want 0", n)
	}
}

func TestCheckName(t *testing.T) {
	long := strings.Repeat("a", 64)
	tests := map[string]bool{
		"localhost": true, "a.example.org": true, "a.example.org.": true, "*.example.org": true, "_dns.example": true,
		"127.0.0.1": true, "::1": true, "A-1.test": true,
		"": false, ".": false, "*": false, "*.": false, "a..b": false, "a.*.b": false, "-a.test": false, "a-.test": false,
		"a b": false, "x/y": false, "host:853": false, "[::1]": false, "ä.test": false, long + ".test": false,
		strings.Repeat("a.", 127) + "a": false,
	}
	for name, want := range tests {
		if got := CheckName(name) == nil; got != want {
			t.Errorf("CheckName(%q): got %v, want %v", name, got, want)
		}
	}
}

func TestPin(t *testing.T) {
	ca := testCA(t)
	s, err := NewStore([]Pair{testPair(t, ca, "a", "a.test")})
	if err != nil {
		t.Fatal(err)
	}
	b64, ok := strings.CutPrefix(Pin(s.Leaves()[0]), "sha256/")
	sum, err := base64.StdEncoding.DecodeString(b64)
	if !ok || err != nil || len(sum) != 32 {
		t.Errorf("got %q", Pin(s.Leaves()[0]))
	}
	if diff := cmp.Diff(Pin(ca.Certificate()), Pin(s.Leaves()[0])); diff == "" {
		t.Error("two keys have one pin")
	}
}

func FuzzNewStore(f *testing.F) {
	ca := testCA(f)
	p := testPair(f, ca, "a", "a.test", "192.0.2.1")
	f.Add(p.CertPEM, p.KeyPEM, "a.test")
	f.Add(ca.CertPEM(), p.KeyPEM, "*.a.test")
	f.Fuzz(func(t *testing.T, cert, key []byte, name string) {
		s, err := NewStore([]Pair{{CertPEM: cert, KeyPEM: key, Names: []string{name}}})
		if err != nil {
			return
		}
		if c, err := s.Get(&tls.ClientHelloInfo{ServerName: name}); c == nil || err != nil {
			t.Errorf("got %v, %v for %q", c, err, name)
		}
	})
}
