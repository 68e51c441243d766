package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// queryCA issues the certificates of one test.
type queryCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its certificate in PEM
}

func newQueryCA(t *testing.T) *queryCA {
	t.Helper()
	ca := &queryCA{key: newQueryKey(t), file: filepath.Join(t.TempDir(), "ca.pem")}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "query test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(ca.file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return ca
}

func newQueryKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue returns a server configuration with a certificate for names that ends at notAfter.
func (ca *queryCA) issue(t *testing.T, notBefore, notAfter time.Time, names ...string) *tls.Config {
	t.Helper()
	key := newQueryKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "query\x1b[31m test server"},
		NotBefore: notBefore, NotAfter: notAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der, ca.cert.Raw}, PrivateKey: key, Leaf: leaf}}}
}

// good returns a certificate for dns.lab.test and 127.0.0.1.
func (ca *queryCA) good(t *testing.T) *tls.Config {
	return ca.issue(t, time.Now().Add(-time.Hour), time.Now().Add(36*time.Hour), "dns.lab.test", "127.0.0.1")
}

func withALPN(conf *tls.Config, protos ...string) *tls.Config {
	conf = conf.Clone()
	conf.NextProtos = protos
	return conf
}

// labAnswer is the zone that every server of the tests serves.
func labAnswer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	m.CheckingDisabled = q.CheckingDisabled
	opt := q.IsEdns0()
	if opt != nil {
		m.SetEdns0(1232, opt.Do())
	}
	records := func(rrs ...string) {
		for _, s := range rrs {
			rr, err := dns.NewRR(s)
			if err != nil {
				panic(err)
			}
			m.Answer = append(m.Answer, rr)
		}
	}
	switch name := strings.ToLower(q.Question[0].Name); name {
	case "www.lab.test.":
		records("www.lab.test. 300 IN CNAME host.lab.test.", "host.lab.test. 60 IN A 192.0.2.7")
		if opt != nil && opt.Do() {
			m.AuthenticatedData = true
			records("host.lab.test. 60 IN RRSIG A 13 3 60 20300101000000 20200101000000 1 lab.test. AAAA")
		}
	case "big.lab.test.":
		for range 10 {
			records("big.lab.test. 60 IN TXT " + strings.Repeat("x", 200))
		}
	case "escape.lab.test.":
		records(`escape.lab.test. 60 IN TXT "\027[2J"`, `escape.lab.test. 60 IN TYPE65280 \# 2 abcd`)
	case "dead.lab.test.":
		m.Rcode = dns.RcodeServerFailure
		m.IsEdns0().Option = append(m.IsEdns0().Option,
			&dns.EDNS0_EDE{InfoCode: 22, ExtraText: "no server\x1b[2J of group default"},
			&dns.EDNS0_EDE{InfoCode: 4000}, &dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE, Timeout: 100},
			&dns.EDNS0_NSID{Code: dns.EDNS0NSID, Nsid: "6c6162"}, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte{1, 2}},
			&dns.EDNS0_PADDING{Padding: make([]byte, 7)})
	case "7.2.0.192.in-addr.arpa.":
		records("7.2.0.192.in-addr.arpa. 60 IN PTR host.lab.test.")
	case "version.bind.":
		records(`version.bind. 0 CH TXT "lab"`)
	case "badvers.lab.test.":
		m.Rcode = dns.RcodeBadVers
	case "formerr.lab.test.":
		m.Rcode, m.Question, m.Extra = dns.RcodeFormatError, nil, nil
	case "wrongid.lab.test.":
		m.Id++
	case "query.lab.test.":
		m.Response = false
	case "other.lab.test.":
		m.Question[0].Name = "evil.lab.test."
	default:
		m.Rcode = dns.RcodeNameError
		soa, err := dns.NewRR("lab.test. 60 IN SOA ns.lab.test. root.lab.test. 1 2 3 4 60")
		if err != nil {
			panic(err)
		}
		m.Ns = append(m.Ns, soa)
	}
	return m
}

