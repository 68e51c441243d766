package cache

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// named returns the answer to a question for the addresses of name, with so many of them.
func named(t testing.TB, name string, addresses int) (key []byte, a *wire.Answer) {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, dns.TypeA)
	m.Response, m.Compress = true, true
	for i := range addresses {
		rr, err := dns.NewRR(fmt.Sprintf("%s 300 A 192.0.2.%d", name, i))
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	msg, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return keyOf(name, 1, 0, 0), answer(t, msg)
}

// TestEntry holds entries to what they may cost: a name of 25 octets, one address.
func TestEntry(t *testing.T) {
	key, a := named(t, "www.host1234.example.org.", 1)
	if len(key) != 26+7 {
		t.Fatalf("a key of %d octets", len(key))
	}
	if size := unsafe.Sizeof(entry{}); unsafe.Sizeof(uintptr(0)) == 8 && size > 192 {
		t.Errorf("an entry has %d octets, want at most the size class of 192", size)
	}
	if off := unsafe.Offsetof(entry{}.answer); off > 64 {
		t.Errorf("what a lookup reads has %d octets, want a cache line", off)
	}
	if e := newEntry(key, 1, a, start, 300); e.cost > 300 {
		t.Errorf("an entry costs %d octets", e.cost)
	}
	for _, tt := range []struct {
		name string
		ede  []wire.EDE
		want float64
	}{
		{"plain", nil, 1},
		{"with an extended DNS error", []wire.EDE{{Code: 3, Text: "text"}}, 2},
		{"with two", []wire.EDE{{Code: 3, Text: "text"}, {Code: 4, Text: "text"}}, 2},
	} {
		a.EDE = tt.ede
		c := newCache(t, Config{})
		hash := c.Hash(key)
		if n := testing.AllocsPerRun(100, func() { c.Put(key, hash, a, start) }); n > tt.want+float64(btoi(race)) { // the race detector has Put make one more
			t.Errorf("%s: Put makes %v objects, want %v", tt.name, n, tt.want)
		}
		if n := testing.AllocsPerRun(100, func() { c.Get(key, hash, start); c.Fail(key, hash, nil, start) }); n != 0 {
			t.Errorf("%s: Get and Fail make %v objects, want none", tt.name, n)
		}
	}
}

// TestEntrySizes makes entries of all sizes and looks at what they hold and cost.
func TestEntrySizes(t *testing.T) {
	key := keyOf("www.host1234.example.org.", 1, 0, 0)
	for n := 1; n < 1500; n += 3 {
		var records strings.Builder
		for left := n; left > 0; left -= 200 {
			fmt.Fprintf(&records, "a.example. 300 A 192.0.2.1\na.example. 300 TXT %s\n", strings.Repeat("x", min(left, 200)))
		}
		a := answer(t, response(t, 0, records.String()))
		e := newEntry(key, 7, a, start, 300)
		if string(e.keyBytes()) != string(key) || string(e.answer.Msg) != string(a.Msg) || !slices.Equal(e.answer.TTLs, a.TTLs) {
			t.Fatalf("%d octets of text: the entry holds %q and %v", n, e.answer.Msg, e.answer.TTLs)
		}
		least := a.CloneLen(len(key)) + int(unsafe.Sizeof(*e))
		if int(e.cost) < least || int(e.cost) > least*5/4+64 {
			t.Errorf("%d octets of text: an entry of %d octets costs %d", n, least, e.cost)
		}
	}
}

