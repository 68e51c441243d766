package forward

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// The faults that a fake server can be given while it runs.
const (
	well        = int32(iota)
	silent      // accepts and says nothing, not even TLS
	hang        // shakes hands and never answers
	badCert     // signed by somebody else
	garbage     // octets that are no frame
	notDNS      // a frame that is no message
	wrongID     //
	wrongName   //
	isQuery     // QR=0
	cutFrame    // a length prefix for more than comes
	cutMessage  // fewer records than the header says
	reset       // RST after the query
	servFail    //
	refusedCode //
	slow        // answers after a second
	flap        // every other connection and query is reset
	reversed    // answers of a burst in reverse order
	bytewise    // one octet a segment
	truncated   // TC set
)

var faultNames = map[int32]string{silent: "silent", hang: "hang", badCert: "bad certificate", garbage: "garbage",
	notDNS: "not DNS", wrongID: "wrong ID", wrongName: "wrong question", isQuery: "QR=0", cutFrame: "cut frame",
	cutMessage: "cut message", reset: "reset", servFail: "SERVFAIL", refusedCode: "REFUSED", slow: "slow", flap: "flap",
	truncated: "truncated"}

// testPKI is a CA and the certificates that it, or another one, has signed.
type testPKI struct {
	roots                                         *x509.CertPool
	good, otherName, expired, stranger, clientCrt tls.Certificate
}

var pki = sync.OnceValue(func() *testPKI {
	ca, caKey := makeCA("test CA")
	other, otherKey := makeCA("another CA")
	p := &testPKI{roots: x509.NewCertPool()}
	p.roots.AddCert(ca)
	now := time.Now()
	p.good = makeCert(ca, caKey, now.Add(time.Hour), "dns.test", "127.0.0.1")
	p.otherName = makeCert(ca, caKey, now.Add(time.Hour), "other.test")
	p.expired = makeCert(ca, caKey, now.Add(-time.Hour), "dns.test", "127.0.0.1")
	p.stranger = makeCert(other, otherKey, now.Add(time.Hour), "dns.test", "127.0.0.1")
	p.clientCrt = makeCert(ca, caKey, now.Add(time.Hour), "client.test")
	return p
})

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func makeCA(name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der := must(x509.CreateCertificate(rand.Reader, t, t, key.Public(), key))
	return must(x509.ParseCertificate(der)), key
}

func makeCert(ca *x509.Certificate, caKey *ecdsa.PrivateKey, until time.Time, names ...string) tls.Certificate {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der := must(x509.CreateCertificate(rand.Reader, t, ca, key.Public(), caKey))
	leaf := must(x509.ParseCertificate(der))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// fake is an upstream server of any transport with faults.
type fake struct {
	t      testing.TB
	tag    string // the text of its TXT answers
	fault  atomic.Int32
	asked  atomic.Int64 // queries read
	conns  atomic.Int64 // connections accepted
	open   atomic.Int64
	peak   atomic.Int64
	resume atomic.Int64 // connections that resumed a session
	cert   atomic.Pointer[tls.Certificate]
	delay  atomic.Int64
	http1  bool           // DoH over HTTP/1.1 only
	ca     *x509.CertPool // for client certificates, when set
	server Server
	last   atomic.Pointer[[]byte] // the last query as it came
	answer func(*dns.Msg) *dns.Msg
	wg     sync.WaitGroup
}

// newFake starts a server for scheme. It ends with the test.
func newFake(t testing.TB, scheme, tag string, setup ...func(*fake)) *fake {
	f := &fake{t: t, tag: tag}
	t.Cleanup(f.wg.Wait) // runs last
	f.cert.Store(&pki().good)
	for _, s := range setup {
		s(f)
	}
	var port int
	switch scheme {
	case "tls", "tcp":
		port = f.serveStream(scheme == "tls", 0)
	case "udp":
		port = f.serveUDP()
	case "https":
		port = f.serveHTTPS()
	case "quic":
		port = f.serveQUIC()
	case "h3":
		port = f.serveH3()
	}
	f.server = Server{URL: scheme + "://" + tag, Scheme: scheme, Host: "127.0.0.1", Port: uint16(port)}
	if scheme != "udp" && scheme != "tcp" {
		f.server.VerifyName, f.server.Roots = "dns.test", pki().roots
	}
	return f
}

func (f *fake) tlsConfig(alpn ...string) *tls.Config {
	cfg := &tls.Config{NextProtos: alpn, MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if f.fault.Load() == badCert {
				return &pki().stranger, nil
			}
			return f.cert.Load(), nil
		}}
	if f.ca != nil {
		cfg.ClientCAs, cfg.ClientAuth = f.ca, tls.RequireAndVerifyClientCert
	}
	return cfg
}

