package forward

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
)

// TestCertificates holds that each way in which a certificate can be wrong has its own words, with the pin seen.
func TestCertificates(t *testing.T) {
	pin := func(c tls.Certificate) [32]byte { return sha256.Sum256(c.Leaf.RawSubjectPublicKeyInfo) }
	tests := []struct {
		name   string
		cert   *tls.Certificate
		modify func(*Server)
		want   []string // of the error; nil means none
	}{
		{"good", &pki().good, nil, nil},
		{"by address", &pki().good, func(s *Server) { s.VerifyName = "" }, nil},
		{"another name", &pki().otherName, nil, []string{`certificate is for "other.test", not for "dns.test"`}},
		{"another address", &pki().otherName, func(s *Server) { s.VerifyName = "" },
			[]string{`certificate is for "other.test", not for "127.0.0.1"`}},
		{"expired", &pki().expired, nil, []string{"certificate expired on 2"}},
		{"unknown authority", &pki().stranger, nil, []string{"unknown authority", "another CA"}},
		{"right pin", &pki().good, func(s *Server) { s.Pins = [][32]byte{{1}, pin(pki().good)} }, nil},
		{"wrong pin", &pki().good, func(s *Server) { s.Pins = [][32]byte{{1}} }, []string{"no pin matches"}},
		{"right pin, unknown authority", &pki().stranger, func(s *Server) { s.Pins = [][32]byte{pin(pki().stranger)} },
			[]string{"unknown authority"}},
	}
	for _, scheme := range []string{"tls", "https", "h3", "quic"} {
		for _, tt := range tests {
			t.Run(scheme+"/"+tt.name, func(t *testing.T) {
				if strings.HasSuffix(tt.name, "address") && (scheme == "https" || scheme == "h3") {
					t.Skip("the HTTP fake goes by names alone")
				}
				f := newFake(t, scheme, "a", func(f *fake) { f.cert.Store(tt.cert) })
				s := f.server
				if tt.modify != nil {
					tt.modify(&s)
				}
				c := newTestClient(t, s)
				_, err := c.Exchange(question("name.test."))
				if tt.want == nil {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if got := kindOf(err); got != KindTLS {
					t.Fatalf("got %v, want kind tls", err)
				}
				for _, want := range append(tt.want, pinOf(tt.cert.Leaf)) {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("got %q, want it to say %q", err, want)
					}
				}
			})
		}
	}
}

// TestPinOnResumption holds that a resumed session is held against the pins too.
func TestPinOnResumption(t *testing.T) {
	cs := tls.ConnectionState{DidResume: true, PeerCertificates: []*x509.Certificate{pki().good.Leaf},
		VerifiedChains: [][]*x509.Certificate{{pki().good.Leaf}}}
	s := Server{Pins: [][32]byte{{1}}}
	if err := s.tlsConfig("dot").VerifyConnection(cs); err == nil {
		t.Error("a wrong pin passed")
	}
	s.Pins = append(s.Pins, sha256.Sum256(pki().good.Leaf.RawSubjectPublicKeyInfo))
	if err := s.tlsConfig("dot").VerifyConnection(cs); err != nil {
		t.Error(err)
	}
	// What the server sent and nobody verified does not count.
	cs.VerifiedChains = nil
	if err := s.tlsConfig("dot").VerifyConnection(cs); err == nil {
		t.Error("an unverified certificate matched")
	}
	tbs := sha256.Sum256(pki().good.Leaf.RawTBSCertificate)
	cs.VerifiedChains = [][]*x509.Certificate{{pki().good.Leaf}}
	stamped := Server{tbsHashes: [][]byte{tbs[:]}}
	if err := stamped.tlsConfig("dot").VerifyConnection(cs); err != nil {
		t.Errorf("a stamp's hash: %v", err)
	}
}

func TestClientCertificate(t *testing.T) {
	for _, scheme := range []string{"tls", "https", "h3", "quic"} {
		f := newFake(t, scheme, "a", func(f *fake) { f.ca = pki().roots })
		if _, err := newTestClient(t, f.server).Exchange(question("name.test.")); err == nil {
			t.Errorf("%s: an answer without a client certificate", scheme)
		}
		s := f.server
		s.ClientCert = &pki().clientCrt
		if _, err := newTestClient(t, s).Exchange(question("name.test.")); err != nil {
			t.Errorf("%s: with the client certificate: %v", scheme, err)
		}
	}
}

func TestNotTLS(t *testing.T) {
	f := newFake(t, "tcp", "a")
	s := f.server
	s.Scheme = "tls"
	f.answer = nil
	c := newTestClient(t, s)
	ctx := t.Context()
	_, err := c.ask(ctx, rootQuery)
	if kind := kindOf(err); kind != KindTLS && kind != KindTimeout && kind != KindIO {
		t.Errorf("got %v", err)
	}
	if err == nil {
		t.Error("an answer over TLS from a server that has none")
	}
}
