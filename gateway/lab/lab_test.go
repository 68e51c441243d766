package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestEveryServerAnswers(t *testing.T) {
	l := startLab(t, Config{})
	for _, s := range l.Servers() {
		t.Run(s.Name(), func(t *testing.T) {
			c := newClient(t, l, s)
			for i, want := range []string{"NOERROR; www. CNAME 300; a. CNAME 200; b. A 100", "NXDOMAIN; ( SOA 300)"} {
				name := []string{"www.lab.test.", "nxdomain.lab.test."}[i]
				req := query(s.Scheme(), name, dns.TypeA)
				resp, err := c.ask(t, req, patience)
				if err != nil {
					t.Fatal(err)
				}
				if resp.Id != req.Id {
					t.Errorf("got ID %d, want %d", resp.Id, req.Id)
				}
				if diff := cmp.Diff(brief(resp), want); diff != "" {
					t.Errorf("(-got +want):\n%s", diff)
				}
				if resp.IsEdns0() != nil {
					t.Error("got an OPT record that was not asked for")
				}
			}
			if got := s.Queries(); got != 2 {
				t.Errorf("got %d queries, want 2", got)
			}
			want := uint64(1)
			if s.Scheme() == UDP {
				want = 0
			}
			if got := s.Conns(); got != want {
				t.Errorf("got %d connections, want %d", got, want)
			}
		})
	}
}

func TestOpenConns(t *testing.T) {
	l := startLab(t, Config{})
	for _, s := range l.Servers() {
		t.Run(s.Name(), func(t *testing.T) {
			await := func(wantNow, wantMost int) {
				t.Helper()
				var now, most int
				for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					if now, most = s.OpenConns(); now == wantNow && most == wantMost {
						return
					}
				}
				t.Errorf("got %d connections, at most %d, want %d and %d", now, most, wantNow, wantMost)
			}
			each := 1
			if s.Scheme() == UDP {
				each = 0
			}
			clients := []*client{newClient(t, l, s), newClient(t, l, s)}
			for i, c := range clients {
				if _, err := c.ask(t, query(s.Scheme(), "b.lab.test.", dns.TypeA), patience); err != nil {
					t.Fatal(err)
				}
				await(each*(i+1), each*(i+1))
			}
			clients[0].close()
			await(each, each*2)
			clients[1].close()
			await(0, each*2)
		})
	}
}

// A client that ends a connection before it opens the next never has two, however late the server reads of the end.
func TestOpenConnsInTurn(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux tells of an end that was not read yet")
	}
	l := startLab(t, Config{Servers: []ServerConfig{{Name: "a", Scheme: TLS}, {Name: "b", Scheme: HTTPS}}})
	for _, s := range l.Servers() {
		for range 200 {
			conn, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		}
		for deadline := time.Now().Add(patience); s.Conns() < 200 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		}
		if _, most := s.OpenConns(); most > 1 {
			t.Errorf("%s: got %d connections at once, want 1", s.Scheme(), most)
		}
	}
}

// A client that has gone does not count, though its question has not been answered yet; nor does what a fault closes.
func TestOpenConnsUnderFaults(t *testing.T) {
	l := startLab(t, Config{Servers: []ServerConfig{{Name: "a", Scheme: TLS, Fault: Fault{Kind: Slow, Duration: time.Hour}}}})
	s := l.Server("a")
	for _, f := range []Fault{s.Fault(), {Kind: Silent}, {Kind: TLSHang}} {
		if err := s.SetFault(f); err != nil {
			t.Fatal(err)
		}
		resp, err := askNew(t, l, s, "b.lab.test.", haste)
		silence(t, s, resp, err)
		now := 1
		for deadline := time.Now().Add(patience); now != 0 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			now, _ = s.OpenConns()
		}
		if now != 0 {
			t.Errorf("%s: %d connections are open, want none", f, now)
		}
	}
	if err := s.SetFault(Fault{}); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, l, s)
	if _, err := c.ask(t, query(TLS, "b.lab.test.", dns.TypeA), patience); err != nil {
		t.Fatal(err)
	}
	if err := s.SetFault(Fault{Kind: Dead}); err != nil {
		t.Fatal(err)
	}
	if now, most := s.OpenConns(); now != 0 || most != 1 {
		t.Errorf("dead: got %d connections, at most %d, want 0 and 1", now, most)
	}
}

