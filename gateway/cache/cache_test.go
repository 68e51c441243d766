package cache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

const second = int64(time.Second)

// start is a time for tests, in Unix nanoseconds.
const start = 1_800_000_000 * second

func newCache(t testing.TB, c Config) *Cache {
	t.Helper()
	if c.MaxBytes == 0 {
		c.MaxBytes = 1 << 20
	}
	cache, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return cache
}

// response packs a response to "a.example. A" from records in presentation form; a line "--" starts the next section.
func response(t testing.TB, rcode int, records string) []byte {
	t.Helper()
	m := new(dns.Msg).SetQuestion("a.example.", dns.TypeA)
	m.Response, m.Compress, m.Rcode = true, true, rcode
	sections := []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra}
	for line := range strings.Lines(records) {
		switch line = strings.TrimSpace(line); line {
		case "":
		case "--":
			sections = sections[1:]
		default:
			rr, err := dns.NewRR(line)
			if err != nil {
				t.Fatal(err)
			}
			*sections[0] = append(*sections[0], rr)
		}
	}
	msg, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func answer(t testing.TB, msg []byte) *wire.Answer {
	t.Helper()
	a, _, err := wire.ReadAnswer(msg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// address returns an answer with an address that lives for ttl seconds.
func address(t testing.TB, ttl uint32) *wire.Answer {
	t.Helper()
	return answer(t, response(t, 0, fmt.Sprintf("a.example. %d A 192.0.2.1", ttl)))
}

func put(c *Cache, key []byte, a *wire.Answer, now int64) *wire.Answer {
	return c.Put(key, c.Hash(key), a, now)
}

// get returns what is found alive.
func get(c *Cache, key []byte, now int64) (a *wire.Answer, age uint32, ok bool) {
	f, ok := c.Get(key, c.Hash(key), now)
	return f.Answer, f.Age, ok && !f.Stale
}

func ttls(a *wire.Answer) (list []uint32) {
	for _, off := range a.TTLs {
		list = append(list, binary.BigEndian.Uint32(a.Msg[off:]))
	}
	return list
}

func TestNew(t *testing.T) {
	tests := []struct {
		name   string
		config Config
		want   string // "" when there is no error
	}{
		{"smallest", Config{MaxBytes: MinBytes}, ""},
		{"all fields", Config{MaxBytes: 1 << 26, MinTTL: time.Minute, MaxTTL: time.Hour, NegativeMaxTTL: time.Second}, ""},
		{"zero", Config{}, "MaxBytes is 0, want at least 524288"},
		{"small", Config{MaxBytes: MinBytes - 1}, "MaxBytes is 524287, want at least 524288"},
		{"MinTTL negative", Config{MaxBytes: 1 << 20, MinTTL: -1}, "MinTTL is -1ns, want 0s to 24h0m0s, which is MaxTTL"},
		{"MinTTL above MaxTTL", Config{MaxBytes: 1 << 20, MinTTL: 2 * time.Second, MaxTTL: time.Second}, "MinTTL is 2s, want 0s to 1s, which is MaxTTL"},
		{"MaxTTL too short", Config{MaxBytes: 1 << 20, MaxTTL: 999 * time.Millisecond}, "MaxTTL is 999ms, want 1s to 596523h14m7s"},
		{"NegativeMaxTTL too long", Config{MaxBytes: 1 << 20, NegativeMaxTTL: 1 << 62}, "NegativeMaxTTL is 1281023h53m38.427387904s, want 1s to 596523h14m7s"},
		{"StaleFor negative", Config{MaxBytes: 1 << 20, StaleFor: -1}, "StaleFor is -1ns, want 0s to 596523h14m7s"},
		{"StaleFor too long", Config{MaxBytes: 1 << 20, StaleFor: 1 << 62}, "StaleFor is 1281023h53m38.427387904s, want 0s to 596523h14m7s"},
		{"prefetch", Config{MaxBytes: 1 << 20, PrefetchHits: 255, PrefetchRemaining: 0.5}, ""},
		{"PrefetchHits", Config{MaxBytes: 1 << 20, PrefetchHits: 256, PrefetchRemaining: 0.5}, "PrefetchHits is 256, want at most 255"},
		{"no PrefetchRemaining", Config{MaxBytes: 1 << 20, PrefetchHits: 1}, "PrefetchRemaining is 0, want a share above 0 and below 1"},
		{"PrefetchRemaining", Config{MaxBytes: 1 << 20, PrefetchHits: 1, PrefetchRemaining: 1}, "PrefetchRemaining is 1, want a share above 0 and below 1"},
		{"PrefetchRemaining NaN", Config{MaxBytes: 1 << 20, PrefetchHits: 1, PrefetchRemaining: math.NaN()},
			"PrefetchRemaining is NaN, want a share above 0 and below 1"},
		{"two mistakes", Config{MaxTTL: 1}, "MaxBytes is 0, want at least 524288\nMaxTTL is 1ns, want 1s to 596523h14m7s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			if _, err := New(tt.config); err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestLifetimes stores answers of every kind and looks at them through time.
func TestLifetimes(t *testing.T) {
	const soa = "example. 900 SOA ns.example. root.example. 1 2 3 4 "
	type want struct {
		life uint32 // seconds; 0: not stored
		ttls []uint32
	}
	def := Config{}
	bounded := Config{MinTTL: 30 * time.Second, MaxTTL: 200 * time.Second, NegativeMaxTTL: 50 * time.Second}
	tests := []struct {
		name    string
		config  Config
		rcode   int
		records string
		want    want
	}{
		{"one record", def, 0, "a.example. 300 A 192.0.2.1", want{300, []uint32{300}}},
		{"two TTLs", def, 0, "a.example. 300 A 192.0.2.1\na.example. 20 A 192.0.2.2", want{20, []uint32{300, 20}}},
		{"additional counts", def, 0, "a.example. 300 A 192.0.2.1\n--\n--\nb. 20 A 192.0.2.2", want{20, []uint32{300, 20}}},
		{"TTL 0", def, 0, "a.example. 0 A 192.0.2.1", want{0, []uint32{0}}},
		{"TTL 0 whatever MinTTL is", bounded, 0, "a.example. 0 A 192.0.2.1", want{0, []uint32{0}}},
		{"a week becomes a day", def, 0, "a.example. 604800 A 192.0.2.1", want{86400, []uint32{86400}}},
		{"raised", bounded, 0, "a.example. 1 A 192.0.2.1", want{30, []uint32{30}}},
		{"lowered", bounded, 0, "a.example. 300 A 192.0.2.1", want{200, []uint32{200}}},
		{"some raised and lowered", bounded, 0, "a.example. 300 A 192.0.2.1\na.example. 1 A 192.0.2.2\na.example. 100 A 192.0.2.3",
			want{30, []uint32{200, 30, 100}}},
		{"NODATA", def, 0, "--\n" + soa + "60", want{60, []uint32{60}}},
		{"NXDOMAIN", def, 3, "--\n" + soa + "60", want{60, []uint32{60}}},
		{"NXDOMAIN, SOA's TTL", def, 3, "--\n" + soa + "6000", want{900, []uint32{900}}},
		{"NXDOMAIN with proofs", def, 3, "--\n" + soa + "60\na.example. 800 NSEC b.example. TXT", want{60, []uint32{60, 60}}},
		{"NXDOMAIN behind a CNAME", def, 3, "a.example. 600 CNAME b.example.\n--\n" + soa + "60", want{60, []uint32{60, 60}}},
		{"NXDOMAIN behind a short CNAME", def, 3, "a.example. 6 CNAME b.example.\n--\n" + soa + "60", want{6, []uint32{6, 6}}},
		{"negative for a day", def, 3, "--\nexample. 90000 SOA ns. root. 1 2 3 4 90000", want{3600, []uint32{3600}}},
		{"negative lowered", bounded, 3, "--\n" + soa + "60", want{50, []uint32{50}}},
		{"negative raised", bounded, 3, "--\n" + soa + "1", want{30, []uint32{30}}},
		{"MinTTL above NegativeMaxTTL", Config{MinTTL: time.Minute, NegativeMaxTTL: 5 * time.Second}, 3, "--\n" + soa + "1", want{5, []uint32{5}}},
		{"NegativeMaxTTL above MaxTTL", Config{MaxTTL: 10 * time.Second}, 3, "--\n" + soa + "60", want{10, []uint32{10}}},
		{"negative with MINIMUM 0", bounded, 3, "--\n" + soa + "0", want{0, []uint32{900}}},
		{"NXDOMAIN without SOA", def, 3, "", want{}},
		{"NODATA without SOA", def, 0, "", want{}},
		{"referral", def, 0, "--\na.example. 60 NS ns.a.example.\n--\nns.a.example. 60 A 192.0.2.1", want{0, []uint32{60, 60}}},
		{"SERVFAIL", def, 2, "a.example. 300 A 192.0.2.1", want{0, []uint32{300}}},
		{"FORMERR", def, 1, "", want{}},
		{"REFUSED", def, 5, "--\n" + soa + "60", want{0, []uint32{900}}},
	}
	key := []byte("key")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, tt.config)
			a := answer(t, response(t, tt.rcode, tt.records))
			original := bytes.Clone(a.Msg)
			put := put(c, key, a, start)
			if diff := cmp.Diff(ttls(put), tt.want.ttls); diff != "" {
				t.Errorf("TTLs (-got +want)\n%s", diff)
			}
			if !bytes.Equal(a.Msg, original) {
				t.Error("Put has changed its argument")
			}
			got, age, ok := get(c, key, start)
			if stored := tt.want.life > 0; ok != stored || stored != (put != a) || stored && got != put {
				t.Fatalf("stored: got %v, %v, want %v", ok, put != a, stored)
			}
			if !ok {
				if s := c.Stats(); s.Entries != 0 {
					t.Errorf("%d entries, want 0", s.Entries)
				}
				return
			}
			if age != 0 {
				t.Errorf("age %d, want 0", age)
			}
			end := start + int64(tt.want.life)*second
			if _, age, ok := get(c, key, end-1); !ok || age != tt.want.life-1 {
				t.Errorf("a nanosecond before its end: %v, age %d, want true, %d", ok, age, tt.want.life-1)
			}
			if _, _, ok := get(c, key, end); ok {
				t.Error("it outlives its TTL")
			}
		})
	}
}

func TestTruncatedIsNotStored(t *testing.T) {
	c := newCache(t, Config{})
	msg := response(t, 0, "a.example. 300 A 192.0.2.1")
	msg[2] |= 2
	put(c, []byte("key"), answer(t, msg), start)
	if _, _, ok := get(c, []byte("key"), start); ok {
		t.Error("a truncated answer was stored")
	}
}

func TestClockSetBack(t *testing.T) {
	c := newCache(t, Config{})
	put(c, []byte("key"), address(t, 300), start)
	if _, age, ok := get(c, []byte("key"), start-clockSlack); !ok || age != 0 {
		t.Errorf("within the slack: %v, age %d, want true, 0", ok, age)
	}
	if _, _, ok := get(c, []byte("key"), start-clockSlack-1); ok {
		t.Error("an entry from the future is served")
	}
}

func TestReplace(t *testing.T) {
	c := newCache(t, Config{})
	key := []byte("key")
	first := put(c, key, address(t, 10), start)
	put(c, key, answer(t, response(t, 2, "")), start+second)
	if got, _, _ := get(c, key, start+second); got != first {
		t.Error("a SERVFAIL took the place of a good answer")
	}
	second := put(c, key, address(t, 20), start+5*second)
	if got, age, ok := get(c, key, start+14*int64(time.Second)); !ok || got != second || age != 9 {
		t.Errorf("got %v, age %d, want the second answer", ok, age)
	}
	if s := c.Stats(); s.Entries != 1 {
		t.Errorf("%d entries, want 1", s.Entries)
	}
	key[0]++ // the cache must not have kept it
	if _, _, ok := get(c, []byte("key"), start+6*int64(time.Second)); !ok {
		t.Error("the caller's key was kept")
	}
}

func TestKeepsNoBuffer(t *testing.T) {
	c := newCache(t, Config{})
	msg := append(make([]byte, 0, 65536), response(t, 0, "a.example. 300 A 192.0.2.1")...)
	a := put(c, []byte("key"), answer(t, msg), start)
	if cap(a.Msg) > len(a.Msg)+16 {
		t.Errorf("%d octets are kept for an answer of %d", cap(a.Msg), len(a.Msg))
	}
	clear(msg[:cap(msg)])
	if got, _, _ := get(c, []byte("key"), start); got.Msg[5] != 1 {
		t.Error("the cache shares memory with the caller")
	}
}

func TestStatsAndFlush(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 4 << 20})
	empty := c.Stats()
	if empty.MaxBytes != 4<<20 || empty.Bytes <= 0 || empty.Bytes > empty.MaxBytes/20 {
		t.Errorf("an empty cache has %+v", empty)
	}
	for i := range 100 {
		put(c, fmt.Append(nil, i), address(t, 300), start)
	}
	for i := range 150 {
		get(c, fmt.Append(nil, i), start)
	}
	get(c, fmt.Append(nil, 1), start+300*second)
	s := c.Stats()
	bytes := s.Bytes - empty.Bytes
	if s.Entries != 100 || s.Evictions != 0 || bytes < 100*200 || bytes > 100*500 {
		t.Errorf("got %+v", s)
	}
	c.FlushName([]byte{0}, true)
	want := Stats{Bytes: empty.Bytes, MaxBytes: empty.MaxBytes}
	if diff := cmp.Diff(c.Stats(), want); diff != "" {
		t.Errorf("(-got +want)\n%s", diff)
	}
	if _, _, ok := get(c, fmt.Append(nil, 1), start); ok {
		t.Error("an answer survived Flush")
	}
	put(c, fmt.Append(nil, 1), address(t, 300), start)
	if _, _, ok := get(c, fmt.Append(nil, 1), start); !ok {
		t.Error("nothing can be stored after Flush")
	}
}

