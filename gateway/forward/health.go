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

	"dnsgateway/gateway/wire"
)

// Breaker says when a server is left alone and how it comes back. The zero value of a field means its default.
type Breaker struct {
	OpenAfter int           // failures in a row that make a server failing; 3
	Probe     time.Duration // between the probes of a failing server; 2 s
	MaxProbe  time.Duration // what that time grows to; 60 s
}

const (
	defaultOpenAfter = 3
	defaultProbe     = 2 * time.Second
	defaultMaxProbe  = 60 * time.Second

	// openAfterRefuted is how many SERVFAILs, REFUSEDs or unreadable answers in a row make a server failing, each for
	// another name than the last and each refuted by a good answer of another server. It is higher, because a name can
	// be broken for one server alone.
	openAfterRefuted = 8
	// patientProbes is after how many probes the time between them begins to double.
	patientProbes = 8

	// lateWeight is the share of one query in lateShare, and from troubledShare on the budget of hedges does not count. In
	// normal times it is about 1/hedgeShare, and its deviation a fifth of troubledShare.
	lateWeight    = 1.0 / 32
	troubledShare = 0.1
	// lostWeight is the share of one query in lostShare, and lossyShare the lostShare that makes a server suspect.
	lostWeight = 1.0 / 64
	lossyShare = 0.15
	// lossyProbes is how many probes in a row a server has to answer that lost queries: with 30 % lost, one in 35 such
	// rows succeeds.
	lossyProbes = 10
	// probePause is the time between the probes of such a row.
	probePause = 10 * time.Millisecond
	// relapseWithin is how soon after its recovery trouble counts as the same trouble: then more probes are asked for.
	relapseWithin = 10 * time.Second
	relapseBefore = 20 // or so few answers
	maxRelapses   = 2
	// quickProbe is the least time for a probe over a connection that may be dead.
	quickProbe = 100 * time.Millisecond

	// latencyWeight is the share of a new sample in the decaying mean.
	latencyWeight = 0.2
	// usualWeight is one part in how many a new sample is of what is usual.
	usualWeight = 8
	// latencyHalfLife is how fast the memory of a slow server fades, so that it is tried again.
	latencyHalfLife = 20 * time.Second
)

// trouble is why a server is suspect or failing. It decides what a probe has to show.
type trouble uint8

const (
	troubleErrors  trouble = iota // failures in a row
	troubleSilent                 // queries in a row without any answer
	troubleLossy                  // too many queries late, lost or broken
	troubleRefuted                // answers that another server refuted
)

// server is one upstream server: its client and what is remembered about it.
type server struct {
	spec    Server
	url     string
	seed    uint64 // of the URL, for PickSticky
	tier    int    // from 1
	client  client
	stream  *pool // the client's, where it may be able to send a query without waiting; else nil
	obs     ServerObserver
	log     *slog.Logger
	breaker Breaker

	flying  atomic.Int32 // queries in flight
	away    atomic.Bool  // suspect or failing
	high    atomic.Int64 // what nearly all answers are faster than, as a time.Duration; 0 while unknown
	hedge   atomic.Int64 // the same within minHedge and maxHedge
	usual   atomic.Int64 // the decaying mean of answers that came in time, as a time.Duration; 0 while unknown
	watched atomic.Bool  // watch runs
	group   *Group
	wake    chan struct{}

	mu sync.Mutex
	memory
}

// memory is what a server's answers have taught. It outlives a reload.
type memory struct {
	state       string
	why         trouble // of suspect and failing
	since       time.Time
	fails       int     // in a row
	doubted     bool    // nobody had an answer to a question, and it has given none since: watch asks it
	vain        bool    // and that probe had no answer at once, or that of a suspect one: it is gone
	unanswered  int     // late queries in a row since which nothing came at all
	lateShare   float64 // decaying share of the queries that were late
	lostShare   float64 // decaying share of those that broke, or were late where another server was not
	refutals    int     // in a row
	refutedBy   *query  // the last of them
	outrunBy    *query  // the last that another server answered while this one was late
	relapses    int     // recoveries in a row that did not last
	recovered   bool    // it was away once
	good        int     // answers in time since the last recovery
	lastAnswer  time.Time
	lastErr     string
	latency     float64 // decaying mean in nanoseconds
	latencyTime time.Time
	latencies   latencies
	tries       int       // while failing: those that were, and the one that is due at retry
	retry       time.Time // when a failing server is tried again
}

