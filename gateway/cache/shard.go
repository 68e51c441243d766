package cache

import (
	"math"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"dnsgateway/gateway/wire"
)

const (
	// meanCost is what an entry is assumed to take when the tables are sized, in octets: the answer to a question for an
	// address takes 288, others more. Where it is wrong, chains are longer or slots empty.
	meanCost = 360
	// smallShare is the part of a shard that new entries pass through; the paper has 10 %.
	smallShare = 10
	// maxFrequency is as far as hits are counted for eviction; the paper has two bits.
	maxFrequency = 3
	// promoteAt is how many hits in the small queue show that an entry is worth keeping: a client that repeats itself
	// makes one.
	promoteAt = 2

	// failedUnit is the unit of entry.failed, in nanoseconds.
	failedUnit = int64(10 * time.Millisecond)

	// The bits of entry.hits: the frequency, and behind it the hits since the answer was stored, for prefetch.
	frequencyMask = 3
	hitShift      = 2
)

// entry is one answer. What a lookup reads comes first and fits in one cache line; that line is written to only by the
// first few hits. All but the atomic fields and those of the queue is written before the entry is shared and never again,
// so that readers need no lock, and an entry that has left the table stays what it was for who still holds it.
type entry struct {
	hash    uint64
	chain   atomic.Pointer[entry] // the next entry in the same slot of the table; written under the shard's lock
	key     *byte                 // keyLen octets, in the array that answer refers to
	stored  int64                 // Unix nanoseconds
	life    uint32                // seconds
	hits    atomic.Uint32         // see frequencyMask; readers count without a common order, so some hits may be lost
	failed  atomic.Uint32         // when asking has failed last, in failedUnits after stored, up to 497 days; 0: it has not
	claimed atomic.Uint32         // when a caller was last told to prefetch, Unix seconds; 0: none was
	cost    uint32
	keyLen  uint16
	failure bool // a SERVFAIL: what is good takes its place, and it is never stale
	main    bool // which queue it is in; guarded by the shard's lock

	answer wire.Answer

	prev, next *entry // the neighbours in the queue; guarded by the shard's lock
}

// roomy is an entry with room behind it for what it refers to: one object, so that a lookup finds all of it in one place.
// There are no pointers in T, and the garbage collector does not look at it.
type roomy[T any] struct {
	entry
	room T
}

// entrySize is one of the sizes of objects that entries are made in.
type entrySize struct {
	room, cost int // octets for what an entry refers to, and what the object takes on the heap
	make       func() (*entry, []byte)
}

func sizeOf[T any]() entrySize {
	var r roomy[T]
	return entrySize{int(unsafe.Sizeof(r.room)), sizeClass(int(unsafe.Sizeof(r))), func() (*entry, []byte) {
		r := new(roomy[T])
		return &r.entry, unsafe.Slice((*byte)(unsafe.Pointer(&r.room)), unsafe.Sizeof(r.room))
	}}
}

// entrySizes are the allocator's size classes from 256 to 1024 octets, less the header that objects of more than 512 have.
// A larger entry has an array of its own.
var entrySizes = []entrySize{
	sizeOf[[32]uint16](), sizeOf[[48]uint16](), sizeOf[[64]uint16](), sizeOf[[80]uint16](), sizeOf[[96]uint16](),
	sizeOf[[112]uint16](), sizeOf[[128]uint16](), sizeOf[[144]uint16](), sizeOf[[160]uint16](),
	sizeOf[[188]uint16](), sizeOf[[220]uint16](), sizeOf[[252]uint16](), sizeOf[[284]uint16](), sizeOf[[348]uint16](),
	sizeOf[[412]uint16](),
}

// sizeClass returns how many octets the allocator takes for an object of n with pointers in it. One of more words than a word
// has bits has 8 octets in front that tell where the pointers are, which append does not count.
func sizeClass(n int) int {
	const word = int(unsafe.Sizeof(uintptr(0)))
	size := word * cap(append([]*byte(nil), make([]*byte, (n+word-1)/word)...))
	if n > 8*word*word {
		size += 8
	}
	return size
}

