package lab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func testZone(t *testing.T) *zone {
	t.Helper()
	z, err := loadZone(zoneText)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

// brief is a response in one line: the RCODE, the answer records as "owner TYPE ttl", the authority records as "(...)".
func brief(m *dns.Msg) string {
	out := []string{dns.RcodeToString[m.Rcode]}
	add := func(rrs []dns.RR, form string) {
		for _, rr := range rrs {
			h := rr.Header()
			out = append(out, fmt.Sprintf(form, strings.TrimSuffix(h.Name, "lab.test.")+" "+dns.Type(h.Rrtype).String(), h.Ttl))
		}
	}
	add(m.Answer, "%s %d")
	add(m.Ns, "(%s %d)")
	return strings.Join(out, "; ")
}

func TestZone(t *testing.T) {
	z := testZone(t)
	tests := []struct {
		name   string
		rrtype uint16
		want   string
	}{
		{"lab.test.", dns.TypeA, "NOERROR;  A 300"},
		{"LAB.Test.", dns.TypeA, "NOERROR; LAB.Test. A 300"},
		{"lab.test.", dns.TypeSOA, "NOERROR;  SOA 3600"},
		{"lab.test.", dns.TypeMX, "NOERROR;  MX 3600;  MX 3600"},
		{"lab.test.", dns.TypeANY, "NOERROR;  HINFO 3600"},
		{"www.lab.test.", dns.TypeA, "NOERROR; www. CNAME 300; a. CNAME 200; b. A 100"},
		{"www.lab.test.", dns.TypeAAAA, "NOERROR; www. CNAME 300; a. CNAME 200; b. AAAA 100"},
		{"www.lab.test.", dns.TypeMX, "NOERROR; www. CNAME 300; a. CNAME 200; ( SOA 300)"},
		{"www.lab.test.", dns.TypeCNAME, "NOERROR; www. CNAME 300"},
		{"gone.lab.test.", dns.TypeA, "NXDOMAIN; gone. CNAME 300; ( SOA 300)"},
		{"bare.lab.test.", dns.TypeA, "NOERROR; bare. CNAME 300; ( SOA 300)"},
		{"circle.lab.test.", dns.TypeA, "NOERROR; circle. CNAME 300; round. CNAME 300"},
		{"nodata.lab.test.", dns.TypeA, "NOERROR; ( SOA 300)"},
		{"nxdomain.lab.test.", dns.TypeA, "NXDOMAIN; ( SOA 300)"},
		{"deep.under.nxdomain.lab.test.", dns.TypeA, "NXDOMAIN; ( SOA 300)"},
		{"ent.lab.test.", dns.TypeA, "NOERROR; ( SOA 300)"},
		{"svc.lab.test.", dns.TypeHTTPS, "NOERROR; svc. HTTPS 300"},
		{"_dns.lab.test.", dns.TypeSVCB, "NOERROR; _dns. SVCB 300; _dns. SVCB 300"},
		{"x.wild.lab.test.", dns.TypeA, "NOERROR; x.wild. A 300"},
		{"x.y.wild.lab.test.", dns.TypeTXT, "NOERROR; x.y.wild. TXT 300"},
		{"x.wild.lab.test.", dns.TypeMX, "NOERROR; ( SOA 300)"},
		{"wild.lab.test.", dns.TypeA, "NOERROR; ( SOA 300)"},
		{"x.tame.wild.lab.test.", dns.TypeA, "NXDOMAIN; ( SOA 300)"},
		{"short.lab.test.", dns.TypeA, "NOERROR; short. A 2"},
		{"zero.lab.test.", dns.TypeA, "NOERROR; zero. A 0"},
		{"unknown.lab.test.", 65280, "NOERROR; unknown. TYPE65280 300"},
		{"load.lab.test.", dns.TypeA, "NOERROR; ( SOA 300)"},
		{"n1.load.lab.test.", dns.TypeA, "NOERROR; n1.load. A 300"},
		{"a.b.load.lab.test.", dns.TypeAAAA, "NOERROR; a.b.load. AAAA 300"},
		{"n1.load.lab.test.", dns.TypeTXT, "NOERROR; ( SOA 300)"},
		{"servfail.lab.test.", dns.TypeA, "SERVFAIL"},
		{"refused.lab.test.", dns.TypeA, "REFUSED"},
		{"ede.lab.test.", dns.TypeA, "SERVFAIL"},
		{"10.2.0.192.in-addr.arpa.", dns.TypePTR, "NOERROR; 10.2.0.192.in-addr.arpa. PTR 3600"},
		{"77.2.0.192.in-addr.arpa.", dns.TypePTR, "NXDOMAIN; (2.0.192.in-addr.arpa. SOA 300)"},
		{".", dns.TypeNS, "NOERROR; . NS 86400"},
		{"example.com.", dns.TypeA, "NXDOMAIN; (. SOA 300)"},
		{"test.", dns.TypeA, "NOERROR; (. SOA 300)"},
		{"lab.test.", dns.TypeAXFR, "REFUSED"},
	}
	for _, tt := range tests {
		t.Run(tt.name+" "+dns.Type(tt.rrtype).String(), func(t *testing.T) {
			req := new(dns.Msg).SetQuestion(tt.name, tt.rrtype)
			resp, takes := z.answer(req)
			if diff := cmp.Diff(brief(resp), tt.want); diff != "" {
				t.Errorf("(-got +want):\n%s", diff)
			}
			if takes != 0 {
				t.Errorf("takes %v, want no time", takes)
			}
			if !resp.Response || !resp.RecursionAvailable || resp.Authoritative {
				t.Errorf("got flags %+v, want QR and RA and not AA", resp.MsgHdr)
			}
			again, _ := z.answer(req)
			if diff := cmp.Diff(again.String(), resp.String()); diff != "" {
				t.Errorf("the second answer differs:\n%s", diff)
			}
		})
	}
}

func TestZoneSlowNames(t *testing.T) {
	z := testZone(t)
	for _, name := range []string{"slow.lab.test.", "1.slow.lab.test.", "a.b.Slow.lab.test."} {
		resp, takes := z.answer(new(dns.Msg).SetQuestion(name, dns.TypeA))
		if takes != time.Second || len(resp.Answer) != 1 {
			t.Errorf("%s: got %v after %v, want one record after 1s", name, resp.Answer, takes)
		}
	}
}

func TestZoneRefusesWhatIsNotAQuestion(t *testing.T) {
	z := testZone(t)
	question := func(change func(*dns.Msg)) *dns.Msg {
		m := new(dns.Msg).SetQuestion("lab.test.", dns.TypeA)
		change(m)
		return m
	}
	for _, tt := range []struct {
		name string
		req  *dns.Msg
		want int
	}{
		{"UPDATE", question(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		{"no question", question(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		{"two questions", question(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		{"class CH", question(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		{"EDNS version 1", question(func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }), dns.RcodeBadVers},
	} {
		if resp, _ := z.answer(tt.req); resp.Rcode != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, dns.RcodeToString[resp.Rcode], dns.RcodeToString[tt.want])
		}
	}
}

func TestLoadNamesDiffer(t *testing.T) {
	z := testZone(t)
	seen := make(map[string]bool)
	const names = 1000
	for i := range names {
		resp, _ := z.answer(new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.load.lab.test.", i), dns.TypeA))
		a := resp.Answer[0].(*dns.A).A.String()
		if !strings.HasPrefix(a, "198.18.") && !strings.HasPrefix(a, "198.19.") {
			t.Fatalf("got address %s, want one of 198.18.0.0/15", a)
		}
		seen[a] = true
	}
	if len(seen) < names*9/10 {
		t.Errorf("got %d addresses for %d names", len(seen), names)
	}
}

func TestLoadZoneReportsItsMistakes(t *testing.T) {
	if _, err := loadZone("lab.test. 300 A not-an-address\n"); err == nil || !strings.Contains(err.Error(), "line: 1") {
		t.Errorf("got error %v, want one with the line", err)
	}
}
