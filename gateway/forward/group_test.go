package forward

import (
	"bytes"
	stdcmp "cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// script is a client whose answers are written down: it waits for delay, then answers with rcode or err.
type script struct {
	name string
	mu   sync.Mutex
	play func(ctx context.Context, q *query) (*dns.Msg, error)
	n    atomic.Int32
}

func (s *script) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	s.n.Add(1)
	s.mu.Lock()
	play := s.play
	s.mu.Unlock()
	m, err := play(ctx, q)
	if err != nil {
		return nil, err
	}
	m.Response = true
	return q.checkMessage(m)
}

// watched makes g's servers look probed.
func watched(g *Group) {
	for _, s := range g.servers {
		s.watched.Store(true)
	}
}

// askedOf returns q's question.
func askedOf(q *query) dns.Question { return q.message().Question[0] }

func (s *script) set(play func(ctx context.Context, q *query) (*dns.Msg, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.play = play
}

func (s *script) Exchange(req *dns.Msg) (*dns.Msg, error) { return exchangeWithin(time.Second, s, req) }
func (s *script) Address() string                         { return s.name }
func (s *script) Close() error                            { return nil }

type play = func(ctx context.Context, q *query) (*dns.Msg, error)

// says answers with rcode after d. The answer bears the name of the server as TXT when rcode is NOERROR.
func says(name string, rcode int, d time.Duration) play {
	return func(ctx context.Context, q *query) (*dns.Msg, error) {
		if !sleep(ctx, d) {
			return nil, classify(KindIO, "waiting", ctx.Err())
		}
		m := new(dns.Msg)
		m.SetRcode(&dns.Msg{MsgHdr: dns.MsgHdr{Id: 0}, Question: []dns.Question{askedOf(q)}}, rcode)
		if rcode == dns.RcodeSuccess {
			m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: askedOf(q).Name, Rrtype: dns.TypeTXT}, Txt: []string{name}}}
		}
		m.SetEdns0(1232, false)
		return m, nil
	}
}

func fails(kind string, d time.Duration) play {
	return func(ctx context.Context, _ *query) (*dns.Msg, error) {
		if !sleep(ctx, d) {
			return nil, classify(KindIO, "waiting", ctx.Err())
		}
		return nil, fault(kind, "as written")
	}
}

func mute(ctx context.Context, _ *query) (*dns.Msg, error) {
	<-ctx.Done()
	return nil, classify(KindIO, "waiting", ctx.Err())
}

// scripted returns a group of scripted servers; tiers are separated by "|" in names.
func scripted(t *testing.T, cfg Config, tiers string) (*Group, map[string]*script) {
	t.Helper()
	scripts := make(map[string]*script)
	return assembled(t, cfg, tiers, func(s Server, _ ServerObserver) (client, error) {
		scripts[s.URL] = &script{name: s.URL, play: says(s.URL, dns.RcodeSuccess, 0)}
		return scripts[s.URL], nil
	}), scripts
}