// TestScan asks some names a few times and then very many names once each: the former stay. A cache that forgets what was
// asked for longest ago would have lost all of them.
func TestScan(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 2 << 20})
	a := address(t, 3600)
	const popular = 1000
	for range 4 {
		for i := range popular {
			if key := fmt.Appendf(nil, "popular%d", i); !has(c, key) {
				put(c, key, a, start)
			}
		}
	}
	for i := range 50000 {
		if key := fmt.Appendf(nil, "scan%d", i); !has(c, key) {
			put(c, key, a, start)
		}
	}
	lost := 0
	for i := range popular {
		if !has(c, fmt.Appendf(nil, "popular%d", i)) {
			lost++
		}
	}
	if s := c.Stats(); lost > 0 || s.Evictions < 40000 {
		t.Errorf("%d of %d popular names are lost: %+v", lost, popular, s)
	}
	check(t, c)
}

func has(c *Cache, key []byte) bool {
	_, _, ok := get(c, key, start)
	return ok
}

// TestGhost asks twice for a name, the second time soon after it was forgotten: then it is kept.
func TestGhost(t *testing.T) {
	c := newCache(t, Config{MaxBytes: MinBytes})
	a := address(t, 3600)
	present := func(key string) bool {
		return c.table.find([]byte(key), hashOf(c, key)) != nil
	}
	put(c, []byte("once"), a, start)
	put(c, []byte("twice"), a, start)
	for i := 0; present("twice"); i++ {
		put(c, fmt.Appendf(nil, "fill%d", i), a, start)
	}
	put(c, []byte("twice"), a, start)
	if e := c.table.find([]byte("twice"), hashOf(c, "twice")); !e.main {
		t.Error("a ghost came back into the small queue")
	}
	for i := range 3000 {
		put(c, fmt.Appendf(nil, "more%d", i), a, start)
	}
	if !present("twice") || present("once") {
		t.Errorf("twice %v, once %v, want true, false", present("twice"), present("once"))
	}
}

