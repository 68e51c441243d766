package pipeline

import (
	"bytes"
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"

	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/wire"
)

// flight is one question on its way upstream, with all the queries that wait for its answer. That there is one and not many
// costs less, and gives a forger one chance and not many (RFC 5452, section 5).
//
// The query that starts a flight leads it: it asks on its own goroutine, unless it may have to leave before the answer is
// there. Those with the same key that come meanwhile follow, and wait. The flight belongs to none of them: it is given up when
// the last one has left, when it is shed, or when its group's time is over.
type flight struct {
	key       []byte // nil: nobody can follow
	hash      uint64
	seq       int64 // flights that began later have higher ones
	began     int64 // when its group's time began to run, Unix nanoseconds; whoever leads it may have waited before
	transport wire.Transport

	ctx    context.Context // of the exchange
	cancel context.CancelCauseFunc
	asked  int64 // when it left, Unix nanoseconds; written and read by who flies it

	// Guarded by the lock of the shard.
	waiting    int           // queries that want the answer
	background bool          // goes on when there are none
	spawned    bool          // flies on a goroutine of its own
	flushed    bool          // its answer is not kept
	over       bool          // result is there, and the flight is in no table and no list
	done       chan struct{} // closed when it is over; nil until somebody has to wait for that
	prev, next *flight       // the neighbours in the list: older and newer

	result result // written before the flight is over, and not after
}

// result is how a flight ended.
type result struct {
	answer  *wire.Answer // what an upstream said, whatever its RCODE; nobody may change it; nil if there is none
	ede     wire.EDE     // what to tell the client when there is none
	outcome Outcome
	late    bool // there is none because the time was over
}

// good reports whether r is better than an answer whose time is over. NOERROR and NXDOMAIN are, and nothing else:
// RFC 8767, section 4.
func (r *result) good() bool {
	return r.answer != nil && (r.answer.Rcode == wire.RcodeSuccess || r.answer.Rcode == wire.RcodeNXDomain)
}

// Why the exchange of a flight is given up.
var (
	errShed     = errors.New("given up for a newer question")
	errDeserted = errors.New("nobody waits for the answer any more")
	errStopped  = errors.New("the gateway stops")
)

// tableShards is how many locks the flights have: with more than a big machine has cores, two misses seldom meet at one.
const tableShards = 64

// table holds the flights.
type table [tableShards]tableShard

// tableShard holds the flights of some keys, and the order in which they began.
type tableShard struct {
	mu     sync.Mutex
	byHash map[uint64]*flight // those that can be followed
	oldest *flight
	newest *flight
	first  atomic.Int64  // the seq of the oldest; MaxInt64 if there is none
	ended  atomic.Uint64 // how many flights were here
	_      [64]byte      // keeps the next shard's lock off this one's cache line
}

func (t *table) init() {
	for i := range t {
		t[i].byHash = make(map[uint64]*flight)
		t[i].first.Store(math.MaxInt64)
	}
}

func (t *table) shard(hash uint64) *tableShard { return &t[hash%tableShards] }

// add takes f in. Should another key with the same hash be there, nobody can follow f. s.mu is held.
func (s *tableShard) add(f *flight) {
	if f.key != nil && s.byHash[f.hash] == nil {
		s.byHash[f.hash] = f
	}
	f.prev = s.newest
	if s.newest != nil {
		s.newest.next = f
	} else {
		s.oldest = f
		s.first.Store(f.seq)
	}
	s.newest = f
}

// hide makes f one that nobody can follow. s.mu is held.
func (s *tableShard) hide(f *flight) {
	if s.byHash[f.hash] == f {
		delete(s.byHash, f.hash)
	}
}

// remove takes f out. s.mu is held.
func (s *tableShard) remove(f *flight) {
	s.hide(f)
	if f.next != nil {
		f.next.prev = f.prev
	} else {
		s.newest = f.prev
	}
	if f.prev != nil {
		f.prev.next = f.next
	} else {
		s.oldest = f.next
		first := int64(math.MaxInt64)
		if f.next != nil {
			first = f.next.seq
		}
		s.first.Store(first)
	}
	f.prev, f.next = nil, nil
	s.ended.Add(1)
}