// assembled returns a group of servers with clients that open makes; tiers are separated by "|" in names.
func assembled(t *testing.T, cfg Config, tiers string, open func(Server, ServerObserver) (client, error)) *Group {
	t.Helper()
	for tier := range strings.SplitSeq(tiers, "|") {
		var servers []Server
		for name := range strings.FieldsSeq(tier) {
			servers = append(servers, Server{URL: name})
		}
		cfg.Tiers = append(cfg.Tiers, servers)
	}
	// The servers' own clients are replaced before anything was opened.
	g := &Group{name: "g", pick: cfg.Pick, nextOn: cfg.NextOn, deadline: cfg.Deadline, log: cfg.Logger}
	if g.pick == "" {
		g.pick = PickInOrder
	}
	if g.deadline == 0 {
		g.deadline = DefaultDeadline
	}
	if g.nextOn == (NextOn{}) {
		g.nextOn = NextOn{true, true, true, true}
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	cfg.Breaker.OpenAfter = stdcmp.Or(cfg.Breaker.OpenAfter, defaultOpenAfter)
	cfg.Breaker.Probe = stdcmp.Or(cfg.Breaker.Probe, defaultProbe)
	cfg.Breaker.MaxProbe = stdcmp.Or(cfg.Breaker.MaxProbe, defaultMaxProbe)
	g.hedge, g.searches.New = cfg.Hedge, newSearch
	g.budget.Store(hedgeCap)
	if errs := g.addTiers(cfg, open); len(errs) > 0 {
		t.Fatal(errs)
	}
	return g
}

// TestSearch plays one question against scripted servers, in the time of a bubble.
func TestSearch(t *testing.T) {
	ms := time.Millisecond
	all := NextOn{true, true, true, true}
	tests := []struct {
		name   string
		tiers  string
		cfg    Config
		plays  map[string]play
		want   string        // the server that answers, or an RCODE, or ""
		err    string        // of kind, when want is ""
		within time.Duration // exactly so long it takes
		asked  string        // names of the servers asked
	}{
		{name: "first is well", tiers: "a b | c", want: "a", asked: "a"},
		{name: "refused", tiers: "a b | c", plays: map[string]play{"a": fails(KindConnect, 0)}, want: "b", asked: "a b"},
		{name: "whole tier fails", tiers: "a b | c", plays: map[string]play{"a": fails(KindTLS, 10*ms),
			"b": fails(KindMismatch, 10*ms)}, want: "c", within: 20 * ms, asked: "a b c"},
		{name: "silent leaves time", tiers: "a b | c", plays: map[string]play{"a": mute, "b": mute}, want: "c",
			within: 2000 * ms, asked: "a b c"},
		{name: "silent and many", tiers: "a b c | d e f", plays: map[string]play{"a": mute, "b": mute, "c": mute,
			"d": mute, "e": mute}, want: "f", within: 2500 * ms, asked: "a b c d e f"},
		{name: "slow name is not given up", tiers: "a | b | c", plays: map[string]play{
			"a": says("a", 0, 1500*ms), "b": says("b", 0, 2500*ms), "c": mute}, want: "a", within: 1500 * ms, asked: "a b"},
		{name: "all silent", tiers: "a | b", plays: map[string]play{"a": mute, "b": mute}, err: KindTimeout,
			within: 3000 * ms, asked: "a b"},
		{name: "all refuse", tiers: "a | b", plays: map[string]play{"a": fails(KindConnect, 0),
			"b": fails(KindConnect, 0)}, err: KindConnect, asked: "a b"},
		{name: "SERVFAIL moves on", tiers: "a | b", plays: map[string]play{"a": says("", 2, 0)}, want: "b", asked: "a b"},
		{name: "SERVFAIL ends it when so written", tiers: "a | b", cfg: Config{NextOn: NextOn{Timeout: true}},
			plays: map[string]play{"a": says("", 2, 0)}, want: "SERVFAIL", asked: "a"},
		{name: "REFUSED moves on", tiers: "a | b", plays: map[string]play{"a": says("", 5, 0)}, want: "b", asked: "a b"},
		{name: "REFUSED ends it when so written", tiers: "a | b", cfg: Config{NextOn: NextOn{ServFail: true}},
			plays: map[string]play{"a": says("", 5, 0)}, want: "REFUSED", asked: "a"},
		{name: "NXDOMAIN is an answer", tiers: "a | b", plays: map[string]play{"a": says("", 3, 0)}, want: "NXDOMAIN", asked: "a"},
		{name: "SERVFAIL beats errors", tiers: "a | b | c", cfg: Config{NextOn: all}, plays: map[string]play{
			"a": says("", 2, 0), "b": fails(KindConnect, 0), "c": says("", 5, 0)}, want: "SERVFAIL", asked: "a b c"},
		{name: "SERVFAIL waits for the silent", tiers: "a | b", plays: map[string]play{"a": mute,
			"b": says("", 2, 0)}, want: "SERVFAIL", within: 3000 * ms, asked: "a b"},
		{name: "a slow answer beats SERVFAIL", tiers: "a | b", plays: map[string]play{"a": says("", 2, 0),
			"b": says("b", 0, 2500*ms)}, want: "b", within: 2500 * ms, asked: "a b"},
		{name: "SERVFAIL does not beat an answer on its way", tiers: "a | b", plays: map[string]play{
			"a": says("a", 0, 1300*ms), "b": says("", 2, 0)}, want: "a", within: 1300 * ms, asked: "a b"},
		{name: "connect ends it when so written", tiers: "a | b", cfg: Config{NextOn: NextOn{Timeout: true}},
			plays: map[string]play{"a": fails(KindConnect, 0)}, err: KindConnect, asked: "a"},
		{name: "timeout ends it when so written", tiers: "a | b", cfg: Config{NextOn: NextOn{Connect: true}},
			plays: map[string]play{"a": mute}, err: KindTimeout, within: 3000 * ms, asked: "a"},
		{name: "race", tiers: "a b c | d", cfg: Config{Pick: PickRace}, plays: map[string]play{"a": mute,
			"b": says("b", 0, 20*ms), "c": says("c", 0, 10*ms)}, want: "c", within: 10 * ms, asked: "a b c"},
		{name: "race, tier fails", tiers: "a b | c d", cfg: Config{Pick: PickRace}, plays: map[string]play{
			"a": fails(KindIO, 5*ms), "b": says("", 2, 10*ms), "c": mute, "d": says("d", 0, 5*ms)}, want: "d", within: 15 * ms, asked: "a b c d"},
		{name: "race waits for the tier", tiers: "a b | c", cfg: Config{Pick: PickRace}, plays: map[string]play{
			"a": says("a", 0, 20*ms), "b": fails(KindIO, 0)}, want: "a", within: 20 * ms, asked: "a b"},
		{name: "short deadline", tiers: "a | b", cfg: Config{Deadline: 100 * ms}, plays: map[string]play{"a": mute},
			want: "b", within: 50 * ms, asked: "a b"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tt.cfg.Hedge.Never = true
				g, scripts := scripted(t, tt.cfg, tt.tiers)
				defer g.Close()
				for name, p := range tt.plays {
					scripts[name].set(p)
				}
				start := time.Now()
				req := question("Name.test.")
				resp, err := g.Exchange(t.Context(), req)
				took := time.Since(start)
				switch {
				case err == nil && text(resp) != tt.want:
					t.Errorf("got %s, want %q", text(resp), tt.want)
				case err != nil && (tt.want != "" || kindOf(err) != tt.err):
					t.Errorf("got error %v, want %q, %q", err, tt.want, tt.err)
				case err == nil && (resp.Id != req.Id || resp.Question[0] != req.Question[0]):
					t.Errorf("got ID and question of another request")
				}
				if took != tt.within {
					t.Errorf("took %v, want %v", took, tt.within)
				}
				var asked []string
				for _, s := range g.servers {
					if scripts[s.url].n.Load() > 0 {
						asked = append(asked, s.url)
					}
				}
				if got := strings.Join(asked, " "); got != tt.asked {
					t.Errorf("asked %q, want %q", got, tt.asked)
				}
			})
		})
	}
}

