package forward

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// tally is an Observer that counts for each server.
type tally struct {
	mu      sync.Mutex
	servers map[string]*count
}

// count is what a tally knows of one server.
type count struct {
	hedges, wins, asked, conns, peak atomic.Int32
	mu                               sync.Mutex
	states                           []string
	kinds                            map[string]int // of those without a response
}

func newTally() *tally { return &tally{servers: map[string]*count{}} }

func (o *tally) Server(_, server string) ServerObserver {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.servers[server] == nil {
		o.servers[server] = &count{kinds: map[string]int{}}
	}
	return o.servers[server]
}

func (o *tally) hedges() (n int) {
	for _, c := range o.servers {
		n += int(c.hedges.Load())
	}
	return n
}

func (c *count) Done(_ time.Duration, _ int, kind string) {
	c.asked.Add(1)
	if kind != "" {
		c.mu.Lock()
		c.kinds[kind]++
		c.mu.Unlock()
	}
}

func (c *count) Hedge()    { c.hedges.Add(1) }
func (c *count) HedgeWon() { c.wins.Add(1) }

func (c *count) State(state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states = append(c.states, state)
}

func (c *count) Connections(delta int) {
	n := c.conns.Add(int32(delta))
	for old := c.peak.Load(); n > old && !c.peak.CompareAndSwap(old, n); old = c.peak.Load() {
	}
}

// history returns the states since the group was made.
func (c *count) history() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.states, " ")
}

// teach makes srv know n answers that took d.
func teach(srv *server, n int, d time.Duration) {
	for range n {
		srv.answered(time.Now(), time.Now().Add(-d), d, wire.RcodeSuccess)
	}
}

// mustAsk asks g for name, holds who answers, and returns what it took.
func mustAsk(t *testing.T, g *Group, name, want string) time.Duration {
	t.Helper()
	start := time.Now()
	resp, err := g.Exchange(t.Context(), question(name))
	if err != nil || text(resp) != want {
		t.Errorf("%s: got %v, %v, want %s", name, resp, err, want)
	}
	return time.Since(start)
}

// running runs g, whose probes then go on until the result is called, which closes g as well.
func running(t *testing.T, g *Group) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- g.Run(ctx) }()
	synctest.Wait()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: got %v", err)
		}
		g.Close()
	}
}

// TestHedgeDelay holds when the next server is asked beside one that says nothing.
func TestHedgeDelay(t *testing.T) {
	ms := time.Millisecond
	tests := []struct {
		name   string
		hedge  Hedge
		nextOn NextOn
		answer time.Duration // what a's answers took; 0 for none
		n      int
		want   time.Duration
		none   bool // nobody answers
	}{
		{name: "unknown", want: maxHedge},
		{name: "30ms", answer: 30 * ms, n: 100, want: 32768 * time.Microsecond},
		{name: "30ms, a few", answer: 30 * ms, n: 5, want: 65536 * time.Microsecond},
		{name: "1ms", answer: ms, n: 100, want: minHedge},
		{name: "2s", answer: 2 * time.Second, n: 100, want: maxHedge},
		{name: "fixed", hedge: Hedge{After: 250 * ms}, answer: 30 * ms, n: 100, want: 250 * ms},
		{name: "fixed, short", hedge: Hedge{After: 5 * ms}, answer: 30 * ms, n: 100, want: 5 * ms},
		{name: "fixed, later than its turn", hedge: Hedge{After: 2 * time.Second}, answer: 30 * ms, n: 100, want: maxPatience},
		{name: "never", hedge: Hedge{Never: true}, answer: 30 * ms, n: 100, want: maxPatience},
		{name: "next_on without timeout", nextOn: NextOn{true, true, true, true}, answer: 30 * ms, n: 100,
			want: 32768 * time.Microsecond},
		{name: "next_on without timeout", nextOn: NextOn{Connect: true, ServFail: true}, answer: 30 * ms, n: 100,
			want: DefaultDeadline, none: true},
	}
	for _, tiers := range []string{"a | b", "a b", "a b | c"} {
		for _, tt := range tests {
			t.Run(tiers+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newTally()
					g, scripts := scripted(t, Config{Hedge: tt.hedge, NextOn: tt.nextOn, Observer: o}, tiers)
					defer g.Close()
					watched(g)
					teach(g.servers[0], tt.n, tt.answer)
					if tt.answer > 0 {
						time.Sleep(time.Second)
					}
					scripts["a"].set(mute)
					start := time.Now()
					resp, err := g.Exchange(t.Context(), question("name.test."))
					if d := time.Since(start); d != tt.want {
						t.Errorf("took %v, want %v", d, tt.want)
					}
					hedges, wins := o.hedges(), o.servers["b"].wins.Load()
					if tt.none {
						if kindOf(err) != KindTimeout || scripts["b"].n.Load() > 0 || hedges > 0 {
							t.Errorf("got %v, %v with %d hedges, want a timeout and b not asked", resp, err, hedges)
						}
						return
					}
					if err != nil || text(resp) != "b" {
						t.Errorf("got %v, %v, want b", resp, err)
					}
					want := 1
					if tt.want == maxPatience {
						want = 0 // its turn was over: no hedge
					}
					if hedges != want || int(wins) != want {
						t.Errorf("got %d hedges and %d wins, want %d", hedges, wins, want)
					}
				})
			})
		}
	}
}

