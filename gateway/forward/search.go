package forward

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"dnsgateway/gateway/wire"
)

// maxPatience is the longest time for which one server is waited for alone where nothing is hedged. A recursive server
// that has to go far for a cold name takes about as long; a silent one shall not cost more.
const maxPatience = time.Second

// search is one question on its way through the tiers.
//
// Servers are asked one after the other. The next one starts when the newest attempt fails, when it has taken longer than
// that server's answers usually do (the hedge), or when its share of the time that is left is over; the older attempts
// go on beside it, and the first good answer ends the search. So every server gets its turn inside the deadline, and no
// slow answer is thrown away that could still be the only one.
type search struct {
	g        *Group
	q        *query
	parent   context.Context
	deadline time.Time
	plan     []*server
	healthy  int // plan[:healthy] are in use; the others are the last resort
	attempts []attempt
	running  int
	results  chan result
	best     *wire.Answer // the best response that is not good enough: a SERVFAIL or REFUSED
	causes   []Cause
	second   bool // again was here
	repeated bool // repeat was here
	short    bool // the deadline is the caller's own, and sooner than the group's

	timer    *time.Timer
	hedging  bool      // the timer is for the hedge of the newest attempt
	turnOver time.Time // when its share of the time is over

	// The context of attempts that need a goroutine; made with the first of them.
	ctx    context.Context
	cancel context.CancelFunc
	slow   int // how many of those have not given their result
}

// attempt is one server's part in a search. The attempts are plan[:len(attempts)], in the same order.
type attempt struct {
	start   time.Time
	call    *call // in flight on a stream; nil if a goroutine waits
	hedge   bool  // started because another one was late
	late    bool  // was waited for alone long enough
	counted bool  // its server knows that it is late
	overdue bool  // its share of the time is over
	repeat  bool  // its server was asked before
	again   bool  // asked over another connection, as the first one broke
	done    bool
	useless bool      // done with a SERVFAIL, REFUSED or a malformed answer, which another server may refute
	retry   time.Time // done without having asked: when the server can be asked; else zero
}

// newSearch makes one for Group.searches, which keeps them for their buffers and timers.
func newSearch() any {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return &search{results: make(chan result, searchRoom), timer: timer}
}

// searchRoom is how many results a search has room for before it needs another channel.
const searchRoom = 16

// ask asks the group's servers for q.
func (g *Group) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	now := time.Now()
	s := g.searches.Get().(*search)
	s.g, s.q, s.parent, s.deadline = g, q, ctx, now.Add(g.deadline)
	if d, ok := ctx.Deadline(); ok && d.Before(s.deadline) {
		s.deadline, s.short = d, true
	}
	g.order(s, now)
	if len(s.plan)+1 > searchRoom {
		s.results = make(chan result, len(s.plan)+1) // nobody who is no longer waited for blocks
	}
	g.budget.earn()
	resp, err := s.run(now)
	s.free()
	return resp, err
}

// free ends what is left and keeps the search for another question.
func (s *search) free() {
	s.timer.Stop()
	if s.cancel != nil {
		s.cancel()
	}
	if s.slow > 0 || cap(s.results) > searchRoom {
		return // somebody still has the channel
	}
	for len(s.results) > 0 { // of those that came before they could be given up
		r := <-s.results
		if c := s.attempts[r.index].call; c != nil {
			c.free()
		}
	}
	clear(s.plan)
	clear(s.attempts)
	pool := &s.g.searches
	*s = search{plan: s.plan[:0], attempts: s.attempts[:0], results: s.results, timer: s.timer}
	pool.Put(s)
}