// TestCancel holds that a caller who goes away ends the search, and that no server is blamed for it.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, scripts := scripted(t, Config{}, "a | b")
		defer g.Close()
		scripts["a"].set(mute)
		for range 10 {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			start := time.Now()
			if _, err := g.Exchange(ctx, question("name.test.")); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
			if d := time.Since(start); d != 10*time.Millisecond {
				t.Errorf("took %v, want 10ms", d)
			}
		}
		if st := g.Status()[0]; st.State != StateUnknown {
			t.Errorf("got state %q, want unknown", st.State)
		}
	})
}

// TestBreaker follows one server through failing and recovery, in the time of a bubble.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		g, scripts := scripted(t, Config{Logger: slog.New(slog.NewTextHandler(&logged, nil)), Hedge: Hedge{Never: true}}, "a | b")
		stop := running(t, g)
		ask := func(want string) time.Duration {
			t.Helper()
			start := time.Now()
			resp, err := g.Exchange(t.Context(), question("name.test."))
			if err != nil || text(resp) != want {
				t.Errorf("got %v, %v, want %q", resp, err, want)
			}
			return time.Since(start)
		}
		ask("a")
		scripts["a"].set(mute)
		for range defaultOpenAfter {
			if d := ask("b"); d != time.Second {
				t.Errorf("took %v, want the longest patience, 1s", d)
			}
		}
		synctest.Wait() // what the watcher has to do at this moment is done
		if st := g.Status()[0]; st.State != StateFailing || !strings.HasPrefix(st.LastError, KindTimeout) {
			t.Errorf("got %+v, want it failing with a timeout", st)
		}
		n := scripts["a"].n.Load()
		for range 100 {
			if d := ask("b"); d != 0 {
				t.Errorf("took %v, want a failing server to be left alone", d)
			}
		}
		if got := scripts["a"].n.Load(); got != n {
			t.Errorf("%d queries went to the failing server", got-n)
		}
		// The probes that follow find it silent, then well.
		time.Sleep(20 * time.Second)
		if got := scripts["a"].n.Load() - n; got < 3 || got > 6 {
			t.Errorf("got %d probes of up to 3s in 20s, want one every 2s after the last", got)
		}
		scripts["a"].set(says("a", 0, 0))
		time.Sleep(defaultProbe + DefaultDeadline + time.Second)
		ask("a")
		stop()
		got := logged.String()
		if n := strings.Count(got, "\n"); n != 3 || !strings.Contains(got, `level=INFO msg="upstream suspect"`) ||
			!strings.Contains(got, `level=WARN msg="upstream failing"`) ||
			!strings.Contains(got, `level=INFO msg="upstream recovered"`) {
			t.Errorf("got log\n%s\nwant one line for each of three changes", got)
		}
	})
}

