package forward

import (
	"math"
	"sync/atomic"
	"time"
)

// Hedge says when the next server is asked beside one that has not answered yet. The zero value means: when it has taken
// longer than 98 % of its answers do, within 20 ms and 400 ms.
type Hedge struct {
	Never bool          // only when its share of the deadline is over
	After time.Duration // always after this time; 0 means by its latency
}

// delay returns how long srv is waited for alone.
func (h Hedge) delay(srv *server) time.Duration {
	switch {
	case h.Never:
		return math.MaxInt64
	case h.After > 0:
		return h.After
	}
	return time.Duration(srv.hedge.Load())
}

// budget bounds what hedging adds to the load of the servers while all is well: one query in hedgeCost, and a few at
// once. It is not asked where a server seems to be in trouble.
type budget struct{ atomic.Int64 }

const (
	hedgeCost = 20 // 5 %
	hedgeCap  = 10 * hedgeCost
)

// earn counts a query.
func (b *budget) earn() {
	if b.Load() < hedgeCap {
		b.Add(1)
	}
}

// spend takes the cost of a hedge if it is there.
func (b *budget) spend() bool {
	for {
		n := b.Load()
		if n < hedgeCost {
			return false
		}
		if b.CompareAndSwap(n, n-hedgeCost) {
			return true
		}
	}
}