// run drives the search to its end.
func (s *search) run(now time.Time) (*wire.Answer, error) {
	s.next(now, false)
	for {
		select {
		case r := <-s.results:
			now = time.Now()
			a := &s.attempts[r.index]
			if a.call == nil {
				s.slow--
			}
			if s.askAgain(now, &r) {
				continue
			}
			if a.call != nil {
				a.call.free()
				a.call = nil
			}
			if r.err != nil && (s.parent.Err() != nil || !now.Before(s.deadline)) {
				return s.finish(now, nil, s.parent.Err() == nil) // time was up, not this server's fault alone
			}
			if resp, end := s.take(now, r); end {
				return s.finish(now, resp, false)
			}
			switch more := len(s.attempts) < len(s.plan); {
			case more && (s.fresh() == 0 || s.settled()):
				s.next(now, false)
			case more:
			case s.running == 0:
				if !s.again() {
					return s.finish(now, nil, false)
				}
				s.next(time.Now(), false)
			case s.fresh() == 0 && s.settled():
				return s.finish(now, nil, false)
			}
		case <-s.timer.C:
			now = time.Now()
			if !now.Before(s.deadline) {
				return s.finish(now, nil, true)
			}
			if s.hedging {
				s.late(now)
				continue
			}
			for i := range s.attempts {
				s.attempts[i].late, s.attempts[i].overdue = true, true
				s.report(now, i)
			}
			// A healthy server that is still silent may yet have the answer: a SERVFAIL at hand does not end the search
			// before its time.
			if s.settled() {
				return s.finish(now, nil, false)
			}
			switch {
			case !s.g.nextOn.Timeout:
				s.timer.Reset(s.deadline.Sub(now))
			case len(s.attempts) < len(s.plan):
				s.next(now, false)
			case s.repeat(maxPatience/2, true):
				s.next(now, false)
				// What is at hand does not wait for it.
				s.attempts[len(s.attempts)-1].late, s.attempts[len(s.attempts)-1].repeat = true, true
			default:
				s.timer.Reset(s.deadline.Sub(now))
			}
		case <-s.parent.Done():
			return s.finish(time.Now(), nil, errors.Is(s.parent.Err(), context.DeadlineExceeded))
		}
	}
}

// late comes when the newest attempt was waited for alone long enough. The next server starts, if it is a healthy one and
// the budget has room for it, or something is wrong with this one.
func (s *search) late(now time.Time) {
	s.hedging = false
	i := len(s.attempts) - 1
	srv := s.plan[i]
	s.attempts[i].late = true
	wrong := s.report(now, i)
	switch {
	case !s.g.nextOn.Timeout:
	case i+1 < s.healthy && (wrong || s.g.budget.spend()), wrong && i+1 < len(s.plan):
		s.next(now, true)
		return
	case wrong && i+1 == len(s.plan) && s.repeat(max(minHedge, 2*time.Duration(srv.high.Load())), false):
		s.next(now, false)
		return
	}
	s.timer.Reset(s.turnOver.Sub(now))
}

// report tells the server of attempt i, if that is under way, that it has taken longer than nearly all others, where it
// has. It reports whether something is wrong with the server.
func (s *search) report(now time.Time, i int) (wrong bool) {
	srv, a := s.plan[i], &s.attempts[i]
	if a.done {
		return false
	}
	if a.counted || a.repeat || now.Sub(a.start) < time.Duration(srv.high.Load()) || a.hedge && s.hard(i) {
		return srv.away.Load()
	}
	a.counted = true
	return srv.overdue(now, a.start)
}

// hard reports whether a server in use from before attempt i is late as well: then it is the name.
func (s *search) hard(i int) bool {
	for j := range i {
		if !s.attempts[j].done && !s.plan[j].away.Load() {
			return true
		}
	}
	return false
}

// repeat comes when nobody is left to ask, once, and puts the best server into the plan again. It may be a connection alone
// that is dead: if there is one that has brought nothing for so long, it is asked over a new one. If there is none, and
// always says so, it is asked nevertheless: the answer may have been lost.
func (s *search) repeat(quiet time.Duration, always bool) bool {
	srv := s.plan[0]
	c, ok := srv.client.(renewer)
	if s.repeated || s.best != nil || !(ok && c.renew(quiet)) && !always {
		return false
	}
	s.repeated = true
	s.plan = append(s.plan, srv)
	return true
}

// askAgain asks once more over another connection if r says that one broke that had been good. What is left of r is the
// error.
func (s *search) askAgain(now time.Time, r *result) bool {
	if r.err == nil {
		return false
	}
	b, ok := r.err.(*brokenError)
	if !ok {
		return false
	}
	r.err = b.err
	a := &s.attempts[r.index]
	if !b.again || a.again || s.parent.Err() != nil || !now.Before(s.deadline) {
		return false
	}
	a.again = true
	if a.call != nil {
		a.call.free()
		a.call = nil
	}
	return s.startSlow(r.index) == nil
}

// again makes a new plan, once, of the servers that could not be asked because they had been dialled in vain a moment
// before, and waits until the first of them can be: nobody else is left to ask, and there is time. Those that are failing
// are not waited for. It reports whether there is such a plan. No attempt is running.
func (s *search) again() bool {
	var plan []*server
	var first time.Time
	for i, a := range s.attempts {
		if a.retry.IsZero() || s.plan[i].away.Load() {
			continue
		}
		if plan = append(plan, s.plan[i]); first.IsZero() || a.retry.Before(first) {
			first = a.retry
		}
	}
	if s.second || len(plan) == 0 || !first.Before(s.deadline) || !sleep(s.parent, time.Until(first)) {
		return false
	}
	s.second, s.plan, s.healthy, s.attempts = true, plan, len(plan), s.attempts[:0]
	return true
}