// TestBreakerWithoutRun holds that a failing server is tried again by a query now and then when nobody probes.
func TestBreakerWithoutRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, scripts := scripted(t, Config{}, "a | b")
		defer g.Close()
		scripts["a"].set(fails(KindConnect, 0))
		for range 1000 {
			if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != "b" {
				t.Fatalf("got %v, %v", resp, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n := scripts["a"].n.Load(); n < 5 || n > 9 {
			t.Errorf("got %d tries in 10s, want 3 and one every 2s", n)
		}
		scripts["a"].set(says("a", 0, 0))
		time.Sleep(3 * time.Second)
		for range 2 {
			if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != "a" {
				t.Fatalf("after recovery: got %v, %v", resp, err)
			}
		}
	})
}

// TestAllFailing holds that failing servers are asked when there are no others, and come back by that.
func TestAllFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, scripts := scripted(t, Config{}, "a | b")
		defer g.Close()
		watched(g)
		scripts["a"].set(fails(KindConnect, 0))
		scripts["b"].set(fails(KindConnect, 0))
		for range 5 {
			_, err := g.Exchange(t.Context(), question("name.test."))
			var e *NoAnswerError
			if !errors.As(err, &e) || len(e.Causes) != 2 {
				t.Fatalf("got %v, want two causes", err)
			}
		}
		scripts["b"].set(says("b", 0, 0))
		if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != "b" {
			t.Errorf("got %v, %v, want b", resp, err)
		}
		if st := g.Status(); st[0].State != StateFailing || st[1].State != StateOK {
			t.Errorf("got %+v, want a failing and b ok", st)
		}
		if n := scripts["a"].n.Load(); n != 6 {
			t.Errorf("a was asked %d times, want 6", n)
		}
	})
}

