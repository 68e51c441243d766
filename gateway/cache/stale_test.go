package cache

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
)

// find is Get with a key alone.
func find(c *Cache, key []byte, now int64) (Found, bool) { return c.Get(key, c.Hash(key), now) }

func servfail(t testing.TB) *wire.Answer {
	t.Helper()
	a := answer(t, response(t, 2, ""))
	a.EDE = []wire.EDE{{Code: 22, Text: "no reachable authority"}}
	return a
}

// TestStale looks at an answer after its time, RFC 8767.
func TestStale(t *testing.T) {
	for _, tt := range []struct {
		name     string
		staleFor time.Duration
		age      int64 // nanoseconds, of 10 s to live
		want     string
	}{
		{"fresh", time.Minute, 10*second - 1, "age 9"},
		{"over", time.Minute, 10 * second, "age 10, stale"},
		{"nearly gone", time.Minute, 70*second - 1, "age 69, stale"},
		{"gone", time.Minute, 70 * second, "none"},
		{"without StaleFor", 0, 10 * second, "none"},
		{"less than a second of StaleFor", time.Second - 1, 10 * second, "none"},
		{"the longest", 1<<31*time.Second - time.Second, 1<<31*second + 8*second, "age 2147483656, stale"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, Config{StaleFor: tt.staleFor})
			put(c, []byte("key"), address(t, 10), start)
			got := "none"
			if f, ok := find(c, []byte("key"), start+tt.age); ok {
				got = fmt.Sprint("age ", f.Age)
				if f.Stale {
					got += ", stale"
				}
				if f.Failed != 0 {
					got += ", failed"
				}
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestFailed lets upstream fail while an answer is stale: for 30 s that is known.
func TestFailed(t *testing.T) {
	c := newCache(t, Config{StaleFor: time.Hour})
	key := []byte("key")
	put(c, key, address(t, 10), start)
	now := start + 100*second
	for _, a := range []*wire.Answer{nil, servfail(t)} {
		c.Fail(key, c.Hash(key), a, now)
		for _, tt := range []struct {
			after, want int64
		}{
			{0, now},
			{29*second + second - 1, now},
			{30 * second, 0},
			{-10 * second, 0}, // the clock was set back
		} {
			f, ok := find(c, key, now+tt.after)
			if !ok || f.Answer.Rcode != 0 || !f.Stale || f.Failed != tt.want {
				t.Errorf("%d s after a failure: %+v, %v, want it stale, and Failed %d", tt.after/second, f, ok, tt.want)
			}
		}
		now += 100 * second
	}
	put(c, key, address(t, 10), now)
	if f, ok := find(c, key, now+10*second); !ok || !f.Stale || f.Failed != 0 {
		t.Errorf("a new answer has taken over the failure of the old one: %+v, %v", f, ok)
	}
}

func TestFail(t *testing.T) {
	c := newCache(t, Config{StaleFor: time.Minute})
	key := []byte("key")
	hash := c.Hash(key)
	c.Fail(key, hash, nil, start)
	if s := c.Stats(); s.Entries != 0 {
		t.Errorf("no answer is kept: %+v", s)
	}
	a := servfail(t)
	c.Fail(key, hash, a, start)
	f, ok := find(c, key, start+5*second-1)
	if !ok || f.Answer == a || f.Answer.Rcode != 2 || f.Age != 4 || f.Stale || f.Failed != 0 || f.Prefetch {
		t.Errorf("got %+v, %v", f, ok)
	}
	if diff := cmp.Diff(f.Answer.EDE, a.EDE); diff != "" {
		t.Errorf("(-got +want)\n%s", diff)
	}
	if f, ok := find(c, key, start+5*second); ok {
		t.Errorf("a failure lives on: %+v", f)
	}
	// With records, of any TTL: the age stays less than that.
	c.Fail(key, hash, answer(t, response(t, 2, "a.example. 0 A 192.0.2.1\na.example. 300 A 192.0.2.2")), start+second)
	if f, ok := find(c, key, start+5*second); !ok || f.Age != 4 || !slices.Equal(ttls(f.Answer), []uint32{5, 5}) {
		t.Errorf("a second failure: %+v, %v", f, ok)
	}
	truncated := response(t, 2, "")
	truncated[2] |= 2
	c.Fail([]byte("other"), c.Hash([]byte("other")), answer(t, truncated), start)
	if s := c.Stats(); s.Entries != 1 {
		t.Errorf("%d entries, want 1: a truncated answer is not kept", s.Entries)
	}

	good := put(c, key, address(t, 10), start+2*second)
	for _, tt := range []struct {
		at    int64
		stale bool
	}{{2, false}, {11, false}, {12, true}, {71, true}} {
		c.Fail(key, hash, a, start+tt.at*second)
		if f, ok := find(c, key, start+tt.at*second); !ok || f.Answer != good || f.Stale != tt.stale {
			t.Errorf("after %d s: %+v, %v, want the good answer, stale %v", tt.at, f, ok, tt.stale)
		}
	}
	// Nobody could use that one any more.
	c.Fail(key, hash, nil, start+72*second)
	c.Fail(key, hash, a, start+72*second)
	if f, ok := find(c, key, start+72*second); !ok || f.Answer.Rcode != 2 {
		t.Errorf("got %+v, %v, want the failure", f, ok)
	}
	if s := c.Stats(); s.Entries != 1 {
		t.Errorf("%d entries, want 1", s.Entries)
	}
	check(t, c)
}

// TestUnanswered has a question fail again and again for want of any answer.
func TestUnanswered(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before func(c *Cache, key []byte, now int64) // a second before the last failure
		pause  int64                                 // seconds between the failures
		want   []int64                               // how long each is kept
	}{
		{"in a row", nil, 10, []int64{1, 2, 4, 5, 5}},
		{"at once", nil, 0, []int64{1, 2, 4, 5, 5}},
		{"too seldom", nil, 30, []int64{1, 1, 1}},
		{"an answer between them", func(c *Cache, key []byte, now int64) { put(c, key, address(t, 1), now) }, 10, []int64{1, 2, 1}},
		{"a SERVFAIL between them", func(c *Cache, key []byte, now int64) { c.Fail(key, c.Hash(key), servfail(t), now) }, 10, []int64{1, 2, 5}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, Config{PrefetchHits: 1, PrefetchRemaining: 0.9})
			key, now := []byte("key"), start+second/2
			for i, want := range tt.want {
				if tt.before != nil && i == len(tt.want)-1 {
					tt.before(c, key, now-second)
				}
				c.Unanswered(key, c.Hash(key), servfail(t), now)
				for _, at := range []int64{0, want*second - 1} {
					f, ok := find(c, key, now+at)
					if !ok || f.Answer.Rcode != 2 || len(f.Answer.EDE) != 1 || f.Failed != now || f.Stale || f.Prefetch {
						t.Errorf("failure %d, after %d ns: %+v, %v, want Failed %d", i+1, at, f, ok, now)
					}
				}
				if f, ok := find(c, key, now+want*second); ok {
					t.Errorf("failure %d after %d s: %+v, want nothing", i+1, want, f)
				}
				now += tt.pause * second
			}
			check(t, c)
		})
	}
	c := newCache(t, Config{StaleFor: time.Minute})
	key := []byte("key")
	good := put(c, key, address(t, 10), start)
	c.Unanswered(key, c.Hash(key), servfail(t), start+20*second)
	if f, ok := find(c, key, start+20*second); !ok || f.Answer != good || f.Failed != start+20*second {
		t.Errorf("got %+v, %v, want the good answer, and that asking has failed", f, ok)
	}
}

