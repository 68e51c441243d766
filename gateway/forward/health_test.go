package forward

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// piped is a server behind streams in memory, so that it can live in a bubble. Its answers bear its name as TXT.
type piped struct {
	name  string
	echo  bool         // its answers bear the name that was asked instead
	conns atomic.Int32 // that were opened

	mu         sync.Mutex
	hear       hearing
	hangs      bool     // dials do
	seen       []string // questions, in order
	open, peak int      // connections, those that hang included
}

// opened counts connections.
func (p *piped) opened(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open += n
	p.peak = max(p.peak, p.open)
}

// hearing says when the answer to a question is sent, and whether at all.
type hearing func(name string) (d time.Duration, lost bool)

func after(d time.Duration) hearing { return func(string) (time.Duration, bool) { return d, false } }

func deaf(string) (time.Duration, bool) { return 0, true }

// lossy answers after d and loses some, probes too.
func lossy(seed uint64, share float64, d time.Duration) hearing {
	r := rand.New(rand.NewPCG(seed, seed))
	return func(string) (time.Duration, bool) { return d, r.Float64() < share }
}

func (p *piped) set(h hearing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hear = h
}

// asked returns how many questions came, and how many of them were probes.
func (p *piped) asked() (all, probes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range p.seen {
		if name == "." {
			probes++
		}
	}
	return len(p.seen), probes
}

func (p *piped) dial(ctx context.Context, spawn func(func())) (link, error) {
	p.opened(1)
	p.mu.Lock()
	hangs := p.hangs
	p.mu.Unlock()
	if hangs {
		defer p.opened(-1)
		<-ctx.Done()
		return nil, classify(KindConnect, "dialling", ctx.Err())
	}
	near, far := net.Pipe()
	p.conns.Add(1)
	spawn(func() { p.serve(far) })
	closed := sync.OnceFunc(func() { p.opened(-1) })
	return newStreamLink(hooked{near, closed}, keepalive, spawn), nil
}

// hooked is a connection that tells when it is closed.
type hooked struct {
	net.Conn
	closed func()
}

func (c hooked) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func (p *piped) serve(conn net.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer conn.Close()
	var writing sync.Mutex
	r := bufio.NewReader(conn)
	for {
		msg, err := readFrame(r, new([]byte))
		if err != nil {
			return
		}
		m := new(dns.Msg)
		if m.Unpack(msg) != nil {
			return
		}
		name := m.Question[0].Name
		p.mu.Lock()
		p.seen = append(p.seen, name)
		d, lost := p.hear(name)
		p.mu.Unlock()
		if lost {
			continue
		}
		wg.Go(func() {
			time.Sleep(d)
			m.Response, m.Extra = true, nil
			m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
				Txt: []string{p.name}}}
			if p.echo {
				m.Answer[0].(*dns.TXT).Txt[0] = name
			}
			out := must(m.Pack())
			writing.Lock()
			defer writing.Unlock()
			conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
		})
	}
}

// piping returns a group of piped servers that answer after 10ms.
func piping(t *testing.T, cfg Config, tiers string) (*Group, map[string]*piped) {
	t.Helper()
	servers := make(map[string]*piped)
	return assembled(t, cfg, tiers, func(s Server, obs ServerObserver) (client, error) {
		p := &piped{name: s.URL, hear: after(10 * time.Millisecond)}
		servers[s.URL] = p
		env := environment{timeout: DefaultDeadline, count: obs.Connections}
		return &poolClient{identity{s.URL, env.timeout}, newPool(env, p.dial), true}, nil
	}), servers
}

// journal is a logger whose lines a test reads.
type journal struct {
	*slog.Logger
	mu  sync.Mutex
	buf bytes.Buffer
}

func newJournal() *journal {
	j := new(journal)
	j.Logger = slog.New(slog.NewTextHandler(j, nil))
	return j
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

// lines returns level and message of each line, without "upstream".
func (j *journal) lines() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	var all []string
	for line := range strings.Lines(j.buf.String()) {
		level := line[strings.Index(line, "level=")+len("level="):]
		msg := line[strings.Index(line, `msg="upstream `)+len(`msg="upstream `):]
		all = append(all, level[:strings.Index(level, " ")]+" "+msg[:strings.Index(msg, `"`)])
	}
	return strings.Join(all, ", ")
}