// mix returns answer number i of what a resolver sees: most with few addresses, some negative, some large.
func mix(t testing.TB) func(i int) (key []byte, a *wire.Answer) {
	t.Helper()
	msgs := make([]*wire.Answer, 0, 10)
	for _, records := range []string{
		"a.example. 300 A 192.0.2.1",
		"a.example. 300 A 192.0.2.1\na.example. 300 A 192.0.2.2",
		"a.example. 300 CNAME cdn.a.example.net.\ncdn.a.example.net. 60 A 192.0.2.1\ncdn.a.example.net. 60 A 192.0.2.2",
		"--\nexample. 900 SOA ns.example. root.example. 1 2 3 4 300",
		"a.example. 300 A 192.0.2.1" + strings.Repeat("\na.example. 300 A 192.0.2.2", 7),
		"a.example. 300 A 192.0.2.1\n--\nexample. 300 NS ns1.example.\nexample. 300 NS ns2.example.\n--\nns1.example. 300 A 192.0.2.1",
		"a.example. 300 A 192.0.2.1",
		"a.example. 300 A 192.0.2.1\na.example. 300 RRSIG A 13 2 300 20300101000000 20200101000000 12345 example. " + strings.Repeat("A", 86) + "==",
		"a.example. 300 A 192.0.2.1\na.example. 300 TXT " + strings.Repeat("x", 200),
		"a.example. 300 A 192.0.2.1" + strings.Repeat("\na.example. 300 TXT "+strings.Repeat("x", 200), 4),
	} {
		msgs = append(msgs, answer(t, response(t, 0, records)))
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	return func(i int) ([]byte, *wire.Answer) {
		name := fmt.Sprintf("%s%d.%s.example.org.", strings.Repeat("w", 1+i%20), i, strings.Repeat("d", 1+i%11))
		return keyOf(name, 1, 0, 0), msgs[rnd.IntN(len(msgs))]
	}
}

// elsewhere runs the test in a process of its own, without the race detector, which takes more memory and time, and reports
// whether it did: in that process it does not.
func elsewhere(t *testing.T) bool {
	t.Helper()
	const variable = "CACHE_TEST_ELSEWHERE"
	if os.Getenv(variable) != "" {
		return false
	}
	if testing.Short() {
		t.Skip("takes seconds")
	}
	only := "^" + t.Name() + "$"
	cmd := exec.Command(os.Args[0], "-test.run", only, "-test.v")
	if race {
		cmd = exec.Command("go", "test", "-count=1", "-run", only, "-v", ".")
	}
	cmd.Env = append(os.Environ(), variable+"=1")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return true
}

// TestResident fills 64 MB and compares what the cache says that it takes with what the process has grown by. When entries
// have been evicted for long, what is alive is still what is counted; but then there is garbage between it, as much as GOGC
// allows.
func TestResident(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	if elsewhere(t) {
		return
	}
	const size = 64 << 20
	next := mix(t)
	before, aliveBefore := resident(t), heap()
	c := newCache(t, Config{MaxBytes: size})
	fill := func(upto func(Stats) bool, from int) int {
		for i := from; ; i++ {
			if i%1000 == 0 && upto(c.Stats()) {
				return i
			}
			key, a := next(i)
			c.Put(key, c.Hash(key), a, start)
		}
	}
	i := fill(func(s Stats) bool { return s.Evictions > 1000 }, 0)
	used := resident(t) - before
	s := c.Stats()
	ratio := float64(used) / float64(s.Bytes)
	t.Logf("%d entries of %d octets, %d octets counted, %d resident: %.3f", s.Entries, s.Bytes/s.Entries, s.Bytes, used, ratio)
	if ratio > 1.15 || ratio < 0.85 || s.Bytes > s.MaxBytes || s.Bytes < size*9/10 {
		t.Errorf("%d octets are counted, %d are resident", s.Bytes, used)
	}
	fill(func(s Stats) bool { return s.Evictions > 3*uint64(s.Entries) }, i)
	alive := heap() - aliveBefore
	s = c.Stats()
	ratio = float64(alive) / float64(s.Bytes)
	t.Logf("later: %d octets counted, %d alive: %.3f, %d resident", s.Bytes, alive, ratio, resident(t)-before)
	if ratio > 1.02 || ratio < 0.98 || s.Bytes > s.MaxBytes || s.Bytes < size*9/10 {
		t.Errorf("%d octets are counted, %d are alive", s.Bytes, alive)
	}
	runtime.KeepAlive(c)
}

// resident returns how many octets of memory the process has.
func resident(t *testing.T) int64 {
	t.Helper()
	runtime.GC()
	debug.FreeOSMemory()
	var pages, n int64
	b, err := os.ReadFile("/proc/self/statm")
	if err == nil {
		_, err = fmt.Sscan(string(b), &pages, &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n * int64(os.Getpagesize())
}

// TestFlood asks for popular names again and again while 1,000,000 unique names flood the cache.
func TestFlood(t *testing.T) {
	if elsewhere(t) {
		return
	}
	const flood = 1_000_000
	for _, tt := range []struct {
		name        string
		size        int64
		hot         int
		unique, ask int // how many of each in turn
		zipf, cold  bool
	}{
		{"64 MB, 100 to 10", 64 << 20, 10_000, 100, 10, false, false},
		{"64 MB, 100 to 10, Zipf, cold", 64 << 20, 10_000, 100, 10, true, true},
		{"64 MB, 100 to 1", 64 << 20, 10_000, 100, 1, false, false},
		{"4 MB, 100 to 10", 4 << 20, 5_000, 100, 10, false, false},
		{"4 MB, 100 to 1, Zipf", 4 << 20, 5_000, 100, 1, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCache(t, Config{MaxBytes: tt.size})
			a := address(t, 3600)
			rnd := rand.New(rand.NewPCG(1, 1))
			zipf := rand.NewZipf(rnd, 1.01, 1, uint64(tt.hot-1))
			turn := 0
			seen := make([]bool, tt.hot)
			hits, asked := 0, 0 // what was never asked before is no hit in any cache
			ask := func(zipfian bool) {
				turn++
				i := turn % tt.hot
				if zipfian {
					i = int(zipf.Uint64())
				}
				asked += btoi(seen[i])
				seen[i] = true
				key := fmt.Appendf(nil, "\x03hot\x08%08x\x07example\x03org\x00aabcccc", i)
				if has(c, key) {
					hits++
					return
				}
				put(c, key, a, start)
			}
			if !tt.cold {
				for range 3 * tt.hot { // they were popular before
					ask(false)
				}
				hits, asked = 0, 0
			}
			for i := range flood {
				put(c, fmt.Appendf(nil, "\x04once\x08%08x\x07example\x03org\x00aabcccc", i), a, start)
				if i%tt.unique == 0 {
					for range tt.ask {
						ask(tt.zipf)
					}
				}
			}
			ratio := float64(hits) / float64(asked)
			t.Logf("%.4f of %d, %+v", ratio, asked, c.Stats())
			if ratio < 0.95 {
				t.Errorf("%.3f of the questions for popular names are hits", ratio)
			}
			check(t, c)
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestReaders lets readers look at answers, and hold some, while writers replace, evict and flush them: what was found
// stays what it was. The race detector watches.
func TestReaders(t *testing.T) {
	c := newCache(t, Config{MaxBytes: MinBytes, StaleFor: 10 * time.Second, PrefetchHits: 3, PrefetchRemaining: 0.5})
	const keys = 3000 // more than there is room for
	key := func(i int) []byte { return keyOf(fmt.Sprintf("host%d.example", i), 1, 0, 0) }
	answers := make([]*wire.Answer, 20)
	for i := range answers {
		answers[i] = answer(t, response(t, 0, fmt.Sprintf("a.example. %d A 192.0.2.%d", 20+i, i)))
		answers[i].EDE = []wire.EDE{{Code: uint16(i), Text: fmt.Sprint(i)}}
	}
	bad := servfail(t)
	q := wire.Query{}
	q.Parse(unparsed(t))
	sound := func(a *wire.Answer) {
		if a.Rcode == 2 {
			return
		}
		i := a.EDE[0].Code
		if last := a.Msg[len(a.Msg)-1]; uint16(last) != i || a.EDE[0].Text != fmt.Sprint(i) || ttls(a)[0] != 20+uint32(i) {
			t.Errorf("an answer has changed: %+v", a)
		}
	}
	var readers, writers sync.WaitGroup
	var done atomic.Bool
	for g := range 3 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			held := make([]*wire.Answer, 50)
			q := q
			shape := wire.Shape{UDPSize: 1232}
			var dst []byte
			for i := 0; !done.Load(); i++ {
				f, ok := find(c, key(rnd.IntN(keys)), start+rnd.Int64N(40)*second)
				if !ok {
					continue
				}
				sound(f.Answer)
				dst = shape.AppendAnswer(dst[:0], &q, f.Answer, f.Age)
				if old := held[i%len(held)]; old != nil {
					sound(old)
				}
				held[i%len(held)] = f.Answer
			}
		})
	}
	for g := range 2 {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 2))
			for range 20_000 {
				k := key(rnd.IntN(keys))
				now := start + rnd.Int64N(20)*second
				switch n := rnd.IntN(1000); {
				case n < 100:
					c.Fail(k, c.Hash(k), bad, now)
				case n < 110:
					c.FlushName(k[:len(k)-7], n%2 == 0)
				case n < 112:
					c.FlushName([]byte{0}, true)
				case n < 115:
					if _, err := c.Save(io.Discard, now); err != nil {
						t.Error(err)
					}
				case n < 120:
					c.Stats()
				default:
					c.Put(k, c.Hash(k), answers[rnd.IntN(len(answers))], now)
				}
			}
		})
	}
	writers.Wait()
	done.Store(true)
	readers.Wait()
	check(t, c)
}

// TestFlushHoldsNothing keeps one answer of many that are flushed: the others go.
func TestFlushHoldsNothing(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 8 << 20})
	a := address(t, 300)
	var held *wire.Answer
	before := heap()
	for i := range 20000 {
		b := put(c, fmt.Appendf(nil, "key%d", i), a, start)
		if i == 10000 {
			held = b
		}
	}
	full := heap() - before
	c.FlushName([]byte{0}, true)
	if left := heap() - before; left > full/20 {
		t.Errorf("%d of %d octets are left", left, full)
	}
	runtime.KeepAlive(held)
}