func TestDoHGetAndHello(t *testing.T) {
	l := startLab(t, Config{})
	for _, scheme := range []Scheme{HTTPS, H3} {
		s := l.Server(string(scheme))
		c := newClient(t, l, s)
		c.get = true
		if resp, err := c.ask(t, query(scheme, "b.lab.test.", dns.TypeA), patience); err != nil || len(resp.Answer) != 1 {
			t.Errorf("%s GET: got %v, %v", scheme, resp, err)
		}
		base := "https://" + s.Addr().String()
		for _, tt := range []struct {
			method, path, media string
			body                int
			want                int
		}{
			{"GET", "/", "", 0, 200},
			{"GET", "/other", "", 0, 404},
			{"GET", dohPath, "", 0, 400},
			{"GET", dohPath + "?dns=!!", "", 0, 400},
			{"POST", dohPath, "text/plain", 12, 415},
			{"POST", dohPath, dohMedia, maxMessage + 1, 413},
			{"PUT", dohPath, dohMedia, 12, 405},
		} {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, base+tt.path, bytes.NewReader(make([]byte, tt.body)))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", tt.media)
			resp, err := c.http.Do(req)
			if err != nil {
				t.Errorf("%s %s %s: %v", scheme, tt.method, tt.path, err)
				continue
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != tt.want {
				t.Errorf("%s %s %s: got %s, want %d", scheme, tt.method, tt.path, resp.Status, tt.want)
			}
			if hello := "This is " + s.HostName() + ".\n"; tt.path == "/" && string(body) != hello {
				t.Errorf("%s hello: got %q, want %q", scheme, body, hello)
			}
		}
	}
}

func TestSizes(t *testing.T) {
	l := startLab(t, Config{})
	for _, tt := range []struct {
		name   string
		rrtype uint16
		scheme Scheme
		edns   uint16
		tc     bool
		most   int
	}{
		{"big.lab.test.", dns.TypeTXT, UDP, 0, true, 512},
		{"big.lab.test.", dns.TypeTXT, UDP, 4096, true, ednsSize},
		{"big.lab.test.", dns.TypeTXT, TCP, 0, false, 65535},
		{"big.lab.test.", dns.TypeTXT, TLS, 4096, false, 65535},
		{"many.lab.test.", dns.TypeA, UDP, 1232, true, ednsSize},
		{"many.lab.test.", dns.TypeA, HTTPS, 512, false, 65535},
		{"many.lab.test.", dns.TypeA, QUIC, 0, false, 65535},
	} {
		c := newClient(t, l, l.Server(string(tt.scheme)))
		req := query(tt.scheme, tt.name, tt.rrtype)
		if tt.edns != 0 {
			req.SetEdns0(tt.edns, false)
		}
		raw, err := req.Pack()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		back, err := c.exchange(ctx, raw)
		cancel()
		if err != nil {
			t.Errorf("%s over %s: %v", tt.name, tt.scheme, err)
			continue
		}
		resp := new(dns.Msg)
		if err := resp.Unpack(back); err != nil {
			t.Fatal(err)
		}
		if resp.Truncated != tt.tc || len(back) > tt.most || !tt.tc && len(back) <= ednsSize {
			t.Errorf("%s over %s: got TC %v, %d octets, want TC %v, at most %d",
				tt.name, tt.scheme, resp.Truncated, len(back), tt.tc, tt.most)
		}
	}
}

