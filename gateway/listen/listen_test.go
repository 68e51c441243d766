package listen

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"dnsgateway/gateway/wire"
)

// fake is a Handler that does what the first label of the question says: hit and miss answer with one address, slow
// waits for gate, drop, error and panic-* do that. Everything else is answered with the fault that wire found.
type fake struct {
	surprised
	gate    chan struct{} // slow misses wait for it
	waiting chan string   // gets the name of each slow miss that has begun to wait

	mu   sync.Mutex
	seen []wire.Query // copies with Raw and Name cut off
}

func newFake() *fake { return &fake{gate: make(chan struct{}), waiting: make(chan string, 1000)} }

func (f *fake) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	f.mu.Lock()
	seen := *q
	seen.Raw, seen.Name = nil, nil
	f.seen = append(f.seen, seen)
	f.mu.Unlock()
	if q.Fault != wire.RcodeSuccess {
		return appendReply(dst, q, q.Fault), wire.Answered
	}
	if q.Kind == wire.Junk {
		return dst, wire.Dropped
	}
	switch label := firstLabel(q); {
	case strings.HasPrefix(label, "hit"):
		return appendReply(dst, q, wire.RcodeSuccess), wire.Answered
	case label == "drop":
		return dst, wire.Dropped
	case label == "panic-hit":
		panic("ordered by the test")
	}
	return dst, wire.Miss
}

func (f *fake) Resolve(ctx context.Context, dst []byte, q *wire.Query) ([]byte, error) {
	switch label := firstLabel(q); {
	case strings.HasPrefix(label, "slow"):
		f.waiting <- label
		select {
		case <-f.gate:
		case <-ctx.Done():
			return dst, ctx.Err()
		}
	case label == "error":
		return dst, errors.New("ordered by the test")
	case label == "panic-miss":
		panic("ordered by the test")
	case label == "nxdomain":
		return appendReply(dst, q, wire.RcodeNXDomain), nil
	}
	return appendReply(dst, q, wire.RcodeSuccess), nil
}

func (f *fake) queries() []wire.Query {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]wire.Query(nil), f.seen...)
}

func firstLabel(q *wire.Query) string {
	if len(q.Name) < 2 {
		return ""
	}
	return strings.ToLower(string(q.Name[1 : 1+q.Name[0]]))
}

// appendReply appends a response to q: an A record with a TTL of 300 for success, a SOA with one of 60 for NXDOMAIN.
func appendReply(dst []byte, q *wire.Query, rcode uint16) []byte {
	m := &dns.Msg{}
	m.Id, m.Response, m.RecursionAvailable, m.RecursionDesired, m.Rcode = q.ID, true, true, q.RD(), int(rcode)
	m.Opcode = int(q.Opcode())
	var in dns.Msg
	if q.Name != nil && in.Unpack(q.Raw) == nil && len(in.Question) > 0 {
		m.Question = in.Question[:1]
		name := in.Question[0].Name
		switch rcode {
		case wire.RcodeSuccess:
			m.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: net.IPv4(192, 0, 2, 1),
			}}
		case wire.RcodeNXDomain:
			m.Ns = []dns.RR{&dns.SOA{
				Hdr: dns.RR_Header{Name: "test.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 3600},
				Ns:  "ns.test.", Mbox: "host.test.", Minttl: 60,
			}}
		}
	}
	if q.EDNS {
		m.SetEdns0(1232, q.DO)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return append(dst, b...)
}

// surprised is a Handler's half that expects nothing.
type surprised struct{}

func (surprised) Expect([]wire.Query) {}

// echo is a Handler without any allocation: the query with the QR bit.
type echo struct{ surprised }

func (echo) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	at := len(dst)
	dst = append(dst, q.Raw...)
	dst[at+2] |= 0x80
	return dst, wire.Answered
}

func (echo) Resolve(_ context.Context, dst []byte, _ *wire.Query) ([]byte, error) { return dst, nil }