func hashOf(c *Cache, key string) uint64 { return c.Hash([]byte(key)) }

// TestEviction looks at single steps: where does the entry go that is next?
func TestEviction(t *testing.T) {
	const small, main, out, ghost = "small", "main", "out", "out, a ghost"
	for _, tt := range []struct {
		name string
		from string
		hits uint32
		age  int64 // seconds, of 10 to live
		want string
	}{
		{"new", small, 0, 5, ghost},
		{"asked for again", small, 1, 5, ghost},
		{"popular", small, promoteAt, 5, main},
		{"popular, and stale", small, maxFrequency, 10, main},
		{"less popular, and stale", small, promoteAt, 19, ghost},
		{"popular, but over", small, maxFrequency, 20, out},
		{"main, not asked for", main, 0, 5, out},
		{"main, asked for", main, 1, 5, main},
		{"main, asked for, and stale", main, 2, 10, main},
		{"main, less asked for, and stale", main, 1, 10, out},
		{"main, asked for, but over", main, maxFrequency, 20, out},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, Config{MaxBytes: MinBytes, StaleFor: 10 * time.Second})
			s := &c.shards[0]
			e := newEntry([]byte("key"), 1<<40|5, address(t, 10), start, 10)
			now := start + tt.age*second
			s.put(e, start)
			e.hits.Store(tt.hits)
			if tt.from == main {
				s.small.remove(e)
				s.main.push(e)
				e.main = true
				s.evictMain(now)
			} else {
				s.evictSmall(now)
			}
			got := out
			switch {
			case s.main.head == e && e.main && s.entries == 1:
				got = main
			case s.entries == 0 && s.wasGhost(e.hash):
				got = ghost
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			if left := e.hits.Load(); got == main && left >= max(tt.hits, 1) {
				t.Errorf("%d of %d hits are left", left, tt.hits)
			}
			if inTable := s.table.find([]byte("key"), e.hash) == e; inTable != (got == main) {
				t.Errorf("in the table: %v", inTable)
			}
		})
	}
}

