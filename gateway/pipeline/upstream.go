package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// responseError is a response that cannot be passed on.
type responseError string

func (e responseError) Error() string { return "upstream response: " + string(e) }

// ExtendedError implements the interface that [Exchanger] documents: the server was reached, and did not make sense.
func (e responseError) ExtendedError() (uint16, string) { return dns.ExtendedErrorCodeNetworkError, "" }

// resolve answers q, which is neither the gateway's own matter nor in the cache, by way of the upstream group of its name.
//
// The time that a query may wait is its group's, and runs from its own beginning. Who leads a flight has all of it. Who
// follows one that ends because the time is over had less: it may wait for as long again as it came later, for another
// flight, once. A stale answer is what a query gets instead of waiting longer than Config.Stale.After, and instead of a
// failure; the flight then goes on without it.
func (p *Pipeline) resolve(ctx context.Context, dst []byte, q *wire.Query) []byte {
	var (
		key  []byte // nil: not IN, the key has no class
		hash uint64
		h    hit
		old  *hit // h, if it is stale
		last result
		owed time.Duration // what a query that followed in vain may still wait
	)
	if q.Qclass == wire.ClassIN {
		key, hash = p.key(q)
	}
	s, now := p.flights.shard(hash), q.Received
	for {
		ended := s.ended.Load()
		if key != nil && p.cache != nil {
			// For Odd queries, whose Plain form may be known; for answers that have come meanwhile; and for stale ones. The failure
			// of the flight that a query has followed in vain is for those who came after it.
			var ok bool
			if h, ok = p.find(q, now, q.Kind != wire.Plain); ok && p.usable(q, &h) && !(owed > 0 && h.failure()) {
				return p.appendHit(dst, q, &h)
			}
			if old = nil; ok && h.Stale {
				old = &h
			}
			key = q.Key(p.view)
		}
		f, seat := p.join(ctx, s, key, hash, ended, q, old != nil)
		if seat == nowhere {
			continue
		}
		limit := owed
		if old != nil {
			limit = max(1, p.stale.After-time.Duration(p.now().UnixNano()-q.Received))
		}
		if seat == leading && !(limit > 0 && p.depart(f, q, old)) {
			stay := context.AfterFunc(ctx, func() { s.leave(f) })
			p.fly(f, q.Question(), old != nil && old.denial)
			stay()
			return p.appendResult(dst, q, old, &f.result)
		}
		if !p.wait(ctx, s, f, limit) {
			if old == nil && owed == 0 {
				last = result{ede: extendedError(context.Cause(ctx)), outcome: Miss}
			}
			return p.appendResult(dst, q, old, &last)
		}
		last = f.result
		if later := time.Duration(q.Received - f.began); seat == following && last.late && old == nil && owed == 0 && later > 0 {
			owed, now = later, p.now().UnixNano()
			continue
		}
		return p.appendResult(dst, q, old, &last)
	}
}

// depart lets f fly on a goroutine of its own, so that q can leave. It reports false when it cannot.
func (p *Pipeline) depart(f *flight, q *wire.Query, old *hit) bool {
	question := q.Question()
	question.Name = bytes.Clone(q.Name)
	denied := old != nil && old.denial
	s := p.flights.shard(f.hash)
	s.mu.Lock()
	if f.done == nil {
		f.done = make(chan struct{})
		if f.over { // shed already
			close(f.done)
		}
	}
	s.mu.Unlock()
	return p.spawn(f, func() { p.fly(f, question, denied) })
}

// wait waits until f is over, and reports true; or, when ctx ends or limit is over before, leaves it. A limit of 0 is none.
func (p *Pipeline) wait(ctx context.Context, s *tableShard, f *flight, limit time.Duration) bool {
	var timeUp <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		timeUp = timer.C
	}
	select {
	case <-f.done:
		return true
	case <-timeUp:
	case <-ctx.Done():
	}
	s.leave(f)
	return false
}

// appendResult appends the response to q that r gives, or old instead of a failure.
func (p *Pipeline) appendResult(dst []byte, q *wire.Query, old *hit, r *result) []byte {
	switch {
	case !r.good() && old != nil:
		dst = p.shape.AppendStale(dst, q, old.Answer, p.stale.TTL)
		p.observe(q, old.Answer.Rcode, Stale)
	case r.answer != nil:
		dst = p.shape.AppendAnswer(dst, q, r.answer, 0)
		p.observe(q, r.answer.Rcode, r.outcome)
	default:
		dst = p.shape.AppendError(dst, q, wire.RcodeServFail, r.ede)
		p.observe(q, wire.RcodeServFail, r.outcome)
	}
	return dst
}

// exchange asks the upstream group of q's name, and no other one.
//
// Nothing of the client's goes out but the question, in its letter case, and the CD and DO bits. In particular none of its
// EDNS options: they are for the next hop only (RFC 6891, section 6.2.6), or say who asks (RFC 7871). Padding is the
// business of the transport that knows whether it helps.
func (p *Pipeline) exchange(f *flight, q wire.Question) result {
	g := &p.groups[p.groupOf(q.Name)]
	a, err := g.Upstream.Ask(f.ctx, q)
	if err == nil {
		if err = check(a, q); err == nil {
			a.Secure = g.TrustAD && a.AD()
			return result{answer: a, outcome: Miss}
		}
	}
	if p.log.Enabled(f.ctx, slog.LevelDebug) {
		name, _ := presentation(q.Name)
		p.log.Debug("no answer from upstream", "group", g.Name, "name", name, "type", dns.Type(q.Qtype).String(), "transport",
			f.transport.String(), "err", err)
	}
	return result{ede: extendedError(err), outcome: Miss, late: late(err)}
}

// servFail returns the response to q that says ede, as the cache takes it.
func (p *Pipeline) servFail(q wire.Question, ede wire.EDE) (*wire.Answer, error) {
	msg := p.shape.AppendError(nil, &wire.Query{Transport: wire.TCP, Name: q.Name, Qtype: q.Qtype, Qclass: q.Qclass, EDNS: true},
		wire.RcodeServFail, ede)
	a, _, err := wire.ReadAnswer(msg)
	return a, err
}

// groupOf returns the number of the group that questions for name go to.
func (p *Pipeline) groupOf(name []byte) int {
	if i, ok := p.routes.Match(name); ok {
		return i
	}
	return 0
}

// late reports whether err says that the time for an answer was over.
func late(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// check reports why a cannot be passed on as the answer to q. Its sender has checked what can be wrong with bytes from a
// network; this is what would be wrong for a client.
func check(a *wire.Answer, q wire.Question) error {
	switch {
	case a == nil:
		return responseError("there is none")
	case !a.Answers(q):
		return responseError("it has another question")
	case a.Rcode > wire.MaxPlainRcode:
		return responseError(fmt.Sprintf("RCODE %d is about our query, not about the question", a.Rcode))
	}
	return nil
}

// extendedError returns what err says to the client: its own extended DNS error, or 22 (No Reachable Authority).
func extendedError(err error) wire.EDE {
	var e interface {
		ExtendedError() (code uint16, text string)
	}
	if errors.As(err, &e) {
		code, text := e.ExtendedError()
		return wire.EDE{Code: code, Text: text}
	}
	return wire.EDE{Code: dns.ExtendedErrorCodeNoReachableAuthority}
}