func newServer(spec Server, tier int, c client, obs ServerObserver, b Breaker, log *slog.Logger) *server {
	s := &server{spec: spec, url: spec.URL, seed: fnvLower(spec.URL), tier: tier, client: c, obs: obs, breaker: b,
		log: log.With("server", spec.URL, "tier", tier), wake: make(chan struct{}, 1)}
	if p, ok := c.(*poolClient); ok && p.streams {
		s.stream = p.pool
	}
	s.state = StateUnknown
	s.hedge.Store(int64(maxHedge))
	return s
}

// inherit takes over what old, the same server of the group before, has learned.
func (s *server) inherit(old *server) {
	old.mu.Lock()
	s.memory = old.memory
	old.mu.Unlock()
	s.high.Store(old.high.Load())
	s.hedge.Store(old.hedge.Load())
	s.usual.Store(old.usual.Load())
	if s.state == StateSuspect || s.state == StateFailing {
		s.away.Store(true)
		s.wake <- struct{}{}
	}
}

// answered notes a checked response after d to a query that was sent at the time sent. A SERVFAIL is one: the server
// lives.
func (s *server) answered(now, sent time.Time, d time.Duration, rcode uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := s.vain // not for failures alone: a lost query, or a name without an answer, is one as well
	s.lastAnswer, s.unanswered = now, 0
	s.soundLocked()
	s.lateShare -= s.lateShare * lateWeight
	s.lostShare -= s.lostShare * lostWeight
	if !noAnswer(rcode) {
		s.refutals, s.refutedBy = 0, nil
	} else if s.state == StateUnknown {
		return // no sign of health
	}
	if gone && s.state != StateFailing { // from failing, recoverLocked tells
		s.group.back.Store(now.UnixNano())
	}
	switch s.state {
	case StateUnknown:
		s.recoverLocked(now)
	case StateSuspect:
		if s.why != troubleSilent || d > s.bound() {
			return
		}
		s.recoverLocked(now)
	case StateFailing:
		if sent.Before(s.since) || d > s.bound() || s.why != troubleErrors && s.why != troubleSilent {
			return // stragglers of before, and luck, are no recovery: the probes tell
		}
		s.recoverLocked(now)
	}
	s.sampleLocked(now, d)
}

// soundLocked ends the failures in a row, and every doubt; s.mu is held.
func (s *server) soundLocked() { s.fails, s.doubted, s.vain = 0, false, false }

// doubt notes that nobody in the group had an answer to a question that s was asked at the time sent. If s has answered nothing
// else since, watch asks it: without other questions nobody would find out whether it was the name or the server, and when
// the server is back.
func (s *server) doubt(sent time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doubted || s.away.Load() || s.lastAnswer.After(sent) {
		return
	}
	s.doubted = true
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// doubtful reports whether s, which is in use, has answered nothing since it came into doubt.
func (s *server) doubtful() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.doubted && !s.away.Load()
}

// reassure probes s, which is in doubt. If it answers at once, it was the name; if it does not, it is back when it answers
// again, be it the next moment.
func (s *server) reassure(ctx context.Context, timeout time.Duration) {
	if s.probe(ctx, s.quick(s.bound()), rootQuery) == nil {
		s.settle(time.Now(), true)
		return
	}
	s.mu.Lock()
	s.vain = s.doubted
	s.mu.Unlock()
	well, _ := s.verify(ctx, timeout, StateFailing, troubleSilent)
	if ctx.Err() == nil {
		s.settle(time.Now(), well)
	}
}

// settle notes what the probes of a server in doubt have shown.
func (s *server) settle(now time.Time, well bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.doubted || s.away.Load(): // somebody else has found out
	case well:
		if s.vain {
			s.group.back.Store(now.UnixNano())
		}
		s.soundLocked()
	default:
		if s.fails++; s.fails >= s.breaker.OpenAfter {
			s.failLocked(now, troubleErrors)
		}
	}
}

// heard notes an answer that nobody waited for any more. It says that the server lives. It is no sample of its latency:
// what loses to other servers must not become what is usual.
func (s *server) heard(now, sent time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastAnswer, s.unanswered = now, 0
	if s.state == StateSuspect && s.why == troubleSilent && now.Sub(sent) <= s.bound() {
		s.recoverLocked(now)
	}
}