// newEntry returns an entry that shares no memory with key and a.
func newEntry(key []byte, hash uint64, a *wire.Answer, now int64, life uint32) *entry {
	var e *entry
	var array []byte
	cost, n := 0, a.CloneLen(len(key))
	if i := slices.IndexFunc(entrySizes, func(s entrySize) bool { return n <= s.room }); i >= 0 {
		e, array = entrySizes[i].make()
		cost = entrySizes[i].cost
	} else {
		e = new(entry)
		units := append([]uint16(nil), make([]uint16, (n+1)/2)...)
		array = unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(units))), 2*cap(units))
		cost = sizeClass(int(unsafe.Sizeof(*e))) + len(array)
	}
	a.CloneInto(&e.answer, array, key)
	cost += cap(e.answer.EDE) * int(unsafe.Sizeof(wire.EDE{}))
	e.hash, e.stored, e.life = hash, now, life
	e.key, e.keyLen = unsafe.SliceData(array), uint16(len(key))
	e.cost = uint32(cost)
	return e
}

func (e *entry) keyBytes() []byte { return unsafe.Slice(e.key, e.keyLen) }

// state is what the time has made of an entry.
type state uint8

const (
	dead state = iota
	stale
	fresh
)

// age returns the age of e in whole seconds, and what that makes of it.
func (e *entry) age(now int64, staleFor uint32) (uint32, state) {
	d := now - e.stored
	if d < 0 {
		if d < -clockSlack {
			return 0, dead
		}
		return 0, fresh
	}
	s := uint64(d / int64(time.Second))
	switch {
	case s < uint64(e.life):
		return uint32(s), fresh
	case s-uint64(e.life) < uint64(staleFor) && !e.failure:
		return uint32(s), stale
	}
	return 0, dead
}

// fail notes that asking for e has failed at the time now. It rounds up: what happened before a failure must not look as if it
// came after it. More than 497 days after e was stored there is no room for it, and e is found as if nothing had failed.
func (e *entry) fail(now int64) {
	n := (now - e.stored + failedUnit - 1) / failedUnit
	e.failed.Store(uint32(min(max(n, 1), math.MaxUint32)))
}

// failedLately returns when asking for e has failed, in Unix nanoseconds, if it is not to be repeated so soon after that, else 0.
func (e *entry) failedLately(now int64) int64 {
	n := e.failed.Load()
	at := e.stored + int64(n)*failedUnit
	if d := now - at; n == 0 || d >= recheckAfter*int64(time.Second) || d <= -clockSlack {
		return 0 // d: a time that is yet to come counts for nothing, as in within
	}
	return at
}

// hit counts a hit. Once both counts have reached their bounds it writes nothing, so that cores which serve the same name
// share a cache line that stays clean. It returns the hits since the answer was stored, at most popular.
func (e *entry) hit(popular uint32) uint32 {
	w := e.hits.Load()
	f, n := w&frequencyMask, w>>hitShift
	if f < maxFrequency || n < popular {
		f, n = min(f+1, maxFrequency), min(n+1, popular)
		e.hits.Store(n<<hitShift | f)
	}
	return n
}

func (e *entry) frequency() uint32 { return e.hits.Load() & frequencyMask }

func (e *entry) setFrequency(f uint32) { e.hits.Store(e.hits.Load()&^frequencyMask | f) }

// worth returns the frequency of e as eviction sees it, 0 when it is dead. A stale entry is worth less than a fresh one
// that is asked for as often.
func (e *entry) worth(now int64, staleFor uint32) uint32 {
	f := e.frequency()
	switch _, s := e.age(now, staleFor); {
	case s == dead:
		return 0
	case s == stale && f > 0:
		return f - 1
	}
	return f
}

// table is the hash table of the whole cache: chains of entries, which are read without a lock. The upper bits of a hash
// are the number of its slot, so that every shard has a part of the table to itself.
type table struct {
	slots []atomic.Pointer[entry]
	shift int
}

func (t *table) slot(hash uint64) *atomic.Pointer[entry] { return &t.slots[hash>>t.shift] }

// find returns the entry for key, or nil.
func (t *table) find(key []byte, hash uint64) *entry {
	for e := t.slot(hash).Load(); e != nil; e = e.chain.Load() {
		if e.hash == hash && string(e.keyBytes()) == string(key) {
			return e
		}
	}
	return nil
}

