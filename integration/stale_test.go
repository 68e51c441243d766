package integration

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"dnsgateway/gateway/lab"

	"github.com/miekg/dns"
)

// TestStale has every upstream go silent after an answer's time is over: dig gets the old answer after the client timer, and then at
// once, with the TTL and the extended DNS error that say so.
func TestStale(t *testing.T) {
	need(t, "dig")
	s := newSetup(t, yaml{cache: "{size: 8MB, ttl: {max: 1s, negative_max: 1s}, stale: {after: 300ms, for: 1h, ttl: 30s}, prefetch: off}"})
	dig := func(name string, more ...string) (out string, took time.Duration) {
		begin := time.Now()
		out, status := run(t, append([]string{"dig", "+tries=1", "+timeout=5", "@127.0.0.1", "-p", port(s.plain), name}, more...)...)
		if status != 0 {
			t.Fatalf("dig: exit status %d\n%s", status, out)
		}
		return out, time.Since(begin)
	}
	for _, name := range []string{"www.lab.test", "nothing.lab.test"} {
		if out, _ := dig(name); strings.Contains(out, "EDE: ") {
			t.Fatalf("a fresh answer:\n%s", out)
		}
	}
	for _, server := range s.lab.Servers() {
		s.faultOf(t, server.Name(), "silent")
	}
	for _, tt := range []struct{ name, status, ede string }{
		{"www.lab.test", "NOERROR", "EDE: 3 (Stale Answer)"},
		{"nothing.lab.test", "NXDOMAIN", "EDE: 19 (Stale NXDomain Answer)"},
	} {
		// Its time is over a second after it was asked for.
		var out string
		var took time.Duration
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && !strings.Contains(out, "EDE: "); {
			out, took = dig(tt.name)
		}
		if !strings.Contains(out, "status: "+tt.status) || !strings.Contains(strings.ToLower(out), strings.ToLower(tt.ede)) || !strings.Contains(out, "\t30\tIN\t") {
			t.Errorf("want %s, %s and a TTL of 30:\n%s", tt.status, tt.ede, out)
		}
		if took > time.Second+slack {
			t.Errorf("%s took %v with a client timer of 300 ms", tt.name, took)
		}
	}
	status, metrics := get(t, "http://"+s.admin+"/metrics")
	if status != 200 || !strings.Contains(metrics, `outcome="stale",rcode="NOERROR",transport="udp"`) {
		t.Errorf("no stale answers in the metrics: status %d", status)
	}
	noErrors(t, s.gateway)
}

// TestStaleRecovery heals the upstreams while stale answers are given: the next one is fresh, long before the 30 s of the failure
// recheck timer, though nobody asks for anything else.
func TestStaleRecovery(t *testing.T) {
	for _, fault := range []string{"silent", "dead"} {
		t.Run(fault, func(t *testing.T) {
			var s setup
			s.start(t, func() yaml {
				return yaml{cache: "{size: 8MB, ttl: {max: 1s}, stale: {after: 300ms, for: 1h, ttl: 30s}, prefetch: off}",
					upstreams: s.tiers("    deadline: 1s\n    breaker: {probe: 200ms, max_probe: 400ms}\n")}
			})
			c := dns.Client{Timeout: 5 * time.Second}
			stale := func() bool {
				m := new(dns.Msg).SetQuestion("www.lab.test.", dns.TypeA)
				m.SetEdns0(1232, false)
				resp, _, err := c.Exchange(m, s.plain)
				if err != nil {
					t.Fatal(err)
				}
				if resp.Rcode != dns.RcodeSuccess || len(resp.Answer) == 0 {
					t.Fatalf("got no answer:\n%v", resp)
				}
				return len(resp.IsEdns0().Option) > 0
			}
			if stale() {
				t.Fatal("the first answer is stale")
			}
			for _, server := range s.lab.Servers() {
				s.faultOf(t, server.Name(), fault)
			}
			for end := time.Now().Add(10 * time.Second); !stale(); {
				if time.Now().After(end) {
					t.Fatal("no stale answer")
				}
			}
			// When the question has failed, nobody waits any more.
			for quick, end := 0, time.Now().Add(10*time.Second); quick < 10; {
				begin := time.Now()
				if !stale() || begin.After(end) {
					t.Fatal("want stale answers at once")
				}
				if quick++; time.Since(begin) > 200*time.Millisecond {
					quick = 0
				}
			}
			for _, server := range s.lab.Servers() {
				s.faultOf(t, server.Name(), "ok")
			}
			healed := time.Now()
			for stale() {
				if time.Since(healed) > 5*time.Second+slack {
					t.Fatal("the answers are still stale")
				}
			}
			t.Logf("fresh %v after the upstreams were well", time.Since(healed).Round(time.Millisecond))
			noErrors(t, s.gateway)
		})
	}
}

