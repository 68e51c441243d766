package forward

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/miekg/dns"
)

// maxPatience is the longest time for which one server is waited for alone. A recursive server that has to go far for a
// cold name takes about as long; a silent one shall not cost more.
const maxPatience = time.Second

// search is one question on its way through the tiers.
//
// Servers are asked one after the other. The next one starts when the newest attempt fails, or when its share of the
// time that is left is over; the older attempts go on beside it, and the first good answer ends the search. So every
// server gets its turn inside the deadline, and no slow answer is thrown away that could still be the only one.
type search struct {
	g        *Group
	q        *query
	deadline time.Time
	plan     []*server
	healthy  int // plan[:healthy] are not failing; the others are the last resort
	attempts []attempt
	running  int
	results  chan result
	best     *dns.Msg // the best response that is not good enough: a SERVFAIL or REFUSED
	causes   []Cause
	second   bool // again was here
}

// attempt is one server's part in a search. The attempts are plan[:len(attempts)], in the same order.
type attempt struct {
	start   time.Time
	overdue bool // a later attempt was started because this one took too long
	done    bool
	useless bool      // done with a SERVFAIL or a malformed answer, which another server may refute
	retry   time.Time // done without having asked: when the server can be asked; else zero
}

type result struct {
	index int
	resp  *dns.Msg
	err   error
	d     time.Duration
}

// ask is Exchange for a packed question.
func (g *Group) ask(ctx context.Context, q *query) (*dns.Msg, error) {
	now := time.Now()
	s := search{g: g, q: q, deadline: now.Add(g.deadline)}
	if d, ok := ctx.Deadline(); ok && d.Before(s.deadline) {
		s.deadline = d
	}
	ctx, cancel := context.WithDeadline(ctx, s.deadline)
	defer cancel() // ends the attempts that are no longer waited for
	s.plan, s.healthy = g.order(q, now)
	s.results = make(chan result, len(s.plan)) // nobody who is no longer waited for blocks
	s.attempts = make([]attempt, 0, len(s.plan))
	return s.run(ctx)
}

// run drives the search to its end.
func (s *search) run(ctx context.Context) (*dns.Msg, error) {
	timer := time.NewTimer(s.next(ctx))
	defer timer.Stop()
	for {
		select {
		case r := <-s.results:
			if r.err != nil && ctx.Err() != nil {
				return s.finish(ctx, nil) // time was up, not this server's fault alone
			}
			if resp, end := s.take(r); end {
				return s.finish(ctx, resp)
			}
			switch more := len(s.attempts) < len(s.plan); {
			case more && (s.fresh() == 0 || s.settled()):
				timer.Reset(s.next(ctx))
			case more:
			case s.running == 0:
				if !s.again(ctx) {
					return s.finish(ctx, nil)
				}
				timer.Reset(s.next(ctx))
			case s.fresh() == 0 && s.settled():
				return s.finish(ctx, nil)
			}
		case <-timer.C:
			for i := range s.attempts {
				s.attempts[i].overdue = true
			}
			// A healthy server that is still silent may yet have the answer: a SERVFAIL at hand does not end the search
			// before its time.
			if s.settled() {
				return s.finish(ctx, nil)
			}
			if len(s.attempts) < len(s.plan) && s.g.nextOn.Timeout {
				timer.Reset(s.next(ctx))
			}
		case <-ctx.Done():
			return s.finish(ctx, nil)
		}
	}
}

// again makes a new plan, once, of the servers that could not be asked because they had been dialled in vain a moment
// before, and waits until the first of them can be: nobody else is left to ask, and there is time. Those that are failing
// are not waited for. It reports whether there is such a plan. No attempt is running.
func (s *search) again(ctx context.Context) bool {
	var plan []*server
	var first time.Time
	for i, a := range s.attempts {
		if a.retry.IsZero() || s.plan[i].failing() {
			continue
		}
		if plan = append(plan, s.plan[i]); first.IsZero() || a.retry.Before(first) {
			first = a.retry
		}
	}
	if s.second || len(plan) == 0 || !sleep(ctx, time.Until(first)) {
		return false
	}
	s.second, s.plan, s.healthy, s.attempts = true, plan, len(plan), s.attempts[:0]
	return true
}

// settled reports whether a response is at hand and only failing servers could still bring a better one. They get one
// share of the time for that, all at once, and then the response is what the client gets: or a SERVFAIL would take the
// whole deadline for as long as any server is down.
func (s *search) settled() bool {
	return s.best != nil && len(s.attempts) >= s.healthy &&
		!slices.ContainsFunc(s.attempts[:s.healthy], func(a attempt) bool { return !a.done })
}

// next starts the next attempt, or all of its tier when the pick is race, or all that are left when the search is
// settled, and returns how long to wait for it alone.
func (s *search) next(ctx context.Context) time.Duration {
	first := len(s.attempts)
	s.start(ctx)
	for len(s.attempts) < len(s.plan) && (s.settled() || s.g.pick == PickRace && len(s.attempts) != s.healthy &&
		s.plan[len(s.attempts)].tier == s.plan[first].tier) {
		s.start(ctx)
	}
	// What is left of the time is shared by those who have not had their turn. All failing servers together are one.
	turns := len(s.plan) - len(s.attempts) + 1
	if n := len(s.attempts); n <= s.healthy {
		turns = s.healthy - n + 1 + min(1, len(s.plan)-s.healthy)
	}
	return min(maxPatience, time.Until(s.deadline)/time.Duration(turns))
}