// query returns a packed query for name.test.
func query(t testing.TB, name string, id uint16) []byte {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name+".test.", dns.TypeA)
	m.Id = id
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// framed puts the length field of a stream in front of each message.
func framed(msgs ...[]byte) []byte {
	var b []byte
	for _, m := range msgs {
		b = append(b, byte(len(m)>>8), byte(len(m)))
		b = append(b, m...)
	}
	return b
}

func common(h Handler) Common {
	return Common{Handler: h, Name: "test", Addr: netip.MustParseAddrPort("127.0.0.1:0"), Logger: slog.New(slog.DiscardHandler)}
}

// serve runs s until the test ends, and then looks for what it left behind.
func serve(t testing.TB, s Server) {
	t.Helper()
	serveLater(t, s)()
}

// serveLater does the same with a Serve that begins when the returned function is called. It has to be.
func serveLater(t testing.TB, s Server) func() {
	t.Helper()
	served := make(chan error, 1)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v, want nil after Shutdown", err)
		}
		noLeaks(t)
	})
	return func() { go func() { served <- s.Serve() }() }
}

// noLeaks waits until no goroutine of this package or of its libraries is left.
func noLeaks(t testing.TB) {
	t.Helper()
	var left string
	for range 500 {
		if left = leaked(); left == "" {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Errorf("goroutines are left:\n%s", left)
}

func leaked() string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for i, g := range strings.Split(string(buf), "\n\n") {
		if i == 0 || strings.Contains(g, "testing.tRunner") {
			continue // this one, and tests that run beside it
		}
		for _, of := range []string{"/gateway/listen.", "quic-go", "dnsproxy", "net/http.(*conn)", "net/http.(*http2serverConn)"} {
			if strings.Contains(g, of) {
				return g
			}
		}
	}
	return ""
}

// within returns a context that ends soon enough for a test to fail.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// receive returns what c brings, or fails.
func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came within 10 s")
		panic("unreachable")
	}
}

// shutdown starts a Shutdown and returns when it has begun.
func shutdown(ctx context.Context, s interface {
	Server
	halted() bool
}) <-chan error {
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(ctx) }()
	for !s.halted() {
		runtime.Gosched()
	}
	return done
}

var testCA = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "dns.test"}, DNSNames: []string{"dns.test"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, net.IPv4(127, 0, 0, 2)},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
})

func serverConfig() *tls.Config {
	cert, _ := testCA()
	return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }}
}

func clientConfig(alpn ...string) *tls.Config {
	_, roots := testCA()
	return &tls.Config{RootCAs: roots, ServerName: "dns.test", NextProtos: alpn}
}

func TestBindError(t *testing.T) {
	listeners := map[string]func(c Common) (Server, error){
		"udp": func(c Common) (Server, error) { return ListenPacket(t.Context(), PacketConfig{Common: c}) },
		"tcp": func(c Common) (Server, error) { return ListenStream(t.Context(), StreamConfig{Common: c}) },
		"https": func(c Common) (Server, error) {
			return ListenHTTPS(t.Context(), HTTPSConfig{Common: c, TLS: serverConfig()})
		},
		"h3": func(c Common) (Server, error) {
			return ListenHTTPS(t.Context(), HTTPSConfig{Common: c, TLS: serverConfig(), HTTP: []string{"h3"}})
		},
		"quic": func(c Common) (Server, error) {
			return ListenQUIC(t.Context(), QUICConfig{Common: c, TLS: serverConfig()})
		},
	}
	networks := map[string]string{"udp": "udp", "tcp": "tcp", "https": "tcp", "h3": "udp", "quic": "udp"}
	for name, listen := range listeners {
		t.Run(name, func(t *testing.T) {
			c := common(newFake())
			first, err := listen(c)
			if err != nil {
				t.Fatal(err)
			}
			c.Addr = addrPort(first.Addr())
			second, err := listen(c)
			if second != nil && err == nil {
				t.Fatal("bound twice")
			}
			var bind *BindError
			if !errors.As(err, &bind) || bind.Network != networks[name] || bind.Addr != c.Addr {
				t.Errorf("got %#v, want a BindError for %s %v", err, networks[name], c.Addr)
			}
			if !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("got %v, want EADDRINUSE in it", err)
			}
			// Without Serve, Shutdown gives the socket back, and a Serve that comes late has nothing to do.
			if err := first.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			if err := first.Serve(); err != nil {
				t.Errorf("Serve after Shutdown: %v", err)
			}
			third, err := listen(c)
			if err != nil {
				t.Fatalf("binding again: %v", err)
			}
			_ = third.Shutdown(t.Context())
			noLeaks(t)
		})
	}
}

