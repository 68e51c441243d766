package pipeline

import (
	"context"
	"sync"

	"dnsgateway/gateway/wire"
)

const (
	// renewRoom is how many questions may wait to be renewed; what does not fit is asked for when a client has to wait for it.
	renewRoom = 512
	// renewers is how many questions are renewed at once: at 20 ms for an answer that is 1600 in a second.
	renewers = 32
)

// renewal is a question whose answer in the cache is to be renewed. It is a value with the name in it, so that it can be put
// into the queue from where nothing is allocated.
type renewal struct {
	name   [wire.MaxName]byte
	length uint8
	qtype  uint16
	flags  uint16
	do     bool
	denial bool // the entry is the denial of the name
	stale  bool // its time is over
}

// renew puts the question that h answers into the queue, if there is room.
func (p *Pipeline) renew(q *wire.Query, h *hit) {
	r := renewal{qtype: q.Qtype, flags: q.Flags & wire.FlagCD, do: q.DO, denial: h.denial, stale: h.Stale}
	r.length = uint8(copy(r.name[:], q.Name[h.skip:]))
	select {
	case p.renewals <- r:
	default:
	}
}

// Run renews answers in the cache before clients have to wait for them, until ctx ends. It returns when all that it started
// has ended, and with it the questions whose clients have left with a stale answer; none are begun after that. It is called at
// most once. A Pipeline works without it: then popular answers are asked for when their time is over.
func (p *Pipeline) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range renewers {
		wg.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case r := <-p.renewals:
					p.renewNow(ctx, &r)
				}
			}
		})
	}
	<-ctx.Done()
	p.mu.Lock()
	p.stopped.Store(true)
	p.mu.Unlock()
	for i := range p.flights {
		s := &p.flights[i]
		s.mu.Lock() // what begins in the background has seen stopped, or is in the list
		for f := s.oldest; f != nil; f = f.next {
			if f.background || f.spawned {
				f.cancel(errStopped)
			}
		}
		s.mu.Unlock()
	}
	wg.Wait()
	p.flying.Wait()
	return nil
}

// renewNow asks for r, unless a client does just now or has done so.
func (p *Pipeline) renewNow(ctx context.Context, r *renewal) {
	defer func() {
		if v := recover(); v != nil {
			p.panicked(v, 0)
		}
	}()
	now := p.now().UnixNano()
	q := wire.Query{Name: r.name[:r.length], Qtype: r.qtype, Qclass: wire.ClassIN, Flags: r.flags, DO: r.do, Received: now}
	if r.stale {
		if h, ok := p.find(&q, now, false); ok && !(h.Stale && !p.held(&q, &h)) {
			return
		}
	}
	key, hash := p.key(&q)
	if f, ok := p.joinForNobody(ctx, p.flights.shard(hash), key, hash, &q); ok {
		p.count(Prefetch)
		p.fly(f, q.Question(), r.denial)
	}
}

// spawn runs fly, which flies f, on a goroutine that Run waits for. It reports false when Run ends.
func (p *Pipeline) spawn(f *flight, fly func()) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.stopped.Load() {
		return false
	}
	s := p.flights.shard(f.hash)
	s.mu.Lock()
	f.spawned = true
	s.mu.Unlock()
	p.flying.Go(fly)
	return true
}