// settled reports whether a response is at hand and only servers that are away could still bring a better one. They get
// one share of the time for that, all at once, and then the response is what the client gets: or a SERVFAIL would take the
// whole deadline for as long as any server is down.
func (s *search) settled() bool {
	return s.best != nil && len(s.attempts) >= s.healthy &&
		!slices.ContainsFunc(s.attempts[:s.healthy], func(a attempt) bool { return !a.done })
}

// next starts the next attempt, or all of its tier when the pick is race, or all that are left when the search is
// settled, and sets the timer for the newest.
func (s *search) next(now time.Time, hedge bool) {
	first := len(s.attempts)
	s.start(now, hedge)
	for len(s.attempts) < len(s.plan) && (s.settled() || s.g.pick == PickRace && len(s.attempts) != s.healthy &&
		s.plan[len(s.attempts)].tier == s.plan[first].tier) {
		s.start(now, hedge)
	}
	// What is left of the time is shared by those who have not had their turn. All failing servers together are one.
	turns := len(s.plan) - len(s.attempts) + 1
	if n := len(s.attempts); n <= s.healthy {
		turns = s.healthy - n + 1 + min(1, len(s.plan)-s.healthy)
	}
	left := s.deadline.Sub(now)
	turn := min(maxPatience, left/time.Duration(turns))
	s.hedging, s.turnOver = false, now.Add(turn)
	if d := s.g.hedge.delay(s.plan[len(s.attempts)-1]); d < turn {
		s.hedging, turn = true, d
	}
	s.timer.Reset(turn)
}

// start asks the next server of the plan.
func (s *search) start(now time.Time, hedge bool) {
	i := len(s.attempts)
	srv := s.plan[i]
	s.attempts = append(s.attempts, attempt{start: now, hedge: hedge})
	s.running++
	srv.flying.Add(1)
	if hedge {
		srv.obs.Hedge()
	}
	if srv.stream != nil {
		c := calls.Get().(*call)
		c.q, c.results, c.index, c.start, c.asked = s.q, s.results, i, now, srv
		if srv.stream.start(c) {
			s.attempts[i].call = c
			return
		}
		c.free()
	}
	if err := s.startSlow(i); err != nil {
		s.slow++
		s.results <- result{index: i, err: err}
	}
}

// startSlow asks the server of attempt i in a goroutine, which may have to wait for a connection. An error says that the
// group is closed.
func (s *search) startSlow(i int) error {
	if s.ctx == nil {
		s.ctx, s.cancel = context.WithDeadline(s.parent, s.deadline)
	}
	g := s.g
	if !g.enter() {
		return errClosed
	}
	s.slow++
	ctx, srv, q, results := s.ctx, s.plan[i], s.q, s.results
	go func() {
		defer g.calls.Done()
		resp, err := srv.client.ask(ctx, q)
		results <- result{index: i, resp: resp, err: err}
	}()
	return nil
}

// fresh counts the attempts in flight that may still be waited for alone.
func (s *search) fresh() (n int) {
	for _, a := range s.attempts {
		if !a.done && !a.late {
			n++
		}
	}
	return n
}

// take books r and reports whether it ends the search: with a response, or, where the group does not go on after such
// a failure, without one.
func (s *search) take(now time.Time, r result) (resp *wire.Answer, end bool) {
	srv, a := s.plan[r.index], &s.attempts[r.index]
	a.done = true
	s.running--
	srv.flying.Add(-1)
	d := now.Sub(a.start)
	if r.err != nil {
		var e *Error
		if errors.As(r.err, &e) && e.Kind == KindBackoff {
			a.retry = e.retry
			s.causes = append(s.causes, Cause{Server: srv.url, Err: r.err})
			return nil, !s.g.nextOn.Connect
		}
		kind := kindOf(r.err)
		a.useless = kind == KindMalformed
		srv.obs.Done(d, -1, kind)
		srv.failed(now, d, r.err)
		s.causes = append(s.causes, Cause{Server: srv.url, Err: r.err})
		return nil, kind == KindTimeout && !s.g.nextOn.Timeout || kind != KindTimeout && !s.g.nextOn.Connect
	}
	srv.obs.Done(d, int(r.resp.Rcode), "")
	srv.answered(now, a.start, d, r.resp.Rcode)
	if !s.movesOn(r.resp.Rcode) {
		if a.hedge && !noAnswer(r.resp.Rcode) {
			srv.obs.HedgeWon()
		}
		return r.resp, true
	}
	a.useless = true
	s.best = better(s.best, r.resp)
	return nil, false
}

