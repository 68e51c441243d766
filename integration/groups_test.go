package integration

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// TestPrivateGroup sends names to a private group by a rule: they reach no other server, whatever their type and whatever
// fails.
func TestPrivateGroup(t *testing.T) {
	s := &setup{}
	server := func(name string) string {
		return fmt.Sprintf("{url: %q, ca: %s}", s.lab.Server(name).URL(), s.file("ca.crt"))
	}
	s.start(t, func() yaml {
		return yaml{
			cache: "off",
			upstreams: "  default: {try: [[" + server("tier1") + "], [" + server("tier3") + "]]}\n" +
				"  corp: {try: [" + server("tier2") + "], private: true}",
			more: "rules: [{if: {name: [svc.lab.test, 10.0.0.0/8]}, use: corp}]\n",
		}
	})
	const dig = "dig +tries=1 +timeout=5 @127.0.0.1 -p PLAIN "
	tell(t, s, []story{
		{name: "private", line: dig + "+short SVC.lab.test TYPE65", want: []string{`alpn="h2,h3"`}},
		{name: "another", line: dig + "+short b.lab.test", want: []string{`^192\.0\.2\.10$`}},
	})
	if n := s.lab.Server("tier1").Queries(); n != 1 {
		t.Errorf("the default group was asked %d questions, want 1", n)
	}
	s.faultOf(t, "tier2", "dead")
	var stories []story
	for _, question := range []string{"svc.lab.test", "svc.lab.test DS", "x.y.svc.lab.test AAAA", "svc.lab.test SOA", "-x 10.1.2.3",
		"+tcp 10.in-addr.arpa NS"} {
		stories = append(stories, story{name: question, line: dig + question, want: []string{`status: SERVFAIL`, `EDE: 2[23] `}})
	}
	stories = append(stories, story{name: "not below it", line: dig + "+short xsvc.lab.test", not: []string{"SERVFAIL"}})
	tell(t, s, stories)
	if first, third := s.lab.Server("tier1").Queries(), s.lab.Server("tier3").Queries(); first != 2 || third != 0 {
		t.Errorf("the default group was asked %d and %d questions, want 2 and 0: private names are private", first, third)
	}
	noErrors(t, s.gateway)
}

// TestDiscover has a gateway find out from an unencrypted resolver where its encrypted one is, which is another gateway:
// questions go there, and nothing but the discovery is asked in plain DNS.
func TestDiscover(t *testing.T) {
	s := newSetup(t, yaml{})
	var mu sync.Mutex
	var asked []string
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	resolver := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		mu.Lock()
		asked = append(asked, m.Question[0].Name)
		mu.Unlock()
		r := new(dns.Msg).SetReply(m)
		rr, err := dns.NewRR(fmt.Sprintf("_dns.resolver.arpa. 300 SVCB 1 dns.lab.test. alpn=dot port=%s ipv4hint=127.0.0.1", port(s.dot)))
		if err != nil {
			t.Error(err)
			return
		}
		r.Answer = append(r.Answer, rr)
		_ = w.WriteMsg(r)
	})}
	go func() { _ = resolver.ActivateAndServe() }()
	defer func() { _ = resolver.Shutdown() }()
	addr := freePort(t)
	startGateway(t, fmt.Sprintf("listen: [dns://%s]\nupstreams: [{discover: %q, ca: %s}]\nadmin: off\nlog: json\n", addr,
		conn.LocalAddr(), s.file("ca.crt")))
	need(t, "dig")
	out, _ := run(t, "dig", "+tries=1", "+timeout=5", "@127.0.0.1", "-p", port(addr), "www.lab.test")
	if !strings.Contains(out, "192.0.2.10") {
		t.Errorf("no answer:\n%s", out)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, name := range asked {
		if name != "_dns.resolver.arpa." {
			t.Errorf("asked in plain DNS: %s", name)
		}
	}
	if len(asked) == 0 {
		t.Error("nobody asked the resolver where to go")
	}
}