// check verifies what must hold for every shard: the bound, the sums, and the links.
func check(t *testing.T, c *Cache) {
	t.Helper()
	for i := range c.shards {
		s := &c.shards[i]
		var n, entries int64
		for i := range s.slots {
			for e := s.slots[i].Load(); e != nil; e = e.chain.Load() {
				entries++
			}
		}
		for _, q := range []*queue{&s.small, &s.main} {
			var sum int64
			var prev *entry
			for e := q.head; e != nil; prev, e = e, e.next {
				if e.prev != prev || s.queue(e) != q || e.frequency() > maxFrequency || s.table.find(e.keyBytes(), e.hash) != e {
					t.Fatalf("shard %d: bad links at %q", i, e.keyBytes())
				}
				sum += int64(e.cost)
				n++
			}
			if q.tail != prev || sum != q.bytes {
				t.Fatalf("shard %d: tail %v, %d octets, want %d", i, q.tail == prev, q.bytes, sum)
			}
		}
		if n != entries || n != s.entries {
			t.Fatalf("shard %d: %d in the queues, %d in the table, %d counted", i, n, entries, s.entries)
		}
		if s.small.bytes+s.main.bytes > s.room {
			t.Fatalf("shard %d: %d octets, want at most %d", i, s.small.bytes+s.main.bytes, s.room)
		}
	}
	if s := c.Stats(); s.Bytes > s.MaxBytes {
		t.Fatalf("%d octets, want at most %d", s.Bytes, s.MaxBytes)
	}
}