// load asks g a question every so often for a while, and returns who answered, and what the slowest took.
func load(t *testing.T, g *Group, every, long time.Duration) (from map[string]int, worst time.Duration) {
	t.Helper()
	from = make(map[string]int)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(every) {
		wg.Go(func() {
			start := time.Now()
			resp, err := g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", rand.Uint32())))
			mu.Lock()
			defer mu.Unlock()
			worst = max(worst, time.Since(start))
			if err != nil {
				t.Error(err)
			} else {
				from[text(resp)]++
			}
		})
	}
	wg.Wait()
	return from, worst
}

// TestBreakerHedged follows a server over streams that goes silent, is failing, and comes back, while its questions are
// hedged.
func TestBreakerHedged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ms := time.Millisecond
		j, o := newJournal(), newTally()
		g, servers := piping(t, Config{Logger: j.Logger, Observer: o}, "a | b")
		defer running(t, g)()
		mustAsk(t, g, "warm.test.", "a")
		g.servers[1].client.ask(t.Context(), rootQuery)
		for range 100 {
			mustAsk(t, g, "name.test.", "a")
		}
		time.Sleep(ms)
		servers["a"].set(deaf)
		for i := range 4 {
			want := minHedge + 10*ms
			if i == defaultOpenAfter {
				want = 10 * ms
			}
			if d := mustAsk(t, g, fmt.Sprintf("n%d.test.", i), "b"); d != want {
				t.Errorf("question %d took %v, want %v", i+1, d, want)
			}
		}
		// The probes over the connection at hand and over a new one are lost, then it is failing.
		if got := g.Status()[0].State; got != StateSuspect {
			t.Errorf("got state %q, want suspect", got)
		}
		all, probes := servers["a"].asked()
		time.Sleep(quickProbe)
		if n := servers["a"].conns.Load(); n != 2 {
			t.Errorf("got %d connections, want a second one for the second probe", n)
		}
		time.Sleep(3 * maxHedge)
		if got := g.Status()[0].State; got != StateFailing {
			t.Errorf("got state %q, want failing", got)
		}
		if from, worst := load(t, g, 10*ms, 10*time.Second); from["a"] > 0 || worst != 10*ms {
			t.Errorf("got %v, the slowest after %v, want all of b after 10ms", from, worst)
		}
		all2, probes2 := servers["a"].asked()
		if n := all2 - all - probes2 + probes; n != 0 {
			t.Errorf("%d clients' questions went to the failing server", n)
		}
		if n := probes2 - probes; n < 3 || n > 8 {
			t.Errorf("got %d probes in 11s, want one or two every 3s", n)
		}
		if got, want := j.lines(), "INFO suspect, WARN failing"; got != want {
			t.Errorf("got log %q, want %q", got, want)
		}
		servers["a"].set(after(10 * ms))
		time.Sleep(5 * time.Second)
		if d := mustAsk(t, g, "name.test.", "a"); d != 10*ms {
			t.Errorf("took %v after the recovery", d)
		}
		if got, want := j.lines(), "INFO suspect, WARN failing, INFO recovered"; got != want {
			t.Errorf("got log %q, want %q", got, want)
		}
		if got, want := o.servers["a"].history(), "unknown ok suspect failing ok"; got != want {
			t.Errorf("got states %q, want %q", got, want)
		}
	})
}

