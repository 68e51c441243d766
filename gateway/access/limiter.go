package access

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
	"net/netip"
	"sync"
	"time"
)

const (
	// ways is the number of buckets that one hash value can choose from.
	ways = 8
	// maxShards bounds the locks: with more of them than a big machine has cores, two queries seldom meet at one.
	maxShards = 256
	// minBurst is how many queries a client that was quiet may always send at once.
	minBurst = 10
	// defaultClients is how many client prefixes are remembered: 65536 x 24 octets.
	defaultClients = 1 << 16
	// maxClients keeps the table below half a gigabyte.
	maxClients = 1 << 24
	// clockSlack is how far the clocks of two queries that were read at the same time may seem to differ.
	clockSlack = int64(time.Second)
)

// bucket is one client prefix's token bucket in the form of the generic cell rate algorithm (ITU-T I.371): instead of
// tokens and the time of the last refill it holds the time at which the bucket will be full again. The zero bucket is a
// full one, so an unused place needs no mark.
type bucket struct {
	hi, lo uint64 // the prefix: an IPv6 address, or an IPv4 address in its mapped form
	full   int64  // Unix nanoseconds
}

// limiter is a set-associative table of buckets: a prefix has a set by its hash and any place in the set.
type limiter struct {
	seed     maphash.Seed
	interval int64 // nanoseconds in which one token comes back
	burst    int64 // nanoseconds in which an empty bucket fills up
	v4, v6   [2]uint64
	setBits  int
	shards   []shard
}

// shard is the part of the table behind one lock. The padding keeps two locks off one cache line.
type shard struct {
	mu   sync.Mutex
	sets [][ways]bucket
	_    [64 - 32]byte
}

func newLimiter(c Config) (*limiter, error) {
	rate := c.PerClient
	// The lower bound, one an hour, keeps every sum of times inside an int64.
	if !(rate >= 1.0/3600 && rate <= 1e9) {
		return nil, fmt.Errorf("%v queries per second for a client is not between 1/3600 and 1e9", rate)
	}
	if c.PrefixV4 == 0 {
		c.PrefixV4 = 32
	}
	if c.PrefixV6 == 0 {
		c.PrefixV6 = 56
	}
	if c.Clients == 0 {
		c.Clients = defaultClients
	}
	switch {
	case c.PrefixV4 < 0 || c.PrefixV4 > 32:
		return nil, fmt.Errorf("an IPv4 prefix of %d bits is not between 1 and 32", c.PrefixV4)
	case c.PrefixV6 < 0 || c.PrefixV6 > 128:
		return nil, fmt.Errorf("an IPv6 prefix of %d bits is not between 1 and 128", c.PrefixV6)
	case c.Clients < 0 || c.Clients > maxClients:
		return nil, errors.New("the number of clients to remember is not between 1 and 16777216")
	}
	interval := math.Max(1, math.Round(1e9/rate))
	l := &limiter{
		seed:     maphash.MakeSeed(),
		interval: int64(interval),
		burst:    int64(math.Ceil(math.Max(2*rate, minBurst)) * interval),
		v4:       mask(96 + c.PrefixV4),
		v6:       mask(c.PrefixV6),
		setBits:  bits.Len(uint((c.Clients - 1) / ways)),
	}
	sets := 1 << l.setBits
	l.shards = make([]shard, min(sets, maxShards))
	for i := range l.shards {
		l.shards[i].sets = make([][ways]bucket, sets/len(l.shards))
	}
	return l, nil
}

// mask returns the two halves of an IPv6 mask of n bits.
func mask(n int) [2]uint64 {
	// A shift by 64 or more is 0 in Go, a shift by 0 keeps all bits.
	return [2]uint64{^(^uint64(0) >> min(n, 64)), ^(^uint64(0) >> max(n-64, 0))}
}

// take takes one token from the bucket of client, which is unmapped and has no zone, and reports whether there was one.
func (l *limiter) take(client netip.Addr, now int64) bool {
	m := &l.v6
	if client.Is4() {
		m = &l.v4
	}
	raw := client.As16()
	hi, lo := binary.BigEndian.Uint64(raw[:8])&m[0], binary.BigEndian.Uint64(raw[8:])&m[1]
	h := maphash.Comparable(l.seed, [2]uint64{hi, lo})
	set := h & (1<<l.setBits - 1)
	s := &l.shards[set%uint64(len(l.shards))]

	s.mu.Lock()
	defer s.mu.Unlock()
	b := find(&s.sets[set/uint64(len(l.shards))], hi, lo)
	full := b.full
	if full < now || full > now+l.burst+clockSlack {
		// Full since a while; or the clock was set back, and a client must not pay for that with hours of silence.
		full = now
	}
	if full+l.interval > now+l.burst {
		return false
	}
	b.full = full + l.interval
	return true
}

// find returns the bucket of the prefix in set. When there is none it makes one from the bucket with the most tokens:
// forgetting a full one loses nothing.
func find(set *[ways]bucket, hi, lo uint64) *bucket {
	fullest := &set[0]
	for i := range set {
		b := &set[i]
		if b.hi == hi && b.lo == lo {
			return b
		}
		if b.full < fullest.full {
			fullest = b
		}
	}
	*fullest = bucket{hi: hi, lo: lo}
	return fullest
}
