package listen

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// crew is a missQueue whose work is to wait for a word on gate, and which remembers what became of each miss by its ID.
type crew struct {
	missQueue
	gate    chan struct{}
	done    chan uint16
	dropped []uint16
}

func newCrew(limit int) *crew {
	c := &crew{gate: make(chan struct{}), done: make(chan uint16, 10000)}
	c.init(limit,
		func(m *pending) { <-c.gate; c.done <- m.q.ID },
		func(m *pending) { c.dropped = append(c.dropped, m.q.ID) })
	return c
}

func (c *crew) ask(id int) {
	m := new(pending)
	m.q.ID, m.q.Received = uint16(id), time.Now().UnixNano()
	c.add(m)
}

func (c *crew) finished() (ids []uint16) {
	for {
		select {
		case id := <-c.done:
			ids = append(ids, id)
		default:
			return ids
		}
	}
}

func TestMissesOldestIsShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(3)
		for id := range 10 { // 0 to 2 are being answered, 7 to 9 wait
			c.ask(id)
		}
		if d := cmp.Diff(c.dropped, []uint16{3, 4, 5, 6}); d != "" {
			t.Error("shed:", d)
		}
		var got []uint16
		for range 6 { // one by one: those that wait go in the order in which they came
			synctest.Wait() // everybody stands at the gate
			c.gate <- struct{}{}
			got = append(got, <-c.done)
		}
		if d := cmp.Diff(got[3:], []uint16{7, 8, 9}); d != "" {
			t.Logf("answered: %v", got)
			t.Error("those that waited:", d)
		}
		c.finish()
		if n := c.shed.Load(); n != 4 {
			t.Errorf("%d are shed, want 4", n)
		}
	})
}

func TestMissesPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(4)
		for id := range 4 {
			c.ask(id)
		}
		c.ask(4)
		time.Sleep(time.Nanosecond)
		c.ask(5)
		time.Sleep(patience)
		c.ask(6)
		close(c.gate)
		c.finish()
		if d := cmp.Diff(c.dropped, []uint16{4}); d != "" {
			t.Error("shed:", d)
		}
		if n := len(c.finished()); n != 6 {
			t.Errorf("%d are answered, want 6", n)
		}
		if n := c.shed.Load(); n != 1 {
			t.Errorf("%d are shed, want 1", n)
		}
	})
}

// TestMissesWorkers counts goroutines: one serves misses that come one by one, a burst gets as many as it needs and may
// have, and afterwards no more stay than are worth it.
func TestMissesWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(2 * maxParked)
		count := func() (workers, parked int) {
			synctest.Wait()
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.workers, len(c.parked)
		}
		for id := range 100 {
			c.ask(id)
			c.gate <- struct{}{}
			if w, p := count(); w != 1 || p != 1 {
				t.Fatalf("%d workers, %d parked, want 1 and 1", w, p)
			}
		}
		for id := range 3 * maxParked {
			c.ask(id)
		}
		if w, p := count(); w != 2*maxParked || p != 0 {
			t.Errorf("%d workers, %d parked, want %d and 0", w, p, 2*maxParked)
		}
		close(c.gate)
		if w, p := count(); w != maxParked || p != maxParked {
			t.Errorf("%d workers, %d parked, want %d", w, p, maxParked)
		}
		if n := len(c.finished()); n != 100+3*maxParked {
			t.Errorf("%d are answered, want %d", n, 100+3*maxParked)
		}
		time.Sleep(parkFor / 2)
		c.ask(0)
		if w, p := count(); w != maxParked || p != maxParked {
			t.Errorf("%d workers, %d parked while they may stay, want %d", w, p, maxParked)
		}
		time.Sleep(parkFor/2 + 1)
		if w, p := count(); w != 1 || p != 1 {
			t.Errorf("%d workers, %d parked when the others' time is over, want the one that had work", w, p)
		}
		time.Sleep(parkFor)
		if w, p := count(); w != 0 || p != 0 {
			t.Errorf("%d workers, %d parked when nothing happens, want none", w, p)
		}
		c.ask(0) // and it goes on
		c.finish()
		if w, p := count(); w != 0 || p != 0 {
			t.Errorf("%d workers, %d parked are left", w, p)
		}
	})
}