// TestSuspectReturns holds that a server that lost a few questions, and answers its probe, is never failing.
func TestSuspectReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal()
		g, servers := piping(t, Config{Logger: j.Logger}, "a | b")
		defer running(t, g)()
		load(t, g, 10*time.Millisecond, time.Second)
		time.Sleep(time.Millisecond)
		servers["a"].set(func(name string) (time.Duration, bool) {
			return 10 * time.Millisecond, strings.HasPrefix(name, "lost")
		})
		for i := range defaultOpenAfter {
			mustAsk(t, g, fmt.Sprintf("lost%d.test.", i), "b")
		}
		time.Sleep(20 * time.Millisecond)
		mustAsk(t, g, "name.test.", "a")
		if got, want := j.lines(), "INFO suspect, INFO recovered"; got != want {
			t.Errorf("got log %q, want %q", got, want)
		}
		if n := servers["a"].conns.Load(); n != 1 {
			t.Errorf("got %d connections, want the first to have stayed", n)
		}
	})
}

// TestFaultsOfServers holds which states a server goes through that has a fault from 1s to 11s, how the clients fare,
// and that it is in use again within 5s.
func TestFaultsOfServers(t *testing.T) {
	ms := time.Millisecond
	tests := []struct {
		name string
		hear func() hearing
		want string        // the states
		slow time.Duration // at most
	}{
		{"silent", func() hearing { return deaf }, "unknown ok suspect failing ok", 500 * ms},
		{"2s slow", func() hearing { return after(2 * time.Second) }, "unknown ok suspect failing ok", 500 * ms},
		{"30 % lost", func() hearing { return lossy(1, 0.3, 10*ms) }, "unknown ok suspect failing ok", 1100 * ms},
		{"30 % lost", func() hearing { return lossy(2, 0.3, 10*ms) }, "unknown ok suspect failing ok", 1100 * ms},
		{"1 % lost", func() hearing { return lossy(3, 0.01, 10*ms) }, "unknown ok", 1100 * ms},
	}
	for _, tt := range tests {
		for _, every := range []time.Duration{ms, 20 * ms} {
			t.Run(fmt.Sprint(tt.name, "/", every), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newTally()
					g, servers := piping(t, Config{Observer: o}, "a | b")
					defer running(t, g)()
					load(t, g, every, time.Second)
					servers["a"].set(tt.hear())
					_, worst := load(t, g, every, 10*time.Second)
					if worst > tt.slow {
						t.Errorf("the slowest took %v, want at most %v", worst, tt.slow)
					}
					servers["a"].set(after(10 * ms))
					load(t, g, every, 5*time.Second)
					if from, _ := load(t, g, every, time.Second); from["b"]*20 > from["a"] {
						t.Errorf("after recovery: got %v, want at least 95 %% of a", from)
					}
					if got := o.servers["a"].history(); got != tt.want {
						t.Errorf("got states %q, want %q", got, tt.want)
					}
					if n := o.servers["a"].peak.Load(); n > maxConnections {
						t.Errorf("got %d connections at once, want at most %d", n, maxConnections)
					}
				})
			})
		}
	}
}

// TestLateAnswersAreNoRecovery holds that a server whose every answer comes after 2s stays away, also where the last
// answers come when it is failing already, and that a prompt answer brings it back.
func TestLateAnswersAreNoRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newTally()
		g, servers := piping(t, Config{Observer: o}, "a | b")
		defer g.Close() // nobody probes: only what clients see counts
		load(t, g, 10*time.Millisecond, time.Second)
		time.Sleep(time.Millisecond)
		servers["a"].set(after(2 * time.Second))
		load(t, g, 10*time.Millisecond, 10*time.Second)
		st := g.Status()[0]
		if all, _ := servers["a"].asked(); st.State != StateFailing || all < 100+5 {
			t.Errorf("got %+v after %d questions, want it failing, and tried now and then", st, all)
		}
		time.Sleep(3 * time.Second) // the last tries are answered
		if got, want := o.servers["a"].history(), "unknown ok failing"; got != want {
			t.Errorf("got states %q, want %q: late answers do not bring it back", got, want)
		}
		servers["a"].set(after(10 * time.Millisecond))
		load(t, g, 10*time.Millisecond, 5*time.Second)
		mustAsk(t, g, "name.test.", "a")
	})
}

