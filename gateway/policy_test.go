package gateway

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"dnsgateway/gateway/config"
	"dnsgateway/gateway/lab"
	"dnsgateway/gateway/route"
)

// parse reads a configuration from text.
func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	cfg, err := config.Load("-", config.Options{Stdin: strings.NewReader(text)})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestRouteRules holds what the file says against where names go.
func TestRouteRules(t *testing.T) {
	cfg := parse(t, `
upstreams:
  lab: {try: tls://10.0.1.53, private: true}
  default: [tls://9.9.9.9]
  corp: {try: tls://10.0.0.53, private: true}
  other: [tls://1.1.1.1]
rules:
  - {if: {name: [lab.corp.internal, 'fc00::/7']}, use: lab}
  - {if: {name: [Corp.internal., 172.16.0.0/12, =payroll.example, '/^hr-[a-z]+\.example$/']}, use: corp}
  - {if: {name: '/^www/'}, use: default}
  - {if: {name: .}, use: other}
`)
	index := groupIndex(cfg.Upstreams)
	if diff := cmp.Diff(map[string]int{"default": 0, "lab": 1, "corp": 2, "other": 3}, index); diff != "" {
		t.Fatalf("groups (-want +got):\n%s", diff)
	}
	table, err := route.New(routeRules(cfg.Rules, index))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"x.LAB.corp.internal.": "lab", "corp.internal.": "corp", "a.corp.internal.": "corp", "payroll.example.": "corp",
		"hr-Berlin.example.": "corp", "www.payroll.example.": "default", "1.0.16.172.in-addr.arpa.": "corp",
		"www.1.16.172.in-addr.arpa.": "corp", "1.c.f.ip6.arpa.": "lab", "1.d.f.ip6.arpa.": "lab", "www.1.e.f.ip6.arpa.": "default",
		"WWW.example.com.": "default", "example.com.": "other", ".": "other",
	} {
		wire := make([]byte, 256)
		n, err := dns.PackDomainName(name, wire, 0, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := table.Match(wire[:n]); !ok || got != index[want] {
			t.Errorf("%s: got %d, %v, want %d", name, got, ok, index[want])
		}
	}
}

// TestView changes one thing after the other: the number is another one exactly when answers may be.
func TestView(t *testing.T) {
	const base = `
upstreams:
  default: {try: [[tls://9.9.9.9#dns.quad9.net, tls://1.1.1.1], [udp://127.0.0.1:5353]]}
  corp: {try: tls://10.0.0.53}
rules:
  - {if: {name: [corp.internal, 10.0.0.0/8]}, use: corp}
  - {if: {name: =a.example}, use: corp}
`
	want := view(parse(t, base))
	for _, tt := range []struct {
		name, old, new string
		same           bool
	}{
		{"nothing", "", "", true},
		{"other lines", "upstreams:", "# a comment\n\nlog: json\nupstreams:", true},
		{"other words", "[corp.internal, 10.0.0.0/8]", "[Corp.Internal., 10.in-addr.arpa]", true},
		{"the order of groups", "  corp: {try: tls://10.0.0.53}\n", "", true}, // it is added below
		{"hedge", "[udp://127.0.0.1:5353]]", "[udp://127.0.0.1:5353]], hedge: 1s", true},
		{"breaker", "[udp://127.0.0.1:5353]]", "[udp://127.0.0.1:5353]], breaker: {probe: 1s}", true},
		{"pick and deadline", "[udp://127.0.0.1:5353]]", "[udp://127.0.0.1:5353]], pick: race, deadline: 1s", true},
		{"limits", "upstreams:", "limits: {inflight: 3}\nupstreams:", true},
		{"another server", "tls://1.1.1.1", "tls://1.0.0.1", false},
		{"another name to verify", "#dns.quad9.net", "#quad9.net", false},
		{"one server less", ", tls://1.1.1.1", "", false},
		{"another port", ":5353", ":5354", false},
		{"what is passed on", "[udp://127.0.0.1:5353]]", "[udp://127.0.0.1:5353]], next_on: timeout", false},
		{"private", "tls://10.0.0.53", "tls://10.0.0.53, private: true", false},
		{"another name", "corp.internal", "corp.example", false},
		{"another network", "10.0.0.0/8", "10.0.0.0/9", false},
		{"a name alone", "=a.example", "a.example", false},
		{"another group", "=a.example}, use: corp", "=a.example}, use: default", false},
		{"a rule more", "rules:\n", "rules:\n  - {if: {name: b.example}, use: default}\n", false},
		{"a rule less", "  - {if: {name: =a.example}, use: corp}\n", "", false},
		{"bootstrap", "upstreams:", "bootstrap: 9.9.9.10\nupstreams:", false},
	} {
		text := strings.Replace(base, tt.old, tt.new, 1)
		if tt.name == "the order of groups" {
			text = strings.Replace(text, "upstreams:\n", "upstreams:\n"+tt.old, 1)
		}
		if got := view(parse(t, text)); (got == want) != tt.same {
			t.Errorf("%s: got view %d, was %d, want the same: %v", tt.name, got, want, tt.same)
		}
	}
}