// startDNS serves labAnswer with miekg/dns over network ("udp", "tcp", "tcp-tls") on addr and returns its address.
func startDNS(t *testing.T, network, addr string, conf *tls.Config) string {
	t.Helper()
	started := make(chan struct{})
	s := &dns.Server{Net: network, Addr: addr, TLSConfig: conf, NotifyStartedFunc: func() { close(started) },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			m := labAnswer(q)
			if network == "udp" {
				m.Truncate(int(q.IsEdns0().UDPSize()))
			}
			_ = w.WriteMsg(m) // a client that has gone is its own matter
		})}
	done := make(chan error, 1)
	go func() { done <- s.ListenAndServe() }()
	select {
	case <-started:
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Shutdown(); err != nil {
			t.Error(err)
		}
		<-done
	})
	if s.PacketConn != nil {
		return s.PacketConn.LocalAddr().String()
	}
	return s.Listener.Addr().String()
}

// startPlain serves UDP and TCP on one port. The port that the system chose for TCP may be taken for UDP, so it tries
// more than one.
func startPlain(t *testing.T) string {
	t.Helper()
	for range 20 {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := pc.LocalAddr().String()
		l, err := net.Listen("tcp", addr)
		pc.Close()
		if err != nil {
			continue
		}
		l.Close()
		startDNS(t, "udp", addr, nil)
		return startDNS(t, "tcp", addr, nil)
	}
	t.Fatal("no port that is free for UDP and TCP")
	return ""
}

// dohHandler is a DoH server's handler, and some faulty ones.
func dohHandler(w http.ResponseWriter, r *http.Request) {
	var raw []byte
	var err error
	switch {
	case r.URL.Path == "/redirect":
		http.Redirect(w, r, "/dns-query", http.StatusFound)
		return
	case r.URL.Path == "/html":
		_, _ = io.WriteString(w, "<p>hello")
		return
	case r.URL.Path != "/dns-query":
		http.Error(w, "no such\x1b path", http.StatusNotFound)
		return
	case r.Host != r.URL.Query().Get("host") && r.URL.Query().Has("host"):
		http.Error(w, "asked for "+r.Host, http.StatusMisdirectedRequest)
		return
	case r.Method == "GET":
		raw, err = base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
	case r.Header.Get("Content-Type") == "application/dns-message":
		raw, err = io.ReadAll(r.Body)
	}
	q := new(dns.Msg)
	if err != nil || q.Unpack(raw) != nil || len(raw)%128 != 0 || q.Id != 0 {
		http.Error(w, "not a padded query with ID 0", http.StatusBadRequest)
		return
	}
	out, err := labAnswer(q).Pack()
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/dns-message; x=y")
	w.Header().Set("Cache-Control", "max-age=60")
	w.Header().Set("Age", "3")
	_, _ = w.Write(out)
}

// startDoH serves HTTP/1.1 and, unless h1, HTTP/2.
func startDoH(t *testing.T, conf *tls.Config, h1 bool) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(dohHandler))
	s.TLS = conf.Clone()
	s.EnableHTTP2 = !h1
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that a test breaks
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func startH3(t *testing.T, conf *tls.Config) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http3.Server{Handler: http.HandlerFunc(dohHandler), TLSConfig: http3.ConfigureTLSConfig(conf)}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(pc) })
	t.Cleanup(func() {
		_ = s.Close()
		pc.Close()
		wg.Wait()
	})
	return pc.LocalAddr().String()
}

// startDoQ serves DoQ. For the name reset.lab.test it resets the stream, for close.lab.test it closes the connection.
func startDoQ(t *testing.T, conf *tls.Config) string {
	t.Helper()
	l, err := quic.ListenAddr("127.0.0.1:0", withALPN(conf, "doq"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			wg.Go(func() { serveDoQ(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func serveDoQ(conn *quic.Conn) {
	for {
		stream, err := conn.AcceptStream(context.Background())
		if err != nil {
			return
		}
		raw, err := io.ReadAll(stream) // a client that does not send its FIN gets no answer
		q := new(dns.Msg)
		if err != nil || len(raw) < 2 || q.Unpack(raw[2:]) != nil || q.Id != 0 {
			_ = conn.CloseWithError(2, "protocol")
			return
		}
		switch q.Question[0].Name {
		case "reset.lab.test.":
			stream.CancelWrite(4)
			continue
		case "close.lab.test.":
			_ = conn.CloseWithError(1, "internal\x1b")
			return
		}
		out, err := labAnswer(q).Pack()
		if err != nil {
			panic(err)
		}
		_, _ = stream.Write(framed(out))
		stream.Close()
	}
}

// runCommand runs the program with args and returns what it printed and its exit status.
func runCommand(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	root := newRootCommand()
	root.SetOut(&out)
	root.SetErr(&errs)
	status = execute(t.Context(), root, args)
	return out.String(), errs.String(), status
}