// outrun notes that another server answered q while this one was late.
func (s *server) outrun(now time.Time, q *query) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outrunBy = q
	s.lostShare += (1 - s.lostShare) * lostWeight
	if s.unanswered < defaultOpenAfter && s.lostShare > lossyShare { // else it is silent, and the file says when that counts
		s.suspectLocked(now, troubleLossy, "too many queries that other servers answered sooner")
	}
}

// overdue notes that a query sent at the time sent has waited for longer than almost all others. It reports whether
// something is wrong with the server, not with this name alone.
func (s *server) overdue(now, sent time.Time) (wrong bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lateShare += (1 - s.lateShare) * lateWeight
	if !s.lastAnswer.After(sent) {
		s.unanswered++
	} else {
		s.unanswered = 0
	}
	if s.unanswered >= s.breaker.OpenAfter {
		s.suspectLocked(now, troubleSilent, "no answers")
		return true
	}
	return s.lateShare > troubledShare || s.away.Load()
}

// recoverLocked makes the server ok; s.mu is held.
func (s *server) recoverLocked(now time.Time) {
	was, down := s.state, now.Sub(s.since)
	if was == StateOK {
		return
	}
	if was == StateFailing || s.vain {
		s.group.back.Store(now.UnixNano())
	}
	s.state, s.since, s.tries, s.unanswered, s.refutals = StateOK, now, 0, 0, 0
	s.soundLocked()
	s.lateShare, s.lostShare = 0, 0
	s.outrunBy, s.good, s.recovered = nil, 0, was != StateUnknown
	s.away.Store(false)
	s.obs.State(StateOK)
	if was != StateUnknown {
		s.log.Info("upstream recovered", "after", down.Round(time.Millisecond).String())
	}
}

// suspectLocked takes the server out of use until watch has asked it; s.mu is held. Where nobody watches, a silent
// server is failing at once, and a lossy one stays in use.
func (s *server) suspectLocked(now time.Time, why trouble, text string) {
	switch {
	case s.away.Load():
		return
	case !s.watched.Load() && why == troubleSilent:
		s.lastErr = text
		s.failLocked(now, why)
		return
	case !s.watched.Load():
		return
	}
	s.leaveLocked(now, StateSuspect, why)
	s.log.Info("upstream suspect", "why", text)
}

// failLocked makes the server failing; s.mu is held.
func (s *server) failLocked(now time.Time, why trouble) {
	if s.state == StateFailing {
		return
	}
	s.leaveLocked(now, StateFailing, why)
	s.tries = 0
	s.pauseLocked(now)
	s.log.Warn("upstream failing", "err", s.lastErr)
}