// FuzzCache plays random operations and compares with a map that forgets nothing: what the cache has is what was put
// last, or a failure where nothing good was, it is never too old, and its TTLs never grow. A snapshot has all of it.
func FuzzCache(f *testing.F) {
	f.Add(uint64(1), uint16(500))
	f.Add(uint64(2), uint16(5000))
	f.Fuzz(func(t *testing.T, seed uint64, steps uint16) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		config := Config{
			MaxBytes: MinBytes, MinTTL: time.Duration(rnd.IntN(3)) * time.Second, MaxTTL: 100 * time.Second,
			StaleFor: time.Duration(rnd.IntN(2)*rnd.IntN(200)) * time.Second, PrefetchHits: 2, PrefetchRemaining: 0.3,
		}
		staleFor := uint32(config.StaleFor / time.Second)
		c := newCache(t, config)
		type stored struct {
			a      *wire.Answer
			at     int64
			age    uint32
			failed int64
		}
		model := map[string]*stored{}
		bad := servfail(t)
		now := start
		for range steps {
			now += rnd.Int64N(second)
			key := keyOf(fmt.Sprint(rnd.IntN(3000)), 1, 0, 0)
			switch rnd.IntN(20) {
			case 0:
				c.Fail(key, c.Hash(key), bad, now)
				if m := model[string(key)]; m != nil {
					m.failed = now
				}
				continue
			case 1:
				if n := c.FlushName(key[:len(key)-7], false); n > 1 {
					t.Fatalf("%d entries for one key", n)
				}
				delete(model, string(key))
				continue
			case 2, 3, 4, 5, 6, 7, 8, 9:
				a := answer(t, response(t, 0, fmt.Sprintf("a.example. %d TXT %s\na.example. %d A 192.0.2.1", 1+rnd.IntN(200),
					strings.Repeat("x", 1+rnd.IntN(250)), rnd.IntN(200))))
				if put := put(c, key, a, now); put != a {
					model[string(key)] = &stored{a: put, at: now}
				}
				continue
			}
			f, ok := find(c, key, now)
			if !ok {
				continue
			}
			want := model[string(key)]
			if f.Answer.Rcode == 2 {
				if want != nil && want.failed == 0 && (now-want.at)/second < int64(minTTL(want.a)+staleFor) && c.Stats().Evictions == 0 {
					t.Fatalf("key %q: a failure in the place of %+v", key, want)
				}
				if f.Age >= failureLife || f.Stale || f.Prefetch {
					t.Fatalf("key %q: a failure: %+v", key, f)
				}
				continue
			}
			if want == nil || f.Answer != want.a || f.Age < want.age || int64(f.Age) != (now-want.at)/second {
				t.Fatalf("key %q: %+v, want %+v", key, f, want)
			}
			low, high := minTTL(f.Answer), slices.Max(ttls(f.Answer))
			if f.Stale != (f.Age >= low) || f.Stale && f.Age-low >= staleFor || high > 100 || f.Prefetch && f.Stale {
				t.Fatalf("key %q: TTLs %v in %+v", key, ttls(f.Answer), f)
			}
			failed := int64(0)
			const unit = second / 100
			up := want.at + (want.failed-want.at+unit-1)/unit*unit // to the next hundredth of a second
			if (f.Stale || f.Prefetch) && want.failed != 0 && now-up < recheckAfter*second {
				failed = up
			}
			if f.Failed != failed {
				t.Fatalf("key %q: %+v, want Failed %d", key, f, failed)
			}
			want.age = f.Age
		}
		check(t, c)

		restored := newCache(t, config)
		load(t, restored, save(t, c, now), now)
		check(t, restored)
		for key := range model {
			want, wantOK := find(c, []byte(key), now)
			if wantOK && want.Answer.Rcode == 2 {
				continue
			}
			got, ok := find(restored, []byte(key), now)
			if ok != wantOK && restored.Stats().Bytes < MinBytes*9/10 || ok && (!wantOK || got.Age != want.Age || got.Stale != want.Stale ||
				!bytes.Equal(got.Answer.Msg, want.Answer.Msg) || !slices.Equal(got.Answer.TTLs, want.Answer.TTLs)) {
				t.Fatalf("key %q: restored %+v, %v, want %+v, %v", key, got, ok, want, wantOK)
			}
		}
	})
}