// TestRefuted holds which answers count against a server when another one refutes them, that a good one ends the row,
// and that it takes a good answer to the same question to come back.
func TestRefuted(t *testing.T) {
	for name, bad := range map[string]play{
		"SERVFAIL":  says("", dns.RcodeServerFailure, 0),
		"REFUSED":   says("", dns.RcodeRefused, 0),
		"malformed": fails(KindMalformed, 0),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := newJournal()
				g, scripts := scripted(t, Config{Logger: j.Logger}, "a | b")
				defer running(t, g)()
				i := 0
				ask := func(n int, want string) {
					t.Helper()
					for range n {
						i++
						mustAsk(t, g, fmt.Sprintf("n%d.test.", i), want)
					}
				}
				ask(1, "a")
				scripts["a"].set(bad)
				ask(openAfterRefuted-1, "b")
				scripts["a"].set(says("a", 0, 0))
				ask(1, "a")
				scripts["a"].set(bad)
				ask(openAfterRefuted-1, "b")
				if st := g.Status()[0]; st.State != StateOK {
					t.Errorf("got %+v after %d in a row", st, openAfterRefuted-1)
				}
				ask(1, "b")
				if st := g.Status()[0]; st.State != StateFailing {
					t.Errorf("got %+v after %d in a row", st, openAfterRefuted)
				}
				// The root is well, the name is not.
				scripts["a"].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
					if askedOf(q).Name == "." {
						return says("a", 0, 0)(ctx, q)
					}
					return bad(ctx, q)
				})
				time.Sleep(5 * defaultProbe)
				if st := g.Status()[0]; st.State != StateFailing {
					t.Errorf("got %+v while the name is still broken", st)
				}
				scripts["a"].set(says("a", 0, 0))
				time.Sleep(5 * time.Second)
				ask(1, "a")
				if got, want := j.lines(), "WARN failing, INFO recovered"; got != want {
					t.Errorf("got log %q, want %q", got, want)
				}
			})
		})
	}
}

// TestBreakerConfig holds the three numbers that are written in the configuration.
func TestBreakerConfig(t *testing.T) {
	const s = time.Second
	tests := []struct {
		b       Breaker
		opens   int
		gaps    []time.Duration
		doubled []time.Duration // after the patient ones
	}{
		{Breaker{}, 3, []time.Duration{2 * s, 2 * s}, []time.Duration{4 * s, 8 * s, 16 * s, 32 * s, 60 * s, 60 * s}},
		{Breaker{OpenAfter: 1}, 1, []time.Duration{2 * s}, nil},
		{Breaker{OpenAfter: 5}, 5, []time.Duration{2 * s}, nil},
		{Breaker{Probe: s / 2, MaxProbe: 3 * s}, 3, []time.Duration{s / 2, s / 2}, []time.Duration{s, 2 * s, 3 * s, 3 * s}},
		{Breaker{Probe: 5 * s, MaxProbe: 5 * s}, 3, []time.Duration{5 * s}, []time.Duration{5 * s, 5 * s}},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.b), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, scripts := scripted(t, Config{Breaker: tt.b}, "a | b")
				defer running(t, g)()
				var mu sync.Mutex // guards gaps and last
				var gaps []time.Duration
				last := time.Now()
				scripts["a"].set(func(_ context.Context, q *query) (*dns.Msg, error) {
					mu.Lock()
					defer mu.Unlock()
					if askedOf(q).Name == "." {
						gaps = append(gaps, time.Since(last))
						last = time.Now()
					}
					return nil, fault(KindConnect, "as written")
				})
				for i := range tt.opens {
					if st := g.Status()[0]; st.State == StateFailing {
						t.Fatalf("failing after %d failures, want %d", i, tt.opens)
					}
					mustAsk(t, g, fmt.Sprintf("n%d.test.", i), "b")
				}
				if st := g.Status()[0]; st.State != StateFailing {
					t.Fatalf("got %+v after %d failures", st, tt.opens)
				}
				mu.Lock()
				last = time.Now()
				mu.Unlock()
				time.Sleep(5 * time.Minute)
				mu.Lock()
				defer mu.Unlock()
				want := tt.gaps
				if tt.doubled != nil {
					for len(want) < patientProbes {
						want = append(want, want[0])
					}
					want = append(want, tt.doubled...)
				}
				if len(gaps) < len(want) {
					t.Fatalf("got probes after %v, want %v", gaps, want)
				}
				for i, d := range want {
					if gaps[i] < d*9/10 || gaps[i] > d*11/10 {
						t.Errorf("probe %d came after %v, want %v, a tenth more or less", i+1, gaps[i], d)
					}
				}
			})
		})
	}
}