func (s *server) leaveLocked(now time.Time, state string, why trouble) {
	if s.state != StateSuspect { // else it is the same trouble that goes on
		if s.recovered && s.state == StateOK && (now.Sub(s.since) < relapseWithin || s.good < relapseBefore) {
			s.relapses = min(s.relapses+1, maxRelapses)
		} else {
			s.relapses = 0
		}
	}
	s.state, s.why, s.since = state, why, now
	s.away.Store(true)
	s.obs.State(state)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// bound returns how long an answer may take that shows the server to be well. A server that is slower than it was is no
// help while others are well and fast. It is above maxHedge, or a server could come back that is left for the next one at
// each query.
func (s *server) bound() time.Duration {
	best, any := s.group.pace()
	usual := time.Duration(s.usual.Load())
	switch {
	case !any: // it may be the way to all of them that has become long
		return DefaultDeadline
	case usual == 0:
		return DefaultDeadline / 2
	}
	return max(maxHedge, 2*usual, 2*best)
}

// failed notes an exchange that gave no response.
func (s *server) failed(now time.Time, d time.Duration, err error) {
	kind := kindOf(err)
	switch kind {
	case KindAbandoned, KindBusy, KindClosed, KindBackoff:
		return // says nothing about the server
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if kind == KindMalformed {
		// It lives. What cannot be read of this name may be the name's fault: refuted tells, as for a SERVFAIL.
		s.lastAnswer = now
		s.soundLocked()
		return
	}
	s.lastErr = err.Error()
	s.meanLocked(now, max(d, time.Duration(s.latency)))
	if s.fails++; s.fails >= s.breaker.OpenAfter {
		s.failLocked(now, troubleErrors)
	}
	s.lostShare += (1 - s.lostShare) * lostWeight
	if s.fails < defaultOpenAfter && s.lostShare > lossyShare { // else it only fails, and the file says when that counts
		s.suspectLocked(now, troubleLossy, s.lastErr)
	}
}

// silent notes an exchange that was given up after d without a response. It is a failure only if the server has
// answered nothing else meanwhile: a name may be slow where the server is not.
func (s *server) silent(now time.Time, d time.Duration) {
	s.mu.Lock()
	alive := s.lastAnswer.After(now.Add(-d))
	s.mu.Unlock()
	if !alive {
		s.failed(now, d, fault(KindTimeout, "no answer within %v", d.Round(time.Millisecond)))
	}
}

// refuted notes a response without an answer, or an unreadable one, for q where another server gave a good one.
func (s *server) refuted(now time.Time, q *query) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refutedBy != nil && s.refutedBy.hash == q.hash {
		return
	}
	s.lastErr = "SERVFAIL, REFUSED or an unreadable answer where another server has a good one"
	s.refutedBy = q
	if s.refutals++; s.refutals >= openAfterRefuted {
		s.failLocked(now, troubleRefuted)
	}
}

// pauseLocked sets the time of the next try of a failing server, a tenth more or less, and counts that try.
func (s *server) pauseLocked(now time.Time) {
	d := s.breaker.Probe
	if n := s.tries - patientProbes + 1; n > 0 {
		d = min(s.breaker.MaxProbe, d<<min(n, 10))
	}
	s.tries++
	s.retry = now.Add(time.Duration(float64(d) * (0.9 + 0.2*rand.Float64())))
}

// sampleLocked learns from an answer after d; s.mu is held.
func (s *server) sampleLocked(now time.Time, d time.Duration) {
	s.meanLocked(now, d)
	s.good++
	if usual := time.Duration(s.usual.Load()); usual == 0 {
		s.usual.Store(int64(d))
	} else {
		s.usual.Store(int64(usual + (d-usual)/usualWeight))
	}
	s.latencies.add(d)
	// The histogram is read now and then only, and more often while it is new.
	if n := s.latencies.total; n <= fewSamples || n%32 == 0 {
		high := s.latencies.high()
		s.high.Store(int64(high))
		s.hedge.Store(int64(min(max(high, minHedge), maxHedge)))
	}
}

// meanLocked puts d into the decaying mean; s.mu is held.
func (s *server) meanLocked(now time.Time, d time.Duration) {
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
	age := now.Sub(s.latencyTime)
	if age < time.Second {
		return s.latency // spares the exponential where queries are many
	}
	return s.latency * math.Exp2(-float64(age)/float64(latencyHalfLife))
}

// cost is what PickFastest compares: the time that a query would probably take.
func (s *server) cost(now time.Time) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fadedLocked(now) * float64(1+s.flying.Load())
}

// usable reports whether a query may be spent on the server now. Where nobody probes, one query in a while is.
func (s *server) usable(now time.Time) bool {
	if !s.away.Load() {
		return true
	}
	if s.watched.Load() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.retry) {
		return false
	}
	s.pauseLocked(now)
	return true
}

// status returns the server as Status shows it.
func (s *server) status() ServerStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := ServerStatus{URL: s.url, Tier: s.tier, State: s.state, LastError: s.lastErr,
		Latency: time.Duration(s.latency), High: s.latencies.high(), Since: s.since}
	if c, ok := s.client.(interface{ abandonedCalls() int }); ok {
		st.Abandoned = c.abandonedCalls()
	}
	return st
}

// watch probes the server while it is suspect or failing, or in doubt, until ctx ends.
func (s *server) watch(ctx context.Context, timeout time.Duration) {
	s.watched.Store(true)
	defer s.watched.Store(false)
	for {
		for s.away.Load() {
			s.mu.Lock()
			state, why, retry := s.state, s.why, s.retry
			s.mu.Unlock()
			if state == StateFailing && !sleep(ctx, time.Until(retry)) {
				return
			}
			if !s.away.Load() {
				break // a client's question has shown it to be well
			}
			well, took := s.verify(ctx, timeout, state, why)
			if ctx.Err() != nil {
				return
			}
			s.verified(time.Now(), well, why, took)
		}
		var again <-chan time.Time
		if s.doubtful() {
			s.reassure(ctx, timeout)
			again = time.After(s.breaker.Probe)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-again:
		}
	}
}