// reply returns the bytes of the answer to msg, with the fault of the moment, or nil.
func (f *fake) reply(msg []byte) []byte {
	if len(msg) < wire.HeaderLen {
		return nil // a stray packet
	}
	f.asked.Add(1)
	kept := append([]byte(nil), msg...)
	f.last.Store(&kept)
	m := new(dns.Msg)
	if err := m.Unpack(msg); err != nil {
		f.t.Errorf("%s: query that cannot be read: %v", f.tag, err)
		return nil
	}
	r := new(dns.Msg)
	r.SetReply(m)
	r.RecursionAvailable = true
	r.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeTXT,
		Class: dns.ClassINET, Ttl: 300}, Txt: []string{f.tag}}}
	if f.answer != nil {
		r = f.answer(m)
		if r == nil {
			return nil
		}
	}
	if m.IsEdns0() != nil && r.IsEdns0() == nil {
		r.SetEdns0(1232, m.IsEdns0().Do())
	}
	switch f.fault.Load() {
	case hang:
		return nil
	case servFail, refusedCode:
		r.Rcode, r.Answer = dns.RcodeServerFailure, nil
		if f.fault.Load() == refusedCode {
			r.Rcode = dns.RcodeRefused
		}
		r.IsEdns0().Option = append(r.IsEdns0().Option, &dns.EDNS0_EDE{InfoCode: 9, ExtraText: f.tag})
	case wrongID:
		r.Id += 7
	case wrongName:
		r.Question[0].Name = "somebody.else."
	case isQuery:
		r.Response = false
	case truncated:
		r.Truncated = true
	case slow:
		time.Sleep(time.Second)
	}
	time.Sleep(time.Duration(f.delay.Load()))
	out := must(r.Pack())
	switch f.fault.Load() {
	case cutMessage:
		binary.BigEndian.PutUint16(out[6:], 9)
	case notDNS:
		out = []byte("HTTP/1.1 400 Bad Request\r\n\r\n")
	}
	return out
}

// serveStream serves DoT or TCP on port, or on any if that is 0.
func (f *fake) serveStream(secure bool, port int) int {
	ln := must(net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(port)).String()))
	cfg := f.tlsConfig("dot")
	ctx, cancel := context.WithCancel(context.Background())
	f.t.Cleanup(func() { cancel(); ln.Close() })
	f.wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			f.conns.Add(1)
			if n := f.open.Add(1); n > f.peak.Load() {
				f.peak.Store(n)
			}
			f.wg.Go(func() {
				defer f.open.Add(-1)
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				f.serveConn(ctx, conn, cfg, secure)
			})
		}
	})
	return ln.Addr().(*net.TCPAddr).Port
}