// TestRelapse holds that a lossy server has to answer ever more probes when its trouble comes back soon.
func TestRelapse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, servers := piping(t, Config{}, "a | b")
		defer running(t, g)()
		a := g.servers[0]
		load(t, g, 10*time.Millisecond, time.Second)
		time.Sleep(relapseWithin) // it has been ok for long
		q := must(queryOf(question("outrun.test.")))
		for i, want := range []int{lossyProbes, 2 * lossyProbes, 4 * lossyProbes, 4 * lossyProbes, lossyProbes} {
			if i == 4 {
				time.Sleep(relapseWithin)
				teach(a, relapseBefore, 10*time.Millisecond)
			}
			_, before := servers["a"].asked()
			for !a.away.Load() {
				// Some are answered in between, so it is not silent.
				teach(a, 1, 10*time.Millisecond)
				a.outrun(time.Now(), q)
			}
			a.mu.Lock()
			why := a.why
			a.mu.Unlock()
			if why != troubleLossy {
				t.Fatalf("got trouble %d, want lossy", why)
			}
			time.Sleep(2 * time.Second)
			_, after := servers["a"].asked()
			if st := g.Status()[0]; st.State != StateOK || after-before != want+1 { // one over the connection at hand
				t.Errorf("time %d: got %s after %d probes, want ok after %d", i+1, st.State, after-before, want+1)
			}
		}
	})
}

// TestStates plays random faults on three servers. Whatever happens, a server is away exactly when it is suspect or
// failing, a client gets an answer as long as one server is well, and all are in use soon after all are well.
func TestStates(t *testing.T) {
	ms := time.Millisecond
	seeds := uint64(60)
	if testing.Short() || raceEnabled {
		seeds = 15
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 7))
				g, scripts := scripted(t, Config{Pick: []string{PickInOrder, PickFastest, PickSticky, PickRandom, PickRace}[r.IntN(5)],
					Breaker: Breaker{OpenAfter: 1 + r.IntN(4)}}, []string{"a | b | c", "a b | c", "a b c"}[r.IntN(3)])
				defer running(t, g)()
				sane := func() {
					t.Helper()
					for _, s := range g.servers {
						s.mu.Lock()
						if away := s.state == StateSuspect || s.state == StateFailing; away != s.away.Load() {
							t.Errorf("%s: got away %v in state %s", s.url, !away, s.state)
						}
						s.mu.Unlock()
					}
				}
				faulty := func(name string) play {
					switch r.IntN(9) {
					case 0:
						return mute
					case 1:
						return fails([]string{KindConnect, KindTLS, KindIO, KindMismatch, KindMalformed}[r.IntN(5)],
							time.Duration(r.IntN(3))*50*ms)
					case 2:
						return says("", dns.RcodeServerFailure, time.Duration(r.IntN(300))*ms)
					case 3:
						return says("", dns.RcodeRefused, 0)
					case 4:
						return says(name, 0, time.Duration(r.IntN(3000))*ms)
					case 5:
						return everyNth(name, 3, 0)
					case 6:
						return everyNth(name, int32(2+r.IntN(20)), time.Second)
					}
					return says(name, 0, 5*ms)
				}
				var wg sync.WaitGroup
				var changes atomic.Int32
				ask := func() {
					wg.Go(func() {
						start, n := time.Now(), changes.Load()
						_, err := g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", start.UnixNano()/7)))
						if d := time.Since(start); d > DefaultDeadline {
							t.Errorf("took %v", d)
						}
						if err != nil && n == changes.Load() {
							t.Errorf("got %v, though one server was well", err)
						}
						sane()
					})
				}
				for end := time.Now().Add(12 * time.Second); time.Now().Before(end); {
					changes.Add(1)
					safe := r.IntN(3)
					for i, name := range []string{"a", "b", "c"} {
						scripts[name].set(faulty(name))
						if i == safe {
							scripts[name].set(says(name, 0, 5*ms))
						}
					}
					for range 1 + r.IntN(300) {
						ask()
						time.Sleep(time.Duration(r.IntN(20)) * ms)
					}
				}
				for name, s := range scripts {
					s.set(says(name, 0, 5*ms))
				}
				for range 1000 {
					ask()
					time.Sleep(10 * ms)
				}
				wg.Wait()
				sane()
				for _, st := range g.Status() {
					if st.State != StateOK && st.State != StateUnknown {
						t.Errorf("after 10s in which all was well: %+v", st)
					}
				}
			})
		})
	}
}

