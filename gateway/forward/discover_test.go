package forward

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/quic-go/quic-go/http3"
)

// records reads records in presentation form.
func records(text ...string) (all []dns.RR) {
	for _, s := range text {
		all = append(all, must(dns.NewRR(s)))
	}
	return all
}

// plainResolver is an unencrypted resolver on loopback with some records of its own.
type plainResolver struct {
	*fake
	mu            sync.Mutex
	answers, glue []dns.RR
	rcode         int
	mute          uint16 // a type whose questions get no answer
	questions     []string
}

func newPlainResolver(t testing.TB, text ...string) *plainResolver {
	p := &plainResolver{answers: records(text...)}
	p.fake = newFake(t, "udp", "plain", func(f *fake) { f.answer = p.respond })
	return p
}

func (p *plainResolver) respond(m *dns.Msg) *dns.Msg {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := m.Question[0]
	p.questions = append(p.questions, q.Name+" "+dns.TypeToString[q.Qtype])
	if q.Qtype == p.mute {
		return nil
	}
	r := new(dns.Msg)
	r.SetRcode(m, p.rcode)
	for _, rr := range p.answers {
		if h := rr.Header(); strings.EqualFold(h.Name, q.Name) && h.Rrtype == q.Qtype {
			r.Answer = append(r.Answer, rr)
		}
	}
	r.Extra = append(r.Extra, p.glue...)
	return r
}

func (p *plainResolver) set(text ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers = records(text...)
}

// wasAsked returns the questions, each once.
func (p *plainResolver) wasAsked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := slices.Clone(p.questions)
	slices.Sort(all)
	return slices.Compact(all)
}

// upstream returns p as it is given to a group.
func (p *plainResolver) upstream() Server {
	return Server{URL: "discover://127.0.0.1", Scheme: "discover", Host: "127.0.0.1", Port: p.server.Port, Roots: pki().roots}
}

// designate returns a record for f, a server of a fake.
func designate(priority int, f *fake) string {
	alpn := map[string]string{"tls": "dot", "https": "h2", "h3": "h3", "quic": "doq"}[f.server.Scheme]
	path := ""
	if alpn[0] == 'h' {
		path = " dohpath=/dns-query{?dns}"
	}
	return fmt.Sprintf("_dns.resolver.arpa. 300 SVCB %d dns.test. alpn=%s port=%d ipv4hint=127.0.0.1%s", priority, alpn,
		f.server.Port, path)
}

// newDoHByAddress is newFake for DoH under an address: the URI's host is the unencrypted resolver's (RFC 9462, section 6.3).
func newDoHByAddress(t *testing.T, scheme string) *fake {
	f := newFake(t, "", scheme)
	f.server.Scheme = scheme
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if want := fmt.Sprintf("127.0.0.1:%d", f.server.Port); r.Host != want || r.TLS.ServerName != "" {
			t.Errorf("got authority %q and SNI %q, want %q and none", r.Host, r.TLS.ServerName, want)
		}
		r.Host = "dns.test"
		f.ServeHTTP(w, r)
	})
	if scheme == "https" {
		s := httptest.NewUnstartedServer(h)
		s.EnableHTTP2, s.TLS = true, withoutOthers(f.tlsConfig("h2"))
		s.Config.ErrorLog = quietLog
		s.StartTLS()
		t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
		f.server.Port = uint16(s.Listener.Addr().(*net.TCPAddr).Port)
		return f
	}
	conn := must(net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}))
	s := &http3.Server{Handler: h, TLSConfig: http3.ConfigureTLSConfig(f.tlsConfig("h3"))}
	f.wg.Go(func() { s.Serve(conn) })
	t.Cleanup(func() { s.Close(); conn.Close() })
	f.server.Port = uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	return f
}

const discoveryQuestion = "_dns.resolver.arpa. SVCB"

