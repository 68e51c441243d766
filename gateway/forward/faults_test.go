package forward

import (
	"sync"
	"testing"
	"time"
)

// TestFaultTable asks 1,000 questions of a group whose first tier has a fault, over each transport. All are answered
// within the deadline, and nothing is left behind.
func TestFaultTable(t *testing.T) {
	faults := map[string][]int32{
		"tls": {silent, hang, badCert, garbage, notDNS, wrongID, wrongName, isQuery, cutFrame, cutMessage, reset, servFail,
			refusedCode, slow, flap, truncated},
		"tcp":   {silent, garbage, reset},
		"udp":   {silent, garbage, wrongID, wrongName, servFail},
		"https": {hang, badCert, garbage, cutFrame, reset, servFail, refusedCode},
		"h3":    {hang, badCert, reset},
		"quic":  {hang, badCert, garbage, reset, servFail, flap},
	}
	for scheme, list := range faults {
		for _, fault := range list {
			t.Run(scheme+"/"+faultNames[fault], func(t *testing.T) {
				first := newFake(t, scheme, "first")
				first.fault.Store(fault)
				n := 1000
				if fault == slow {
					n = 200 // each waits for a second
				}
				faultRun(t, first.server, n, fault == slow || fault == flap)
			})
		}
		t.Run(scheme+"/dead", func(t *testing.T) {
			network := "tcp"
			if scheme == "udp" || scheme == "h3" || scheme == "quic" {
				network = "udp"
			}
			s := newFake(t, scheme, "gone").server
			s.Port = deadPort(network)
			faultRun(t, s, 1000, false)
		})
	}
}

// faultRun asks n questions, 50 at a time, of a group with first as its first tier and a well server behind it.
func faultRun(t *testing.T, first Server, n int, mayAnswer bool) {
	second := newFake(t, "tls", "second")
	if _, err := newTestClient(t, second.server).Exchange(question("warm.test.")); err != nil {
		t.Fatal(err)
	}
	noLeak(t, func() {
		g, err := NewGroup(Config{Name: "default", Tiers: [][]Server{{first}, {second.server}}})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		var (
			wg     sync.WaitGroup
			mu     sync.Mutex
			worst  time.Duration
			counts = map[string]int{}
			names  = make(chan struct{}, n)
		)
		for range n {
			names <- struct{}{}
		}
		close(names)
		for range 50 {
			wg.Go(func() {
				for range names {
					start := time.Now()
					resp, err := g.Exchange(t.Context(), question("name.test."))
					d := time.Since(start)
					mu.Lock()
					worst = max(worst, d)
					if err != nil {
						t.Error(err)
					} else {
						counts[text(resp)]++
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if counts["second"]+counts["first"] != n || counts["first"] > 0 && !mayAnswer {
			t.Errorf("got %v, want %d answers of the second tier", counts, n)
		}
		if worst > DefaultDeadline {
			t.Errorf("the slowest answer took %v, want at most %v", worst, DefaultDeadline)
		}
		t.Logf("slowest %v, %v", worst.Round(time.Millisecond), counts)
	})
}