// TestPrevious holds what a group takes over from the one that it replaces.
func TestPrevious(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ms := time.Millisecond
		old, scripts := scripted(t, Config{}, "a | b | c")
		stop := running(t, old)
		scripts["a"].set(fails(KindConnect, 0))
		scripts["b"].set(says("b", 0, 100*ms))
		for range 60 {
			mustAsk(t, old, "name.test.", "b")
		}
		before := old.Status()
		stop()
		o, j := newTally(), newJournal()
		g, scripts := scripted(t, Config{Previous: old, Observer: o, Logger: j.Logger}, "a b | d | c")
		for i, want := range map[int]ServerStatus{0: before[0], 1: before[1]} {
			want.Tier = 1
			if got := g.Status()[i]; got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		}
		if got := time.Duration(g.servers[1].hedge.Load()); got != before[1].High || got < 100*ms {
			t.Errorf("got hedge delay %v, want %v", got, before[1].High)
		}
		if got := g.Status()[2]; got.State != StateUnknown || got.Latency != 0 {
			t.Errorf("a new server: got %+v", got)
		}
		if a, b := o.servers["a"].history(), o.servers["b"].history(); a != StateFailing || b != StateOK {
			t.Errorf("the observer was told %q and %q", a, b)
		}
		defer running(t, g)()
		for range 10 {
			mustAsk(t, g, "name.test.", "b")
		}
		if n := scripts["a"].n.Load(); n != 0 {
			t.Errorf("the failing server got %d questions, want none before its probe", n)
		}
		time.Sleep(3 * time.Second)
		if n := scripts["a"].n.Load(); n == 0 || g.Status()[0].State != StateOK {
			t.Errorf("got %d probes and state %s, want the new group to bring it back", n, g.Status()[0].State)
		}
		mustAsk(t, g, "name.test.", "a")
		if got, want := j.lines(), "INFO recovered"; got != want {
			t.Errorf("got log %q, want %q", got, want)
		}
	})
}