// leave is for a query that does not wait for f any more. A flight that nobody waits for is given up.
func (s *tableShard) leave(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.waiting--; f.waiting == 0 && !f.background && !f.over {
		s.hide(f) // the next one who asks must not follow it to its end
		f.cancel(errDeserted)
	}
}

// seat says what a query is to a flight.
type seat uint8

const (
	nowhere   seat = iota // there is no flight: look into the cache again, or let it be
	leading               // the caller has to see to it that the flight flies
	following             // another one does
)

// join takes the flight with the key and the hash, and begins one if there is none and no flight of the shard has ended since
// its count was ended: that one's answer may be in the cache. A nil key is like no other one. Received is when its query was,
// and with keep it goes on when no client waits for it.
//
// With more flights than there may be the oldest one makes room. Its clients have waited longest: of all they are the likeliest
// to have given up, and where upstreams are slow its answer is the unlikeliest to come at all. To turn away the newest instead
// would refuse everybody for as long as the dead questions take that the bound is full of, and the newest are those that are
// still waited for when the upstreams come back.
func (p *Pipeline) join(ctx context.Context, s *tableShard, key []byte, hash, ended uint64, q *wire.Query, keep bool) (*flight, seat) {
	s.mu.Lock()
	if f := s.byHash[hash]; f != nil && key != nil && bytes.Equal(f.key, key) {
		f.waiting++
		f.background = f.background || keep
		if f.done == nil {
			f.done = make(chan struct{})
		}
		s.mu.Unlock()
		p.count(Coalesced)
		return f, following
	}
	if key != nil && s.ended.Load() != ended {
		s.mu.Unlock()
		return nil, nowhere
	}
	f := p.begin(ctx, key, hash, q)
	f.waiting, f.background = 1, keep
	s.add(f)
	s.mu.Unlock()
	if p.exchanges.Add(1) > p.inflight {
		p.shed()
	}
	return f, leading
}

// joinForNobody begins a flight that no client waits for, if there is none with the key and room for one.
func (p *Pipeline) joinForNobody(ctx context.Context, s *tableShard, key []byte, hash uint64, q *wire.Query) (*flight, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byHash[hash] != nil || p.stopped.Load() {
		return nil, false
	}
	if p.exchanges.Add(1) > p.inflight {
		p.exchanges.Add(-1)
		return nil, false // it is not worth a client's
	}
	f := p.begin(ctx, key, hash, q)
	f.background = true
	s.add(f)
	return f, true
}

func (p *Pipeline) begin(ctx context.Context, key []byte, hash uint64, q *wire.Query) *flight {
	f := &flight{hash: hash, seq: p.sequence.Add(1), began: p.now().UnixNano(), transport: q.Transport}
	if key != nil {
		f.key = append(make([]byte, 0, 2*len(key)), key...) // with room for nameKey's
	}
	f.ctx, f.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	return f
}

// shed ends the oldest flight.
func (p *Pipeline) shed() {
	for range tableShards { // for as long as others are quicker
		var s *tableShard
		oldest := int64(math.MaxInt64)
		for i := range p.flights {
			if first := p.flights[i].first.Load(); first < oldest {
				s, oldest = &p.flights[i], first
			}
		}
		if s == nil {
			return
		}
		s.mu.Lock()
		f := s.oldest
		if f == nil || f.seq != oldest {
			s.mu.Unlock()
			continue
		}
		p.end(s, f, result{ede: edeOverload, outcome: Local})
		s.mu.Unlock()
		f.cancel(errShed)
		p.count(Shed)
		return
	}
}

// end ends f with r, unless it is over. s.mu is held.
func (p *Pipeline) end(s *tableShard, f *flight, r result) {
	if f.over {
		return
	}
	f.over, f.result = true, r
	s.remove(f)
	p.exchanges.Add(-1)
	if f.done != nil {
		close(f.done)
	}
}