// TestMemory fills a cache and compares what it says it uses with what the heap says.
func TestMemory(t *testing.T) {
	for _, tt := range []struct{ name, records string }{
		{"addresses", "a.example. 300 A 192.0.2.1"},
		{"negative", "--\nexample. 300 SOA ns.example. root.example. 1 2 3 4 60"},
		{"many records", "a.example. 300 A 192.0.2.1" + strings.Repeat("\nb.example. 300 TXT "+strings.Repeat("x ", 30), 10)},
		{"large", "a.example. 300 A 192.0.2.1\na.example. 300 TXT " + strings.Repeat("x ", 10000)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const size = 16 << 20
			a := answer(t, response(t, 0, tt.records))
			before := heap()
			c := newCache(t, Config{MaxBytes: size})
			for i := 0; i < size/256 && (i%64 > 0 || c.Stats().Evictions < 1000); i++ {
				put(c, fmt.Appendf(nil, "\x08host%04x\x07example\x03org\x00aabcccc", i), a, start)
			}
			used := heap() - before
			s := c.Stats()
			t.Logf("%d entries, %d octets counted, %d on the heap, %.3f", s.Entries, s.Bytes, used, float64(used)/float64(s.Bytes))
			if ratio := float64(used) / float64(s.Bytes); ratio > 1.02 || ratio < 0.9 {
				t.Errorf("%d octets are counted, %d are used: %.2f", s.Bytes, used, ratio)
			}
			if s.Evictions == 0 || s.Bytes > size || s.Bytes < size*8/10 {
				t.Errorf("%d octets of %d are used, %d evictions", s.Bytes, int64(size), s.Evictions)
			}
			check(t, c)
			runtime.KeepAlive(c)
		})
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestTogether lets many goroutines work on few keys; the race detector watches.
func TestTogether(t *testing.T) {
	c := newCache(t, Config{MaxBytes: MinBytes})
	var wg sync.WaitGroup
	a := address(t, 300)
	q := wire.Query{}
	q.Parse(unparsed(t))
	shape := wire.Shape{UDPSize: 1232}
	for g := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			var dst []byte
			for i := range 2000 {
				key := fmt.Append(nil, rnd.IntN(2500))
				if got, age, ok := get(c, key, start); ok {
					dst = shape.AppendAnswer(dst[:0], &q, got, age)
				} else {
					put(c, key, a, start)
				}
				if i%500 == 0 {
					c.Stats()
				}
			}
			if g == 0 {
				c.FlushName([]byte{0}, true)
			}
		})
	}
	wg.Wait()
	check(t, c)
}

