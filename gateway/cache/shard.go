package cache

import (
	"bytes"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"dnsgateway/gateway/wire"
)

const (
	// meanCost is what an entry is assumed to take when the tables of a shard are sized, in octets: the answer to a
	// question for an address is 100 to 300 octets long. Where it is wrong, chains are longer or slots empty.
	meanCost = 512
	// smallShare is the part of a shard that new entries pass through; the paper has 10 %.
	smallShare = 10
	// maxFrequency is as far as hits are counted; the paper has two bits.
	maxFrequency = 3
	// promoteAt is how many hits in the small queue show that an entry is worth keeping: a client that repeats itself
	// makes one.
	promoteAt = 2
	// sizeofEntry is an entry's place on the heap; the runtime rounds up to multiples of 16 in this range.
	sizeofEntry = int64(unsafe.Sizeof(entry{})+15) &^ 15
)

// entry is one answer. All but hits and the links is written before the entry is shared and never again. What a lookup
// reads comes first and fits in one cache line.
type entry struct {
	hash   uint64
	chain  *entry // the next entry in the same slot of the table; guarded by the shard's lock
	key    []byte
	stored int64 // Unix nanoseconds
	life   uint32
	hits   atomic.Uint32 // at most maxFrequency; readers count without a common order, so some hits may be lost
	cost   uint32
	answer wire.Answer

	// Guarded by the shard's lock.
	queue      *queue
	prev, next *entry // the neighbours in the queue
}

// newEntry returns an entry that shares no memory with key and a.
func newEntry(hash uint64, key []byte, a *wire.Answer, now int64, life uint32) *entry {
	e := &entry{answer: a.Clone(), key: append([]byte(nil), key...), hash: hash, stored: now, life: life}
	e.cost = uint32(sizeofEntry + int64(max(cap(e.key), 16)+e.answer.Size()))
	return e
}

// age returns the age of e in whole seconds, and whether e is still alive.
func (e *entry) age(now int64) (uint32, bool) {
	d := now - e.stored
	if d < 0 {
		return 0, d >= -clockSlack
	}
	s := d / int64(time.Second)
	return uint32(s), s < int64(e.life)
}

// queue is a FIFO of entries: in at head, out at tail.
type queue struct {
	head, tail *entry
	bytes      int64
}

func (q *queue) push(e *entry) {
	e.queue, e.prev, e.next = q, nil, q.head
	if q.head != nil {
		q.head.prev = e
	} else {
		q.tail = e
	}
	q.head = e
	q.bytes += int64(e.cost)
}

func (q *queue) pop() *entry {
	e := q.tail
	q.tail = e.prev
	if q.tail != nil {
		q.tail.next = nil
	} else {
		q.head = nil
	}
	e.queue, e.prev = nil, nil
	q.bytes -= int64(e.cost)
	return e
}

// replace puts e into the place of old.
func (q *queue) replace(old, e *entry) {
	e.queue, e.prev, e.next = q, old.prev, old.next
	if e.prev != nil {
		e.prev.next = e
	} else {
		q.head = e
	}
	if e.next != nil {
		e.next.prev = e
	} else {
		q.tail = e
	}
	q.bytes += int64(e.cost) - int64(old.cost)
	old.queue, old.prev, old.next = nil, nil, nil
}

// shard is an independent part of the cache.
type shard struct {
	mu      sync.RWMutex
	slots   []*entry // a power of two of chains, by the low bits of the hash
	ghosts  []uint32 // the high bits of hashes that left the small queue; a newer one in the same slot takes its place
	small   queue
	main    queue
	room    int64 // for entries, without the tables
	fixed   int64 // the tables
	entries int64

	evictions uint64
	hits      atomic.Uint64
	misses    atomic.Uint64
	_         [64]byte // keeps the next shard's lock off this one's cache line
}

// init gives s its tables; size bounds all that the shard uses.
func (s *shard) init(size int64) {
	n := 1 << (bits.Len64(uint64(size/meanCost)) - 1)
	s.slots = make([]*entry, n)
	s.ghosts = make([]uint32, n)
	s.fixed = int64(unsafe.Sizeof(*s)) + int64(n)*int64(unsafe.Sizeof(s.slots[0])+unsafe.Sizeof(s.ghosts[0]))
	s.room = size - s.fixed
}