// TestSlowNameIsNoFailure holds that a server which answers other names is not blamed for a slow one.
func TestSlowNameIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, scripts := scripted(t, Config{}, "a | b")
		defer g.Close()
		scripts["a"].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
			if askedOf(q).Name == "slow.test." {
				return mute(ctx, q)
			}
			return says("a", 0, time.Millisecond)(ctx, q)
		})
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if resp, err := g.Exchange(t.Context(), question("slow.test.")); err != nil || text(resp) != "b" {
					t.Errorf("got %v, %v", resp, err)
				}
			})
			time.Sleep(100 * time.Millisecond)
			if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != "a" {
				t.Errorf("got %v, %v, want a", resp, err)
			}
		}
		// From here on nothing but the slow name is asked, and the silence counts.
		wg.Wait()
		if st := g.Status()[0]; st.State != StateOK {
			t.Errorf("got %+v, want it ok", st)
		}
	})
}

// TestServFailCounts holds that SERVFAILs count only when another server refutes them, and only for different names.
func TestServFailCounts(t *testing.T) {
	tests := []struct {
		name  string
		b     play
		names int
		want  string
	}{
		{"broken everywhere", says("", dns.RcodeServerFailure, 0), 50, StateUnknown},
		{"one name broken at a", says("b", 0, 0), 1, StateUnknown},
		{"many names broken at a", says("b", 0, 0), openAfterRefuted, StateFailing},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, scripts := scripted(t, Config{}, "a | b")
				defer g.Close()
				scripts["a"].set(says("", dns.RcodeServerFailure, 0))
				scripts["b"].set(tt.b)
				for i := range 50 {
					if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i%tt.names))); err != nil {
						t.Fatal(err)
					}
				}
				if got := g.Status()[0].State; got != tt.want {
					t.Errorf("got state %q, want %q", got, tt.want)
				}
				if tt.want != StateFailing {
					return
				}
				// A probe is strict with it: the name that it failed on has to be well.
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- g.Run(ctx) }()
				time.Sleep(5 * time.Second)
				if got := g.Status()[0].State; got != StateFailing {
					t.Errorf("got state %q while it still answers SERVFAIL", got)
				}
				scripts["a"].set(says("a", 0, 0))
				time.Sleep(3 * time.Second)
				if got := g.Status()[0].State; got != StateOK {
					t.Errorf("got state %q after recovery", got)
				}
				cancel()
				<-done
			})
		})
	}
}

func TestPicks(t *testing.T) {
	ask := func(t *testing.T, g *Group, name string) string {
		t.Helper()
		resp, err := g.Exchange(t.Context(), question(name))
		if err != nil {
			t.Fatal(err)
		}
		return text(resp)
	}
	t.Run("fastest", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, scripts := scripted(t, Config{Pick: PickFastest}, "a b")
			defer g.Close()
			scripts["a"].set(says("a", 0, 50*time.Millisecond))
			scripts["b"].set(says("b", 0, 5*time.Millisecond))
			got := map[string]int{}
			for range 200 {
				got[ask(t, g, "name.test.")]++
			}
			if got["b"] < 190 {
				t.Errorf("got %v, want nearly all from b", got)
			}
			// The past fades: after a long time the slow one gets another chance.
			scripts["a"].set(says("a", 0, time.Millisecond))
			for range 300 {
				got[ask(t, g, "name.test.")]++
				time.Sleep(time.Second)
			}
			if got["a"] < 100 {
				t.Errorf("got %v, want most of the later ones from a", got)
			}
		})
	})
	t.Run("random", func(t *testing.T) {
		g, _ := scripted(t, Config{Pick: PickRandom}, "a b c | d")
		defer g.Close()
		got := map[string]int{}
		for range 300 {
			got[ask(t, g, "name.test.")]++
		}
		if got["a"] < 50 || got["b"] < 50 || got["c"] < 50 || got["d"] != 0 {
			t.Errorf("got %v, want about 100 each of the first tier", got)
		}
	})
	t.Run("sticky", func(t *testing.T) {
		g, scripts := scripted(t, Config{Pick: PickSticky}, "a b c | d")
		defer g.Close()
		where, n := map[string]string{}, map[string]int{}
		for i := range 300 {
			name := fmt.Sprintf("n%d.test.", i)
			where[name] = ask(t, g, name)
			n[where[name]]++
			if got := ask(t, g, strings.ToUpper(name)); got != where[name] {
				t.Errorf("%s: got %q, then %q", name, where[name], got)
			}
		}
		if n["a"] < 50 || n["b"] < 50 || n["c"] < 50 || n["d"] != 0 {
			t.Errorf("got %v, want about 100 each of the first tier", n)
		}
		scripts["a"].set(fails(KindConnect, 0))
		for name, was := range where {
			if got := ask(t, g, name); was != "a" && got != was {
				t.Errorf("%s: moved from %q to %q, though only a is away", name, was, got)
			}
		}
	})
}