func unparsed(t testing.TB) []byte {
	t.Helper()
	msg, err := new(dns.Msg).SetQuestion("a.example.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func TestGetDoesNotAllocate(t *testing.T) {
	c := newCache(t, Config{})
	hit, miss := []byte("\x01a\x07example\x00aabcccc"), []byte("\x01b\x07example\x00aabcccc")
	put(c, hit, address(t, 300), start)
	hashes := []uint64{c.Hash(hit), c.Hash(miss)}
	if n := testing.AllocsPerRun(100, func() { c.Touch(hashes); get(c, hit, start); get(c, miss, start) }); n != 0 {
		t.Errorf("%v allocs, want 0", n)
	}
}

// TestTouch touches more names than are touched at once, known and unknown ones, in a table whose chains are long. That is
// no use: the entries are as unpopular as before.
func TestTouch(t *testing.T) {
	c := newCache(t, Config{})
	var hashes []uint64
	var hits []*entry
	for i := range 3*touchAtOnce + 1 {
		key := fmt.Appendf(nil, "\x04%04d\x00aabcccc", i)
		hash := c.Hash(key)
		if i%5 > 0 {
			hash = uint64(i%3) << 60 // as find sees it, another key with the same hash is another one
			c.Put(key, hash, address(t, 300), start)
			hits = append(hits, c.table.find(key, hash))
		}
		hashes = append(hashes, hash)
	}
	for n := range hashes {
		c.Touch(hashes[:n])
	}
	if seen := c.table.touch(hashes[1:2]); seen == 0 {
		t.Error("an entry was not read")
	}
	for _, e := range hits {
		if e == nil || e.hits.Load() != 0 {
			t.Fatalf("%v was found by nobody", e)
		}
	}
	check(t, c)
}

// BenchmarkGet looks names up at random. With more names than the processor's caches hold, what it costs is the waiting for
// memory: the slot, the entry, the key.
func BenchmarkGet(b *testing.B) {
	for _, n := range []int{1_000, 100_000, 1_000_000} {
		c := newCache(b, Config{MaxBytes: max(int64(n)*400, MinBytes)})
		a := address(b, 3600)
		const keyLen = 9 + 8 + 4 + 1 + 7
		keys := make([]byte, 0, n*keyLen)
		for i := range n {
			keys = fmt.Appendf(keys, "\x08%08x\x07example\x03org\x00aabcccc", i)
			put(c, keys[i*keyLen:], a, start)
		}
		if s := c.Stats(); s.Entries != int64(n) {
			b.Fatalf("%d entries, want %d", s.Entries, n)
		}
		key := func(i uint32) []byte {
			i = uint32(uint64(i*2654435769) * uint64(n) >> 32)
			return keys[i*keyLen:][:keyLen]
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for i := uint32(0); b.Loop(); i++ {
				find(c, key(i), start)
			}
		})
		b.Run(fmt.Sprintf("%d/parallel", n), func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := rand.Uint32(); pb.Next(); i++ {
					find(c, key(i), start)
				}
			})
		})
		if n > 1_000 {
			continue
		}
		b.Run("one name", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				find(c, key(0), start)
			}
		})
		b.Run("one name/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					find(c, key(0), start)
				}
			})
		})
	}
}

func BenchmarkPut(b *testing.B) {
	c := newCache(b, Config{MaxBytes: 16 << 20})
	a := address(b, 3600)
	key := []byte("\x08host0000\x07example\x03org\x00aabcccc")
	b.ReportAllocs()
	for i := uint32(0); b.Loop(); i++ {
		binary.BigEndian.PutUint32(key[1:], i)
		put(c, key, a, start)
	}
}
