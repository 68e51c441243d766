package integration

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const (
	// faultQueries is how many questions each transport asks under each fault, faultClients how many ask at once.
	faultQueries = 1000
	faultClients = 20
	deadline     = 3 * time.Second
	// slack is what the client, the scheduler and the race detector may add to the gateway's deadline.
	slack = 500 * time.Millisecond
)

// TestFaults breaks the first tier in every way and asks over every transport: all questions are answered from the
// fallback, none later than the deadline.
func TestFaults(t *testing.T) {
	for _, fault := range []string{"dead", "silent", "badcert", "garbage", "servfail", "tlshang", "rst", "truncated",
		"wrong-id", "wrong-question", "refused", "slow:4s", "flap"} {
		t.Run(fault, func(t *testing.T) {
			s := newSetup(t, yaml{cache: "off"})
			s.fault(t, fault)
			for _, tr := range transports {
				worst := askMany(t, s, fault, tr.name, tr.dial)
				t.Logf("%-5s slowest answer of %d: %v", tr.name, faultQueries, worst.Round(time.Millisecond))
			}
			noErrors(t, s.gateway)
		})
	}
}

// askMany asks faultQueries names that were never asked before and returns how long the slowest answer took.
func askMany(t *testing.T, s *setup, fault, name string, dial func(*testing.T, *setup) client) time.Duration {
	t.Helper()
	var next, worst atomic.Int64
	var clients sync.WaitGroup
	for range faultClients {
		clients.Go(func() {
			c := dial(t, s)
			if c == nil {
				return
			}
			defer c.close()
			for {
				n := next.Add(1)
				if n > faultQueries || t.Failed() {
					return
				}
				m := new(dns.Msg).SetQuestion(fmt.Sprintf("q%d-%s.load.lab.test.", n, name), dns.TypeA)
				ctx, cancel := contextWithDeadline(t)
				begin := time.Now()
				resp, err := c.ask(ctx, m)
				took := time.Since(begin)
				cancel()
				if err != nil {
					t.Errorf("%s, %s: question %d: no answer after %v: %v", fault, name, n, took, err)
					return
				}
				if resp.Rcode != dns.RcodeSuccess || len(resp.Answer) != 1 {
					t.Errorf("%s, %s: question %d after %v: got\n%v", fault, name, n, took, resp)
					return
				}
				for old := worst.Load(); int64(took) > old && !worst.CompareAndSwap(old, int64(took)); old = worst.Load() {
				}
			}
		})
	}
	clients.Wait()
	return time.Duration(worst.Load())
}

// TestUnreadableNames has a stranger ask, as fast as it can, for names whose answers no client can read, while another
// asks for good ones: all of those are answered, and no upstream is thought to be failing.
func TestUnreadableNames(t *testing.T) {
	s := newSetup(t, yaml{cache: "off"})
	done := make(chan struct{})
	var stranger sync.WaitGroup
	for i := range 4 {
		stranger.Go(func() {
			c := dialClassic(t, s, "tcp", s.plain)
			if c == nil {
				return
			}
			defer c.close()
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				ctx, cancel := contextWithDeadline(t)
				resp, err := c.ask(ctx, new(dns.Msg).SetQuestion(fmt.Sprintf("n%d-%d.unreadable.lab.test.", i, n), dns.TypeA))
				cancel()
				if err != nil || resp.Rcode != dns.RcodeServerFailure {
					t.Errorf("unreadable name: got %v, %v, want SERVFAIL", resp, err)
					return
				}
			}
		})
	}
	for _, tr := range transports {
		askMany(t, s, "unreadable names", "unreadable-"+tr.name, tr.dial)
	}
	close(done)
	stranger.Wait()
	if status, body := get(t, "http://"+s.admin+"/readyz"); status != 200 || strings.Contains(body, `"failing"`) {
		t.Errorf("/readyz: got %d %s", status, body)
	}
	noErrors(t, s.gateway)
}