// TestHedgeWinner holds whose answer a client gets when two are under way.
func TestHedgeWinner(t *testing.T) {
	ms := time.Millisecond
	const start = 32768 * time.Microsecond // a's high quantile
	servFail, refused := says("", dns.RcodeServerFailure, 5*ms), says("", dns.RcodeRefused, 5*ms)
	tests := []struct {
		name   string
		tiers  string
		plays  map[string]play
		want   string
		within time.Duration
		hedges int
		wins   int // of b
	}{
		{"no need", "a | b", map[string]play{"a": says("a", 0, 30*ms)}, "a", 30 * ms, 0, 0},
		{"the hedge is first", "a | b", map[string]play{"a": says("a", 0, 100*ms), "b": says("b", 0, 20*ms)}, "b",
			start + 20*ms, 1, 1},
		{"the first is first", "a | b", map[string]play{"a": says("a", 0, 100*ms), "b": says("b", 0, 200*ms)}, "a",
			100 * ms, 1, 0},
		{"NXDOMAIN is an answer", "a | b", map[string]play{"a": mute, "b": says("", dns.RcodeNameError, 0)}, "NXDOMAIN",
			start, 1, 1},
		{"SERVFAIL waits", "a | b", map[string]play{"a": says("a", 0, 900*ms), "b": servFail}, "a", 900 * ms, 1, 0},
		{"SERVFAIL waits longer", "a | b", map[string]play{"a": says("a", 0, 2900*ms), "b": servFail}, "a", 2900 * ms, 1, 0},
		{"SERVFAIL waits in its tier", "a b | c", map[string]play{"a": says("a", 0, 100*ms), "b": servFail, "c": mute}, "a",
			100 * ms, 1, 0},
		{"REFUSED waits", "a | b", map[string]play{"a": says("a", 0, 100*ms), "b": refused}, "a", 100 * ms, 1, 0},
		{"an error waits", "a | b", map[string]play{"a": says("a", 0, 100*ms), "b": fails(KindConnect, 0)}, "a", 100 * ms, 1, 0},
		{"SERVFAIL of both", "a | b", map[string]play{"a": says("", 2, 100*ms), "b": servFail}, "SERVFAIL", 100 * ms, 1, 0},
		{"the late one fails", "a | b", map[string]play{"a": fails(KindIO, 100*ms), "b": says("b", 0, 200*ms)}, "b",
			start + 200*ms, 1, 1},
		{"a third", "a | b | c", map[string]play{"a": mute, "b": mute}, "c", start + maxHedge, 2, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newTally()
				g, scripts := scripted(t, Config{Observer: o}, tt.tiers)
				defer g.Close()
				watched(g)
				teach(g.servers[0], 100, 30*ms)
				time.Sleep(time.Second)
				for name, p := range tt.plays {
					scripts[name].set(p)
				}
				if d := mustAsk(t, g, "name.test.", tt.want); d != tt.within {
					t.Errorf("took %v, want %v", d, tt.within)
				}
				if hedges, wins := o.hedges(), int(o.servers["b"].wins.Load()); hedges != tt.hedges || wins != tt.wins {
					t.Errorf("got %d hedges and %d wins, want %d and %d", hedges, wins, tt.hedges, tt.wins)
				}
			})
		})
	}
}