func (f *fake) serveConn(ctx context.Context, raw net.Conn, cfg *tls.Config, secure bool) {
	if f.fault.Load() == silent {
		io.Copy(io.Discard, raw)
		return
	}
	conn := raw
	if secure {
		tc := tls.Server(raw, cfg)
		if err := tc.HandshakeContext(ctx); err != nil {
			return
		}
		if tc.ConnectionState().DidResume {
			f.resume.Add(1)
		}
		conn = tc
	}
	r := bufio.NewReader(conn)
	var mu sync.Mutex
	var held [][]byte
	var wg sync.WaitGroup
	defer wg.Wait()
	for n := 1; ; n++ {
		msg, err := readFrame(r, new([]byte))
		if err != nil {
			return
		}
		mode := f.fault.Load()
		if mode == reset || mode == flap && n%3 == 0 {
			tcp := raw.(*net.TCPConn)
			tcp.SetLinger(0)
			tcp.Close()
			return
		}
		msg = append([]byte(nil), msg...)
		wg.Go(func() {
			out := f.reply(msg)
			if out == nil {
				return
			}
			frame := append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
			mu.Lock()
			defer mu.Unlock()
			switch mode {
			case garbage:
				frame = []byte(strings.Repeat("\x00\x01garbage", 20))
			case cutFrame:
				frame = frame[:len(frame)-3]
				defer conn.Close()
			case reversed:
				if held = append(held, frame); len(held) < 10 {
					return
				}
				for i := len(held) - 1; i >= 0; i-- {
					conn.Write(held[i])
				}
				held = nil
				return
			case bytewise:
				for i := range frame {
					conn.Write(frame[i : i+1])
				}
				return
			}
			conn.Write(frame)
		})
	}
}

func (f *fake) serveUDP() int {
	// TCP on the same port for what is truncated.
	port := f.serveStream(false, 0)
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		f.t.Skipf("the UDP port beside the TCP one is taken: %v", err)
	}
	f.t.Cleanup(func() { conn.Close() })
	f.wg.Go(func() {
		buf := make([]byte, 65535)
		for {
			n, addr, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			msg := append([]byte(nil), buf[:n]...)
			f.wg.Go(func() {
				mode := f.fault.Load()
				if mode == silent {
					return
				}
				out := f.reply(msg)
				switch {
				case out == nil:
				case mode == garbage:
					conn.WriteToUDPAddrPort([]byte("garbage"), addr)
				default:
					conn.WriteToUDPAddrPort(out, addr)
				}
			})
		}
	})
	return port
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var msg []byte
	if r.Method == http.MethodGet {
		msg, _ = base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
	} else {
		msg, _ = io.ReadAll(r.Body)
	}
	if r.URL.Path != "/dns-query" || !strings.HasPrefix(r.Host, "dns.test") || r.Header.Get("Content-Type") != mediaType ||
		r.Header.Get("User-Agent") != "" {
		http.Error(w, "no", http.StatusNotFound)
		return
	}
	mode := f.fault.Load()
	out := f.reply(msg)
	if out == nil {
		<-r.Context().Done()
		return
	}
	w.Header().Set("Content-Type", "application/dns-message; charset=x")
	w.Header().Set("Age", "100")
	switch mode {
	case garbage:
		out = []byte("garbage")
	case reset:
		panic(http.ErrAbortHandler)
	case cutFrame:
		out = make([]byte, wire.MaxMessage+1)
	}
	w.Write(out)
}

// withoutOthers returns cfg for httptest, which adds a certificate of its own, and crypto/tls would prefer that where a
// client sends no name.
func withoutOthers(cfg *tls.Config) *tls.Config {
	outer := cfg.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return cfg, nil }
	return outer
}

func (f *fake) serveHTTPS() int {
	s := httptest.NewUnstartedServer(f)
	s.EnableHTTP2 = !f.http1
	s.TLS = f.tlsConfig("h2", "http/1.1")
	if f.http1 {
		s.TLS.NextProtos = []string{"http/1.1"}
	}
	s.TLS = withoutOthers(s.TLS)
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			f.conns.Add(1)
		}
	}
	s.Config.ErrorLog = quietLog
	s.StartTLS()
	f.t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.Listener.Addr().(*net.TCPAddr).Port
}