// TestNXDomainCut asks for a name that does not exist, and then, with all upstreams dead, for its other types and for names below it.
func TestNXDomainCut(t *testing.T) {
	s := newSetup(t, yaml{})
	const dig = "dig +tries=1 +timeout=5 @127.0.0.1 -p PLAIN "
	tell(t, s, []story{{name: "asked for", line: dig + "nothing.lab.test", want: []string{`status: NXDOMAIN`, `lab\.test\.\s+\d+\sIN\sSOA`}}})
	for _, server := range s.lab.Servers() {
		s.faultOf(t, server.Name(), "dead")
	}
	tell(t, s, []story{
		{name: "another type", line: dig + "nothing.lab.test AAAA", want: []string{`status: NXDOMAIN`, `lab\.test\.\s+\d+\sIN\sSOA`}},
		{name: "below", line: dig + "+tcp a.very.Long.name.nothing.lab.test TXT", want: []string{
			`status: NXDOMAIN`, `^;a\.very\.Long\.name\.nothing\.lab\.test\.\s+IN\sTXT`, `^lab\.test\.\s+\d+\sIN\sSOA`}},
		{name: "beside", line: dig + "other.lab.test", want: []string{`status: SERVFAIL`}},
	})
}

// TestCoalesce has 200 clients ask the same missing name in letter cases of their own while the upstream is slow: it is asked once, and
// each gets its own answer.
func TestCoalesce(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	l, err := lab.Start(context.WithoutCancel(t.Context()), lab.Config{OnQuery: func(_ string, raw []byte) {
		var m dns.Msg
		if m.Unpack(raw) == nil && len(m.Question) == 1 && strings.EqualFold(m.Question[0].Name, "crowd.load.lab.test.") {
			mu.Lock()
			asked++
			mu.Unlock()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	slow, err := lab.ParseFault("slow:300ms")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Servers()[0].SetFault(slow); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, dir+"/ca.crt", string(l.CAPEM()))
	plain := freePort(t)
	g := startGateway(t, fmt.Sprintf("listen: dns://%s\nupstreams: {default: {try: [{url: %q, ca: %s/ca.crt}]}}\nadmin: off\n",
		plain, l.Servers()[0].URL(), dir))
	var clients sync.WaitGroup
	for i := range 200 {
		clients.Go(func() {
			name := "crowd.load.lab.test."
			for bit := range 5 {
				if i>>bit&1 == 1 {
					name = name[:bit] + strings.ToUpper(name[bit:bit+1]) + name[bit+1:]
				}
			}
			m := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
			network := []string{"udp", "tcp"}[i%2]
			c := dns.Client{Net: network, Timeout: 5 * time.Second}
			resp, _, err := c.Exchange(m, plain)
			if err != nil {
				t.Errorf("%s over %s: %v", name, network, err)
				return
			}
			if resp.Id != m.Id || resp.Question[0] != m.Question[0] || resp.Rcode == dns.RcodeServerFailure {
				t.Errorf("%s over %s: got\n%v", name, network, resp)
			}
		})
	}
	clients.Wait()
	mu.Lock()
	defer mu.Unlock()
	if asked != 1 {
		t.Errorf("the upstream was asked %d times, want once", asked)
	}
	noErrors(t, g)
}