// TestNoHedgeIntoFailing holds that a failing server is not asked beside a late one, until something is wrong with that.
func TestNoHedgeIntoFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, scripts := scripted(t, Config{}, "a | b")
		defer g.Close()
		watched(g)
		teach(g.servers[0], 100, 30*time.Millisecond)
		g.servers[1].mu.Lock()
		g.servers[1].failLocked(time.Now(), troubleErrors)
		g.servers[1].mu.Unlock()
		time.Sleep(time.Second)
		scripts["a"].set(says("a", 0, 100*time.Millisecond))
		for range 2 {
			mustAsk(t, g, "name.test.", "a")
		}
		if n := scripts["b"].n.Load(); n != 0 {
			t.Errorf("the failing server was asked %d times", n)
		}
		teach(g.servers[0], 1000, 30*time.Millisecond)
		time.Sleep(time.Second)
		scripts["a"].set(mute)
		delay := time.Duration(g.servers[0].hedge.Load())
		for _, want := range []time.Duration{maxPatience, maxPatience, delay} {
			// b is asked in its turn, as the last resort, and answers. It is failing all the same, as its trouble is over
			// only when that is what it was.
			g.servers[1].mu.Lock()
			g.servers[1].failLocked(time.Now(), troubleRefuted)
			g.servers[1].mu.Unlock()
			if d := mustAsk(t, g, "name.test.", "b"); d != want {
				t.Errorf("took %v, want %v", d, want)
			}
		}
	})
}

// everyNth answers one question in n after d, and the others after 10ms. With d 0, that one is lost.
func everyNth(name string, n int32, d time.Duration) play {
	var i atomic.Int32
	return func(ctx context.Context, q *query) (*dns.Msg, error) {
		switch {
		case i.Add(1)%n != 0:
			return says(name, 0, 10*time.Millisecond)(ctx, q)
		case d == 0:
			return mute(ctx, q)
		}
		return says(name, 0, d)(ctx, q)
	}
}

// slowNames answers one name in n after d, whoever is asked, and the others after 10ms.
func slowNames(name string, n uint64, d time.Duration) play {
	return func(ctx context.Context, q *query) (*dns.Msg, error) {
		if mix(q.hash)%n == 0 {
			return says(name, 0, d)(ctx, q)
		}
		return says(name, 0, 10*time.Millisecond)(ctx, q)
	}
}

// TestHedgeBudget counts hedges while all servers are well: at most 5 % of the questions and the first ten.
func TestHedgeBudget(t *testing.T) {
	ms := time.Millisecond
	tests := []struct {
		name   string
		hedge  Hedge
		a, b   play
		n      int
		least  int // hedges
		atMost int
	}{
		{"all well", Hedge{}, nil, nil, 2000, 0, 0},
		// The high quantile learns of these.
		{"10 % of names take 60ms", Hedge{}, slowNames("a", 10, 60*ms), slowNames("b", 10, 60*ms), 2000, 0, 20},
		{"3 % of names are answered by nobody", Hedge{}, slowNames("a", 33, time.Hour), slowNames("b", 33, time.Hour), 4000, 10, 210},
		// Here it is the budget that decides: one in 18 is late, and one in 20 may be hedged.
		{"one in 18 is late", Hedge{After: 20 * ms}, everyNth("a", 18, 60*ms), nil, 18 * 400, 18*400/20 - 10, 18*400/20 + 10},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newTally()
				g, scripts := scripted(t, Config{Observer: o, Hedge: tt.hedge}, "a | b")
				defer running(t, g)()
				scripts["a"].set(says("a", 0, 10*ms))
				scripts["b"].set(says("b", 0, 10*ms))
				if tt.a != nil {
					scripts["a"].set(tt.a)
				}
				if tt.b != nil {
					scripts["b"].set(tt.b)
				}
				var wg sync.WaitGroup
				for i := range tt.n {
					wg.Go(func() { g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i))) })
					time.Sleep(ms)
				}
				wg.Wait()
				if got := o.hedges(); got < tt.least || got > tt.atMost {
					t.Errorf("got %d hedges of %d questions, want from %d to %d", got, tt.n, tt.least, tt.atMost)
				}
			})
		})
	}
}

