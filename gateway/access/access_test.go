package access

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// noon is an arbitrary moment as queries carry it.
var noon = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC).UnixNano()

func mustNew(t testing.TB, c Config) *Control {
	t.Helper()
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func prefixes(s ...string) []netip.Prefix {
	ps := []netip.Prefix{}
	for _, s := range s {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func TestAdmit(t *testing.T) {
	lan := prefixes("192.0.2.0/24", "2001:db8::/32")
	for _, tt := range []struct {
		name      string
		config    Config
		client    string
		encrypted bool
		want      Decision
	}{
		{name: "loopback", client: "127.0.0.1"},
		{name: "whole loopback network", client: "127.255.255.254"},
		{name: "loopback 6", client: "::1"},
		{name: "ten", client: "10.255.0.1"},
		{name: "below 172.16", client: "172.15.255.255", want: Refused},
		{name: "172.16", client: "172.16.0.0"},
		{name: "172.31", client: "172.31.255.255"},
		{name: "above 172.31", client: "172.32.0.0", want: Refused},
		{name: "192.168", client: "192.168.1.1"},
		{name: "link-local 4", client: "169.254.7.7"},
		{name: "link-local 6", client: "fe80::1"},
		{name: "link-local 6 with a zone", client: "fe80::1%eth0"},
		{name: "unique local", client: "fd12:3456::1"},
		{name: "shared address space is no private network", client: "100.64.0.1", want: Refused},
		{name: "public 4", client: "192.0.2.1", want: Refused},
		{name: "public 6", client: "2001:db8::1", want: Refused},
		{name: "mapped private", client: "::ffff:10.1.2.3"},
		{name: "mapped public", client: "::ffff:192.0.2.1", want: Refused},
		{name: "no address", client: "", want: Refused},
		{name: "public over an encrypted transport", client: "192.0.2.1", encrypted: true},
		{name: "no address over an encrypted transport", client: "", encrypted: true},
		{name: "default list, everywhere", config: Config{Allow: PrivateNetworks(), Everywhere: true},
			client: "192.0.2.1", encrypted: true, want: Refused},
		{name: "drop", config: Config{Drop: true}, client: "192.0.2.1", want: Dropped},
		{name: "own list, in it", config: Config{Allow: lan, Everywhere: true}, client: "192.0.2.9"},
		{name: "own list, in it, encrypted", config: Config{Allow: lan, Everywhere: true}, client: "2001:db8::9", encrypted: true},
		{name: "own list, loopback is not in it", config: Config{Allow: lan, Everywhere: true}, client: "127.0.0.1",
			want: Refused},
		{name: "own list, outside, encrypted", config: Config{Allow: lan, Everywhere: true, Drop: true},
			client: "198.51.100.1", encrypted: true, want: Dropped},
		{name: "own list for plain only", config: Config{Allow: lan}, client: "198.51.100.1", encrypted: true},
		{name: "everyone", config: Config{Allow: prefixes("0.0.0.0/0", "::/0"), Everywhere: true}, client: "198.51.100.1"},
		{name: "every IPv6 address does not mean IPv4", config: Config{Allow: prefixes("::/0"), Everywhere: true},
			client: "198.51.100.1", want: Refused},
		{name: "prefix with host bits", config: Config{Allow: prefixes("192.0.2.77/24"), Everywhere: true}, client: "192.0.2.1"},
		{name: "mapped prefix", config: Config{Allow: prefixes("::ffff:192.0.2.0/120"), Everywhere: true}, client: "192.0.2.1"},
		{name: "mapped prefix, outside", config: Config{Allow: prefixes("::ffff:192.0.2.0/120"), Everywhere: true},
			client: "192.0.3.1", want: Refused},
		{name: "empty list everywhere", config: Config{Everywhere: true}, client: "127.0.0.1", want: Refused},
		{name: "empty list on plain transports", config: Config{Allow: prefixes()}, client: "127.0.0.1", want: Refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var client netip.Addr
			if tt.client != "" {
				client = netip.MustParseAddr(tt.client)
			}
			got := mustNew(t, tt.config).Admit(client, tt.encrypted, noon)
			if got != tt.want {
				t.Errorf("Admit(%q, %v) = %v, want %v", tt.client, tt.encrypted, got, tt.want)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{Allow: []netip.Prefix{{}}}, "allow[0] is not a network"},
		{Config{PerClient: -1}, "-1 queries per second"},
		{Config{PerClient: math.NaN()}, "NaN queries per second"},
		{Config{PerClient: math.Inf(1)}, "+Inf queries per second"},
		{Config{PerClient: 1e-9}, "1e-09 queries per second"},
		{Config{PerClient: 1, PrefixV4: 33}, "an IPv4 prefix of 33 bits"},
		{Config{PerClient: 1, PrefixV6: 129}, "an IPv6 prefix of 129 bits"},
		{Config{PerClient: 1, PrefixV6: -1}, "an IPv6 prefix of -1 bits"},
		{Config{PerClient: 1, Clients: -1}, "the number of clients"},
		{Config{PerClient: 1, Clients: 1 << 40}, "the number of clients"},
	} {
		a, err := New(tt.config)
		if err == nil || !strings.Contains(err.Error(), tt.want) || a != nil {
			t.Errorf("New(%+v) = %v, %v, want an error with %q", tt.config, a, err, tt.want)
		}
	}
}

// step is one moment of a client's day: how many of n queries at that moment are admitted.
type step struct {
	after   time.Duration // since the last step
	queries int
	allowed int
}

func TestBucket(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rate  float64
		steps []step
	}{
		{"burst is twice the rate", 20, []step{{0, 100, 40}}},
		{"burst is at least ten", 1, []step{{0, 100, 10}}},
		{"a slow rate refills slowly", 0.5, []step{{0, 20, 10}, {time.Second, 5, 0}, {time.Second, 5, 1}}},
		{"refill", 20, []step{{0, 50, 40}, {50 * time.Millisecond, 5, 1}, {100 * time.Millisecond, 5, 2},
			{49 * time.Millisecond, 5, 0}, {time.Millisecond, 5, 1}}},
		{"it never holds more than the burst", 20, []step{{0, 40, 40}, {time.Hour, 100, 40}}},
		{"a client at its rate is never limited", 100, []step{{0, 1, 1}, {10 * time.Millisecond, 1, 1},
			{10 * time.Millisecond, 1, 1}, {10 * time.Millisecond, 1, 1}}},
		{"being limited costs nothing", 20, []step{{0, 10000, 40}, {time.Second, 100, 20}}},
		{"the clock is set back by an hour", 20, []step{{0, 40, 40}, {-time.Hour, 100, 40}, {50 * time.Millisecond, 9, 1}}},
		{"a query that was read a little earlier", 20, []step{{0, 40, 40}, {-time.Millisecond, 9, 0},
			{51 * time.Millisecond, 9, 1}}},
		{"one an hour", 1.0 / 3600, []step{{0, 20, 10}, {time.Hour - time.Second, 3, 0}, {time.Second, 3, 1}}},
		{"the highest rate", 1e9, []step{{0, 1000, 1000}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := mustNew(t, Config{PerClient: tt.rate})
			now := noon
			for i, s := range tt.steps {
				now += int64(s.after)
				got := 0
				for range s.queries {
					switch d := a.Admit(netip.MustParseAddr("127.0.0.1"), i%2 == 0, now); d {
					case Allowed:
						got++
					case Limited:
					default:
						t.Fatalf("step %d: %v", i, d)
					}
				}
				if got != s.allowed {
					t.Errorf("step %d: %d of %d allowed, want %d", i, got, s.queries, s.allowed)
				}
			}
		})
	}
}

// TestPrefixes empties the bucket of one client and then asks as another.
func TestPrefixes(t *testing.T) {
	for _, tt := range []struct {
		name          string
		v4, v6        int
		first, second string
		want          Decision
	}{
		{"same address", 0, 0, "192.0.2.1", "192.0.2.1", Limited},
		{"neighbours", 0, 0, "192.0.2.1", "192.0.2.2", Allowed},
		{"a mapped client is the same", 0, 0, "192.0.2.1", "::ffff:192.0.2.1", Limited},
		{"same /24", 24, 0, "192.0.2.1", "192.0.2.200", Limited},
		{"other /24", 24, 0, "192.0.2.1", "192.0.3.1", Allowed},
		{"same /56", 0, 0, "2001:db8::1", "2001:db8:0:ff:ffff::1", Limited},
		{"other /56", 0, 0, "2001:db8::1", "2001:db8:0:100::1", Allowed},
		{"same /64", 0, 64, "2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", Limited},
		{"same /120", 0, 120, "2001:db8::1", "2001:db8::ff", Limited},
		{"other /120", 0, 120, "2001:db8::1", "2001:db8::100", Allowed},
		{"other /128", 0, 128, "2001:db8::1", "2001:db8::2", Allowed},
		{"a zone is not part of the client", 0, 128, "fe80::1%eth0", "fe80::1%eth1", Limited},
		{"an IPv6 prefix that begins like a mapped address", 1, 1, "128.0.0.1", "::2", Allowed},
		{"the prefix of all zeros", 0, 0, "::1", "::2", Limited},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := mustNew(t, Config{PerClient: 1, PrefixV4: tt.v4, PrefixV6: tt.v6})
			for range minBurst {
				if got := a.Admit(netip.MustParseAddr(tt.first), true, noon); got != Allowed {
					t.Fatalf("burst: %v", got)
				}
			}
			if got := a.Admit(netip.MustParseAddr(tt.second), true, noon); got != tt.want {
				t.Errorf("%v after %v: %v, want %v", tt.second, tt.first, got, tt.want)
			}
		})
	}
}

// TestStrangersHaveNoBucket shows that who is not on the list is refused, not limited, however often he asks.
func TestStrangersHaveNoBucket(t *testing.T) {
	a := mustNew(t, Config{PerClient: 1})
	for range 1000 {
		if got := a.Admit(netip.MustParseAddr("192.0.2.1"), false, noon); got != Refused {
			t.Fatalf("got %v, want %v", got, Refused)
		}
	}
	for i := range a.limit.shards {
		for _, set := range a.limit.shards[i].sets {
			if diff := cmp.Diff(set, [ways]bucket{}, cmp.AllowUnexported(bucket{})); diff != "" {
				t.Fatal(diff)
			}
		}
	}
}

// TestEviction floods a table of one set: the client over its rate has to stay, and idle ones go first.
func TestEviction(t *testing.T) {
	a := mustNew(t, Config{PerClient: 1, Clients: ways})
	heavy := netip.MustParseAddr("192.0.2.1")
	now := noon
	for range minBurst {
		a.Admit(heavy, true, now)
	}
	for i := range 100 * ways {
		now += int64(time.Millisecond)
		other := netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)})
		if got := a.Admit(other, true, now); got != Allowed {
			t.Fatalf("newcomer %d: %v", i, got)
		}
		if i%100 == 0 {
			if got := a.Admit(heavy, true, now); got != Limited {
				t.Fatalf("after %d newcomers the client over its rate is %v", i, got)
			}
		}
	}
	if got := len(a.limit.shards) * len(a.limit.shards[0].sets) * ways; got != ways {
		t.Errorf("the table has %d buckets, want %d", got, ways)
	}
	// The last newcomers are still known: their buckets lack one token.
	known := 0
	set := &a.limit.shards[0].sets[0]
	for i := range set {
		if set[i].full > now {
			known++
		}
	}
	if known != ways {
		t.Errorf("%d of %d buckets hold a debt, want all", known, ways)
	}
}