// TestPrivateGroupIsClosed asks for private names while the private group's one server is silent, refuses, fails or is dead:
// no other server hears of them, and the client gets SERVFAIL with a reason. Other names have their answer meanwhile.
func TestPrivateGroupIsClosed(t *testing.T) {
	var (
		mu    sync.Mutex
		heard []string // what the servers of the group default were asked
	)
	l, err := lab.Start(context.Background(), lab.Config{OnQuery: func(server string, raw []byte) {
		var m dns.Msg
		if server == "tier2" || m.Unpack(raw) != nil || len(m.Question) != 1 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		heard = append(heard, strings.ToLower(m.Question[0].Name))
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	g := runGateway(t, load(t, l, `
listen: dns://127.0.0.1:0
upstreams:
  corp:
    try: [{url: "`+l.Server("tier2").URL()+`", ca: ca.crt}]
    private: true
    deadline: 300ms
  default: [{url: "`+l.Server("tier1").URL()+`", ca: ca.crt}]
fallback: [{url: "`+l.Server("tier3").URL()+`", ca: ca.crt}]
rules: [{if: {name: [corp.internal, 10.0.0.0/8, load.lab.test]}, use: corp}]
admin: off
`))
	ask := func(name string, qtype uint16) *dns.Msg {
		t.Helper()
		c := dns.Client{Timeout: 5 * time.Second}
		m := new(dns.Msg).SetQuestion(name, qtype)
		m.SetEdns0(1232, true)
		resp, _, err := c.Exchange(m, g.Addrs()[0].Addr.String())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return resp
	}
	if resp := ask("a.load.lab.test.", dns.TypeA); resp.Rcode != dns.RcodeSuccess || len(resp.Answer) != 1 {
		t.Errorf("while all is well: got %v", resp)
	}
	for _, fault := range []string{"silent", "servfail", "dead", "badcert"} {
		f, err := lab.ParseFault(fault)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Server("tier2").SetFault(f); err != nil {
			t.Fatal(err)
		}
		g.cache.FlushName([]byte{0}, true) // of the SERVFAIL of the fault before, which is kept for some seconds
		for _, qtype := range []uint16{dns.TypeA, dns.TypePTR, dns.TypeDS} {
			for _, name := range []string{"corp.internal.", "Payroll.corp.internal.", "1.2.3.10.in-addr.arpa.", "b." + fault + ".load.lab.test."} {
				resp := ask(name, qtype)
				opt := resp.IsEdns0()
				if resp.Rcode != dns.RcodeServerFailure || fault != "servfail" && (opt == nil || len(opt.Option) == 0) {
					t.Errorf("%s: %s %s: got %v, want SERVFAIL with a reason", fault, name, dns.Type(qtype), resp)
				}
			}
		}
		if resp := ask("b.lab.test.", dns.TypeA); resp.Rcode != dns.RcodeSuccess || len(resp.Answer) != 1 {
			t.Errorf("%s: another name: got %v", fault, resp)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for _, name := range heard {
		if name != "b.lab.test." {
			t.Errorf("%s got out to the group default", name)
		}
	}
	if len(heard) == 0 {
		t.Error("the group default was never asked: this test proves nothing")
	}
}
