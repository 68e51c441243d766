// Package cache keeps answers in wire form, within a fixed amount of memory. It knows lifetimes, not policy: which
// questions share an answer is decided by the key, and what has to be checked first is checked by the caller.
//
// It is a hash table that is read without a lock: entries do not change once they are in it. Writers lock one shard of
// it, and a hit writes nothing but the first few times. A shard that is full forgets by S3-FIFO
// (https://doi.org/10.1145/3600006.3613147): what was asked for once passes through a small queue and out, so that a
// flood of names that nobody will ask for again does not wash away what is asked for all the time.
//
// Answers outlive a restart by way of a file, see [Cache.SaveFile].
//
// What surprises a newcomer: [Cache.Put] keeps a copy whose TTLs may differ from those it was given, and an entry whose
// time is over stays in memory, found as stale or not at all, until its place is needed or a fresh answer replaces it.
package cache

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/wire"
)

const (
	// DefaultMaxTTL bounds lifetimes when Config.MaxTTL is 0; RFC 8767, section 4 asks for a bound of days.
	DefaultMaxTTL = 24 * time.Hour
	// DefaultNegativeMaxTTL is used when Config.NegativeMaxTTL is 0; RFC 2308, section 5 recommends one to three hours.
	DefaultNegativeMaxTTL = time.Hour
	// MinBytes is the smallest cache: one shard, in which the largest answer still leaves room for others.
	MinBytes = 512 << 10

	// maxShards is as many as 64 cores keep busy without waiting for each other.
	maxShards = 128
	// clockSlack is how much older than an entry a question may seem: listener and resolver read the clock one after the
	// other. More than that means that the clock was set back, and the entry's age is unknown.
	clockSlack = int64(10 * time.Second)

	// failureLife is how long a SERVFAIL is kept, in seconds. RFC 9520, section 3.2 wants at least 1 s, RFC 2308, section 7
	// at most 5 minutes.
	failureLife = 5
	// silenceLife is how long it is kept at first that nobody answered; the same section asks for longer with each failure
	// in a row, which is twice as long here, up to failureLife.
	silenceLife = 1
	// recheckAfter is for how many seconds stale answers are given without asking again after asking has failed: the
	// failure recheck timer of RFC 8767, section 5.
	recheckAfter = 30
	// claimFor is for how many seconds a caller who was told to prefetch is trusted to do it. No exchange takes longer.
	claimFor = 10
	// minPrefetchLife is the shortest life, in seconds, that is worth to be renewed before it ends.
	minPrefetchLife = 2
	// maxPrefetchHits is what entry.hits has room for, and more than anybody needs.
	maxPrefetchHits = 255
)

// Config is what [New] needs. TTLs count in whole seconds; fractions are cut off.
type Config struct {
	// MaxBytes bounds the heap that the cache uses, with all that belongs to it. At least MinBytes.
	MaxBytes int64
	// MinTTL raises the TTLs of what is kept. An answer with a TTL of 0 is not kept whatever MinTTL says: its owner has
	// asked for that.
	MinTTL time.Duration
	// MaxTTL lowers the TTLs of what is kept; 0 means DefaultMaxTTL.
	MaxTTL time.Duration
	// NegativeMaxTTL bounds the life of negative answers as well, and wins over MinTTL; 0 means DefaultNegativeMaxTTL.
	NegativeMaxTTL time.Duration
	// StaleFor is how long an answer can still be found after its time is over, RFC 8767; 0: it cannot.
	StaleFor time.Duration
	// PrefetchHits is how often an answer has to be found in its life to be worth a prefetch, at most 255; 0: no prefetch.
	PrefetchHits uint32
	// PrefetchRemaining is the share of an answer's life, above 0 and below 1, in which it is prefetched: its end.
	PrefetchRemaining float64
}

// Cache maps keys to answers. All its methods may be called from any goroutine.
//
// A key begins with a name in lower-case wire form, as [wire.Query.Key] makes it, and hash is what [Cache.Hash] returns for
// it. The time now is in Unix nanoseconds.
type Cache struct {
	table  table
	shards []shard
	seed   maphash.Seed
	shift  int // a hash shifted right by this is the number of its shard
	max    int64

	minTTL, maxTTL, negativeTTL uint32 // seconds
	staleFor                    uint32 // seconds
	prefetchHits                uint32
	prefetchShare               float64 // nanoseconds of each second of life
}