// fly asks q's question, keeps what may be kept, and ends f. Denied says that what the cache knows of it is a denial of its
// name.
func (p *Pipeline) fly(f *flight, q wire.Question, denied bool) {
	r := result{ede: edeInternal, outcome: Local}
	defer func() {
		if v := recover(); v != nil {
			p.panicked(v, f.transport)
			r = result{ede: edeInternal, outcome: Local}
		}
		s := p.flights.shard(f.hash)
		s.mu.Lock()
		p.end(s, f, r)
		s.mu.Unlock()
		f.cancel(nil)
	}()
	f.asked = p.now().UnixNano()
	r = p.exchange(f, q)
	p.store(f, &r, q, denied)
}

// store keeps in the cache what r says, and puts into r what clients are to be sent: its TTLs are within the cache's bounds.
//
// A SERVFAIL is kept for some seconds, as RFC 9520, section 3.2 has it, so that clients who try again at once do not send each
// try upstream. So is that nobody gave any answer, for a shorter time at first: else each try would wait until the group's
// time is over, one after the other. When the group has come back, find passes over that. It is never kept where there is a
// good answer, though an old one.
//
// It holds the lock of the shard, so that Flush either sees f and has nothing kept, or finds in the cache what was.
func (p *Pipeline) store(f *flight, r *result, q wire.Question, denied bool) {
	if p.cache == nil || f.key == nil {
		return
	}
	// Given up, or its servers have come back while it waited in vain: that says nothing about the question.
	void := r.answer == nil && (f.ctx.Err() != nil || p.over(q.Name, f.asked))
	s := p.flights.shard(f.hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.flushed || f.over { // over: it was shed, and is in no list in which Flush would see it
		if r.answer != nil {
			p.cache.Clamp(r.answer)
		}
		return
	}
	now := p.now().UnixNano()
	switch {
	case r.good() && r.answer.Denial():
		key, hash := p.nameKey(f.key)
		r.answer = p.cache.Put(key, hash, r.answer, now)
	case r.good():
		a := r.answer
		r.answer = p.cache.Put(f.key, f.hash, a, now)
		if a.Rcode == wire.RcodeSuccess && (r.answer != a || !a.Negative() && !a.Truncated()) {
			// The name exists, for whatever type: a denial from before does not hold any more.
			key, hash := p.nameKey(f.key)
			p.cache.Drop(key, hash, f.asked)
		}
	case void:
	case denied:
		// Its name has a good entry, though an old one, which no SERVFAIL may stand before.
		key, hash := p.nameKey(f.key)
		p.cache.Fail(key, hash, nil, now)
	case r.answer != nil && r.answer.Rcode == wire.RcodeServFail:
		r.answer = p.cache.Fail(f.key, f.hash, r.answer, now)
	case r.answer != nil:
		p.cache.Fail(f.key, f.hash, nil, now)
	default:
		a, err := p.servFail(q, r.ede)
		if err != nil {
			panic("pipeline: a SERVFAIL that cannot be read: " + err.Error()) // its question came from a client
		}
		p.cache.Unanswered(f.key, f.hash, a, now)
	}
}

// Flush forgets the answers for a name as [cache.Cache.FlushName] does, and returns how many there were. Questions under way that
// it is about, which upstreams may have answered before, go on for those who wait for them; nobody follows them any more, and
// their answers are not kept. So whoever asks after Flush gets an answer from after it was called.
func (p *Pipeline) Flush(name []byte, below bool) (entries int) {
	for i := range p.flights {
		s := &p.flights[i]
		s.mu.Lock()
		for f := s.oldest; f != nil; f = f.next {
			if f.key == nil {
				continue
			}
			if own, above := cache.Concerns(f.key, name, below); own || above {
				f.flushed = true
				s.hide(f)
			}
		}
		s.mu.Unlock()
	}
	if p.cache == nil {
		return 0
	}
	return p.cache.FlushName(name, below) // last: what was kept until now goes, and nothing follows
}

// nameKey returns the key for all types of the name in key, and its hash. It takes the room behind key if there is enough.
func (p *Pipeline) nameKey(key []byte) ([]byte, uint64) {
	key = append(key, key...)[len(key):]
	wire.TurnNameKey(key)
	return key, p.hash(key)
}
