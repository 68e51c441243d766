package listen

import (
	"net/netip"
	"slices"
	"testing"

	"dnsgateway/gateway/wire"
)

// expecting is a Handler that notes what it is told to expect, and how many queries it has served until then.
type expecting struct {
	*fake
	names  [][]string
	served []int
	broken bool
}

func (e *expecting) Expect(qs []wire.Query) {
	var names []string
	for i := range qs {
		names = append(names, firstLabel(&qs[i]))
	}
	e.names = append(e.names, names)
	e.served = append(e.served, len(e.queries()))
	if e.broken {
		panic("ordered by the test")
	}
}

// TestDNSMachineExpect has the machine read what one read of a connection brought.
func TestDNSMachineExpect(t *testing.T) {
	h := &expecting{fake: newFake()}
	cfg := common(h)
	cfg.Addr = netip.MustParseAddrPort("127.0.0.1:0")
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	names := func(n int, name string) (data []byte) {
		for i := range n {
			data = append(data, framed(query(t, name, uint16(i)))...)
		}
		return data
	}
	for _, tt := range []struct {
		name     string
		pipeline int
		data     []byte
		expected []int // how many at once
		misses   int
		full     bool
	}{
		{"one", 100, names(1, "hit"), nil, 0, false},
		{"some", 100, names(5, "hit"), []int{5}, 0, false},
		{"the last is not whole", 100, names(3, "hit")[:2*(2+12+14)+9], []int{2}, 0, false},
		{"many", 100, names(2*aheadSize+3, "hit"), []int{aheadSize, aheadSize, 3}, 0, false},
		{"misses", 100, names(aheadSize, "miss"), []int{aheadSize}, aheadSize, false},
		{"more than there may be misses", 4, names(7, "miss"), []int{4}, 4, true},
		{"as many as there may be misses", 4, names(4, "miss"), []int{4}, 4, false},
		{"more hits than there may be misses", 4, names(7, "hit"), []int{4, 3}, 0, false},
	} {
		h.names = nil
		d := newDNSMachine(peer{common: &cfg}, tt.pipeline)
		var u turn
		used, err := d.input(&u, tt.data)
		if err != nil {
			t.Fatal(err)
		}
		list := aheads.Get().(*[aheadSize]wire.Query)
		for i := range list {
			if list[i].Raw != nil || list[i].Name != nil {
				t.Fatalf("%s: query %d holds a buffer of the driver's", tt.name, i)
			}
		}
		aheads.Put(list)
		var sizes []int
		for _, names := range h.names {
			sizes = append(sizes, len(names))
		}
		if !slices.Equal(sizes, tt.expected) || len(u.misses) != tt.misses || u.full != tt.full {
			t.Errorf("%s: expected %v, %d misses, full %v; want %v, %d, %v",
				tt.name, sizes, len(u.misses), u.full, tt.expected, tt.misses, tt.full)
		}
		if all := used == len(tt.data); all == (tt.full || tt.name == "the last is not whole") {
			t.Errorf("%s: %d octets of %d were used", tt.name, used, len(tt.data))
		}
		for _, m := range u.misses {
			m.free()
		}
	}
}