func TestDiscover(t *testing.T) {
	for _, scheme := range []string{"tls", "https", "h3", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			var f *fake
			if scheme == "https" || scheme == "h3" {
				f = newDoHByAddress(t, scheme)
			} else {
				f = newFake(t, scheme, scheme)
			}
			p := newPlainResolver(t, designate(1, f))
			s := p.upstream()
			s.Pins = [][32]byte{sha256.Sum256(pki().good.Leaf.RawSubjectPublicKeyInfo)}
			c := newTestClient(t, s)
			if got := c.Address(); got != s.URL {
				t.Errorf("got address %q, want %q", got, s.URL)
			}
			var wg sync.WaitGroup
			for range 20 { // one discovery for all
				wg.Go(func() {
					if resp, err := c.Exchange(question("name.test.")); err != nil || text(resp) != scheme {
						t.Errorf("got %v, %v", resp, err)
					}
				})
			}
			wg.Wait()
			if diff := cmp.Diff(p.wasAsked(), []string{discoveryQuestion}); diff != "" || p.asked.Load() != 1 {
				t.Errorf("the plain resolver was asked %d times:\n%s", p.asked.Load(), diff)
			}
		})
	}
}

// TestDiscoverVerifies holds that no designated resolver is asked whose certificate is not for the address, or not sound,
// and that then nobody is asked, in plain least of all. The address is a private one: there is no opportunistic discovery.
func TestDiscoverVerifies(t *testing.T) {
	tests := []struct {
		name string
		cert *tls.Certificate
		pin  byte
		want string
	}{
		{"wrong address", &pki().otherName, 0, `certificate is for "other.test", not for "127.0.0.1"`},
		{"expired", &pki().expired, 0, "certificate expired on 2"},
		{"unknown authority", &pki().stranger, 0, "unknown authority"},
		{"wrong pin", &pki().good, 1, "no pin matches"},
	}
	for _, scheme := range []string{"tls", "https", "h3", "quic"} {
		for _, tt := range tests {
			t.Run(scheme+"/"+tt.name, func(t *testing.T) {
				f := newFake(t, scheme, "a", func(f *fake) { f.cert.Store(tt.cert) })
				p := newPlainResolver(t, designate(1, f))
				s := p.upstream()
				if tt.pin != 0 {
					s.Pins = [][32]byte{{tt.pin}}
				}
				g := newTestGroup(t, Config{Tiers: [][]Server{{s}}})
				for range 3 {
					_, err := g.Exchange(t.Context(), question("name.test."))
					if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "dns.test") {
						t.Errorf("got %v, want it to say %q and where", err, tt.want)
					}
				}
				if n := f.asked.Load(); n != 0 {
					t.Errorf("the impostor was asked %d questions", n)
				}
				if diff := cmp.Diff(p.wasAsked(), []string{discoveryQuestion}); diff != "" {
					t.Errorf("what the plain resolver was asked: got, want:\n%s", diff)
				}
			})
		}
	}
}

func TestDiscoverNothing(t *testing.T) {
	const none = "127.0.0.1 designates no encrypted resolver (RFC 9462)"
	svcb := func(rest string) string { return "_dns.resolver.arpa. 300 SVCB " + rest }
	tests := []struct {
		name   string
		answer []string
		rcode  int
		want   string
		also   []string // questions besides the one for SVCB
	}{
		{"no record", nil, 0, none, nil},
		{"no such name", nil, dns.RcodeNameError, none, nil},
		{"SERVFAIL", nil, dns.RcodeServerFailure, "SERVFAIL", nil},
		{"unknown mandatory", []string{svcb("1 dns.test. mandatory=alpn,key667 alpn=dot key667=x ipv4hint=127.0.0.1")}, 0, none, nil},
		{"no own name", []string{svcb("1 . alpn=dot ipv4hint=127.0.0.1")}, 0, none, nil},
		{"nobody's name", []string{svcb("1 a.Resolver.arpa. alpn=dot")}, 0, none, nil},
		{"alias to nothing", []string{svcb("0 ."), svcb("1 dns.test. alpn=dot ipv4hint=127.0.0.1")}, 0, none, nil},
		{"alias to itself", []string{svcb("0 _dns.resolver.arpa.")}, 0, none, nil},
		{"endless aliases", []string{svcb("0 a.test."), "a.test. 300 SVCB 0 b.test.", "b.test. 300 SVCB 0 a.test."}, 0,
			"more than 8 aliases", []string{"a.test. SVCB", "b.test. SVCB"}},
		{"no address", []string{svcb("1 dns.test. alpn=dot")}, 0, "no address for what 127.0.0.1 designates: the name has none",
			[]string{"dns.test. A", "dns.test. AAAA"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlainResolver(t, tt.answer...)
			p.mu.Lock()
			p.rcode = tt.rcode
			p.mu.Unlock()
			c := newTestClient(t, p.upstream())
			for range 2 {
				_, err := c.Exchange(question("name.test."))
				if kindOf(err) != KindBootstrap || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want kind bootstrap with %q", err, tt.want)
				}
			}
			if diff := cmp.Diff(p.wasAsked(), append([]string{discoveryQuestion}, tt.also...)); diff != "" {
				t.Errorf("what the plain resolver was asked: got, want:\n%s", diff)
			}
		})
	}
}