// TestHedgeBudgetLifts holds that an empty budget does not keep clients waiting when a server goes silent or loses much.
func TestHedgeBudgetLifts(t *testing.T) {
	ms := time.Millisecond
	tests := []struct {
		name   string
		a      play
		every  time.Duration
		slow   int // questions that may take longer than the hedge
		hedges int // at least
	}{
		// Two that nobody notices, and those of the moment in which the third is not late yet.
		{"silent", mute, ms, 5, 3},
		{"silent, few questions", mute, 100 * ms, 2, 1},
		{"30 % lost", everyNth("a", 3, 0), ms, 5, 5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newTally()
				g, scripts := scripted(t, Config{Observer: o}, "a | b")
				defer running(t, g)()
				scripts["a"].set(says("a", 0, 10*ms))
				scripts["b"].set(says("b", 0, 10*ms))
				for range 100 {
					mustAsk(t, g, "name.test.", "a")
				}
				delay := time.Duration(g.servers[0].hedge.Load())
				g.budget.Store(0)
				scripts["a"].set(tt.a)
				var wg sync.WaitGroup
				var slow atomic.Int32
				for i := range 1000 {
					wg.Go(func() {
						start := time.Now()
						if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i))); err != nil {
							t.Error(err)
						}
						if time.Since(start) > delay+10*ms {
							slow.Add(1)
						}
					})
					time.Sleep(tt.every)
				}
				wg.Wait()
				if n := int(slow.Load()); n > tt.slow {
					t.Errorf("%d questions took longer than %v and 10ms, want at most %d", n, delay, tt.slow)
				}
				if n := o.hedges(); n < tt.hedges {
					t.Errorf("got %d hedges, want at least %d", n, tt.hedges)
				}
			})
		})
	}
}

// TestBudget holds the sums.
func TestBudget(t *testing.T) {
	var b budget
	if b.spend() {
		t.Error("spent from an empty budget")
	}
	for range hedgeCost {
		b.earn()
	}
	if !b.spend() || b.spend() {
		t.Errorf("%d questions do not pay for exactly one hedge", hedgeCost)
	}
	for range 100 * hedgeCap {
		b.earn()
	}
	n := 0
	for b.spend() {
		n++
	}
	if n != hedgeCap/hedgeCost {
		t.Errorf("a full budget pays for %d hedges, want %d", n, hedgeCap/hedgeCost)
	}
}

// TestLoserHarmsNobody holds that the call of a server that lost stays where its answer will come, whatever else is asked
// meanwhile, and that the late answer is the server's only.
func TestLoserHarmsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, servers := piping(t, Config{Hedge: Hedge{After: 20 * time.Millisecond}}, "a | b")
		defer g.Close()
		watched(g)
		mustAsk(t, g, "warm.test.", "a")
		time.Sleep(time.Millisecond)
		servers["a"].set(func(name string) (time.Duration, bool) {
			if name == "slow.test." {
				return 400 * time.Millisecond, false
			}
			return time.Millisecond, false
		})
		mustAsk(t, g, "slow.test.", "b")
		l := g.servers[0].stream.links[0].(*streamLink)
		inFlight := func() (n int, at *call, c call) {
			l.mu.Lock()
			defer l.mu.Unlock()
			for _, at = range l.pending {
				c = *at
			}
			return len(l.pending), at, c
		}
		n, at, lost := inFlight()
		if n != 1 || !lost.givenUp || lost.asked != g.servers[0] {
			t.Fatalf("got %d calls in flight, %+v, want the one that was given up", n, lost)
		}
		for i := range 100 {
			mustAsk(t, g, fmt.Sprintf("n%d.test.", i), "a")
		}
		if n, now, c := inFlight(); n != 1 || now != at || c != lost {
			t.Errorf("got %d calls in flight, %+v, want %+v", n, c, lost)
		}
		time.Sleep(time.Second)
		if n, _, _ := inFlight(); n != 0 {
			t.Errorf("%d calls left after the late answer", n)
		}
		s := g.servers[0]
		s.mu.Lock()
		defer s.mu.Unlock()
		if got := s.latencies.count[bucketOf(400*time.Millisecond)]; got != 0 || time.Since(s.lastAnswer) > time.Second {
			t.Errorf("the late answer was a sample %d times, want never; the last sign of life %v ago", got, time.Since(s.lastAnswer))
		}
	})
}

