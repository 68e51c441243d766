package listen

import (
	"math/rand/v2"
	"testing"
)

// TestDueTimes does anything to a heap: the first is always the earliest, and everyone knows its place.
func TestDueTimes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var h dueTimes
	for range 20000 {
		switch n := len(h); {
		case n == 0 || r.IntN(4) == 0:
			h.push(new(loopConn), r.Int64N(1000))
		case r.IntN(3) == 0:
			c := h[r.IntN(n)].c
			if h.remove(c); c.place != -1 || len(h) != n-1 {
				t.Fatalf("place %d and %d of %d left after remove", c.place, len(h), n)
			}
		case r.IntN(2) == 0:
			h.hasten(h[r.IntN(n)].c, r.Int64N(1000))
		default:
			h.delay(h[0].at + r.Int64N(100))
		}
		for i, e := range h {
			if e.at < h[0].at || int(e.c.place) != i {
				t.Fatalf("%d has the time %d and the place %d; the first time is %d", i, e.at, e.c.place, h[0].at)
			}
		}
		if len(h) > 200 {
			h = h[:0:0]
		}
	}
}