// TestDiscoverWhere holds the ways in which a designated resolver is found: aliases, hints, glue and questions.
func TestDiscoverWhere(t *testing.T) {
	f := newFake(t, "tls", "a")
	params := fmt.Sprintf(" alpn=dot port=%d", f.server.Port)
	const svcb, address = "_dns.resolver.arpa. 300 SVCB ", "dns.test. 300 A 127.0.0.1"
	asked := []string{discoveryQuestion, "dns.test. A", "dns.test. AAAA"}
	tests := []struct {
		name    string
		answers []string
		glue    []string
		mute    uint16
		want    []string // questions that the plain resolver got
	}{
		{"hint", []string{svcb + "1 dns.test." + params + " ipv4hint=127.0.0.1"}, nil, 0, asked[:1]},
		{"glue", []string{svcb + "1 dns.test." + params}, []string{"DNS.test. 300 A 127.0.0.1", "other.test. 60 A 127.0.0.2"}, 0,
			asked[:1]},
		{"question", []string{svcb + "1 dns.test." + params, address}, nil, 0, asked},
		{"one family silent", []string{svcb + "1 dns.test." + params, address}, nil, dns.TypeAAAA, asked},
		{"alias", []string{svcb + "0 b.test.", "b.test. 300 SVCB 0 a.test.", "a.test. 300 SVCB 1 dns.test." + params, address},
			nil, 0, []string{discoveryQuestion, "a.test. SVCB", "b.test. SVCB", "dns.test. A", "dns.test. AAAA"}},
		{"alias to the resolver itself", []string{svcb + "0 dns.test.", "dns.test. 300 SVCB 1 ." + params, address}, nil, 0,
			append(slices.Clone(asked), "dns.test. SVCB")},
		{"unknown keys that are not mandatory", []string{svcb + "1 dns.test." + params + " ipv4hint=127.0.0.1 key667=x"}, nil, 0,
			asked[:1]},
		{"one for others", []string{svcb + "1 new.test. mandatory=alpn,key667 alpn=dot key667=x",
			svcb + "2 dns.test." + params + " ipv4hint=127.0.0.1"}, nil, 0, asked[:1]},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlainResolver(t, tt.answers...)
			p.mu.Lock()
			p.glue, p.mute = records(tt.glue...), tt.mute
			p.mu.Unlock()
			c := must(newClient(p.upstream(), environment{timeout: DefaultDeadline}))
			defer c.Close()
			if resp, err := c.Exchange(question("name.test.")); err != nil || text(resp) != "a" {
				t.Errorf("got %v, %v", resp, err)
			}
			if diff := cmp.Diff(p.wasAsked(), tt.want); diff != "" {
				t.Errorf("what the plain resolver was asked: got, want:\n%s", diff)
			}
		})
	}
}