// counter is an Observer that writes down what it is told.
type counter struct {
	mu   sync.Mutex
	seen map[string]int
}

func (c *counter) Server(group, server string) ServerObserver {
	return &handle{c: c, name: group + " " + server}
}

type handle struct {
	noObserver
	c    *counter
	name string
}

func (h *handle) Done(_ time.Duration, rcode int, kind string) {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	h.c.seen[fmt.Sprintf("%s %d %s", h.name, rcode, kind)]++
}

func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{seen: map[string]int{}}
		g, scripts := scripted(t, Config{Name: "g", Observer: c, Hedge: Hedge{Never: true}}, "a | b | c")
		defer g.Close()
		scripts["a"].set(fails(KindTLS, 0))
		scripts["b"].set(mute)
		if _, err := g.Exchange(t.Context(), question("name.test.")); err != nil {
			t.Fatal(err)
		}
		want := map[string]int{"g a -1 tls": 1, "g b -1 timeout": 1, "g c 0 ": 1}
		if diff := cmp.Diff(c.seen, want); diff != "" {
			t.Errorf("got, want:\n%s", diff)
		}
	})
}

func TestExtendedError(t *testing.T) {
	tests := []struct {
		kinds []string
		code  uint16
	}{
		{[]string{KindConnect, KindTimeout}, 22},
		{[]string{KindTimeout}, 22},
		{[]string{KindBusy}, 22},
		{[]string{KindBootstrap}, 22},
		{nil, 22},
		{[]string{KindTimeout, KindTLS}, 23},
		{[]string{KindMismatch}, 23},
		{[]string{KindConnect, KindIO}, 23},
		{[]string{KindHTTP}, 23},
	}
	for _, tt := range tests {
		e := &NoAnswerError{Group: "g"}
		for _, k := range tt.kinds {
			e.Causes = append(e.Causes, Cause{"tls://192.0.2.1", fault(k, "secret.name.test")})
		}
		var as interface{ ExtendedError() (uint16, string) } = e
		code, text := as.ExtendedError()
		if code != tt.code || text == "" || len(text) > 40 || strings.Contains(text, "192.0.2.1") ||
			strings.Contains(text, "secret") {
			t.Errorf("%v: got %d %q, want code %d and a short text", tt.kinds, code, text, tt.code)
		}
	}
}