// verified notes the outcome of verify.
func (s *server) verified(now time.Time, well bool, why trouble, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.away.Load():
	case well:
		s.recoverLocked(now)
		if took > time.Duration(s.high.Load()) {
			// It is well, and slower than the histogram knows: what is given up, as hedges win, does not get there.
			s.latencies = latencies{}
			s.high.Store(0)
			s.hedge.Store(int64(maxHedge))
		}
	case s.state == StateSuspect:
		s.failLocked(now, why)
	default:
		s.pauseLocked(now)
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

// verify probes the server and reports whether it is well. A first probe may take its time, because it may have to open
// a connection; the next ones have to be answered as promptly as clients want it, and took is what the fastest took.
func (s *server) verify(ctx context.Context, timeout time.Duration, state string, why trouble) (well bool, took time.Duration) {
	if why == troubleRefuted {
		return s.verifyAnswers(ctx, timeout), 0
	}
	s.mu.Lock()
	bound, rounds, outrunBy := s.bound(), 1, s.outrunBy
	if why == troubleSilent && s.relapses == 0 || s.tries > patientProbes {
		outrunBy = nil // some names may be slow, or this one may be slow there for long
	}
	if why == troubleLossy {
		rounds = lossyProbes << s.relapses
	}
	s.mu.Unlock()
	// What was suspected may have been some slow names at once: then the connection that is open answers.
	if state != StateSuspect || s.probe(ctx, s.quick(bound), rootQuery) != nil {
		if state == StateSuspect && why == troubleSilent {
			s.mu.Lock()
			s.vain = true
			s.mu.Unlock()
		}
		if c, ok := s.client.(renewer); ok {
			c.renew(quickProbe / 2)
		}
		if s.probe(ctx, min(timeout, 3*bound), rootQuery) != nil {
			return false, 0
		}
	}
	took = bound
	for i := range rounds {
		if i > 0 && !sleep(ctx, probePause) {
			return false, 0
		}
		start := time.Now()
		if s.probe(ctx, bound, rootQuery) != nil {
			return false, 0
		}
		took = min(took, time.Since(start))
	}
	if outrunBy == nil {
		return true, took
	}
	// The root's servers are at hand even where all else is not.
	return s.probe(ctx, bound, outrunBy) == nil, took
}

// quick returns how long the answer to a probe may take over a connection that may be dead; the bound is for one that is not.
func (s *server) quick(bound time.Duration) time.Duration {
	return min(bound, max(quickProbe, 4*time.Duration(s.hedge.Load())))
}

// verifyAnswers is verify for a server whose answers were refuted. It may have forwarded them; it is also well when it can
// now answer the question that it could not.
func (s *server) verifyAnswers(ctx context.Context, timeout time.Duration) bool {
	s.mu.Lock()
	failed, tooLong := s.refutedBy, s.tries > patientProbes // for so long that the name itself may be broken now
	s.mu.Unlock()
	return failed == nil || s.probe(ctx, timeout, failed) == nil || tooLong && s.probe(ctx, timeout, rootQuery) == nil
}

// probe asks the server for q.
func (s *server) probe(ctx context.Context, timeout time.Duration, q *query) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	resp, err := s.client.ask(ctx, q)
	d := time.Since(start)
	if err == nil {
		s.obs.Done(d, int(resp.Rcode), "")
		if q != rootQuery && noAnswer(resp.Rcode) {
			return errStillRefuted
		}
		s.mu.Lock()
		s.lastAnswer = time.Now()
		s.mu.Unlock()
		return nil
	}
	if !errors.Is(ctx.Err(), context.Canceled) {
		s.obs.Done(d, -1, kindOf(err))
		s.mu.Lock()
		s.lastErr = err.Error()
		s.mu.Unlock()
	}
	return err
}

var errStillRefuted = errors.New("an RCODE that is no answer")

// noAnswer reports whether rcode says that the server has no answer, where another one may: SERVFAIL, REFUSED, and what is
// about our query and not about the question, FORMERR, NOTIMP and the extended ones (BADVERS, BADCOOKIE, ...).
func noAnswer(rcode uint16) bool {
	switch rcode {
	case wire.RcodeServFail, wire.RcodeRefused, wire.RcodeFormErr, wire.RcodeNotImp:
		return true
	}
	return rcode > wire.MaxPlainRcode
}

// rootQuery is ". NS", which every resolver has at hand.
var rootQuery = newQuery(wire.Question{Name: []byte{0}, Qtype: 2, Qclass: wire.ClassIN})