func TestTableSize(t *testing.T) {
	for _, tt := range []struct{ clients, want int }{
		{0, defaultClients}, {1, ways}, {ways, ways}, {ways + 1, 2 * ways}, {1000, 1024}, {1 << 20, 1 << 20},
	} {
		l := mustNew(t, Config{PerClient: 1, Clients: tt.clients}).limit
		got := 0
		for i := range l.shards {
			got += len(l.shards[i].sets) * ways
		}
		if got != tt.want {
			t.Errorf("%d clients: %d buckets, want %d", tt.clients, got, tt.want)
		}
	}
}

// TestManyClients has each of many clients send more than its burst: none gets more, and hardly one gets less.
func TestManyClients(t *testing.T) {
	a := mustNew(t, Config{PerClient: 1, Clients: 1 << 14})
	allowed := map[netip.Addr]int{}
	for range 2 * minBurst {
		for i := range 4096 {
			client := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
			if a.Admit(client, false, noon) == Allowed {
				allowed[client]++
			}
		}
	}
	over := 0
	for client, n := range allowed {
		if n < minBurst {
			t.Fatalf("%v: %d allowed, want at least %d", client, n, minBurst)
		}
		if n > minBurst {
			over++
		}
	}
	if over > len(allowed)/50 {
		t.Errorf("%d of %d clients were forgotten in a table that is a quarter full", over, len(allowed))
	}
}

