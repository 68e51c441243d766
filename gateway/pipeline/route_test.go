package pipeline

import (
	"context"
	"errors"
	"slices"
	"testing"

	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

func mustRoutes(t testing.TB, rules ...route.Rule) *route.Table {
	t.Helper()
	table, err := route.New(rules)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// TestRoutes shows that a question goes to the group of its name and to no other one, whatever its type and class, whichever
// way it came, and whatever the group answers: nothing that a private group does sends a question elsewhere.
func TestRoutes(t *testing.T) {
	var asked []string
	answer := func(*dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") }
	group := func(name string) Group {
		return Group{Name: name, TrustAD: name == "corp", Upstream: exchange(func(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
			asked = append(asked, name)
			return answer(req)
		})}
	}
	for _, cached := range []bool{false, true} {
		c := Config{
			Groups: []Group{group("default"), group("corp"), group("lab")},
			Routes: mustRoutes(t, route.Rule{Group: 2, Below: []string{"lab.corp.internal"}},
				route.Rule{Group: 1, Below: []string{"corp.internal", "10.in-addr.arpa"}, Exact: []string{"corp.example"}}),
		}
		if cached {
			c.Cache = mustCache(t)
		}
		p := mustNew(t, c)
		for _, tt := range []struct{ name, want string }{
			{"example.com.", "default"}, {".", "default"}, {"a.corp.example.", "default"}, {"internal.", "default"},
			{"notcorp.internal.", "default"}, {"11.in-addr.arpa.", "default"},
			{"corp.internal.", "corp"}, {"Payroll.CORP.internal.", "corp"}, {"corp.example.", "corp"}, {"1.2.0.10.in-addr.arpa.", "corp"},
			{"x.lab.corp.internal.", "lab"},
		} {
			for _, qtype := range []uint16{dns.TypeA, dns.TypePTR, dns.TypeDS, dns.TypeSOA, dns.TypeNS, 65400} {
				for _, transport := range transports {
					for name, reply := range map[string]func(*dns.Msg) (*dns.Msg, error){
						"no server": func(*dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") },
						"nonsense": func(req *dns.Msg) (*dns.Msg, error) {
							m := new(dns.Msg).SetReply(req)
							m.Question[0].Qtype++
							return m, nil
						},
						"SERVFAIL": func(req *dns.Msg) (*dns.Msg, error) { return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure), nil },
						"REFUSED":  func(req *dns.Msg) (*dns.Msg, error) { return new(dns.Msg).SetRcode(req, dns.RcodeRefused), nil },
					} {
						asked, answer = nil, reply
						if cached {
							p.cache.FlushName([]byte{0}, true) // of the SERVFAIL that was kept just before
						}
						q := query(p, transport, pack(t, dig(tt.name, qtype)))
						out, _ := ask(t, p, q)
						if !slices.Equal(asked, []string{tt.want}) {
							t.Errorf("%s %s, %s: asked %q, want %q", tt.name, dns.Type(qtype), name, asked, tt.want)
						}
						if m := checkResponse(t, q, out); m.Rcode != dns.RcodeServerFailure && m.Rcode != dns.RcodeRefused {
							t.Errorf("%s %s, %s: got %s", tt.name, dns.Type(qtype), name, dns.RcodeToString[m.Rcode])
						}
					}
				}
			}
		}
		asked = nil
		m := dig("corp.internal.", dns.TypeA)
		m.Question[0].Qclass = dns.ClassHESIOD
		ask(t, p, query(p, wire.TCP, pack(t, m)))
		if len(asked) > 0 && !slices.Equal(asked, []string{"corp"}) {
			t.Errorf("class HS: asked %q", asked)
		}
	}
}

// TestRoutesTrust shows that the AD bit is believed of the group that earned it, and of no other one.
func TestRoutesTrust(t *testing.T) {
	secure := reply(func(m *dns.Msg) { m.AuthenticatedData = true })
	p := mustNew(t, Config{
		Groups: []Group{{Upstream: secure}, {Upstream: secure, TrustAD: true}},
		Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"example.com"}}),
	})
	for name, want := range map[string]bool{"example.com.": true, "example.org.": false} {
		m := dig(name, dns.TypeA)
		m.AuthenticatedData = true
		q := query(p, wire.TCP, pack(t, m))
		out, _ := ask(t, p, q)
		if got := checkResponse(t, q, out).AuthenticatedData; got != want {
			t.Errorf("%s: got AD %v, want %v", name, got, want)
		}
	}
}