func TestReadDesignation(t *testing.T) {
	tests := []struct {
		record string
		want   []string
	}{
		{"1 dns.test. alpn=dot", []string{"tls://dns.test 853"}},
		{"1 DNS.test. alpn=doq port=784 ipv4hint=192.0.2.2,192.0.2.1 ipv6hint=2001:db8::1",
			[]string{"quic://dns.test:784 784 192.0.2.1 192.0.2.2 2001:db8::1"}},
		{"1 dns.test. alpn=h3,h2,dot dohpath=/q{?dns}", []string{"h3://dns.test/q 443", "https://dns.test/q 443",
			"tls://dns.test 853"}},
		{"1 dns.test. alpn=h2,dot", []string{"tls://dns.test 853"}}, // no dohpath
		{"1 dns.test. alpn=h2 dohpath=/q", nil},
		{"1 dns.test. alpn=h2 dohpath=q{?dns}", nil},
		{"1 dns.test. alpn=h2 dohpath=/{?dns}", []string{"https://dns.test/ 443"}},
		{"1 dns.test. alpn=h2 dohpath=/a/{+x,dns}b", []string{"https://dns.test/a/b 443"}},
		{"1 dns.test. alpn=h2 dohpath=/q?a=b{&dns}", nil},
		{"1 dns.test. alpn=h2 dohpath=/q{?dns", nil},
		{"1 dns.test. alpn=h2 dohpath=/%zz{?dns}", nil},
		{"1 dns.test. alpn=http/1.1,foo", nil},
		{"1 dns.test.", nil},
		{"1 dns.test. alpn=dot port=0", nil},
		{"1 dns.test. alpn=dot ipv4hint=0.0.0.0,224.0.0.1,192.0.2.1", []string{"tls://dns.test 853 192.0.2.1"}},
		{"1 dns.test. alpn=dot mandatory=port", nil}, // and there is none
		{"1 dns.test. alpn=dot port=853 mandatory=alpn,port", []string{"tls://dns.test 853"}},
		{"1 dns.test. alpn=dot ech=AAAA", []string{"tls://dns.test 853"}},
		{"1 dns.test. alpn=dot ech=AAAA mandatory=ech", nil},
		{`1 d\ s.test. alpn=dot`, nil},
		{"1 . alpn=dot", nil},
		{"0 dns.test. alpn=dot", nil},
	}
	for _, tt := range tests {
		var got []string
		for _, d := range readDesignation(must(dns.NewRR("_dns.resolver.arpa. SVCB " + tt.record)).(*dns.SVCB)) {
			s := fmt.Sprint(d, " ", d.port)
			for _, a := range d.addrs {
				s += " " + a.String()
			}
			got = append(got, s)
		}
		if diff := cmp.Diff(got, tt.want); diff != "" {
			t.Errorf("%s: got, want:\n%s", tt.record, diff)
		}
	}
}

// FuzzReadDesignation holds that whatever an answer says, what is made of it can be dialled.
func FuzzReadDesignation(f *testing.F) {
	for _, s := range []string{"1 dns.test. alpn=dot", "0 dns.test.",
		"1 dns.test. alpn=h2,h3 dohpath=/q{?dns} mandatory=alpn port=1",
		"1 a.resolver.arpa. alpn=doq ipv4hint=192.0.2.1 ipv6hint=::"} {
		m := &dns.Msg{Answer: records("_dns.resolver.arpa. 300 SVCB " + s)}
		f.Add(must(m.Pack()))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		m := new(dns.Msg)
		if m.Unpack(msg) != nil {
			return
		}
		for _, rr := range m.Answer {
			svcb, ok := rr.(*dns.SVCB)
			if !ok {
				continue
			}
			for _, d := range readDesignation(svcb) {
				doh := d.scheme == "https" || d.scheme == "h3"
				if d.scheme == "" || d.port == 0 || d.name == "" || strings.HasSuffix(d.name, "resolver.arpa") ||
					doh != strings.HasPrefix(d.path, "/") {
					t.Errorf("%s gives %+v", svcb, d)
				}
				if doh && dohURL(Server{VerifyName: "192.0.2.1", Port: d.port, Path: d.path}).Path == "" {
					t.Errorf("no URL for %q", d.path)
				}
			}
		}
	})
}