func TestConfigErrors(t *testing.T) {
	ok := common(newFake())
	bad := map[string]func() error{
		"no handler": func() error {
			_, err := ListenPacket(t.Context(), PacketConfig{Common: Common{Addr: ok.Addr}})
			return err
		},
		"no address": func() error {
			_, err := ListenStream(t.Context(), StreamConfig{Common: Common{Handler: newFake()}})
			return err
		},
		"negative in flight": func() error {
			_, err := ListenPacket(t.Context(), PacketConfig{Common: ok, Inflight: -1})
			return err
		},
		"IPv4 prefix": func() error {
			_, err := ListenStream(t.Context(), StreamConfig{Common: ok, Limits: Limits{PrefixV4: 33}})
			return err
		},
		"negative pipeline": func() error {
			_, err := ListenStream(t.Context(), StreamConfig{Common: ok, Pipeline: -1})
			return err
		},
		"HTTPS without TLS": func() error {
			_, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: ok})
			return err
		},
		"HTTP version": func() error {
			_, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: ok, TLS: serverConfig(), HTTP: []string{"h4"}})
			return err
		},
		"path": func() error {
			_, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: ok, TLS: serverConfig(), Path: "dns-query"})
			return err
		},
		"HTTPS limits": func() error {
			_, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: ok, TLS: serverConfig(), Limits: Limits{Idle: -1}})
			return err
		},
		"QUIC without TLS": func() error {
			_, err := ListenQUIC(t.Context(), QUICConfig{Common: ok})
			return err
		},
		"QUIC limits": func() error {
			_, err := ListenQUIC(t.Context(), QUICConfig{Common: ok, TLS: serverConfig(), PrefixV6: 129})
			return err
		},
		"QUIC in flight": func() error {
			_, err := ListenQUIC(t.Context(), QUICConfig{Common: ok, TLS: serverConfig(), Inflight: -1})
			return err
		},
	}
	for name, listen := range bad {
		t.Run(name, func(t *testing.T) {
			if err := listen(); err == nil {
				t.Error("no error")
			}
		})
	}
}

// TestBackoff has a socket fail again and again: the pauses grow to the longest, and there is one warning a minute.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		b := backoff{longest: time.Second}
		begin := time.Now()
		for range 100 {
			b.pause(nil, slog.New(slog.NewTextHandler(&log, nil)), "cannot", errors.New("no"))
		}
		if d := time.Since(begin); d < 90*time.Second || d > 100*time.Second {
			t.Errorf("100 pauses took %v", d)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 2 {
			t.Errorf("%d warnings, want 2:\n%s", n, log.String())
		}
		b.reset()
		begin = time.Now()
		b.pause(nil, slog.New(slog.DiscardHandler), "cannot", errors.New("no"))
		if d := time.Since(begin); d != time.Millisecond {
			t.Errorf("the first pause took %v, want 1ms", d)
		}
	})
}

func TestQuietLogger(t *testing.T) {
	var b strings.Builder
	log := quietLogger(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})))
	log.With("a", 1).WithGroup("g").Error("boom", "b", 2)
	if got := b.String(); !strings.Contains(got, "level=DEBUG") || !strings.Contains(got, "a=1") || !strings.Contains(got, "g.b=2") {
		t.Errorf("got %q", got)
	}
	info := slog.New(slog.NewTextHandler(&b, nil))
	if quietLogger(info).Enabled(t.Context(), slog.LevelError) {
		t.Error("an error of a library passes a logger at info level")
	}
}
