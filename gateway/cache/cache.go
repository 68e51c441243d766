// Package cache keeps answers in wire form, within a fixed amount of memory. It knows lifetimes, not policy: which
// questions share an answer is decided by the key, and what has to be checked first is checked by the caller.
//
// It consists of independent shards, each a hash table under its own lock. A shard that is full forgets by S3-FIFO
// (https://doi.org/10.1145/3600006.3613147): what was asked for once passes through a small queue and out, so that a
// flood of names that nobody will ask for again does not wash away what is asked for all the time.
//
// What surprises a newcomer: [Cache.Put] keeps a copy whose TTLs may differ from those it was given, and an entry whose
// time is over stays in memory until its place is needed or a fresh answer replaces it.
package cache

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
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
}

// Cache maps keys to answers. All its methods may be called from any goroutine.
type Cache struct {
	shards []shard
	seed   maphash.Seed
	shift  int // a hash shifted right by this is the number of its shard
	max    int64

	minTTL, maxTTL, negativeTTL uint32 // seconds
}

// Stats are a cache's gauges and, since New, its counters.
type Stats struct {
	Entries   int64
	Bytes     int64 // heap in use, the tables included; at most MaxBytes
	MaxBytes  int64
	Hits      uint64
	Misses    uint64
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
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	n := shardCount(c.MaxBytes)
	cache := &Cache{
		shards:      make([]shard, n),
		seed:        maphash.MakeSeed(),
		shift:       64 - bits.TrailingZeros(uint(n)),
		max:         c.MaxBytes,
		minTTL:      uint32(c.MinTTL / time.Second),
		maxTTL:      uint32(c.MaxTTL / time.Second),
		negativeTTL: uint32(c.NegativeMaxTTL / time.Second),
	}
	for i := range cache.shards {
		cache.shards[i].init(c.MaxBytes / int64(n))
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

// Get finds the live answer for key at the time now, in Unix nanoseconds, and its age in whole seconds, which is less
// than every TTL in it. The answer is shared: nobody may change it, and it stays valid after it has left the cache. Get
// does not allocate and does not keep key.
func (c *Cache) Get(key []byte, now int64) (a *wire.Answer, age uint32, ok bool) {
	hash := maphash.Bytes(c.seed, key)
	return c.shard(hash).get(hash, key, now)
}

// Put stores a copy of a under key if its Lifetime says that it may be kept (RFC 2308, RFC 2181, section 8: no referral,
// no negative answer without an SOA record, nothing truncated, no RCODE but NOERROR and NXDOMAIN, no TTL of 0), and
// returns the answer that clients are to be sent: the copy, whose TTLs lie between the bounds of the Config, or else a
// itself. The TTLs of a negative answer are no longer than its life, as RFC 2308, section 5 has it. Put keeps neither key
// nor a; now is in Unix nanoseconds.
func (c *Cache) Put(key []byte, a *wire.Answer, now int64) *wire.Answer {
	life := a.Lifetime()
	if life == 0 {
		return a
	}
	low, high := c.minTTL, c.maxTTL
	if a.Negative() {
		high = min(high, c.negativeTTL)
		low = min(low, high)
	}
	life = min(max(life, low), high)
	if a.Negative() {
		high = life
	}
	hash := maphash.Bytes(c.seed, key)
	e := newEntry(hash, key, a, now, life)
	e.answer.ClampTTL(low, high)
	c.shard(hash).put(e, now)
	return &e.answer
}

// Stats returns the sum over all shards, which are read one after the other.
func (c *Cache) Stats() Stats {
	s := Stats{MaxBytes: c.max}
	for i := range c.shards {
		c.shards[i].addTo(&s)
	}
	return s
}

// Flush forgets all answers. The counters go on.
func (c *Cache) Flush() {
	for i := range c.shards {
		c.shards[i].flush()
	}
}