// movesOn reports whether a response with rcode is left for that of the next server.
func (s *search) movesOn(rcode uint16) bool {
	if rcode == wire.RcodeRefused {
		return s.g.nextOn.Refused
	}
	return noAnswer(rcode) && s.g.nextOn.ServFail
}

// better returns which of two responses without an answer tells the client more: SERVFAIL before REFUSED and others, which
// speak of our standing with that server; then the one that says why (RFC 8914); then the earlier.
func better(old, resp *wire.Answer) *wire.Answer {
	if old == nil {
		return resp
	}
	rank := func(a *wire.Answer) (n int) {
		if a.Rcode == wire.RcodeServFail {
			n = 2
		}
		return n + min(len(a.EDE), 1)
	}
	if rank(resp) > rank(old) {
		return resp
	}
	return old
}

// finish books what is still in flight, gives it up and returns the outcome: resp, else the best response, else that
// there is none. With timeUp, the time for the question is over.
func (s *search) finish(now time.Time, resp *wire.Answer, timeUp bool) (*wire.Answer, error) {
	good := resp != nil && !noAnswer(resp.Rcode)
	for i := range s.attempts {
		srv, a := s.plan[i], &s.attempts[i]
		if a.done {
			if a.useless && good {
				srv.refuted(now, s.q)
			}
			continue
		}
		srv.flying.Add(-1)
		if a.call != nil && a.call.abandon(good) {
			a.call = nil
		}
		d := now.Sub(a.start)
		if good && a.counted {
			srv.outrun(now, s.q)
		}
		if !a.overdue && !timeUp && d < maxPatience || s.short && d < maxHedge {
			srv.obs.Done(d, -1, KindAbandoned)
			continue
		}
		srv.obs.Done(d, -1, KindTimeout)
		if !a.hedge || !s.hard(i) {
			srv.silent(now, d)
		}
		s.causes = append(s.causes, Cause{srv.url, fault(KindTimeout, "no answer within %v", d.Round(time.Millisecond))})
	}
	switch {
	case resp != nil:
		return resp, nil
	case s.best != nil:
		return s.best, nil
	case errors.Is(s.parent.Err(), context.Canceled):
		return nil, context.Cause(s.parent)
	}
	if !s.short {
		for i := range s.attempts {
			s.plan[i].doubt(s.attempts[i].start)
		}
	}
	return nil, &NoAnswerError{Group: s.g.name, Causes: s.causes}
}

// order puts into s the servers in the order in which its question asks them, and how many of them are in use. Those come
// first, tier by tier; the suspect and failing ones follow as a last resort, in their written order.
func (g *Group) order(s *search, now time.Time) {
	away := 0
	for _, tier := range g.tiers {
		start := len(s.plan)
		for _, srv := range tier {
			if srv.usable(now) {
				s.plan = append(s.plan, srv)
			} else {
				away++
			}
		}
		g.arrange(s.plan[start:], s.q, now)
	}
	s.healthy = len(s.plan)
	if away == 0 {
		return
	}
	for _, srv := range g.servers {
		if !slices.Contains(s.plan[:s.healthy], srv) {
			s.plan = append(s.plan, srv)
		}
	}
}

// arrange sorts the servers of one tier by the group's pick.
func (g *Group) arrange(tier []*server, q *query, now time.Time) {
	if len(tier) < 2 {
		return
	}
	switch g.pick {
	case PickRandom, PickFastest:
		rand.Shuffle(len(tier), func(i, j int) { tier[i], tier[j] = tier[j], tier[i] })
		// The better of two at random, not the best of all: so a server that just looks fast is not run over.
		if g.pick == PickFastest && tier[1].cost(now) < tier[0].cost(now) {
			tier[0], tier[1] = tier[1], tier[0]
		}
	case PickSticky:
		// Rendezvous hashing: a server that is away moves only its own names.
		slices.SortStableFunc(tier, func(a, b *server) int {
			if mix(q.hash^a.seed) > mix(q.hash^b.seed) {
				return -1
			}
			return 1
		})
	}
}

// mix is the finisher of SplitMix64: every bit of x moves every bit of the result.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