// TestDiscoverNext holds that another designated resolver answers within the time when the first cannot be reached, and
// that the first is left alone for a while then.
func TestDiscoverNext(t *testing.T) {
	for name, fail := range map[string]func(*fake){
		"silent":          func(f *fake) { f.fault.Store(silent) },
		"hang":            func(f *fake) { f.fault.Store(hang) },
		"bad certificate": func(f *fake) { f.fault.Store(badCert) },
		"wrong address":   func(f *fake) { f.cert.Store(&pki().otherName) },
		"refused":         nil,
	} {
		t.Run(name, func(t *testing.T) {
			first, second := newFake(t, "tls", "first"), newFake(t, "quic", "second")
			if fail == nil {
				first.server.Port = deadPort("tcp")
			} else {
				fail(first)
			}
			p := newPlainResolver(t, designate(2, second), designate(1, first))
			c := must(newClient(p.upstream(), environment{timeout: DefaultDeadline}))
			defer c.Close()
			for i := range 3 {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				start := time.Now()
				a, err := c.(*discoverClient).ExchangeContext(ctx, question("name.test."))
				cancel()
				if err != nil || text(a) != "second" {
					t.Fatalf("got %v, %v", a, err)
				}
				if d := time.Since(start); i > 0 && d > 500*time.Millisecond {
					t.Errorf("the next question took %v", d)
				}
			}
		})
	}
}

func TestDiscoverSilent(t *testing.T) {
	p := newPlainResolver(t)
	p.fault.Store(silent)
	c := must(newClient(p.upstream(), environment{timeout: time.Second}))
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := c.ask(ctx, rootQuery); kindOf(err) != KindTimeout || time.Since(start) > 700*time.Millisecond {
		t.Errorf("got %v after %v, want a timeout in time", err, time.Since(start))
	}
	_, err := c.Exchange(question("name.test.")) // its own limit is that of the discovery
	if kind := kindOf(err); kind != KindTimeout && kind != KindBootstrap {
		t.Errorf("got %v", err)
	}
	if _, err := c.ask(t.Context(), rootQuery); kindOf(err) != KindBootstrap || !strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("got %v, want kind bootstrap that says why", err)
	}
}

// TestDiscoverChange holds that a new designation is put to use, while a question to the old one still gets its answer.
func TestDiscoverChange(t *testing.T) {
	before, after, kept := newFake(t, "tls", "before"), newFake(t, "tls", "after"), newFake(t, "tls", "kept")
	p := newPlainResolver(t, designate(1, before), designate(2, kept))
	c := newTestClient(t, p.upstream()).(*discoverClient)
	if resp, err := c.Exchange(question("name.test.")); err != nil || text(resp) != "before" {
		t.Fatalf("got %v, %v", resp, err)
	}
	before.delay.Store(int64(500 * time.Millisecond))
	slow := make(chan error, 1)
	go func() {
		resp, err := c.Exchange(question("slow.test."))
		if err == nil && text(resp) != "before" {
			err = errors.New(text(resp))
		}
		slow <- err
	}()
	for before.asked.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	p.set(designate(1, after), designate(2, kept))
	c.mu.Lock()
	old := c.designated
	c.expires = time.Now()
	c.mu.Unlock()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		resp, err := c.Exchange(question("name.test."))
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("got %v, %v", resp, err)
		}
		if text(resp) == "after" {
			break
		}
	}
	if err := <-slow; err != nil {
		t.Errorf("the question to the old one: %v", err)
	}
	c.mu.Lock()
	same := c.designated[1] == old[1]
	c.mu.Unlock()
	if !same {
		t.Error("what stays was replaced")
	}
	for deadline := time.Now().Add(5 * time.Second); before.open.Load() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the old connection stays open")
		}
	}
	if diff := cmp.Diff(p.wasAsked(), []string{discoveryQuestion}); diff != "" {
		t.Errorf("what the plain resolver was asked: got, want:\n%s", diff)
	}
}