// touchAtOnce is how many entries are touched together. A processor waits for ten to twenty places in memory at once.
const touchAtOnce = 32

// touch reads all that a lookup of hashes, touchAtOnce at most, reads. It is done in short loops whose turns do not depend on
// each other, and returns something of all that it has read: else the compiler would see that nobody needs it.
//
//go:noinline
func (t *table) touch(hashes []uint64) (seen uint64) {
	var list [touchAtOnce]*entry
	for i, hash := range hashes {
		list[i] = t.slot(hash).Load()
	}
	for i, hash := range hashes {
		e := list[i]
		for e != nil && e.hash != hash {
			e = e.chain.Load()
		}
		list[i] = e
	}
	for _, e := range list[:len(hashes)] {
		if e != nil {
			seen += uint64(*e.key) + uint64(e.answer.Rcode) + uint64(e.answer.Msg[len(e.answer.Msg)-1])
		}
	}
	return seen
}

// link returns the pointer to e, which has to be in the table.
func (t *table) link(e *entry) *atomic.Pointer[entry] {
	link := t.slot(e.hash)
	for next := link.Load(); next != e; next = link.Load() {
		link = &next.chain
	}
	return link
}

// add puts e in front of its chain.
func (t *table) add(e *entry) {
	slot := t.slot(e.hash)
	e.chain.Store(slot.Load())
	slot.Store(e)
}

// remove takes e out. Its own link stays, for readers who are there just now.
func (t *table) remove(e *entry) { t.link(e).Store(e.chain.Load()) }

// replace puts e into the place of old.
func (t *table) replace(old, e *entry) {
	e.chain.Store(old.chain.Load())
	t.link(old).Store(e)
}

// queue is a FIFO of entries: in at head, out at tail.
type queue struct {
	head, tail *entry
	bytes      int64
}

// insert puts e between two neighbours, nil being the ends.
func (q *queue) insert(prev, e, next *entry) {
	e.prev, e.next = prev, next
	if prev != nil {
		prev.next = e
	} else {
		q.head = e
	}
	if next != nil {
		next.prev = e
	} else {
		q.tail = e
	}
	q.bytes += int64(e.cost)
}

func (q *queue) remove(e *entry) {
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		q.head = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		q.tail = e.prev
	}
	e.prev, e.next = nil, nil
	q.bytes -= int64(e.cost)
}

func (q *queue) push(e *entry) { q.insert(nil, e, q.head) }

func (q *queue) pop() *entry {
	e := q.tail
	q.remove(e)
	return e
}

// shard is an independent part of the cache: what has to be locked to write to a part of the table. Readers never come
// here.
type shard struct {
	mu        sync.Mutex
	table     table                   // the whole cache's
	slots     []atomic.Pointer[entry] // the part of it that is this shard's
	ghosts    []uint32                // marks of hashes that left the small queue; a newer one in the same slot takes its place
	small     queue
	main      queue
	room      int64 // for entries, without the tables
	fixed     int64 // the tables
	entries   int64
	evictions uint64
	staleFor  uint32
	_         [64]byte // keeps the next shard's lock off this one's cache line
}

// slotsFor returns how many slots a shard of so many octets has: a power of two, and one or two for each entry.
func slotsFor(size int64) int { return 1 << bits.Len64(uint64(size/meanCost)) }

// init gives s its tables; size bounds all that the shard uses.
func (s *shard) init(size int64, t table, slots []atomic.Pointer[entry], staleFor uint32) {
	s.table, s.slots, s.staleFor = t, slots, staleFor
	s.ghosts = make([]uint32, len(slots))
	s.fixed = int64(unsafe.Sizeof(*s)) + int64(len(slots))*int64(unsafe.Sizeof(s.slots[0])+unsafe.Sizeof(s.ghosts[0]))
	s.room = size - s.fixed
}

func (s *shard) queue(e *entry) *queue {
	if e.main {
		return &s.main
	}
	return &s.small
}

// put takes e in, in the place of the entry with the same key if there is one, and makes room for it.
func (s *shard) put(e *entry, now int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.putLocked(s.table.find(e.keyBytes(), e.hash), e, now)
}