// TestOutdated puts what may not be kept over a stale answer.
func TestOutdated(t *testing.T) {
	for _, tt := range []struct {
		name string
		a    *wire.Answer
		at   int64
		want bool // the old answer is still there
	}{
		{"data with TTL 0, fresh", address(t, 0), 9, true},
		{"data with TTL 0, stale", address(t, 0), 10, false},
		{"SERVFAIL", servfail(t), 10, true},
		{"no data, no SOA", answer(t, response(t, 0, "")), 10, true},
		{"a referral", answer(t, response(t, 0, "--\na.example. 60 NS ns.a.example.")), 10, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, Config{StaleFor: time.Hour})
			put(c, []byte("key"), address(t, 10), start)
			if got := put(c, []byte("key"), tt.a, start+tt.at*second); got != tt.a {
				t.Error("it was kept")
			}
			if _, ok := find(c, []byte("key"), start+tt.at*second); ok != tt.want {
				t.Errorf("the old answer is there: %v, want %v", ok, tt.want)
			}
			check(t, c)
		})
	}
}

// TestFailedTime lets asking fail at any part of a second: when that was is known to a hundredth, and is never said to be earlier.
func TestFailedTime(t *testing.T) {
	const day = 24 * 3600 * second
	for _, tt := range []struct {
		at   int64 // from when the answer was stored, which has no whole seconds either
		want bool  // it is known
	}{
		{20 * second, true}, {20*second + 1, true}, {20*second + second/100, true}, {20*second + 7*second/10, true},
		{21*second - 1, true}, {497 * day, true}, {498 * day, false},
	} {
		c := newCache(t, Config{StaleFor: 1000 * 24 * time.Hour})
		key, stored := []byte("key"), start+second/3
		put(c, key, address(t, 10), stored)
		failed := stored + tt.at
		c.Fail(key, c.Hash(key), nil, failed)
		for _, after := range []int64{0, 1, 30*second - 1} {
			f, ok := find(c, key, failed+after)
			if d := f.Failed - failed; !ok || !f.Stale || tt.want && (d < 0 || d >= second/100) || !tt.want && f.Failed != 0 {
				t.Errorf("%d ns after a failure at %d: %+v, %v, %d ns later", after, tt.at, f, ok, d)
			}
		}
		if f, ok := find(c, key, failed+30*second+second/100); !ok || f.Failed != 0 {
			t.Errorf("30 s after a failure at %d: %+v, %v", tt.at, f, ok)
		}
	}
}