// TestPreviousSame holds which servers are the same after a reload.
func TestPreviousSame(t *testing.T) {
	pin := func(b byte) (p [][32]byte) { return append(p, [32]byte{b}) }
	one := Server{URL: "https://192.0.2.1/x", Scheme: "https", Host: "192.0.2.1", Port: 443, Path: "/x", VerifyName: "dns.test",
		Roots: pki().roots, Pins: pin(1), ClientCert: &pki().clientCrt}
	with := func(change func(*Server)) Server { s := one; change(&s); return s }
	otherRoots := pki().roots.Clone()
	otherRoots.AddCert(pki().stranger.Leaf)
	tests := []struct {
		name string
		s    Server
		same bool
	}{
		{"itself", one, true},
		{"equal roots", with(func(s *Server) { s.Roots = pki().roots.Clone() }), true},
		{"equal pins", with(func(s *Server) { s.Pins = pin(1) }), true},
		{"another URL", with(func(s *Server) { s.URL += "y" }), false},
		{"another scheme", with(func(s *Server) { s.Scheme = "h3" }), false},
		{"another host", with(func(s *Server) { s.Host = "192.0.2.2" }), false},
		{"another port", with(func(s *Server) { s.Port = 8443 }), false},
		{"another path", with(func(s *Server) { s.Path = "/y" }), false},
		{"another name", with(func(s *Server) { s.VerifyName = "other.test" }), false},
		{"another pin", with(func(s *Server) { s.Pins = pin(2) }), false},
		{"no pin", with(func(s *Server) { s.Pins = nil }), false},
		{"other roots", with(func(s *Server) { s.Roots = otherRoots }), false},
		{"the system's roots", with(func(s *Server) { s.Roots = nil }), false},
		{"another client certificate", with(func(s *Server) { s.ClientCert = &pki().good }), false},
		{"no client certificate", with(func(s *Server) { s.ClientCert = nil }), false},
	}
	for _, tt := range tests {
		old := newTestGroup(t, Config{Tiers: [][]Server{{one}}})
		s := old.servers[0]
		teach(s, 100, 50*time.Millisecond)
		s.mu.Lock()
		s.failLocked(time.Now(), troubleErrors)
		s.mu.Unlock()
		g := newTestGroup(t, Config{Tiers: [][]Server{{tt.s}}, Previous: old})
		st := g.Status()[0]
		if same := st.State == StateFailing && st.Latency != 0; same != tt.same {
			t.Errorf("%s: got %+v, want taken over: %v", tt.name, st, tt.same)
		}
		if got := g.servers[0].away.Load(); got != tt.same {
			t.Errorf("%s: got away %v", tt.name, got)
		}
	}
}

// TestNeverGone has a name without an answer while the server answers others, the next of them a moment before or after that name's
// time is over, or while the probe that this is worth waits: the server was never gone, and has not recovered.
func TestNeverGone(t *testing.T) {
	for _, tt := range []struct {
		name string
		wait time.Duration // from the question in vain to the next one, whose answer takes 10 ms
	}{
		{"before", DefaultDeadline - 15*time.Millisecond},
		{"under way", DefaultDeadline - 5*time.Millisecond},
		{"with the probe", DefaultDeadline},
		{"after", DefaultDeadline + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newTally()
				g, servers := piping(t, Config{Observer: o}, "a")
				defer running(t, g)()
				for range 20 {
					mustAsk(t, g, "name.test.", "a")
				}
				servers["a"].set(func(name string) (time.Duration, bool) { return 10 * time.Millisecond, name == "lost.test." })
				for range defaultOpenAfter {
					time.Sleep(time.Minute) // nobody asks anything else meanwhile
					var wg sync.WaitGroup
					wg.Go(func() {
						if _, err := g.Exchange(t.Context(), question("lost.test.")); err == nil {
							t.Error("an answer")
						}
					})
					time.Sleep(tt.wait)
					mustAsk(t, g, "name.test.", "a")
					wg.Wait()
				}
				time.Sleep(time.Minute)
				if n := g.Recovered(); n != 0 {
					t.Errorf("recovered at %v", time.Unix(0, n))
				}
				if got, want := o.servers["a"].history(), "unknown ok"; got != want {
					t.Errorf("got states %q, want %q", got, want)
				}
			})
		})
	}
}

// TestRecoveredByAnswer has a server that was silent to a question and to the probe for it answer a question before the next probe:
// it is back.
func TestRecoveredByAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, servers := piping(t, Config{Breaker: Breaker{OpenAfter: 100}}, "a")
		defer running(t, g)()
		for range 20 {
			mustAsk(t, g, "name.test.", "a")
		}
		servers["a"].set(deaf)
		if _, err := g.Exchange(t.Context(), question("lost.test.")); err == nil {
			t.Fatal("an answer")
		}
		time.Sleep(quickProbe + 50*time.Millisecond)
		servers["a"].set(after(10 * time.Millisecond))
		_, probes := servers["a"].asked()
		mustAsk(t, g, "name.test.", "a")
		if _, n := servers["a"].asked(); n != probes || g.Recovered() != time.Now().UnixNano() {
			t.Errorf("recovered at %v after %d probes, want now and %d", time.Unix(0, g.Recovered()), n, probes)
		}
	})
}