// Found is what [Cache.Get] has found.
type Found struct {
	// Answer is shared: nobody may change it. It stays valid after it has left the cache.
	Answer *wire.Answer
	// Age is how many whole seconds ago Answer was stored; when it is fresh, less than every TTL in it.
	Age uint32
	// Stale says that Answer's time is over, by less than Config.StaleFor.
	Stale bool
	// Prefetch says that the answer is popular and near its end, and that nobody renews it: who wants to calls Claim.
	Prefetch bool
	// Failed is when asking has failed, Unix nanoseconds, never earlier and at most a hundredth of a second later. With Stale
	// and Prefetch that is less than 30 s ago, and upstream should be left alone: it is the failure recheck timer of RFC 8767,
	// section 5. Else Answer is the SERVFAIL of a question that nobody answered. 0: nothing of that.
	Failed int64
}

// Stats are a cache's gauges and, since New, its counter. Hits are not counted here: on many cores that would cost more than
// the lookup.
type Stats struct {
	Entries   int64
	Bytes     int64 // heap in use, the tables included; at most MaxBytes
	MaxBytes  int64
	Evictions uint64 // entries that made room for others, those whose time was over included
}

// New returns an empty cache.
func New(c Config) (*Cache, error) {
	if c.MaxTTL == 0 {
		c.MaxTTL = DefaultMaxTTL
	}
	if c.NegativeMaxTTL == 0 {
		c.NegativeMaxTTL = DefaultNegativeMaxTTL
	}
	var errs []error
	if c.MaxBytes < MinBytes {
		errs = append(errs, fmt.Errorf("MaxBytes is %d, want at least %d", c.MaxBytes, MinBytes))
	}
	if c.MinTTL < 0 || c.MinTTL > c.MaxTTL {
		errs = append(errs, fmt.Errorf("MinTTL is %v, want 0s to %v, which is MaxTTL", c.MinTTL, c.MaxTTL))
	}
	for _, d := range []struct {
		name string
		ttl  time.Duration
	}{{"MaxTTL", c.MaxTTL}, {"NegativeMaxTTL", c.NegativeMaxTTL}} {
		if d.ttl < time.Second || d.ttl > math.MaxInt32*time.Second { // RFC 2181, section 8
			errs = append(errs, fmt.Errorf("%s is %v, want 1s to %v", d.name, d.ttl, math.MaxInt32*time.Second))
		}
	}
	if c.StaleFor < 0 || c.StaleFor > math.MaxInt32*time.Second {
		errs = append(errs, fmt.Errorf("StaleFor is %v, want 0s to %v", c.StaleFor, math.MaxInt32*time.Second))
	}
	if c.PrefetchHits > maxPrefetchHits {
		errs = append(errs, fmt.Errorf("PrefetchHits is %d, want at most %d", c.PrefetchHits, maxPrefetchHits))
	}
	if c.PrefetchHits > 0 && !(c.PrefetchRemaining > 0 && c.PrefetchRemaining < 1) {
		errs = append(errs, fmt.Errorf("PrefetchRemaining is %v, want a share above 0 and below 1", c.PrefetchRemaining))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	n := shardCount(c.MaxBytes)
	each := slotsFor(c.MaxBytes / int64(n))
	cache := &Cache{
		table:         table{slots: make([]atomic.Pointer[entry], n*each), shift: 64 - bits.TrailingZeros(uint(n*each))},
		shards:        make([]shard, n),
		seed:          maphash.MakeSeed(),
		shift:         64 - bits.TrailingZeros(uint(n)),
		max:           c.MaxBytes,
		minTTL:        uint32(c.MinTTL / time.Second),
		maxTTL:        uint32(c.MaxTTL / time.Second),
		negativeTTL:   uint32(c.NegativeMaxTTL / time.Second),
		staleFor:      uint32(c.StaleFor / time.Second),
		prefetchHits:  c.PrefetchHits,
		prefetchShare: c.PrefetchRemaining * float64(time.Second),
	}
	for i := range cache.shards {
		cache.shards[i].init(c.MaxBytes/int64(n), cache.table, cache.table.slots[i*each:(i+1)*each], cache.staleFor)
	}
	return cache, nil
}

// shardCount returns a power of two, so that no shard is smaller than MinBytes.
func shardCount(size int64) int {
	n := 1
	for n < maxShards && size/int64(2*n) >= MinBytes {
		n *= 2
	}
	return n
}

func (c *Cache) shard(hash uint64) *shard { return &c.shards[hash>>c.shift] }

// Hash returns the hash of key. It differs from cache to cache and from run to run, so that nobody outside can choose keys
// that meet in one slot.
func (c *Cache) Hash(key []byte) uint64 { return maphash.Bytes(c.seed, key) }

// Get finds the answer for key that is alive at the time now, or stale. It takes no lock, does not allocate and does not
// keep key.
func (c *Cache) Get(key []byte, hash uint64, now int64) (f Found, ok bool) {
	e := c.table.find(key, hash)
	if e == nil {
		return Found{}, false
	}
	age, state := e.age(now, c.staleFor)
	if state == dead {
		return Found{}, false
	}
	f = Found{Answer: &e.answer, Age: age}
	hits := e.hit(c.prefetchHits)
	switch {
	case state == stale:
		f.Stale, f.Failed = true, e.failedLately(now)
	case e.failure:
		if e.failed.Load() != 0 {
			f.Failed = e.stored
		}
	case c.prefetchHits > 0 && hits >= c.prefetchHits && c.ending(e, now):
		f.Prefetch, f.Failed = true, e.failedLately(now)
	}
	return f, true
}

// Touch reads what Get will read for the keys with these hashes, so that it lies in the processor's caches then. It changes
// nothing. Each Get for a name that was not asked for just now waits three times for memory, where it lies (the slot of the
// table, the entry, the message), each time for the one before; here the processor waits for all the first at once, then for
// all the second. With 1,000,000 names that takes a third of the time.
func (c *Cache) Touch(hashes []uint64) {
	for len(hashes) > 0 {
		n := min(len(hashes), touchAtOnce)
		c.table.touch(hashes[:n])
		hashes = hashes[n:]
	}
}

// ending reports whether e, which is fresh, is near its end and nobody renews it.
func (c *Cache) ending(e *entry, now int64) bool {
	remaining := int64(e.life)*int64(time.Second) - (now - e.stored)
	return float64(remaining) <= float64(e.life)*c.prefetchShare && e.life >= minPrefetchLife && !e.failure &&
		!within(e.claimed.Load(), now, claimFor)
}

// Claim reports whether the caller is the one who is to renew the answer for key, which was found with Prefetch: nobody else
// finds it so until the next Put for key, or for 10 s. It takes no lock, does not allocate and does not keep key.
func (c *Cache) Claim(key []byte, hash uint64, now int64) bool {
	e := c.table.find(key, hash)
	if e == nil {
		return false
	}
	last := e.claimed.Load()
	return c.ending(e, now) && e.claimed.CompareAndSwap(last, seconds(now))
}

// seconds returns the time now in Unix seconds, which fit until 2106, and never 0.
func seconds(now int64) uint32 { return max(uint32(now/int64(time.Second)), 1) }

// within reports whether less than so many seconds have passed from at, which is 0 for never, to now. A time that is yet to
// come counts for nothing: the clock was set back.
func within(at uint32, now int64, limit int64) bool {
	d := now/int64(time.Second) - int64(at)
	return at != 0 && d < limit && d > -clockSlack/int64(time.Second)
}

// Put stores a copy of a under key if its Lifetime says that it may be kept (RFC 2308, RFC 2181, section 8: no referral,
// no negative answer without an SOA record, nothing truncated, no RCODE but NOERROR and NXDOMAIN, no TTL of 0), and
// returns the answer that clients are to be sent: the copy, whose TTLs lie between the bounds of the Config, or else a
// itself. The TTLs of a negative answer are no longer than its life, as RFC 2308, section 5 has it. Put keeps neither key
// nor a.
//
// What may not be kept leaves what is there in its place, but for data with a TTL of 0: a stale answer is no longer the
// last one known then, and goes.
func (c *Cache) Put(key []byte, hash uint64, a *wire.Answer, now int64) *wire.Answer {
	life, low, high := c.lifetime(a)
	if life == 0 {
		if a.Rcode == wire.RcodeSuccess && !a.Negative() && !a.Truncated() {
			c.shard(hash).outdate(key, hash, now)
		}
		return a
	}
	e := newEntry(key, hash, a, now, life)
	e.answer.ClampTTL(low, high)
	c.shard(hash).put(e, now)
	return &e.answer
}

// Clamp puts the TTLs of a, which nobody else has yet, between the bounds that Put would, if it may be kept.
func (c *Cache) Clamp(a *wire.Answer) {
	if life, low, high := c.lifetime(a); life > 0 {
		a.ClampTTL(low, high)
	}
}

// Drop forgets the entry for key, unless it was stored after the time since. It does not keep key.
func (c *Cache) Drop(key []byte, hash uint64, since int64) {
	if c.table.find(key, hash) != nil { // spares the lock, as there seldom is one
		c.shard(hash).drop(key, hash, since)
	}
}

// lifetime returns for how many seconds a may be kept, 0 if it may not, and between what its TTLs have to be.
func (c *Cache) lifetime(a *wire.Answer) (life, low, high uint32) {
	if life = a.Lifetime(); life == 0 {
		return 0, 0, 0
	}
	low, high = c.minTTL, c.maxTTL
	if a.Negative() {
		high = min(high, c.negativeTTL)
		low = min(low, high)
	}
	life = min(max(life, low), high)
	if a.Negative() {
		high = life
	}
	return life, low, high
}

// Fail notes that asking for key brought no good answer: a is a SERVFAIL, or nil for no answer at all. It never replaces a
// good entry that may still be used, be it stale: that one only remembers the failure. Without one, a copy of a is kept for
// 5 s, whatever its TTLs are (RFC 9520; RFC 2308, section 7), so that a name that cannot be resolved is not asked for again
// by everybody. It returns the answer that clients are to be sent, as Put does. Fail keeps neither key nor a.
func (c *Cache) Fail(key []byte, hash uint64, a *wire.Answer, now int64) *wire.Answer {
	var e *entry
	if a != nil && !a.Truncated() {
		e = newEntry(key, hash, a, now, failureLife)
		e.failure = true
		e.answer.ClampTTL(failureLife, failureLife)
		a = &e.answer
	}
	c.shard(hash).fail(key, hash, e, now)
	return a
}

// Unanswered is Fail for a question that nobody answered; a is the SERVFAIL that says so to clients. It is kept for 1 s, and for
// twice as long with each failure in a row, up to 5 s (RFC 9520, section 3.2). A row ends with an answer that may be kept, or
// when nothing has failed for 30 s.
func (c *Cache) Unanswered(key []byte, hash uint64, a *wire.Answer, now int64) {
	life := uint32(silenceLife)
	if old := c.table.find(key, hash); old != nil && old.failure && within(seconds(old.stored), now, recheckAfter) {
		life = min(2*old.life, failureLife)
	}
	e := newEntry(key, hash, a, now, life)
	e.failure = true
	e.fail(now)
	c.shard(hash).fail(key, hash, e, now)
}

// Stats returns the sum over all shards, which are read one after the other.
func (c *Cache) Stats() Stats {
	s := Stats{MaxBytes: c.max}
	for i := range c.shards {
		c.shards[i].addTo(&s)
	}
	return s
}

// FlushName forgets the answers for a name, which is in lower-case wire form: every type, DO, CD and view of it, and with
// below everything under it: with the root's everything there is. So go the denials of the names above it but the root,
// which say that it does not exist either. It returns how many entries went. It looks at all entries, one shard after the other.
func (c *Cache) FlushName(name []byte, below bool) (n int) {
	if below && len(name) == 1 {
		for i := range c.shards {
			n += c.shards[i].flush()
		}
		return n
	}
	match := func(e *entry) bool {
		own, above := Concerns(e.keyBytes(), name, below)
		return own || above && e.answer.Denial()
	}
	for i := range c.shards {
		n += c.shards[i].flushName(match)
	}
	return n
}

// Concerns says what a flush of name, as FlushName has it, is about in what has the given key: own says that it is all of it,
// above that it is a denial of a name above, if it is one.
func Concerns(key, name []byte, below bool) (own, above bool) {
	if bytes.HasPrefix(key, name) || below && under(key, name) {
		return true, false
	}
	for off := 0; name[off] != 0; off += 1 + int(name[off]) {
		if bytes.HasPrefix(key, name[off:]) {
			return false, true
		}
	}
	return false, false
}

// under reports whether the name at the front of key is name or lies below it.
func under(key, name []byte) bool {
	for !bytes.HasPrefix(key, name) {
		if len(key) == 0 || key[0] == 0 || int(key[0]) >= len(key) {
			return false
		}
		key = key[1+int(key[0]):]
	}
	return true
}