// TestSearchStress asks from many goroutines servers that answer at random times, lose some, and break their connections,
// all but the last, so that hedges, late answers, new connections and used searches meet. Every answer is to its own question.
func TestSearchStress(t *testing.T) {
	var breaking atomic.Int32
	open := func(s Server, _ ServerObserver) (client, error) {
		p := &piped{name: s.URL, echo: true, hear: func(string) (time.Duration, bool) {
			d := time.Duration(rand.IntN(3000)) * time.Microsecond
			return d, s.URL != "c" && rand.IntN(50) == 0
		}}
		dial := func(ctx context.Context, spawn func(func())) (link, error) {
			l, err := p.dial(ctx, spawn)
			if err == nil && s.URL != "c" {
				breaking.Add(1)
				l.vitals().timer.Reset(time.Hour)
				time.AfterFunc(time.Duration(5+rand.IntN(50))*time.Millisecond, func() {
					l.vitals().die(fault(KindIO, "as written"))
				})
			}
			return l, err
		}
		env := environment{timeout: DefaultDeadline}
		return &poolClient{identity{s.URL, env.timeout}, newPool(env, dial), true}, nil
	}
	n := 200
	if testing.Short() || raceEnabled {
		n = 100
	}
	o := newTally()
	g := assembled(t, Config{Hedge: Hedge{After: time.Millisecond}, Observer: o}, "a b | c", open)
	// Nobody is left alone for long, and hedging has no bound.
	for _, s := range g.servers {
		s.breaker = Breaker{OpenAfter: 1 << 30, Probe: time.Millisecond, MaxProbe: time.Millisecond}
	}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := range n {
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if j%10 == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(3000))*time.Microsecond)
				}
				name := fmt.Sprintf("n%d-%d.test.", i, j)
				g.budget.Store(hedgeCap)
				resp, err := g.Exchange(ctx, question(name))
				switch {
				case err != nil && j%10 != 0:
					t.Errorf("%s: %v", name, err)
				case err == nil && (text(resp) != name || resp.Answer[0].Header().Name != name):
					t.Errorf("%s: got an answer to %s, %s", name, resp.Answer[0].Header().Name, text(resp))
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if o.hedges() < n || breaking.Load() < 5 {
		t.Errorf("got %d hedges and %d connections, want many", o.hedges(), breaking.Load())
	}
	g.Close()
}

// echoStream returns a client of a TCP server that sends every query back as its answer, without allocating anything.
func echoStream(t testing.TB) client {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { ln.Close() })
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				buf := make([]byte, 4096)
				for {
					n, err := conn.Read(buf)
					if err != nil {
						return
					}
					for i := 0; i+4 < n; i += 2 + int(buf[i])<<8 + int(buf[i+1]) {
						buf[i+4] |= 0x80 // QR
					}
					conn.Write(buf[:n])
				}
			})
		}
	})
	addr := ln.Addr().(*net.TCPAddr)
	return newTestClient(t, Server{URL: "tcp://echo", Scheme: "tcp", Host: "127.0.0.1", Port: uint16(addr.Port)})
}

// TestSearchAllocs holds what a question over a stream allocates. The number may only go down.
func TestSearchAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool forgets on purpose")
	}
	const want = 6
	g := assembled(t, Config{}, "a | b", func(s Server, _ ServerObserver) (client, error) { return echoStream(t), nil })
	asked := wire.Question{Name: []byte("\x04name\x04test\x00"), Qtype: dns.TypeTXT, Qclass: dns.ClassINET}
	ask := func() {
		if _, err := g.Ask(t.Context(), asked); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		ask()
	}
	if got := testing.AllocsPerRun(1000, ask); got > want {
		t.Errorf("got %v allocations for a question, want at most %d", got, want)
	}
}