func TestEDNS(t *testing.T) {
	l := startLab(t, Config{})
	for _, scheme := range allSchemes {
		t.Run(string(scheme), func(t *testing.T) {
			c := newClient(t, l, l.Server(string(scheme)))
			req := query(scheme, "ede.lab.test.", dns.TypeA)
			req.SetEdns0(1400, true)
			req.IsEdns0().Option = append(req.IsEdns0().Option, &dns.EDNS0_PADDING{Padding: make([]byte, 20)})
			raw, err := req.Pack()
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			back, err := c.exchange(ctx, raw)
			if err != nil {
				t.Fatal(err)
			}
			resp := new(dns.Msg)
			if err := resp.Unpack(back); err != nil {
				t.Fatal(err)
			}
			opt := resp.IsEdns0()
			if opt == nil || !opt.Do() || opt.UDPSize() != ednsSize {
				t.Fatalf("got OPT %v, want DO and size %d", opt, ednsSize)
			}
			var ede *dns.EDNS0_EDE
			for _, o := range opt.Option {
				if e, ok := o.(*dns.EDNS0_EDE); ok {
					ede = e
				}
			}
			if ede == nil || ede.InfoCode != edeCode || ede.ExtraText != edeText || resp.Rcode != dns.RcodeServerFailure {
				t.Errorf("got %v with EDE %v, want SERVFAIL with %d", dns.RcodeToString[resp.Rcode], ede, edeCode)
			}
			if padded := len(back)%padBlock == 0 && hasPadding(opt); padded != scheme.encrypted() {
				t.Errorf("got %d octets, padded %v, want %v", len(back), padded, scheme.encrypted())
			}
		})
	}
}

// A slow answer does not hold a fast one behind it on the same connection.
func TestOutOfOrder(t *testing.T) {
	l := startLab(t, Config{})
	for _, scheme := range []Scheme{TCP, TLS} {
		c := newClient(t, l, l.Server(string(scheme)))
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := c.dial(ctx); err != nil {
			t.Fatal(err)
		}
		var both []byte
		for id, name := range map[uint16]string{1: "slow.lab.test.", 2: "b.lab.test."} {
			m := new(dns.Msg).SetQuestion(name, dns.TypeA)
			m.Id = id
			raw, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			both = append(both, frame(raw)...)
		}
		if _, err := c.conn.Write(both); err != nil {
			t.Fatal(err)
		}
		// A client that has nothing more to say still gets both.
		c.conn.(interface{ CloseWrite() error }).CloseWrite()
		var order []byte
		for range 2 {
			raw, err := readFrame(c.conn)
			if err != nil {
				t.Fatal(err)
			}
			order = append(order, raw[1])
		}
		if diff := cmp.Diff(order, []byte{2, 1}); diff != "" {
			t.Errorf("%s: IDs in order of arrival (-got +want):\n%s", scheme, diff)
		}
		if _, err := readFrame(c.conn); err != io.EOF {
			t.Errorf("%s: got %v behind the last answer, want EOF", scheme, err)
		}
	}
}

func TestDoQWantsIDZero(t *testing.T) {
	l := startLab(t, Config{})
	c := newClient(t, l, l.Server("quic"))
	m := query(QUIC, "lab.test.", dns.TypeA)
	m.Id = 7
	if _, err := c.ask(t, m, patience); err == nil || !strings.Contains(err.Error(), "0x2") {
		t.Errorf("got error %v, want DOQ_PROTOCOL_ERROR", err)
	}
}