func TestConcurrent(t *testing.T) {
	const workers, queries = 8, 2000
	a := mustNew(t, Config{PerClient: 100})
	var allowed [4]atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			for range queries {
				i := rnd.IntN(len(allowed))
				if a.Admit(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), false, noon) == Allowed {
					allowed[i].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for i := range allowed {
		if got := allowed[i].Load(); got != 200 {
			t.Errorf("client %d: %d allowed, want 200", i, got)
		}
	}
}

func TestAdmitAllocates(t *testing.T) {
	a := mustNew(t, Config{PerClient: 5})
	clients := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.2"),
		netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("192.0.2.1")}
	n := testing.AllocsPerRun(100, func() {
		for _, c := range clients {
			a.Admit(c, false, noon)
		}
	})
	if n != 0 {
		t.Errorf("Admit: %v allocs, want 0", n)
	}
}

func TestDecisionString(t *testing.T) {
	got := fmt.Sprint(Allowed, Refused, Dropped, Limited, Decision(9))
	if want := "allowed refused dropped limited unknown"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// FuzzBucket holds the limiter to its law: in any span of time a client gets at most its burst and its rate.
func FuzzBucket(f *testing.F) {
	f.Add(uint16(20), []byte{0, 0, 0, 1, 255, 3})
	f.Fuzz(func(t *testing.T, rate uint16, gaps []byte) {
		rate = rate%1000 + 1
		a := mustNew(t, Config{PerClient: float64(rate), Clients: ways})
		burst := max(2*int(rate), minBurst)
		now, allowed := noon, 0
		for _, gap := range gaps {
			now += int64(gap) * int64(time.Millisecond) / 4
			for range 20 {
				if a.Admit(netip.MustParseAddr("::1"), false, now) == Allowed {
					allowed++
				}
			}
		}
		// One more for rounding 1e9/rate to whole nanoseconds.
		if most := burst + 1 + int(float64(now-noon)/1e9*float64(rate)); allowed > most {
			t.Errorf("%d allowed in %v at %d/s, want at most %d", allowed, time.Duration(now-noon), rate, most)
		}
	})
}

func BenchmarkAdmit(b *testing.B) {
	client := netip.MustParseAddr("10.0.0.1")
	for _, bb := range []struct {
		name string
		c    Config
	}{
		{"list", Config{}},
		{"list and limiter", Config{PerClient: 1e6}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			a, now := mustNew(b, bb.c), noon
			b.ReportAllocs()
			for b.Loop() {
				now += 1000
				if a.Admit(client, false, now) != Allowed {
					b.Fatal("not allowed")
				}
			}
		})
	}
	// All cores at once: for a client each, and for clients that never came before and push each other out.
	for _, bb := range []struct {
		name    string
		clients uint32 // of each core
	}{
		{"parallel, one client a core", 1},
		{"parallel, strangers", 1 << 24},
	} {
		b.Run(bb.name, func(b *testing.B) {
			a := mustNew(b, Config{PerClient: 1e6, Allow: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}})
			var cores atomic.Uint32
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				core, now := byte(cores.Add(1)), noon
				for n := uint32(0); pb.Next(); n++ {
					now += 1000
					c := n % bb.clients
					a.Admit(netip.AddrFrom4([4]byte{core, byte(c >> 16), byte(c >> 8), byte(c)}), false, now)
				}
			})
		})
	}
}