// scriptedDiscovery is a client in the time of a bubble. Its designated resolvers are scripts by the names of designations.
func scriptedDiscovery(t *testing.T) (c *discoverClient, plain *script, servers map[string]*script) {
	plain, servers = &script{name: "plain", play: mute}, make(map[string]*script)
	c = &discoverClient{identity: identity{"discover://192.0.2.1", DefaultDeadline}, address: netip.MustParseAddr("192.0.2.1"),
		plain: plain, log: slog.New(slog.DiscardHandler)}
	c.open = func(d designation) (*designated, error) {
		s := servers[d.name]
		if s == nil {
			s = &script{name: d.name, play: says(d.name, dns.RcodeSuccess, 0)}
			servers[d.name] = s
		}
		return &designated{designation: d, client: s}, nil
	}
	c.life, c.end = context.WithCancel(context.Background())
	t.Cleanup(func() { c.Close() })
	return c, plain, servers
}

// designates answers with SVCB records for names in order of preference.
func designates(ttl int, names ...string) play {
	return func(_ context.Context, q *query) (*dns.Msg, error) {
		m := new(dns.Msg)
		m.SetReply(&dns.Msg{Question: []dns.Question{askedOf(q)}})
		for i, n := range names {
			rr := fmt.Sprintf("_dns.resolver.arpa. %d SVCB %d %s. alpn=dot ipv4hint=192.0.2.9", ttl, i+1, n)
			m.Answer = append(m.Answer, records(rr)...)
		}
		return m, nil
	}
}

func (c *discoverClient) wantAnswer(t *testing.T, want string) {
	t.Helper()
	resp, err := c.Exchange(question("name.test."))
	switch {
	case err != nil && (want == "" || !strings.Contains(err.Error(), want)):
		t.Errorf("got %v, want %q", err, want)
	case err == nil && text(resp) != want:
		t.Errorf("got %q, want %q", text(resp), want)
	}
}

func TestDiscoverRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, plain, _ := scriptedDiscovery(t)
		defer c.Close()
		questions := func(least, most int32) {
			t.Helper()
			synctest.Wait()
			if n := plain.n.Swap(0); n < least || n > most {
				t.Errorf("got %d questions, want %d to %d", n, least, most)
			}
		}
		plain.set(designates(60, "a.test"))
		c.wantAnswer(t, "a.test")
		time.Sleep(59 * time.Second)
		c.wantAnswer(t, "a.test")
		questions(1, 1)
		// The old ones serve while the refresh fails, be it that there are none all at once.
		plain.set(fails(KindTimeout, time.Second))
		for range 60 {
			time.Sleep(5 * time.Second)
			c.wantAnswer(t, "a.test")
		}
		questions(6, 12)
		plain.set(designates(60))
		time.Sleep(maxLookupPause)
		c.wantAnswer(t, "a.test")
		questions(1, 1)
		// A new one is put to use.
		plain.set(designates(1, "b.test", "c.test"))
		time.Sleep(maxLookupPause)
		c.wantAnswer(t, "a.test")
		questions(1, 1)
		c.wantAnswer(t, "b.test")
		// TTL bounds.
		time.Sleep(minAddressTTL - time.Second)
		c.wantAnswer(t, "b.test")
		questions(0, 0)
		plain.set(designates(1<<30, "b.test"))
		time.Sleep(time.Second)
		c.wantAnswer(t, "b.test")
		questions(1, 1)
		time.Sleep(maxAddressTTL - time.Second)
		c.wantAnswer(t, "b.test")
		questions(0, 0)
		time.Sleep(time.Second)
		c.wantAnswer(t, "b.test")
		questions(1, 1)
	})
}

// TestDiscoverLost holds when designations are asked for again of which none works: soon if they are gone, and not so soon
// if they are impostors.
func TestDiscoverLost(t *testing.T) {
	for kind, want := range map[string]time.Duration{KindConnect: minAddressTTL, KindTLS: distrustAfter} {
		synctest.Test(t, func(t *testing.T) {
			c, plain, servers := scriptedDiscovery(t)
			defer c.Close()
			plain.set(designates(86400, "a.test", "b.test"))
			c.wantAnswer(t, "a.test")
			start := time.Now()
			for _, s := range servers {
				s.set(func(ctx context.Context, q *query) (*dns.Msg, error) {
					return nil, &Error{Kind: KindBackoff, Err: fmt.Errorf("too soon after: %w", fault(kind, "as written"))}
				})
			}
			plain.set(designates(86400, "c.test"))
			for plain.n.Load() == 1 && time.Since(start) < time.Hour {
				c.wantAnswer(t, "as written")
				time.Sleep(time.Second)
				synctest.Wait()
			}
			if got := time.Since(start); got < want || got > want+2*time.Second {
				t.Errorf("%s: asked again after %v, want %v", kind, got, want)
			}
			c.wantAnswer(t, "c.test")
		})
	}
}