func TestNewGroupMistakes(t *testing.T) {
	name := Server{URL: "tls://dns.test", Scheme: "tls", Host: "dns.test"}
	addr := Server{URL: "tls://192.0.2.1", Scheme: "tls", Host: "192.0.2.1"}
	tests := []struct {
		name string
		cfg  Config
		want []string
	}{
		{"nothing", Config{}, []string{"no servers"}},
		{"empty tier", Config{Tiers: [][]Server{{addr}, {}}}, []string{"tier 2 is empty"}},
		{"pick", Config{Tiers: [][]Server{{addr}}, Pick: "best"}, []string{`unknown pick "best"`}},
		{"deadline", Config{Tiers: [][]Server{{addr}}, Deadline: -1}, []string{"negative"}},
		{"no bootstrap", Config{Tiers: [][]Server{{name}}}, []string{`host name "dns.test" needs a bootstrap server`}},
		{"bootstrap by name", Config{Tiers: [][]Server{{name}}, Bootstrap: []Server{name}}, []string{"bootstrap: tls://dns.test"}},
		{"scheme", Config{Tiers: [][]Server{{{URL: "x", Scheme: "gopher", Host: "192.0.2.1"}}}}, []string{`unknown scheme "gopher"`}},
		{"no host", Config{Tiers: [][]Server{{{URL: "x", Scheme: "tls"}}}}, []string{"no host"}},
		{"pin on UDP", Config{Tiers: [][]Server{{{URL: "x", Scheme: "udp", Host: "192.0.2.1", Pins: make([][32]byte, 1)}}}},
			[]string{"mean nothing to udp"}},
		{"bad stamp", Config{Tiers: [][]Server{{{URL: "sdns://!", Scheme: "sdns"}}}}, []string{"DNS stamp"}},
		{"all at once", Config{Pick: "best", Tiers: [][]Server{{name, {URL: "x", Scheme: "y", Host: "192.0.2.1"}}}},
			[]string{"unknown pick", "needs a bootstrap", "unknown scheme"}},
	}
	for _, tt := range tests {
		g, err := NewGroup(tt.cfg)
		if err == nil {
			t.Errorf("%s: got %v, want an error", tt.name, g)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %q, want it to say %q", tt.name, err, want)
			}
		}
	}
}

func TestExchangeAfterClose(t *testing.T) {
	g, _ := scripted(t, Config{}, "a | b")
	g.Close()
	if _, err := g.Exchange(t.Context(), question("name.test.")); !errors.Is(err, errClosed) {
		t.Errorf("got %v, want %v", err, errClosed)
	}
	if _, err := g.Exchange(t.Context(), new(dns.Msg)); err == nil {
		t.Error("a request without a question: got no error")
	}
}

var discard = slog.New(slog.DiscardHandler)

// TestSettled holds that failing servers get one share of the time, and no more, once a response is at hand, and that
// they can still better it.
func TestSettled(t *testing.T) {
	ms := time.Millisecond
	servFail := says("", dns.RcodeServerFailure, 0)
	tests := []struct {
		name    string
		tiers   string
		failing string
		plays   map[string]play
		nextOn  NextOn
		want    string
		within  time.Duration
	}{
		{name: "failing and silent", tiers: "a | b | c", failing: "b c", plays: map[string]play{"a": servFail, "b": mute,
			"c": mute}, want: "SERVFAIL", within: 1000 * ms},
		{name: "the last of the failing has it", tiers: "a | b | c", failing: "b c", plays: map[string]play{"a": servFail,
			"b": mute, "c": says("c", 0, 900*ms)}, want: "c", within: 900 * ms},
		{name: "all fail at once", tiers: "a | b", failing: "b", plays: map[string]play{"a": servFail,
			"b": fails(KindConnect, 0)}, want: "SERVFAIL"},
		{name: "late SERVFAIL", tiers: "a | b | c", failing: "b c", plays: map[string]play{
			"a": says("", dns.RcodeServerFailure, 1500*ms), "b": mute, "c": mute}, want: "SERVFAIL", within: 2500 * ms},
		{name: "later SERVFAIL", tiers: "a | b", failing: "b", plays: map[string]play{
			"a": says("", dns.RcodeServerFailure, 2500*ms), "b": mute}, want: "SERVFAIL", within: 2500 * ms},
		{name: "the healthy are waited for", tiers: "a | b | c", failing: "c", plays: map[string]play{"a": servFail,
			"b": says("b", 0, 2500*ms), "c": mute}, want: "b", within: 2500 * ms},
		{name: "all failing", tiers: "a | b | c", failing: "a b c", plays: map[string]play{"a": servFail, "b": mute,
			"c": mute}, want: "SERVFAIL", within: 1000 * ms},
		{name: "no going on after a timeout", tiers: "a | b | c", failing: "b c", plays: map[string]play{"a": servFail,
			"b": mute, "c": mute}, nextOn: NextOn{ServFail: true}, want: "SERVFAIL", within: 1000 * ms},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, scripts := scripted(t, Config{NextOn: tt.nextOn, Hedge: Hedge{Never: true}}, tt.tiers)
				defer g.Close()
				watched(g)
				for name, p := range tt.plays {
					scripts[name].set(p)
				}
				for _, s := range g.servers {
					if strings.Contains(tt.failing, s.url) {
						s.state = StateFailing
						s.away.Store(true)
					}
				}
				start := time.Now()
				resp, err := g.Exchange(t.Context(), question("name.test."))
				if err != nil || text(resp) != tt.want {
					t.Errorf("got %v, %v, want %s", resp, err, tt.want)
				}
				if d := time.Since(start); d != tt.within {
					t.Errorf("took %v, want %v", d, tt.within)
				}
			})
		})
	}
}

