package listen

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// patience is how long a miss may wait for its turn. Resolvers and stubs commonly give up on a server after 2 s (RFC
	// 8767, section 5, sets its timer by that): an answer after it costs an upstream exchange and helps nobody, and by then
	// the client's second try is in the queue as well.
	patience = 2 * time.Second
	// maxParked is how many workers without work stay. Those that the ordinary load needs are there, with the stacks that
	// they have grown; what a burst needed beyond them is given back.
	maxParked = 256
	// parkFor is how long a worker stays without work.
	parkFor = 10 * time.Second
)

// missQueue has a bounded set of workers answer the misses of a listener. When all are busy misses wait; when too many
// wait, the one that has waited longest is shed, as its client is the likeliest to have given up, and the newest, whose
// client has just begun to wait, is kept.
type missQueue struct {
	do   func(*pending) // answers a miss and owns it
	drop func(*pending) // takes a miss that is not answered
	max  int
	shed atomic.Uint64

	mu       sync.Mutex
	workers  int        // that live
	parked   []*worker  // those without work, the last to have stopped is the first to go on: its stack is in the cache
	ring     []*pending // waiting, the oldest at head
	head, n  int
	finished bool
	wg       sync.WaitGroup
}

// worker is a goroutine that answers one miss after the other.
type worker struct {
	next chan *pending // gets one miss, or nil as the order to end, each time the worker is taken from parked
	idle *time.Timer
}

func (w *missQueue) init(limit int, do, drop func(*pending)) {
	w.max, w.do, w.drop = limit, do, drop
	w.ring = make([]*pending, limit)
}

// add gives m to a worker, or lets it wait. It does not block.
func (w *missQueue) add(m *pending) {
	w.mu.Lock()
	switch last := len(w.parked) - 1; {
	case last >= 0:
		to := w.parked[last]
		w.parked = w.parked[:last]
		w.mu.Unlock()
		to.next <- m
	case w.workers < w.max:
		w.workers++
		w.mu.Unlock()
		w.wg.Go(func() { w.work(m) })
	default:
		var oldest *pending
		if w.n == len(w.ring) {
			oldest = w.pop()
		}
		w.ring[(w.head+w.n)%len(w.ring)] = m
		w.n++
		w.mu.Unlock()
		if oldest != nil {
			w.giveUp(oldest)
		}
	}
}

// pop takes the oldest from the ring, which is not empty. mu is held.
func (w *missQueue) pop() *pending {
	m := w.ring[w.head]
	w.ring[w.head] = nil
	w.head = (w.head + 1) % len(w.ring)
	w.n--
	return m
}

func (w *missQueue) giveUp(m *pending) {
	w.shed.Add(1)
	w.drop(m)
}

func (w *missQueue) work(m *pending) {
	self := &worker{next: make(chan *pending, 1), idle: time.NewTimer(parkFor)}
	for m != nil {
		w.do(m)
		m = w.take(self)
	}
}

// take returns what the worker does next, or nil when it is to end.
func (w *missQueue) take(self *worker) *pending {
	for {
		w.mu.Lock()
		if w.n == 0 {
			break
		}
		m := w.pop()
		w.mu.Unlock()
		if time.Now().UnixNano()-m.q.Received <= int64(patience) {
			return m
		}
		w.giveUp(m)
	}
	if w.finished || len(w.parked) == maxParked {
		w.workers--
		w.mu.Unlock()
		return nil
	}
	w.parked = append(w.parked, self)
	w.mu.Unlock()
	self.idle.Reset(parkFor)
	select {
	case m := <-self.next:
		self.idle.Stop()
		return m
	case <-self.idle.C:
	}
	w.mu.Lock()
	i := slices.Index(w.parked, self)
	if i < 0 {
		w.mu.Unlock()
		return <-self.next // somebody has taken it from parked just now
	}
	w.parked = slices.Delete(w.parked, i, i+1)
	w.workers--
	w.mu.Unlock()
	return nil
}

// finish returns when all misses are answered and the workers have ended. Nothing may be added any more.
func (w *missQueue) finish() {
	w.mu.Lock()
	w.finished = true
	idle := w.parked
	w.parked = nil
	w.workers -= len(idle)
	w.mu.Unlock()
	for _, to := range idle {
		to.next <- nil
	}
	w.wg.Wait()
}