// TestRecovered asks a group of one server, and nothing else while it waits: it knows when the server is back, and that it never
// was gone when a name alone has no answer.
func TestRecovered(t *testing.T) {
	deafTo := func(prefix string) hearing {
		return func(name string) (time.Duration, bool) { return 10 * time.Millisecond, strings.HasPrefix(name, prefix) }
	}
	for _, tt := range []struct {
		name   string
		broken hearing
		asked  int           // questions, all in vain
		longer time.Duration // the fault goes on
		open   int           // Breaker.OpenAfter
		states string
		want   bool
	}{
		{"one question in an outage", deaf, 1, 5 * time.Second, 0, "unknown ok failing ok", true},
		{"one question in a short outage", deaf, 1, 150 * time.Millisecond, 100, "unknown ok", true},
		{"questions in an outage", deaf, 5, 5 * time.Second, 0, "unknown ok failing ok", true},
		{"a name without an answer", deafTo("lost"), 1, 5 * time.Second, 0, "unknown ok", false},
		{"names without an answer", deafTo("lost"), 5, 5 * time.Second, 0, "unknown ok", false},
	} {
		for _, watched := range []bool{true, false} {
			if !watched && (!tt.want || tt.asked < defaultOpenAfter) {
				continue // nobody can tell
			}
			t.Run(fmt.Sprint(tt.name, "/watched=", watched), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newTally()
					g, servers := piping(t, Config{Observer: o, Breaker: Breaker{OpenAfter: tt.open}}, "a")
					stop := func() { g.Close() }
					if watched {
						stop = running(t, g)
					}
					defer stop()
					for range 20 {
						mustAsk(t, g, "name.test.", "a")
					}
					if n := g.Recovered(); n != 0 {
						t.Errorf("recovered at %v before anything has failed", time.Unix(0, n))
					}
					servers["a"].set(tt.broken)
					for i := range tt.asked {
						if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("lost%d.test.", i))); err == nil {
							t.Fatal("an answer")
						}
					}
					time.Sleep(tt.longer)
					healed := time.Now()
					servers["a"].set(after(10 * time.Millisecond))
					if watched {
						time.Sleep(2 * defaultProbe) // a probe may be waiting for its answer when the server comes back
					} else {
						mustAsk(t, g, "name.test.", "a")
					}
					if got := g.Recovered() >= healed.UnixNano(); got != tt.want {
						t.Errorf("recovered after the fault: %v, want %v", got, tt.want)
					}
					if !tt.want && g.Recovered() != 0 {
						t.Error("it was never gone, and has recovered")
					}
					if got := o.servers["a"].history(); watched && got != tt.states {
						t.Errorf("got states %q, want %q", got, tt.states)
					}
				})
			})
		}
	}
}

// TestRecoveredFromSuspect has a server that is silent to several questions and to the probe that follows, and is back before
// the next probe's time is over: it was gone.
func TestRecoveredFromSuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newTally()
		g, servers := piping(t, Config{Observer: o}, "a")
		defer running(t, g)()
		for range 40 {
			mustAsk(t, g, "name.test.", "a")
		}
		servers["a"].set(deaf)
		var wg sync.WaitGroup
		for _, name := range []string{"x.test.", "y.test.", "z.test.", "w.test."} {
			wg.Go(func() { _, _ = g.Exchange(t.Context(), question(name)) })
			time.Sleep(50 * time.Millisecond)
		}
		time.Sleep(450 * time.Millisecond)
		began := time.Now()
		servers["a"].set(after(10 * time.Millisecond))
		time.Sleep(3 * time.Second)
		wg.Wait()
		if got := o.servers["a"].history(); got != "unknown ok suspect ok" || g.Recovered() < began.UnixNano() {
			t.Errorf("%s, recovered %v after the server was back", got, time.Unix(0, g.Recovered()).Sub(began))
		}
	})
}