// putLocked is put, old being the entry with the same key, or nil.
func (s *shard) putLocked(old, e *entry, now int64) {
	if old != nil {
		s.replace(old, e)
	} else {
		e.main = s.wasGhost(e.hash)
		s.table.add(e)
		s.queue(e).push(e)
		s.entries++
	}
	s.shrink(now)
}

// replace puts e into the place of old, in the table and in the queue. It is as popular, but its hits are counted anew.
func (s *shard) replace(old, e *entry) {
	e.setFrequency(old.frequency())
	e.main = old.main
	s.table.replace(old, e)
	q, prev, next := s.queue(old), old.prev, old.next
	q.remove(old)
	q.insert(prev, e, next)
}

// fail takes note of a failure at the time now. Only where there is no good entry that may still be used, e, which may be
// nil, is taken in.
func (s *shard) fail(key []byte, hash uint64, e *entry, now int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.table.find(key, hash)
	if old != nil && !old.failure {
		if _, state := old.age(now, s.staleFor); state != dead {
			old.fail(now)
			return
		}
	}
	if e != nil {
		s.putLocked(old, e, now)
	}
}

// outdate drops the entry for key if its time is over, or it is a failure.
func (s *shard) outdate(key []byte, hash uint64, now int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.table.find(key, hash); e != nil {
		if _, state := e.age(now, s.staleFor); state != fresh || e.failure {
			s.forget(e)
		}
	}
}

// drop drops the entry for key, unless it was stored after the time since.
func (s *shard) drop(key []byte, hash uint64, since int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.table.find(key, hash); e != nil && e.stored <= since {
		s.forget(e)
	}
}

// restore takes in an entry of a snapshot, unless there is a good entry with its key or no room for it. It comes behind
// all that is in its queue.
func (s *shard) restore(e *entry, main bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.table.find(e.keyBytes(), e.hash)
	switch {
	case old != nil && !old.failure, s.small.bytes+s.main.bytes+int64(e.cost) > s.room:
		return false
	case old != nil:
		s.replace(old, e)
		return true
	}
	e.main = main
	s.table.add(e)
	q := s.queue(e)
	q.insert(q.tail, e, nil)
	s.entries++
	return true
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
	if e.worth(now, s.staleFor) >= promoteAt {
		e.setFrequency(0)
		e.main = true
		s.main.push(e)
		return
	}
	if _, state := e.age(now, s.staleFor); state != dead {
		s.setGhost(e.hash)
	}
	s.evict(e)
}

// evictMain gives the oldest entry of the main queue another round if it was asked for, or else drops it.
func (s *shard) evictMain(now int64) {
	e := s.main.pop()
	if f := e.worth(now, s.staleFor); f > 0 {
		e.setFrequency(f - 1)
		s.main.push(e)
		return
	}
	s.evict(e)
}

// evict takes e, which is in no queue any more, out of the table to make room.
func (s *shard) evict(e *entry) {
	s.table.remove(e)
	s.entries--
	s.evictions++
}

// forget takes e out of the queue and the table.
func (s *shard) forget(e *entry) {
	s.queue(e).remove(e)
	s.table.remove(e)
	s.entries--
}

// ghost returns the slot for a ghost and its mark, which is never 0. The slots of the table are chosen by other bits.
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
	s.mu.Lock()
	defer s.mu.Unlock()
	t.Entries += s.entries
	t.Bytes += s.fixed + s.small.bytes + s.main.bytes
	t.Evictions += s.evictions
}

// flush drops all entries and the memory of those that left. It returns how many entries there were.
func (s *shard) flush() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.slots {
		s.slots[i].Store(nil)
	}
	clear(s.ghosts)
	for _, q := range []*queue{&s.small, &s.main} {
		for e := q.head; e != nil; {
			// Who still holds one of them must not hold all.
			next := e.next
			e.prev, e.next = nil, nil
			e = next
		}
		*q = queue{}
	}
	n := s.entries
	s.entries = 0
	return int(n)
}

// flushName drops the entries that match, and returns how many.
func (s *shard) flushName(match func(e *entry) bool) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.slots {
		for e := s.slots[i].Load(); e != nil; e = e.chain.Load() {
			if match(e) {
				s.forget(e)
				n++
			}
		}
	}
	return n
}
