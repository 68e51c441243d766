package listen

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"dnsgateway/gateway/wire"
)

func listenHTTPS(t testing.TB, cfg HTTPSConfig) *HTTPS {
	t.Helper()
	if cfg.TLS == nil {
		cfg.TLS = serverConfig()
	}
	s, err := ListenHTTPS(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	return s
}

// httpClient speaks one HTTP version: h1, h2 or h3.
func httpClient(t testing.TB, version string) *http.Client {
	var rt http.RoundTripper
	switch version {
	case "h3":
		tr := &http3.Transport{TLSClientConfig: clientConfig("h3")}
		t.Cleanup(func() { _ = tr.Close() })
		rt = tr
	default:
		var p http.Protocols
		p.SetHTTP1(version == "h1")
		p.SetHTTP2(version == "h2")
		tr := &http.Transport{TLSClientConfig: clientConfig(), Protocols: &p, DisableCompression: true}
		t.Cleanup(tr.CloseIdleConnections)
		rt = tr
	}
	return &http.Client{Transport: rt}
}

// request is one HTTP request; do sends it.
type request struct {
	method, path string // the path with its parameters; GET by default
	header       http.Header
	body         []byte
}

func (r request) do(t testing.TB, client *http.Client, addr net.Addr) (*http.Response, []byte, error) {
	t.Helper()
	if r.method == "" {
		r.method = http.MethodGet
	}
	var body io.Reader
	if r.body != nil {
		body = bytes.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(within(t), r.method, "https://"+addr.String()+r.path, body)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func post(b []byte) request {
	return request{method: "POST", path: defaultPath, header: http.Header{"Content-Type": {mediaMessage}}, body: b}
}

func get(b []byte) request { return request{path: defaultPath + "?dns=" + b64(b)} }

func with(r request, key, value string) request {
	r.header = r.header.Clone()
	if r.header == nil {
		r.header = http.Header{}
	}
	r.header.Set(key, value)
	return r
}

// edited returns a query for hit.test with something done to it.
func edited(t testing.TB, edit func(b []byte) []byte) []byte { return edit(query(t, "hit", 0)) }

// plus returns m with one more entry.
func plus(m map[string]string, k, v string) map[string]string {
	c := maps.Clone(m)
	c[k] = v
	return c
}

type dohTest struct {
	name   string
	req    request
	status int
	header map[string]string
	rcode  int // of a 200
}

func dohTests(t *testing.T) []dohTest {
	hit := query(t, "hit", 0)
	long := make([]byte, wire.MaxMessage+1)
	dnsOK := map[string]string{"Content-Type": mediaMessage, "Cache-Control": "max-age=300"}
	dnsZero := map[string]string{"Content-Type": mediaMessage, "Cache-Control": "max-age=0"}
	text := map[string]string{"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
	return []dohTest{
		{"GET", get(hit), 200, dnsOK, 0},
		{"GET with another parameter", request{path: defaultPath + "?x=1&dns=" + b64(hit)}, 200, dnsOK, 0},
		{"GET accepting anything", with(get(hit), "Accept", "*/*"), 200, dnsOK, 0},
		{"GET of a message beats a wish for JSON", with(get(hit), "Accept", mediaJSON), 200, dnsOK, 0},
		{"POST", post(hit), 200, dnsOK, 0},
		{"POST with a media type parameter", with(post(hit), "Content-Type", "application/dns-message; charset=utf-8"), 200, dnsOK, 0},
		{"POST with a parameter without value", with(post(hit), "Content-Type", "application/dns-message; x"), 200, dnsOK, 0},
		{"POST in capitals", with(post(hit), "Content-Type", "Application/DNS-Message"), 200, dnsOK, 0},
		{"HEAD", request{method: "HEAD", path: defaultPath + "?dns=" + b64(hit)}, 200, dnsOK, 0},
		{"miss", get(query(t, "miss", 0)), 200, dnsOK, 0},
		{"negative answer has the SOA's time", get(query(t, "nxdomain", 0)), 200, plus(dnsOK, "Cache-Control", "max-age=60"), dns.RcodeNameError},
		{"no question is DNS's business", post(edited(t, func([]byte) []byte { return make([]byte, 12) })), 200, dnsZero, dns.RcodeFormatError},
		{"two OPT records too", post(twoOPT(t)), 200, dnsZero, dns.RcodeFormatError},
		{"another opcode too", post(edited(t, func(b []byte) []byte { b[2] |= 2 << 3; return b })), 200, dnsZero, dns.RcodeNotImplemented},

		{"no parameter", request{path: defaultPath}, 400, text, 0},
		{"empty parameter", request{path: defaultPath + "?dns="}, 400, text, 0},
		{"two parameters", request{path: defaultPath + "?dns=" + b64(hit) + "&dns=" + b64(hit)}, 400, text, 0},
		{"not base64", request{path: defaultPath + "?dns=***"}, 400, text, 0},
		{"base64 but not base64url", request{path: defaultPath + "?dns=%2B%2F" + b64(hit)}, 400, text, 0},
		{"padding", request{path: defaultPath + "?dns=" + url.QueryEscape(base64.URLEncoding.EncodeToString(hit))}, 400, text, 0},
		{"a line break in base64", request{path: defaultPath + "?dns=" + b64(hit) + "%0A"}, 400, text, 0},
		{"bad percent", request{path: defaultPath + "?dns=%zz"}, 400, text, 0},
		{"too short for a header", post([]byte{1, 2, 3}), 400, text, 0},
		{"empty body", post([]byte{}), 400, text, 0},
		{"a response", post(edited(t, func(b []byte) []byte { b[2] |= 0x80; return b })), 400, text, 0},
		{"cut in the question", post(edited(t, func(b []byte) []byte { return b[:len(b)-1] })), 400, text, 0},
		{"octets too many", post(edited(t, func(b []byte) []byte { return append(b, 0) })), 400, text, 0},
		{"records that are not there", post(edited(t, func(b []byte) []byte { b[11] = 1; return b })), 400, text, 0},
		{"a name that loops", post(edited(t, func(b []byte) []byte { b[12], b[13] = 0xc0, 12; return b })), 400, text, 0},

		{"another path", request{path: "/"}, 404, text, 0},
		{"a path below", request{path: defaultPath + "/?dns=" + b64(hit)}, 404, text, 0},
		{"another path with POST", request{method: "POST", path: "/other", body: hit}, 404, text, 0},
		{"PUT", request{method: "PUT", path: defaultPath, body: hit}, 405, plus(text, "Allow", "GET, HEAD, POST"), 0},
		{"OPTIONS", request{method: "OPTIONS", path: defaultPath}, 405, plus(text, "Allow", "GET, HEAD, POST"), 0},
		{"DELETE", request{method: "DELETE", path: defaultPath}, 405, plus(text, "Allow", "GET, HEAD, POST"), 0},
		{"POST too large", post(long), 413, text, 0},
		{"wrong media type", with(post(hit), "Content-Type", "application/json"), 415, plus(text, "Accept", mediaMessage), 0},
		{"no media type", request{method: "POST", path: defaultPath, body: hit}, 415, plus(text, "Accept", mediaMessage), 0},
		{"bad media type", with(post(hit), "Content-Type", ";;"), 415, plus(text, "Accept", mediaMessage), 0},
		{"content encoding", with(post(hit), "Content-Encoding", "gzip"), 415, plus(text, "Accept", mediaMessage), 0},
	}
}

func TestDoH(t *testing.T) {
	tests := dohTests(t)
	h := newFake()
	s := listenHTTPS(t, HTTPSConfig{Common: common(h), HTTP: []string{"h1", "h2", "h3"}})
	altSvc := fmt.Sprintf(`h3=":%d"; ma=86400`, addrPort(s.Addr()).Port())
	for _, version := range []string{"h1", "h2", "h3"} {
		client := httpClient(t, version)
		testDoH(t, client, s.Addr(), tests, version, altSvc)
	}
}

// testDoH sends the requests of dohTests.
func testDoH(t *testing.T, client *http.Client, addr net.Addr, tests []dohTest, version, altSvc string) {
	for _, tt := range tests {
		t.Run(version+"/"+tt.name, func(t *testing.T) {
			resp, body, err := tt.req.do(t, client, addr)
			if err != nil {
				t.Fatal(err)
			}
			want := plus(tt.header, "Alt-Svc", altSvc)
			if version == "h3" {
				want["Alt-Svc"] = ""
			}
			got := map[string]string{}
			for k := range want {
				got[k] = resp.Header.Get(k)
			}
			if resp.StatusCode != tt.status {
				t.Errorf("got status %d, want %d: %s", resp.StatusCode, tt.status, body)
			}
			if d := cmp.Diff(got, want); d != "" {
				t.Error(d)
			}
			if resp.Header.Get("Content-Length") == "" {
				t.Error("no Content-Length")
			}
			if tt.req.method == "HEAD" && len(body) == 0 || tt.status != 200 {
				return
			}
			var m dns.Msg
			if err := m.Unpack(body); err != nil || m.Rcode != tt.rcode {
				t.Errorf("got %v, %v, want rcode %d", &m, err, tt.rcode)
			}
		})
	}
}

func twoOPT(t *testing.T) []byte {
	m := new(dns.Msg).SetQuestion("hit.test.", dns.TypeA)
	m.SetEdns0(1232, false)
	m.Extra = append(m.Extra, m.Extra[0])
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDoHUnknownLength sends bodies whose length only their end tells.
func TestDoHUnknownLength(t *testing.T) {
	s := listenHTTPS(t, HTTPSConfig{Common: common(newFake()), HTTP: []string{"h1", "h2", "h3"}})
	for _, version := range []string{"h1", "h2", "h3"} {
		t.Run(version, func(t *testing.T) {
			client := httpClient(t, version)
			for size, want := range map[int]int{wire.MaxMessage: 400, wire.MaxMessage + 1: 413} {
				body := io.NopCloser(io.LimitReader(zeros{}, int64(size))) // chunked: without a Content-Length
				req, err := http.NewRequestWithContext(within(t), "POST", "https://"+s.Addr().String()+defaultPath, body)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Content-Type", mediaMessage)
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				_ = resp.Body.Close()
				if resp.StatusCode != want {
					t.Errorf("%d octets: got %d, want %d", size, resp.StatusCode, want)
				}
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	// QR=1: not a query, whatever its length.
	for i := range b {
		b[i] = 0x80
	}
	return len(b), nil
}

func TestDoHHeaderTooLarge(t *testing.T) {
	s := listenHTTPS(t, HTTPSConfig{Common: common(newFake()), HTTP: []string{"h1", "h2", "h3"}})
	for _, version := range []string{"h1", "h2", "h3"} {
		resp, _, err := request{path: defaultPath + "?dns=" + strings.Repeat("A", 100_000)}.do(t, httpClient(t, version), s.Addr())
		if err == nil && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%s: got %v", version, resp.Status)
		}
		// The listener serves on.
		if resp, _, err = get(query(t, "hit", 0)).do(t, httpClient(t, version), s.Addr()); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %v, %v", version, resp, err)
		}
	}
}

func TestDoHQueryFields(t *testing.T) {
	h := newFake()
	cfg := HTTPSConfig{Common: common(h), HTTP: []string{"h1", "h2", "h3"}, Path: "/q"}
	cfg.Addr = netip.MustParseAddrPort("[::]:0")
	s := listenHTTPS(t, cfg)
	for i, version := range []string{"h1", "h2", "h3"} {
		addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(addrPort(s.Addr()).Port())}
		req := request{path: "/q?dns=" + b64(query(t, "hit", 0))}
		if _, _, err := req.do(t, httpClient(t, version), addr); err != nil {
			t.Fatal(err)
		}
		q := h.queries()[i]
		want := wire.DoH
		if version == "h3" {
			want = wire.DoH3
		}
		if q.Transport != want || q.Listener != "test" || q.Local.String() != addr.String() ||
			q.Client.Addr().String() != "127.0.0.1" || q.Client.Port() == 0 || q.Received == 0 {
			t.Errorf("%s: got %+v", version, q)
		}
	}
}

// TestDoHNoAnswer has the Handler drop, fail and panic: the client gets no response, the listener serves on, and only the
// panics are logged.
func TestDoHNoAnswer(t *testing.T) {
	var log lockedBuilder
	cfg := HTTPSConfig{Common: common(newFake()), HTTP: []string{"h1", "h2", "h3"}}
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	s := listenHTTPS(t, cfg)
	for _, version := range []string{"h1", "h2", "h3"} {
		client := httpClient(t, version)
		for _, name := range []string{"drop", "error", "panic-hit", "panic-miss"} {
			if resp, _, err := post(query(t, name, 0)).do(t, client, s.Addr()); err == nil {
				t.Errorf("%s %s: got %v, want no response", version, name, resp.Status)
			}
		}
		if resp, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %v, %v", version, resp, err)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 6 || strings.Count(log.String(), "panic while answering a query") != 6 {
		t.Errorf("%d lines, want 6 about panics:\n%s", n, log.String())
	}
}

type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestDoHSlowHoldsNobody(t *testing.T) {
	for _, version := range []string{"h2", "h3"} { // h1 has one request at a time
		t.Run(version, func(t *testing.T) {
			h := newFake()
			s := listenHTTPS(t, HTTPSConfig{Common: common(h), HTTP: []string{"h1", "h2", "h3"}})
			client := httpClient(t, version)
			slow := make(chan error, 1)
			go func() {
				_, _, err := get(query(t, "slow", 0)).do(t, client, s.Addr())
				slow <- err
			}()
			receive(t, h.waiting)
			if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err != nil {
				t.Fatal(err)
			}
			close(h.gate)
			if err := receive(t, slow); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDoHDrain(t *testing.T) {
	for _, version := range []string{"h1", "h2", "h3"} {
		t.Run(version, func(t *testing.T) {
			h := newFake()
			s := listenHTTPS(t, HTTPSConfig{Common: common(h), HTTP: []string{"h1", "h2", "h3"}})
			idle := httpClient(t, version)
			if _, _, err := get(query(t, "hit", 0)).do(t, idle, s.Addr()); err != nil {
				t.Fatal(err)
			}
			slow := make(chan error, 1)
			client := httpClient(t, version)
			go func() {
				resp, body, err := get(query(t, "slow", 0)).do(t, client, s.Addr())
				if err == nil && (resp.StatusCode != 200 || len(body) < 12) {
					err = errors.New(resp.Status)
				}
				slow <- err
			}()
			receive(t, h.waiting)
			done := shutdown(within(t), s)
			close(h.gate)
			if err := receive(t, slow); err != nil {
				t.Errorf("the query in flight: %v", err)
			}
			if err := receive(t, done); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			if version == "h3" {
				return // a dial into the void takes 5 s to fail
			}
			if _, _, err := get(query(t, "hit", 0)).do(t, idle, s.Addr()); err == nil {
				t.Error("an answer after Shutdown")
			}
		})
	}
}

func TestDoHShutdownLosesPatience(t *testing.T) {
	for _, version := range []string{"h1", "h2", "h3"} {
		t.Run(version, func(t *testing.T) {
			h := newFake()
			s := listenHTTPS(t, HTTPSConfig{Common: common(h), HTTP: []string{"h1", "h2", "h3"}})
			slow := make(chan error, 1)
			client := httpClient(t, version)
			go func() {
				_, _, err := get(query(t, "slow", 0)).do(t, client, s.Addr())
				slow <- err
			}()
			receive(t, h.waiting)
			ctx, cancel := context.WithCancel(context.Background())
			done := shutdown(ctx, s)
			cancel()
			if err := receive(t, done); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			receive(t, s.done)
			if err := receive(t, slow); err == nil {
				t.Error("an answer that there is none to")
			}
		})
	}
}

// TestHTTPVersions offers versions one by one, and asks each listener by all of them.
func TestHTTPVersions(t *testing.T) {
	for _, offered := range [][]string{{"h1"}, {"h2"}, {"h3"}, {"h1", "h2"}, {"h2", "h3"}, nil} {
		t.Run(fmt.Sprint(offered), func(t *testing.T) {
			s := listenHTTPS(t, HTTPSConfig{Common: common(newFake()), HTTP: offered})
			if offered == nil {
				offered = []string{"h1", "h2"}
			}
			for _, version := range []string{"h1", "h2"} {
				resp, _, err := get(query(t, "hit", 0)).do(t, httpClient(t, version), s.Addr())
				if want := slices.Contains(offered, version); (err == nil) != want {
					t.Errorf("%s: %v, want success %v", version, err, want)
				} else if err == nil && (resp.Header.Get("Alt-Svc") != "") != slices.Contains(offered, "h3") {
					t.Errorf("%s: Alt-Svc is %q", version, resp.Header.Get("Alt-Svc"))
				}
			}
			if slices.Contains(offered, "h3") {
				resp, _, err := get(query(t, "hit", 0)).do(t, httpClient(t, "h3"), s.Addr())
				if err != nil || resp.ProtoMajor != 3 {
					t.Errorf("h3: %v, %v", resp, err)
				}
			}
			if !slices.Contains(offered, "h1") && slices.Contains(offered, "h2") {
				// Without ALPN a client would be speaking HTTP/1.1.
				c, err := tls.Dial("tcp", s.Addr().String(), clientConfig())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				if b, _ := io.ReadAll(c); len(b) != 0 {
					t.Errorf("got %q over HTTP/1.1", b)
				}
			}
		})
	}
}

func TestDoHLimits(t *testing.T) {
	cfg := HTTPSConfig{Common: common(newFake()), HTTP: []string{"h1", "h2", "h3"}}
	cfg.PerClient = 1
	s := listenHTTPS(t, cfg)
	for _, version := range []string{"h1", "h2", "h3"} {
		first, second := httpClient(t, version), httpClient(t, version)
		if _, _, err := get(query(t, "hit", 0)).do(t, first, s.Addr()); err != nil {
			t.Fatalf("%s: %v", version, err)
		}
		if resp, _, err := get(query(t, "hit", 0)).do(t, second, s.Addr()); err == nil {
			t.Errorf("%s: got %v on a connection over the limit", version, resp.Status)
		}
		if tr, ok := first.Transport.(*http3.Transport); ok {
			_ = tr.Close()
		} else {
			first.CloseIdleConnections()
		}
		for s.ln.limit.open() != 0 {
			<-time.After(time.Millisecond)
		}
	}
}

// TestHTTPSSideFails takes the UDP socket away: Serve reports it and the TCP side does not live on alone.
func TestHTTPSSideFails(t *testing.T) {
	s, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: common(newFake()), TLS: serverConfig(), HTTP: []string{"h1", "h3"}})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	client := httpClient(t, "h1")
	if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err != nil {
		t.Fatal(err)
	}
	_ = s.udp.Close()
	if err := receive(t, served); err == nil {
		t.Error("no error")
	}
	if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err == nil {
		t.Error("an answer from a listener that has ended")
	}
	if err := s.Shutdown(within(t)); err != nil {
		t.Errorf("Shutdown afterwards: %v", err)
	}
	if s.Name() != "test" {
		t.Errorf("name %q", s.Name())
	}
	noLeaks(t)
}

func TestReadable(t *testing.T) {
	header := func(counts ...byte) []byte {
		b := make([]byte, 12)
		for i, c := range counts {
			b[5+2*i] = c
		}
		return b
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	question := []byte("\x01a\x00\x00\x01\x00\x01")
	record := []byte("\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\x01\x02\x03\x04")
	tests := []struct {
		name string
		msg  []byte
		want bool
	}{
		{"header", header(), true},
		{"question", join(header(1), question), true},
		{"two questions", join(header(2), question, question), true},
		{"a record in each section", join(header(1, 1, 1, 1), question, record, record, record), true},
		{"a question is missing", join(header(2), question), false},
		{"a record is missing", join(header(1, 2), question, record), false},
		{"too many octets", join(header(1), question, []byte{0}), false},
		{"type is cut", join(header(1), question[:5]), false},
		{"record is cut", join(header(1, 1), question, record[:8]), false},
		{"data is cut", join(header(1, 1), question, record[:14]), false},
		{"name is cut", join(header(1), []byte("\x05a")), false},
		{"pointer is cut", join(header(1), []byte("\xc0")), false},
		{"reserved label type", join(header(1), []byte("\x40\x00\x00\x00\x00\x00")), false},
	}
	for _, tt := range tests {
		if got := readable(tt.msg); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestQUICAdmission(t *testing.T) {
	limits := Limits{Total: 8}.withDefaults()
	l := &quicListener{limit: newConnLimit(limits)}
	ctx, cancel := context.WithCancel(t.Context())
	for i := range 8 {
		if got, want := l.verify(nil), i >= 2; got != want {
			t.Errorf("with %d connections: verify %v, want %v", i, got, want)
		}
		if _, err := l.admit(ctx, &quic.ClientInfo{}); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if _, err := l.admit(ctx, &quic.ClientInfo{}); err == nil {
		t.Error("a connection over the limit")
	}
	cancel()
	for l.open.Load() != 0 {
		<-time.After(time.Millisecond)
	}
}

type jsonTest struct {
	params string
	accept string
	status int
	want   string
	maxAge string
}

func jsonTests() []jsonTest {
	const ok = `{"Status":0,"TC":false,"RD":true,"RA":true,"AD":%v,"CD":%v,"Question":[{"name":"%s","type":%d}]%s}`
	a := func(name string) string {
		return `,"Answer":[{"name":"` + name + `","type":1,"TTL":300,"data":"192.0.2.1"}]`
	}
	return []jsonTest{
		{"name=a.test", "", 200, fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=a.test.", mediaJSON, 200, fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=A.Test&type=a", "", 200, fmt.Sprintf(ok, false, false, "A.Test.", 1, a("A.Test.")), "300"},
		{"name=a.test&type=1", "text/html, application/dns-json;q=0.9", 200, fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=a.test&type=TYPE1&ct=x&edns_client_subnet=0.0.0.0/0&random_padding=zzz", "", 200,
			fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=a.test&cd=1&do=TRUE", "", 200, fmt.Sprintf(ok, true, true, "a.test.", 1, a("a.test.")), "300"},
		{"name=a.test&cd=false&do=0", "", 200, fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=a.test&cd=&do=", "", 200, fmt.Sprintf(ok, false, false, "a.test.", 1, a("a.test.")), "300"},
		{"name=txt.test&type=txt", "", 200, fmt.Sprintf(ok, false, false, "txt.test.", 16,
			`,"Answer":[{"name":"txt.test.","type":16,"TTL":30,"data":"\"one \\\"two\\\"\" \"three\""}]`), "30"},
		{"name=mx.test&type=MX", "", 200, fmt.Sprintf(ok, false, false, "mx.test.", 15,
			`,"Answer":[{"name":"mx.test.","type":15,"TTL":30,"data":"10 mail.mx.test."}]`), "30"},
		{"name=https.test&type=HTTPS", "", 200, fmt.Sprintf(ok, false, false, "https.test.", 65,
			`,"Answer":[{"name":"https.test.","type":65,"TTL":30,"data":"1 . alpn=\"h2\""}]`), "30"},
		{"name=unknown.test&type=TYPE65280", "", 200, fmt.Sprintf(ok, false, false, "unknown.test.", 65280,
			`,"Answer":[{"name":"unknown.test.","type":65280,"TTL":30,"data":"\\# 3 010203"}]`), "30"},
		{"name=.&type=NS", "", 200, fmt.Sprintf(ok, false, false, ".", 2, ""), "0"},
		{"name=nx.test", "", 200, strings.Replace(fmt.Sprintf(ok, false, false, "nx.test.", 1,
			`,"Authority":[{"name":"test.","type":6,"TTL":3600,"data":"ns.test. host.test. 1 2 3 4 60"}]`+
				`,"Comment":["EDE(22): No Reachable Authority (tried <all>)"]`+
				`,"extended_dns_errors":[{"info_code":22,"extra_text":"tried <all>"}]`), `"Status":0`, `"Status":3`, 1), "60"},
		{"name=badvers.test", "", 200, strings.Replace(fmt.Sprintf(ok, false, false, "badvers.test.", 1, ""),
			`"Status":0`, `"Status":16`, 1), "0"},

		{"", mediaJSON, 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"type=A", mediaJSON, 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=a..test", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=.test", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=a%20b", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=m%C3%BCller.test", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=" + strings.Repeat("a", 64) + ".test", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=" + strings.Repeat("a.", 128) + "test", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=%5C", "", 400, `{"error":"name is missing or not a domain name"}`, ""},
		{"name=a.test&name=b.test", "", 400, `{"error":"a parameter is there more than once"}`, ""},
		{"name=a.test&type=NOTYPE", "", 400, `{"error":"type is not a record type"}`, ""},
		{"name=a.test&type=0", "", 400, `{"error":"type is not a record type"}`, ""},
		{"name=a.test&type=none", "", 400, `{"error":"type is not a record type"}`, ""},
		{"name=a.test&type=65536", "", 400, `{"error":"type is not a record type"}`, ""},
		{"name=a.test&type=-1", "", 400, `{"error":"type is not a record type"}`, ""},
		{"name=a.test&do=yes", "", 400, `{"error":"do and cd are 0, 1, false or true"}`, ""},
		{"name=a.test&cd=2", "", 400, `{"error":"do and cd are 0, 1, false or true"}`, ""},
	}
}

func TestJSON(t *testing.T) {
	h := &jsonFake{}
	s := listenHTTPS(t, HTTPSConfig{Common: common(h)})
	client := httpClient(t, "h2")
	for _, tt := range jsonTests() {
		t.Run(tt.params, func(t *testing.T) {
			req := request{path: defaultPath + "?" + tt.params}
			if tt.accept != "" {
				req = with(req, "Accept", tt.accept)
			}
			resp, body, err := req.do(t, client, s.Addr())
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status || resp.Header.Get("Content-Type") != mediaJSON {
				t.Errorf("got %s, %s", resp.Status, resp.Header.Get("Content-Type"))
			}
			cache := "no-store"
			if tt.maxAge != "" {
				cache = "max-age=" + tt.maxAge
			}
			if got := resp.Header.Get("Cache-Control"); got != cache {
				t.Errorf("got Cache-Control %q, want %q", got, cache)
			}
			var got, want any
			if err := json.Unmarshal(body, &got); err != nil {
				t.Fatalf("%v: %s", err, body)
			}
			if err := json.Unmarshal([]byte(tt.want), &want); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(got, want); d != "" {
				t.Error(d)
			}
		})
	}
}

// jsonFake answers as the names of TestJSON want it. AD in its answers is DO of the question, so that both ways of a
// flag are seen.
type jsonFake struct{ surprised }

func (*jsonFake) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	var m dns.Msg
	if err := m.Unpack(q.Raw); err != nil {
		panic(err)
	}
	if !q.AD() || !q.RD() || !q.EDNS {
		panic("a JSON query has to have AD, RD and EDNS")
	}
	name := m.Question[0].Name
	m.SetRcode(&m, dns.RcodeSuccess)
	m.RecursionAvailable, m.AuthenticatedData, m.CheckingDisabled = true, q.DO, q.CD()
	m.Extra = nil
	rr := func(s string) {
		r, err := dns.NewRR(s)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, r)
	}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	m.Extra = []dns.RR{opt}
	switch firstLabel(q) {
	case "a":
		rr(name + " 300 A 192.0.2.1")
	case "txt":
		rr(name + ` 30 TXT "one \"two\"" "three"`)
	case "mx":
		rr(name + " 30 MX 10 mail." + name)
	case "https":
		rr(name + ` 30 HTTPS 1 . alpn="h2"`)
	case "unknown":
		m.Answer = []dns.RR{&dns.RFC3597{Hdr: dns.RR_Header{Name: name, Rrtype: 65280, Class: 1, Ttl: 30}, Rdata: "010203"}}
	case "nx":
		rr("test. 3600 SOA ns.test. host.test. 1 2 3 4 60")
		m.Ns, m.Answer, m.Rcode = m.Answer, nil, dns.RcodeNameError
		opt.Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeNoReachableAuthority, ExtraText: "tried <all>"}}
	case "badvers":
		m.Rcode = dns.RcodeBadVers
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return append(dst, b...), wire.Answered
}

func (*jsonFake) Resolve(context.Context, []byte, *wire.Query) ([]byte, error) {
	return nil, errors.New("nobody should come here")
}