func TestBrokenMessages(t *testing.T) {
	l := startLab(t, Config{})
	c := newClient(t, l, l.Server("tcp"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	broken := []byte{0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 63}
	back, err := c.exchange(ctx, broken)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(back, []byte{0xab, 0xcd, 0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0}); diff != "" {
		t.Errorf("(-got +want):\n%s", diff)
	}
	for _, raw := range [][]byte{{}, {1, 2, 3}, {0, 1, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0}} {
		if msg, act := l.Server("tcp").respond(ctx, TCP, raw); act != drop {
			t.Errorf("%x: got %x, want silence", raw, msg)
		}
	}
}

func TestOnQuery(t *testing.T) {
	var mu sync.Mutex
	seen := make(map[string][]byte)
	l := startLab(t, Config{OnQuery: func(server string, raw []byte) {
		mu.Lock()
		defer mu.Unlock()
		seen[server] = raw
	}})
	for _, s := range l.Servers() {
		m := query(s.Scheme(), "b.lab.test.", dns.TypeA)
		m.SetEdns0(1232, false)
		if _, err := newClient(t, l, s).ask(t, m, patience); err != nil {
			t.Fatal(err)
		}
		want, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		if diff := cmp.Diff(seen[s.Name()], want); diff != "" {
			t.Errorf("%s (-got +want):\n%s", s.Name(), diff)
		}
		mu.Unlock()
	}
}

func TestStartChecksItsConfig(t *testing.T) {
	used, err := Start(t.Context(), Config{Servers: []ServerConfig{{Name: "a", Scheme: TCP}}})
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	for _, tt := range []struct {
		name    string
		servers []ServerConfig
		want    string
	}{
		{"no name", []ServerConfig{{Scheme: TLS}}, `starting server : "" cannot be a server's name`},
		{"bad name", []ServerConfig{{Name: "a b", Scheme: TLS}}, `starting server a b: "a b" cannot be a server's name`},
		{"twice", []ServerConfig{{Name: "a", Scheme: TLS}, {Name: "a", Scheme: UDP}},
			"starting server a: there is a server of this name already"},
		{"scheme", []ServerConfig{{Name: "a", Scheme: "dns"}}, `starting server a: unknown scheme "dns"`},
		{"fault", []ServerConfig{{Name: "a", Scheme: UDP, Fault: Fault{Kind: BadCert}}},
			"starting server a: fault badcert needs an encrypted server, and udp is none"},
		{"port taken", []ServerConfig{{Name: "a", Scheme: UDP, Addr: used.Server("a").Addr()}}, "starting server a: listen tcp"},
	} {
		l, err := Start(t.Context(), Config{Servers: tt.servers})
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want %q", tt.name, err, tt.want)
		}
		if l != nil {
			l.Close()
		}
	}
	used.Close()
	checkLeak(t)
}

// The end of the context ends the lab; Close after it is sound, and so is a second one.
func TestContextEndsTheLab(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l, err := Start(ctx, Config{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range l.Servers() {
		names = append(names, s.URL()[:strings.Index(s.URL(), ":")]+" "+s.HostName())
	}
	if diff := cmp.Diff(names, []string{"tls tier1.lab.test", "https tier2.lab.test", "quic tier3.lab.test"}); diff != "" {
		t.Errorf("default servers (-got +want):\n%s", diff)
	}
	cancel()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := l.Server("tier1").SetFault(Fault{}); err == nil {
		t.Error("a closed server was healed")
	}
	checkLeak(t)
}

// Close ends clients that are waiting for a silent server.
func TestCloseWhileWaiting(t *testing.T) {
	for _, kind := range []FaultKind{Silent, Slow, TLSHang} {
		t.Run(string(kind), func(t *testing.T) { closeWhileWaiting(t, Fault{Kind: kind, Duration: time.Hour}) })
	}
}

func closeWhileWaiting(t *testing.T, f Fault) {
	l := startLab(t, Config{})
	var waiting sync.WaitGroup
	for _, s := range l.Servers() {
		if f.check(s.Scheme()) != nil {
			continue
		}
		if err := s.SetFault(f); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, l, s)
		waiting.Go(func() {
			if _, err := c.ask(t, query(s.Scheme(), "lab.test.", dns.TypeA), time.Second); err == nil {
				t.Errorf("%s: got an answer", s.Name())
			}
		})
	}
	if f.Kind != TLSHang { // wait until the questions are there
		for _, s := range l.Servers() {
			for s.Queries() == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}
	l.Close()
	waiting.Wait()
}

func TestAddrIsKept(t *testing.T) {
	port, err := FreePort()
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(port))
	l := startLab(t, Config{Servers: []ServerConfig{{Name: "a", Scheme: TLS, Addr: addr}}})
	s := l.Server("a")
	if got, want := s.URL(), "tls://"+addr.String()+"#a.lab.test"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if l.Server("b") != nil {
		t.Error("got a server that is not there")
	}
	if got, want := s.Certificate().DNSNames, []string{"a.lab.test"}; !cmp.Equal(got, want) {
		t.Errorf("got certificate for %v, want %v", got, want)
	}
	conn, err := tls.Dial("tcp", addr.String(),
		&tls.Config{RootCAs: l.Roots(), ServerName: "a.lab.test", NextProtos: []string{"dot"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().NegotiatedProtocol; got != "dot" {
		t.Errorf("got ALPN %q, want dot", got)
	}
}