// fates returns what a server does by two octets of fuzz, and whether and when that is a good answer.
func fates(name string, kind, delay byte) (p play, good bool, d time.Duration) {
	// Odd, so that nothing happens at the same moment as a deadline.
	d = time.Duration(delay)*14*time.Millisecond + time.Duration(kind)*time.Microsecond + 1
	switch kind % 8 {
	case 0:
		return mute, false, 0
	case 1:
		return fails([]string{KindConnect, KindTLS, KindIO, KindMismatch, KindMalformed}[kind/8%5], d), false, 0
	case 2:
		return says("", dns.RcodeServerFailure, d), false, 0
	case 3:
		return says("", dns.RcodeRefused, d), false, 0
	case 4:
		return says("", dns.RcodeNameError, d), true, d
	case 5, 6:
		return says(name, 0, d), true, d
	}
	return says(name, 0, 0), true, 0
}

// FuzzAsk holds the engine's law. Whatever each server does: Ask returns by its deadline, and no later than a good answer
// is there; it returns a good one if any server that the group may go on to has one in time; what it returns a server has
// said; and it leaves nothing behind.
func FuzzAsk(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	for n := range 300 {
		data := make([]byte, 3+3*(1+n%6))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 6 || len(data) > 3+3*20 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			head, servers := data[:3], data[3:]
			cfg := Config{Pick: []string{PickInOrder, PickFastest, PickSticky, PickRandom, PickRace}[head[0]%5],
				Hedge: []Hedge{{}, {Never: true}, {After: time.Duration(1+head[2]) * time.Millisecond}}[head[0]/8%3]}
			if head[1]&15 != 0 && head[1]&16 != 0 {
				cfg.NextOn = NextOn{head[1]&1 != 0, head[1]&2 != 0, head[1]&4 != 0, head[1]&8 != 0}
			}
			all := cfg.NextOn == NextOn{} || cfg.NextOn == NextOn{true, true, true, true}
			var names strings.Builder
			n := len(servers) / 3
			for i := range n {
				if i > 0 {
					names.WriteString([]string{" ", "|"}[servers[3*i]&1])
				}
				fmt.Fprintf(&names, " s%d ", i)
			}
			g, scripts := scripted(t, cfg, names.String())
			defer g.Close()
			if head[0]&128 != 0 {
				watched(g)
			}
			if head[2]&1 != 0 {
				g.budget.Store(0)
			}
			var mu sync.Mutex
			said := map[string]time.Duration{} // when it will give a good answer, by server
			asked := map[string]bool{}
			begun := time.Now()
			healthy, prompt := true, false
			for i, s := range g.servers {
				b := servers[3*i : 3*i+3]
				p, good, d := fates(s.url, b[1], b[2])
				prompt = prompt || good && d == 0
				scripts[s.url].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
					mu.Lock()
					if at, ok := said[s.url]; good && (!ok || at > time.Since(begun)+d) {
						said[s.url] = time.Since(begun) + d
					}
					asked[s.url] = true
					mu.Unlock()
					return p(ctx, q)
				})
				switch b[0] >> 1 % 8 {
				case 0:
					healthy = false
					s.mu.Lock()
					s.failLocked(time.Now(), trouble(b[0]>>4%4))
					s.retry = time.Now()
					s.mu.Unlock()
				case 1, 2:
					teach(s, int(b[0]), time.Duration(b[2])*time.Millisecond)
				}
			}
			a, err := g.Ask(t.Context(), wire.Question{Name: []byte("\x04name\x04test\x00"), Qtype: dns.TypeTXT, Qclass: 1})
			took := time.Since(begun)
			mu.Lock()
			defer mu.Unlock()
			first := DefaultDeadline
			for _, at := range said {
				first = min(first, at)
			}
			gotGood := err == nil && !noAnswer(a.Rcode)
			switch {
			case took > DefaultDeadline:
				t.Errorf("took %v, want %v at most", took, DefaultDeadline)
			case took > first:
				t.Errorf("took %v, though a good answer was there after %v", took, first)
			case gotGood && took != first:
				t.Errorf("got %v after %v, when no server has said that", a, took)
			case gotGood || !all:
			case prompt:
				t.Errorf("got %v, %v, though a server answers at once", a, err)
			case healthy && len(asked) != n:
				t.Errorf("got %v, %v, though only %d of %d servers were asked", a, err, len(asked), n)
			case healthy && first < DefaultDeadline:
				t.Errorf("got %v, %v after %v, though a good answer comes after %v", a, err, took, first)
			}
		})
	})
}