// TestPrefetch asks for an answer through its life.
func TestPrefetch(t *testing.T) {
	c := newCache(t, Config{StaleFor: time.Minute, PrefetchHits: 3, PrefetchRemaining: 0.1})
	key := []byte("key")
	hash := c.Hash(key)
	failed := int64(0)
	at := func(ms int64, want bool) {
		t.Helper()
		now := start + ms*second/1000
		f, ok := find(c, key, now)
		if !ok || f.Prefetch != want || !f.Stale && f.Failed != failed || want && (!c.Claim(key, c.Hash(key), now) || c.Claim(key, c.Hash(key), now)) {
			t.Errorf("after %d ms: %+v, %v, want prefetch %v for one, and Failed %d", ms, f, ok, want, failed)
		}
	}
	put(c, key, address(t, 300), start)
	at(1000, false)
	at(2000, false)
	at(3000, false) // popular from now on, but young
	at(269999, false)
	at(270000, true) // the last 10 %
	at(270000, false)
	at(279999, false) // somebody does it already
	at(280000, true)  // but has not
	c.Fail(key, hash, nil, start+281*second)
	failed = start + 281*second
	at(292000, true) // to renew is the caller's decision
	failed = 0
	at(299999, false)
	at(300000, false) // stale

	put(c, key, address(t, 5), start+300*second) // counts anew, as popular as it is
	at(304600, false)
	at(304700, false)
	at(304800, true)
	at(304900, false)
	put(c, key, address(t, 5), start+305*second)
	for range 3 {
		at(309000, false)
	}
	at(309500, true) // a new answer, another caller

	put(c, key, address(t, 1), start+310*second)
	for range 5 {
		at(310999, false) // too short
	}
	for _, tt := range []Config{{}, {PrefetchHits: 255, PrefetchRemaining: 0.999}} {
		c = newCache(t, tt)
		put(c, key, address(t, 300), start)
		for i := range 255 {
			at(299999, i == 254 && tt.PrefetchHits > 0)
		}
	}
	c = newCache(t, Config{PrefetchHits: 1, PrefetchRemaining: 0.5})
	c.Fail(key, c.Hash(key), servfail(t), start)
	at(4999, false) // nobody renews a failure
}

