package forward

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// openAfter is how many failures in a row make a server failing.
	openAfter = 3
	// openAfterServFail is how many SERVFAILs in a row make one failing, each for another name than the last and each
	// refuted by a good answer of another server. It is higher, because a name can be broken for one server alone.
	openAfterServFail = 8

	// A failing server is probed every firstProbe; after patientProbes of them the time doubles up to maxProbe.
	firstProbe    = 2 * time.Second
	maxProbe      = 60 * time.Second
	patientProbes = 8

	// latencyWeight is the share of a new sample in the decaying mean.
	latencyWeight = 0.2
	// latencyHalfLife is how fast the memory of a slow server fades, so that it is tried again.
	latencyHalfLife = 20 * time.Second
)

// server is one upstream server: its client and what is remembered about it.
type server struct {
	url    string
	seed   uint64 // of the URL, for PickSticky
	tier   int    // from 1
	client client
	obs    ServerObserver
	log    *slog.Logger

	flying atomic.Int32  // queries in flight
	wake   chan struct{} // has a value after the server became failing; watch takes it

	mu          sync.Mutex
	state       string
	since       time.Time
	fails       int // in a row
	servFails   int // refuted ones in a row
	servFailed  *query
	byServFail  bool // what made it failing
	lastAnswer  time.Time
	lastErr     string
	latency     float64 // decaying mean in nanoseconds
	latencyTime time.Time
	tries       int       // while failing: those that were, and the one that is due at retry
	retry       time.Time // when a failing server is tried again
}

func newServer(url string, tier int, c client, obs ServerObserver, log *slog.Logger) *server {
	return &server{url: url, seed: fnvLower(url), tier: tier, client: c, obs: obs, state: StateUnknown,
		log: log.With("server", url, "tier", tier), wake: make(chan struct{}, 1)}
}

// answered notes a checked response that took d. A SERVFAIL is one: the server lives.
func (s *server) answered(now time.Time, d time.Duration, resp *dns.Msg) {
	s.mu.Lock()
	s.lastAnswer = now
	s.sample(now, d)
	s.fails = 0
	if resp.Rcode != dns.RcodeServerFailure {
		s.servFails, s.servFailed = 0, nil
	} else if s.byServFail || s.state == StateUnknown {
		s.mu.Unlock() // no sign of recovery
		return
	}
	s.recover(now)
}

// recover makes the server ok; s.mu is held and is released.
func (s *server) recover(now time.Time) {
	was := s.state
	if was == StateOK {
		s.mu.Unlock()
		return
	}
	down := now.Sub(s.since)
	s.state, s.since, s.byServFail, s.servFails, s.tries = StateOK, now, false, 0, 0
	s.mu.Unlock()
	if was == StateFailing {
		s.log.Info("upstream recovered", "after", down.Round(time.Millisecond))
	}
}

// failed notes an exchange that gave no response.
func (s *server) failed(now time.Time, d time.Duration, err error) {
	switch kindOf(err) {
	case KindAbandoned, KindBusy, KindClosed, KindBackoff:
		return // says nothing about the server
	case KindMalformed:
		// It lives. What cannot be read of this name may be the name's fault: refuted tells, as for a SERVFAIL.
		s.mu.Lock()
		s.lastAnswer, s.fails = now, 0
		s.mu.Unlock()
		return
	}
	s.mu.Lock()
	s.lastErr = err.Error()
	s.sample(now, max(d, time.Duration(s.latency)))
	s.fails++
	s.openIf(now, s.fails >= openAfter, false)
}

// silent notes an exchange that was overtaken after d without a response. It is a failure only if the server has
// answered nothing else meanwhile: a name may be slow where the server is not.
func (s *server) silent(now time.Time, d time.Duration) {
	s.mu.Lock()
	alive := s.lastAnswer.After(now.Add(-d))
	s.mu.Unlock()
	if !alive {
		s.failed(now, d, fault(KindTimeout, "no answer within %v", d.Round(time.Millisecond)))
	}
}

// refuted notes a SERVFAIL or a malformed answer for q where another server gave a good one.
func (s *server) refuted(now time.Time, q *query) {
	s.mu.Lock()
	if s.servFailed != nil && s.servFailed.hash == q.hash {
		s.mu.Unlock()
		return
	}
	s.lastErr = "SERVFAIL or a malformed answer where another server has a good one"
	s.servFails++
	s.servFailed = q
	s.openIf(now, s.servFails >= openAfterServFail, true)
}