func (s *shard) slot(hash uint64) **entry { return &s.slots[hash&uint64(len(s.slots)-1)] }

func (s *shard) get(hash uint64, key []byte, now int64) (a *wire.Answer, age uint32, ok bool) {
	s.mu.RLock()
	e := *s.slot(hash)
	for e != nil && (e.hash != hash || !bytes.Equal(e.key, key)) {
		e = e.chain
	}
	s.mu.RUnlock()
	if e != nil {
		if age, ok = e.age(now); ok {
			if f := e.hits.Load(); f < maxFrequency {
				e.hits.Store(f + 1)
			}
			s.hits.Add(1)
			return &e.answer, age, true
		}
	}
	s.misses.Add(1)
	return nil, 0, false
}

// put takes e in, in the place of the entry with the same key if there is one, and makes room for it.
func (s *shard) put(e *entry, now int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	link := s.slot(e.hash)
	for ; *link != nil; link = &(*link).chain {
		if old := *link; old.hash == e.hash && bytes.Equal(old.key, e.key) {
			e.hits.Store(old.hits.Load())
			e.chain, old.chain = old.chain, nil
			*link = e
			old.queue.replace(old, e)
			s.shrink(now)
			return
		}
	}
	e.chain = *s.slot(e.hash)
	*s.slot(e.hash) = e
	s.entries++
	if s.wasGhost(e.hash) {
		s.main.push(e)
	} else {
		s.small.push(e)
	}
	s.shrink(now)
}

// shrink evicts until the shard keeps its bound.
func (s *shard) shrink(now int64) {
	for s.small.bytes+s.main.bytes > s.room {
		if s.main.tail == nil || s.small.bytes > s.room/smallShare {
			s.evictSmall(now)
		} else {
			s.evictMain(now)
		}
	}
}

// evictSmall takes the oldest entry out of the small queue: into the main one if it was asked for, or else out.
func (s *shard) evictSmall(now int64) {
	e := s.small.pop()
	_, live := e.age(now)
	switch {
	case !live:
		s.drop(e)
	case e.hits.Load() >= promoteAt:
		e.hits.Store(0)
		s.main.push(e)
	default:
		s.drop(e)
		s.setGhost(e.hash)
	}
}

// evictMain gives the oldest entry of the main queue another round if it was asked for, or else drops it.
func (s *shard) evictMain(now int64) {
	e := s.main.pop()
	_, live := e.age(now)
	if f := e.hits.Load(); live && f > 0 {
		e.hits.Store(f - 1)
		s.main.push(e)
		return
	}
	s.drop(e)
}

// drop takes e, which is in no queue any more, out of the table.
func (s *shard) drop(e *entry) {
	link := s.slot(e.hash)
	for *link != e {
		link = &(*link).chain
	}
	*link, e.chain = e.chain, nil
	s.entries--
	s.evictions++
}

// ghost returns the slot for a ghost and its mark, which is never 0. The shard's number and the slot use other bits.
func (s *shard) ghost(hash uint64) (slot *uint32, mark uint32) {
	return &s.ghosts[hash&uint64(len(s.ghosts)-1)], uint32(hash>>24) | 1
}

func (s *shard) setGhost(hash uint64) {
	slot, mark := s.ghost(hash)
	*slot = mark
}

// wasGhost reports whether the entry with hash has left the small queue not long ago.
func (s *shard) wasGhost(hash uint64) bool {
	slot, mark := s.ghost(hash)
	if *slot != mark {
		return false
	}
	*slot = 0
	return true
}

func (s *shard) addTo(t *Stats) {
	s.mu.RLock()
	t.Entries += s.entries
	t.Bytes += s.fixed + s.small.bytes + s.main.bytes
	t.Evictions += s.evictions
	s.mu.RUnlock()
	t.Hits += s.hits.Load()
	t.Misses += s.misses.Load()
}

// flush drops all entries and the memory of those that left.
func (s *shard) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.slots)
	clear(s.ghosts)
	s.small, s.main, s.entries = queue{}, queue{}, 0
}