// TestPrefetchOnce lets many callers ask at once: one is to prefetch.
func TestPrefetchOnce(t *testing.T) {
	c := newCache(t, Config{PrefetchHits: 1, PrefetchRemaining: 0.5})
	key := []byte("key")
	for round := range int64(100) {
		now := start + round*60*second
		put(c, key, address(t, 60), now)
		var told atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 20 {
					if f, _ := find(c, key, now+45*second); f.Prefetch && c.Claim(key, c.Hash(key), now+45*second) {
						told.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if n := told.Load(); n != 1 {
			t.Fatalf("%d callers are to prefetch, want 1", n)
		}
	}
}

func TestFlushName(t *testing.T) {
	names := []string{".", "example.", "a.example.", "b.a.example.", "a.a.example.", "xa.example.", "org.", "a.example.org."}
	for _, tt := range []struct {
		name  string
		below bool
		want  []string // what goes
	}{
		{"a.example.", false, []string{"a.example."}},
		{"a.example.", true, []string{"a.example.", "b.a.example.", "a.a.example."}},
		{"example.", true, []string{"example.", "a.example.", "b.a.example.", "a.a.example.", "xa.example."}},
		{".", false, []string{"."}},
		{".", true, names},
		{"c.example.", false, nil},
		{"c.example.", true, nil},
	} {
		t.Run(fmt.Sprint(tt.name, tt.below), func(t *testing.T) {
			c := newCache(t, Config{StaleFor: time.Hour})
			var keys [][]byte
			for _, name := range names {
				for i, bits := range []byte{0, 3} {
					keys = append(keys, keyOf(name, 1, bits, 0), keyOf(name, 28, bits, uint32(i)<<31))
				}
			}
			for _, key := range keys {
				put(c, key, address(t, 300), start)
			}
			if got := c.FlushName(nameOf(tt.name), tt.below); got != 4*len(tt.want) {
				t.Errorf("%d entries went, want %d", got, 4*len(tt.want))
			}
			for i, key := range keys {
				name := names[i/4]
				if _, ok := find(c, key, start); ok == slices.Contains(tt.want, name) {
					t.Errorf("%s is there: %v", name, ok)
				}
			}
			if s := c.Stats(); s.Entries != int64(len(keys)-4*len(tt.want)) || s.Evictions != 0 {
				t.Errorf("got %+v", s)
			}
			check(t, c)
		})
	}
}

// TestFlushNameDenials has denials of the names above go, and nothing else of theirs.
func TestFlushNameDenials(t *testing.T) {
	c := newCache(t, Config{})
	soa := "--\nexample. 300 SOA ns.example. root.example. 1 2 3 4 60"
	gone := answer(t, response(t, 3, soa))
	if !gone.Denial() {
		t.Fatal("no denial")
	}
	names := []string{".", "example.", "a.example.", "b.a.example.", "xa.example."}
	for _, name := range names {
		put(c, keyOf(name, 0, 0, 0), gone, start)
		put(c, keyOf(name, 1, 0, 0), address(t, 300), start)
		put(c, keyOf(name, 28, 0, 0), answer(t, response(t, 0, soa)), start)
	}
	if n := c.FlushName(nameOf("b.a.example."), false); n != 3+2 {
		t.Errorf("%d entries went, want 5", n)
	}
	for _, name := range names {
		for qtype, want := range map[uint16]bool{0: name == "." || name == "xa.example.", 1: name != "b.a.example.", 28: name != "b.a.example."} {
			if _, ok := find(c, keyOf(name, qtype, 0, 0), start); ok != want {
				t.Errorf("%s, type %d: is there: %v, want %v", name, qtype, ok, want)
			}
		}
	}
	check(t, c)
}

// TestDrop drops what was there before, and nothing that came after.
func TestDrop(t *testing.T) {
	c := newCache(t, Config{})
	key := []byte("key")
	hash := c.Hash(key)
	c.Drop(key, hash, start)
	put(c, key, address(t, 300), start)
	c.Drop(key, hash, start-1)
	if _, ok := find(c, key, start); !ok {
		t.Error("what came after is gone")
	}
	c.Drop(key, hash, start)
	if _, ok := find(c, key, start); ok || c.Stats().Entries != 0 {
		t.Error("what was there before is still there")
	}
	check(t, c)
}

func nameOf(name string) []byte {
	key := keyOf(name, 0, 0, 0)
	return key[:len(key)-7]
}