func (f *fake) serveQUIC() int {
	ln := must(quic.ListenAddr("127.0.0.1:0", f.tlsConfig("doq"), &quic.Config{}))
	ctx, cancel := context.WithCancel(context.Background())
	f.t.Cleanup(func() { cancel(); ln.Close() })
	f.wg.Go(func() {
		for {
			conn, err := ln.Accept(ctx)
			if err != nil {
				return
			}
			f.conns.Add(1)
			f.wg.Go(func() { f.serveQUICConn(ctx, conn) })
		}
	})
	return ln.Addr().(*net.UDPAddr).Port
}

func (f *fake) serveQUICConn(ctx context.Context, conn *quic.Conn) {
	defer conn.CloseWithError(0, "")
	var wg sync.WaitGroup
	defer wg.Wait()
	for n := 1; ; n++ {
		str, err := conn.AcceptStream(ctx)
		if err != nil {
			return
		}
		wg.Go(func() {
			defer str.Close()
			all, err := io.ReadAll(str) // to the FIN
			if err != nil || len(all) < 2 {
				return
			}
			switch f.fault.Load() {
			case reset:
				str.CancelWrite(1)
				return
			case flap:
				if n > 1 {
					conn.CloseWithError(1, "")
					return
				}
			}
			out := f.reply(all[2:])
			if out == nil {
				select {
				case <-str.Context().Done():
				case <-conn.Context().Done():
				case <-ctx.Done():
				}
				return
			}
			if f.fault.Load() == garbage {
				out = []byte("garbage")
			}
			str.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
		})
	}
}

func (f *fake) serveH3() int {
	conn := must(net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}))
	s := &http3.Server{Handler: f, TLSConfig: http3.ConfigureTLSConfig(f.tlsConfig("h3"))}
	f.wg.Go(func() { s.Serve(conn) })
	f.t.Cleanup(func() { s.Close(); conn.Close() })
	return conn.LocalAddr().(*net.UDPAddr).Port
}

// question returns a query for name's TXT records.
func question(name string) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeTXT)
	return m
}

// text returns the TXT text in m: the tag of the server that answered.
func text(m *dns.Msg) string {
	for _, rr := range m.Answer {
		if txt, ok := rr.(*dns.TXT); ok {
			return txt.Txt[0]
		}
	}
	return dns.RcodeToString[m.Rcode]
}

// newTestGroup makes a group that is closed at the end of the test.
func newTestGroup(t testing.TB, cfg Config) *Group {
	t.Helper()
	if cfg.Name == "" {
		cfg.Name = "default"
	}
	g, err := NewGroup(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// deadPort returns a port where nobody listens.
func deadPort(network string) uint16 {
	if network == "udp" {
		c := must(net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}))
		defer c.Close()
		return uint16(c.LocalAddr().(*net.UDPAddr).Port)
	}
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	defer ln.Close()
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// census counts goroutines and descriptors.
func census() (goroutines, descriptors int) {
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		descriptors = len(entries)
	}
	return runtime.NumGoroutine(), descriptors
}

// noLeak fails the test if, a while after work, more goroutines or descriptors are there than before it.
func noLeak(t *testing.T, work func()) {
	t.Helper()
	goroutines, descriptors := census()
	for calm := 0; calm < 5; calm++ { // the fakes' own goroutines may still be on their way
		time.Sleep(10 * time.Millisecond)
		if g, d := census(); g != goroutines || d != descriptors {
			goroutines, descriptors, calm = g, d, 0
		}
	}
	work()
	var g, d int
	for range 200 {
		if g, d = census(); g <= goroutines && d <= descriptors {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	buf := make([]byte, 1<<16)
	t.Errorf("left behind: %d goroutines, %d descriptors\n%s", g-goroutines, d-descriptors,
		buf[:runtime.Stack(buf, true)])
}

// stampURL makes a DNS stamp of a protocol with one hash of nothing left out.
func stampURL(proto byte, addr, name, path string) string {
	lp := func(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }
	b := append([]byte{proto}, make([]byte, 8)...)
	b = lp(b, addr)
	b = append(b, 0) // no hashes
	b = lp(b, name)
	if proto == 2 {
		b = lp(b, path)
	}
	return "sdns://" + base64.RawURLEncoding.EncodeToString(b)
}