// TestPatientProbes counts the tries of a failing server before the time between them grows.
func TestPatientProbes(t *testing.T) {
	// check wants the first patientProbes of gaps to be defaultProbe, and the next one twice that.
	check := func(t *testing.T, gaps []time.Duration) {
		t.Helper()
		if len(gaps) <= patientProbes {
			t.Fatalf("got tries after %v, want more", gaps)
		}
		for i, gap := range gaps[:patientProbes+1] {
			want := defaultProbe
			if i == patientProbes {
				want = 2 * defaultProbe
			}
			if gap < want*8/10 || gap > want*12/10 {
				t.Errorf("try %d came after %v, want about %v", i+1, gap, want)
			}
		}
	}
	// refusing notes when it was asked.
	refusing := func(gaps *[]time.Duration) play {
		last := time.Now()
		return func(context.Context, *query) (*dns.Msg, error) {
			*gaps = append(*gaps, time.Since(last))
			last = time.Now()
			return nil, fault(KindConnect, "as written")
		}
	}
	t.Run("probed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, scripts := scripted(t, Config{}, "a | b")
			stop := running(t, g)
			var gaps []time.Duration
			scripts["a"].set(refusing(&gaps))
			for range defaultOpenAfter {
				g.Exchange(t.Context(), question("name.test."))
			}
			time.Sleep(30 * time.Second)
			stop()
			check(t, gaps[defaultOpenAfter:])
		})
	})
	t.Run("asked", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, scripts := scripted(t, Config{}, "a | b")
			defer g.Close()
			var gaps []time.Duration
			scripts["a"].set(refusing(&gaps))
			for range defaultOpenAfter {
				g.Exchange(t.Context(), question("name.test."))
			}
			for range 3000 {
				time.Sleep(10 * time.Millisecond)
				g.Exchange(t.Context(), question("name.test."))
			}
			check(t, gaps[defaultOpenAfter:])
		})
	})
	t.Run("name stays broken", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, scripts := scripted(t, Config{}, "a | b")
			stop := running(t, g)
			rootProbes, asked := 0, 0
			scripts["a"].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
				if askedOf(q).Name == "." {
					rootProbes++
					return says("a", 0, 0)(ctx, q)
				}
				asked++
				return says("", dns.RcodeServerFailure, 0)(ctx, q)
			})
			for i := range openAfterRefuted {
				g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i)))
			}
			for range 60 {
				if time.Sleep(time.Second); g.Status()[0].State == StateOK {
					break
				}
			}
			stop()
			if inVain := asked - openAfterRefuted - 1; rootProbes != 1 || inVain != patientProbes {
				t.Errorf("well after %d probes, want %d in vain and one more", inVain, patientProbes)
			}
		})
	})
}