// TestDiscoverOrder holds that one that failed is tried again by single questions only, and taken back when it is well.
func TestDiscoverOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, plain, servers := scriptedDiscovery(t)
		defer c.Close()
		plain.set(designates(86400, "a.test", "b.test"))
		c.wantAnswer(t, "a.test")
		servers["a.test"].set(mute)
		start := time.Now()
		c.wantAnswer(t, "b.test")
		if got, want := time.Since(start), DefaultDeadline/2; got != want {
			t.Errorf("took %v, want half of the time: %v", got, want)
		}
		before := servers["a.test"].n.Load()
		var wg sync.WaitGroup
		for range 300 {
			wg.Go(func() { c.wantAnswer(t, "b.test") })
			time.Sleep(time.Second)
		}
		wg.Wait()
		if n := servers["a.test"].n.Load() - before; n < 5 || n > 12 {
			t.Errorf("the silent one was asked %d times, want some with growing pauses", n)
		}
		servers["a.test"].set(says("a.test", dns.RcodeSuccess, 0))
		time.Sleep(maxLookupPause)
		c.wantAnswer(t, "a.test")
		c.wantAnswer(t, "a.test")
	})
}

func TestDiscoverConfig(t *testing.T) {
	for want, s := range map[string]Server{
		"is not an address":  {Scheme: "discover", Host: "dns.test"},
		"client certificate": {Scheme: "discover", Host: "192.0.2.1", ClientCert: &pki().clientCrt},
	} {
		if _, err := NewGroup(Config{Tiers: [][]Server{{s}}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

type connectionCount struct {
	noObserver
	open func(int)
}

func (c connectionCount) Server(string, string) ServerObserver { return c }
func (c connectionCount) Connections(delta int)                { c.open(delta) }

// TestDiscoverClose holds that Close ends discoveries, questions under way and connections, old ones too.
func TestDiscoverClose(t *testing.T) {
	f, other := newFake(t, "tls", "a"), newFake(t, "quic", "b")
	p := newPlainResolver(t, designate(1, f))
	quiet := newPlainResolver(t)
	quiet.fault.Store(silent)
	var mu sync.Mutex
	open := make(map[string]int)
	count := connectionCount{open: func(delta int) {
		mu.Lock()
		defer mu.Unlock()
		open["sum"] += delta
		open["most"] = max(open["most"], open["sum"])
	}}
	noLeak(t, func() {
		g := must(NewGroup(Config{Tiers: [][]Server{{p.upstream()}, {quiet.upstream()}}, Observer: count}))
		if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != "a" {
			t.Errorf("got %v, %v", resp, err)
		}
		f.fault.Store(hang)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { g.Exchange(t.Context(), question("name.test.")) })
		}
		for f.asked.Load() < 21 {
			time.Sleep(time.Millisecond)
		}
		c := g.servers[0].client.(*discoverClient)
		time.Sleep(2 * time.Millisecond)
		if !c.renew(time.Millisecond) || c.renew(time.Hour) {
			t.Error("a connection that owes answers is not set aside, or one that does not is")
		}
		p.set(designate(1, other))
		c.mu.Lock()
		c.expires = time.Now()
		c.mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		c.ExchangeContext(ctx, question("name.test.")) // begins the discovery
		cancel()
		g.Close()
		wg.Wait()
		if _, err := c.ask(t.Context(), rootQuery); kindOf(err) != KindClosed {
			t.Errorf("got %v after Close", err)
		}
	})
	mu.Lock()
	defer mu.Unlock()
	if open["sum"] != 0 || open["most"] == 0 {
		t.Errorf("connections: %v", open)
	}
}