// openIf makes the server failing if open; s.mu is held and is released.
func (s *server) openIf(now time.Time, open, byServFail bool) {
	if !open || s.state == StateFailing {
		s.mu.Unlock()
		return
	}
	s.state, s.since, s.byServFail, s.tries = StateFailing, now, byServFail, 0
	s.pauseLocked(now)
	why := s.lastErr
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
	s.log.Warn("upstream failing", "err", why)
}

// pauseLocked sets the time of the next try of a failing server, a tenth more or less, and counts that try.
func (s *server) pauseLocked(now time.Time) {
	d := firstProbe
	if n := s.tries - patientProbes + 1; n > 0 {
		d = min(maxProbe, firstProbe<<min(n, 6))
	}
	s.tries++
	s.retry = now.Add(time.Duration(float64(d) * (0.9 + 0.2*rand.Float64())))
}

// sample puts d into the decaying mean; s.mu is held.
func (s *server) sample(now time.Time, d time.Duration) {
	old := s.fadedLocked(now)
	switch {
	case old == 0:
		s.latency = float64(d)
	case float64(d) > old:
		s.latency = old + (float64(d)-old)*2*latencyWeight // bad news travels faster
	default:
		s.latency = old + (float64(d)-old)*latencyWeight
	}
	s.latencyTime = now
}

func (s *server) fadedLocked(now time.Time) float64 {
	if s.latency == 0 {
		return 0
	}
	return s.latency * math.Exp2(-float64(now.Sub(s.latencyTime))/float64(latencyHalfLife))
}

// cost is what PickFastest compares: the time that a query would probably take.
func (s *server) cost(now time.Time) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fadedLocked(now) * float64(1+s.flying.Load())
}

// usable reports whether a query may be spent on the server now. Where nobody probes, one query in a while is.
func (s *server) usable(now time.Time, probed bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != StateFailing {
		return true
	}
	if probed || now.Before(s.retry) {
		return false
	}
	s.pauseLocked(now)
	return true
}

func (s *server) failing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == StateFailing
}

func (s *server) status() ServerStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := ServerStatus{URL: s.url, Tier: s.tier, State: s.state, LastError: s.lastErr,
		Latency: time.Duration(s.latency), Since: s.since}
	if c, ok := s.client.(interface{ abandonedCalls() int }); ok {
		st.Abandoned = c.abandonedCalls()
	}
	return st
}

// watch probes the server while it is failing, until ctx ends.
func (s *server) watch(ctx context.Context, timeout time.Duration) {
	for {
		for s.failing() {
			s.mu.Lock()
			retry := s.retry
			s.mu.Unlock()
			if !sleep(ctx, time.Until(retry)) {
				return
			}
			if !s.failing() {
				break
			}
			well := s.probe(ctx, timeout)
			s.mu.Lock()
			if well {
				s.fails = 0
				s.recover(time.Now())
			} else {
				s.pauseLocked(time.Now())
				s.mu.Unlock()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
	}
}

// sleep waits for d and reports whether ctx lasted so long.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// probe asks the server for the root's name servers, which every resolver has at hand. A server that is failing for its
// SERVFAILs may have forwarded them; it is also well when it can now answer the question that it could not.
func (s *server) probe(ctx context.Context, timeout time.Duration) bool {
	s.mu.Lock()
	strict, failed := s.byServFail, s.servFailed
	s.mu.Unlock()
	if !strict {
		return s.probeWith(ctx, timeout, rootQuery, false)
	}
	return failed == nil || s.probeWith(ctx, timeout, failed, true) || s.probeWith(ctx, timeout, rootQuery, true) &&
		s.tooLong()
}

// tooLong reports whether the server has been failing for so long that the name it failed on may itself be broken now.
func (s *server) tooLong() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tries > patientProbes
}

func (s *server) probeWith(ctx context.Context, timeout time.Duration, q *query, strict bool) bool {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	resp, err := s.client.ask(ctx, q)
	if err != nil {
		if !errors.Is(ctx.Err(), context.Canceled) {
			s.obs.Done(time.Since(start), -1, kindOf(err))
			s.mu.Lock()
			s.lastErr = err.Error()
			s.mu.Unlock()
		}
		return false
	}
	d := time.Since(start)
	s.obs.Done(d, resp.Rcode, "")
	s.mu.Lock()
	s.sample(time.Now(), d)
	s.mu.Unlock()
	return !strict || resp.Rcode != dns.RcodeServerFailure
}

// rootQuery is ". NS".
var rootQuery = func() *query {
	m := new(dns.Msg)
	m.SetQuestion(".", dns.TypeNS)
	q, err := newQuery(m)
	if err != nil {
		panic("forward: the probe cannot be packed: " + err.Error())
	}
	return q
}()