// start asks the next server of the plan.
func (s *search) start(ctx context.Context) {
	i := len(s.attempts)
	srv, q, results, g := s.plan[i], s.q, s.results, s.g
	now := time.Now()
	s.attempts = append(s.attempts, attempt{start: now})
	s.running++
	if !g.enter() {
		results <- result{index: i, err: errClosed}
		return
	}
	srv.flying.Add(1)
	go func() {
		defer g.calls.Done()
		resp, err := srv.client.ask(ctx, q)
		srv.flying.Add(-1)
		results <- result{index: i, resp: resp, err: err, d: time.Since(now)}
	}()
}

// fresh counts the attempts in flight whose share of the time is not over.
func (s *search) fresh() (n int) {
	for _, a := range s.attempts {
		if !a.done && !a.overdue {
			n++
		}
	}
	return n
}

// take books r and reports whether it ends the search: with a response, or, where the group does not go on after such
// a failure, without one.
func (s *search) take(r result) (resp *dns.Msg, end bool) {
	srv, a := s.plan[r.index], &s.attempts[r.index]
	a.done = true
	s.running--
	now := time.Now()
	if r.err != nil {
		var e *Error
		if errors.As(r.err, &e) && e.Kind == KindBackoff {
			a.retry = e.retry
			s.causes = append(s.causes, Cause{Server: srv.url, Err: r.err})
			return nil, !s.g.nextOn.Connect
		}
		kind := kindOf(r.err)
		a.useless = kind == KindMalformed
		srv.obs.Done(r.d, -1, kind)
		srv.failed(now, r.d, r.err)
		s.causes = append(s.causes, Cause{Server: srv.url, Err: r.err})
		return nil, kind == KindTimeout && !s.g.nextOn.Timeout || kind != KindTimeout && !s.g.nextOn.Connect
	}
	srv.obs.Done(r.d, r.resp.Rcode, "")
	srv.answered(now, r.d, r.resp)
	switch {
	case r.resp.Rcode == dns.RcodeServerFailure && s.g.nextOn.ServFail:
		a.useless = true
	case r.resp.Rcode == dns.RcodeRefused && s.g.nextOn.Refused:
	default:
		return r.resp, true
	}
	s.best = better(s.best, r.resp)
	return nil, false
}

// better returns which of two responses without an answer tells the client more: SERVFAIL before REFUSED, which speaks
// of our standing with that server; then the one that says why (RFC 8914); then the earlier.
func better(old, resp *dns.Msg) *dns.Msg {
	if old == nil {
		return resp
	}
	rank := func(m *dns.Msg) (n int) {
		if m.Rcode == dns.RcodeServerFailure {
			n = 2
		}
		if opt := m.IsEdns0(); opt != nil && slices.ContainsFunc(opt.Option, func(o dns.EDNS0) bool {
			return o.Option() == dns.EDNS0EDE
		}) {
			n++
		}
		return n
	}
	if rank(resp) > rank(old) {
		return resp
	}
	return old
}

// finish books what is still in flight and returns the outcome: resp, else the best response, else that there is none.
func (s *search) finish(ctx context.Context, resp *dns.Msg) (*dns.Msg, error) {
	now := time.Now()
	cancelled := errors.Is(ctx.Err(), context.Canceled)
	timeUp := ctx.Err() != nil && !cancelled
	for i := range s.attempts {
		srv, a := s.plan[i], &s.attempts[i]
		d := now.Sub(a.start)
		switch {
		case a.done && a.useless && resp != nil && resp.Rcode != dns.RcodeServerFailure &&
			resp.Rcode != dns.RcodeRefused:
			srv.refuted(now, s.q)
		case a.done:
		case !cancelled && (a.overdue || timeUp):
			srv.obs.Done(d, -1, KindTimeout)
			srv.silent(now, d)
			s.causes = append(s.causes, Cause{srv.url, fault(KindTimeout, "no answer within %v",
				d.Round(time.Millisecond))})
		default:
			srv.obs.Done(d, -1, KindAbandoned)
		}
	}
	switch {
	case resp != nil:
		return resp, nil
	case s.best != nil:
		return s.best, nil
	case cancelled:
		return nil, context.Cause(ctx)
	}
	return nil, &NoAnswerError{Group: s.g.name, Causes: s.causes}
}

// order returns the servers in the order in which q asks them, and how many of them are not failing. Those come first,
// tier by tier; the failing ones follow as a last resort, in their written order.
func (g *Group) order(q *query, now time.Time) (plan []*server, healthy int) {
	plan = make([]*server, 0, len(g.servers))
	var failing []*server
	probed := g.running.Load()
	for _, tier := range g.tiers {
		start := len(plan)
		for _, s := range tier {
			if s.usable(now, probed) {
				plan = append(plan, s)
			} else {
				failing = append(failing, s)
			}
		}
		g.arrange(plan[start:], q, now)
	}
	return append(plan, failing...), len(plan)
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
