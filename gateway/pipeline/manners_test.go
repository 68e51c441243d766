package pipeline

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/miekg/dns"
)

var signature = &dns.TSIG{
	Hdr:       dns.RR_Header{Name: "key.", Rrtype: dns.TypeTSIG, Class: dns.ClassANY},
	Algorithm: dns.HmacSHA256, TimeSigned: 1782907200, Fudge: 300, MACSize: 32,
	MAC: "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", OrigId: 7,
}

// message is raw DNS: a header with the given flags and counts, and a body.
func message(flags, qd, an, ns, ar uint16, body string) []byte {
	var b []byte
	for _, n := range []uint16{0x1234, flags, qd, an, ns, ar} {
		b = append(b, byte(n>>8), byte(n))
	}
	return append(b, body...)
}

const (
	questionA = "\x07example\x03com\x00\x00\x01\x00\x01"
	optOK     = "\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"
)

// TestManners has the cases that the gateway decides by itself, over every transport. No query leaves in any of them.
func TestManners(t *testing.T) {
	const silence = -1
	for _, tt := range []struct {
		name  string
		query *dns.Msg
		raw   []byte // instead of query
		rcode int    // or silence
		ede   []wire.EDE
		want  []string // the answer section
		last  Outcome
	}{
		{name: "a response", raw: message(0x8180, 1, 0, 0, 0, questionA), rcode: silence, last: Dropped},
		{name: "a short message", raw: []byte("\x12\x34\x01\x00"), rcode: silence, last: Dropped},
		{name: "nothing", raw: nil, rcode: silence, last: Dropped},
		{name: "no question", raw: message(0x0100, 0, 0, 0, 0, ""), rcode: dns.RcodeFormatError, last: Local},
		{name: "two questions", raw: message(0x0100, 2, 0, 0, 0, questionA+questionA), rcode: dns.RcodeFormatError, last: Local},
		{name: "a cut question", raw: message(0x0100, 1, 0, 0, 0, questionA[:9]), rcode: dns.RcodeFormatError, last: Local},
		{name: "a compressed question", raw: message(0x0100, 1, 0, 0, 0, "\xc0\x0c\x00\x01\x00\x01"),
			rcode: dns.RcodeFormatError, last: Local},
		{name: "trailing octets", raw: message(0x0100, 1, 0, 0, 0, questionA+"x"), rcode: dns.RcodeFormatError, last: Local},
		{name: "two OPT records", raw: message(0x0100, 1, 0, 0, 2, questionA+optOK+optOK), rcode: dns.RcodeFormatError, last: Local},
		{name: "OPT in the answer section", raw: message(0x0100, 1, 1, 0, 0, questionA+optOK), rcode: dns.RcodeFormatError, last: Local},
		{name: "IQUERY", query: dig("example.com.", dns.TypeA, opcode(dns.OpcodeIQuery)), rcode: dns.RcodeNotImplemented, last: Local},
		{name: "STATUS", query: dig("example.com.", dns.TypeA, opcode(dns.OpcodeStatus)), rcode: dns.RcodeNotImplemented, last: Local},
		{name: "NOTIFY", query: dig("example.com.", dns.TypeSOA, opcode(dns.OpcodeNotify)), rcode: dns.RcodeNotImplemented, last: Local},
		{name: "UPDATE", query: dig("example.com.", dns.TypeSOA, opcode(dns.OpcodeUpdate), noedns),
			rcode: dns.RcodeNotImplemented, last: Local},
		{name: "DSO", raw: message(0x3000, 0, 0, 0, 0, "\x00\x01\x00\x00"), rcode: dns.RcodeNotImplemented, last: Local},
		{name: "EDNS version 1", query: dig("example.com.", dns.TypeA, func(m *dns.Msg) { m.IsEdns0().SetVersion(1) }),
			rcode: dns.RcodeBadVers, last: Local},

		{name: "version.bind", query: dig("version.bind.", dns.TypeTXT, class(dns.ClassCHAOS)),
			want: []string{"version.bind.\t0\tCH\tTXT\t\"1.2 \\\"three\\\" \\\\\""}, last: Local},
		{name: "the letter case of version.bind", query: dig("VERSION.Bind.", dns.TypeTXT, class(dns.ClassCHAOS), noedns),
			want: []string{"VERSION.Bind.\t0\tCH\tTXT\t\"1.2 \\\"three\\\" \\\\\""}, last: Local},
		{name: "id.server is not configured", query: dig("id.server.", dns.TypeTXT, class(dns.ClassCHAOS)),
			rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "hostname.bind, old style", query: dig("hostname.bind.", dns.TypeTXT, class(dns.ClassCHAOS), noedns),
			rcode: dns.RcodeRefused, last: Local},
		{name: "version.bind ANY", query: dig("version.bind.", dns.TypeANY, class(dns.ClassCHAOS)),
			rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "an address in class CH", query: dig("example.com.", dns.TypeA, class(dns.ClassCHAOS)),
			rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "class ANY", query: dig("example.com.", dns.TypeA, class(dns.ClassANY)),
			rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "class NONE", query: dig("example.com.", dns.TypeA, class(dns.ClassNONE)),
			rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "class 0", query: dig("example.com.", dns.TypeA, class(0)), rcode: dns.RcodeFormatError, last: Local},

		{name: "AXFR", query: dig("example.com.", dns.TypeAXFR), rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "AXFR as dig sends it", query: dig("example.com.", dns.TypeAXFR, noedns, noad, norec), rcode: dns.RcodeRefused, last: Local},
		{name: "IXFR", query: dig("example.com.", dns.TypeIXFR, func(m *dns.Msg) {
			m.Ns = []dns.RR{mustRR("example.com. 0 IN SOA . . 5 0 0 0 0")}
		}), rcode: dns.RcodeRefused, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "ANY", query: dig("Example.com.", dns.TypeANY), want: []string{"Example.com.\t3600\tIN\tHINFO\t\"RFC8482\" \"\""}, last: Local},
		{name: "ANY, DO", query: dig("example.com.", dns.TypeANY, dnssec),
			want: []string{"example.com.\t3600\tIN\tHINFO\t\"RFC8482\" \"\""}, last: Local},
		{name: "ANY of the root, no EDNS", query: dig(".", dns.TypeANY, noedns), want: []string{".\t3600\tIN\tHINFO\t\"RFC8482\" \"\""}, last: Local},
		{name: "ANY of a strange name", query: dig("a\\.b\\000\\255.c\\ d.", dns.TypeANY),
			want: []string{"a\\.b\\000\\255.c\\ d.\t3600\tIN\tHINFO\t\"RFC8482\" \"\""}, last: Local},
		{name: "type 0", query: dig("example.com.", dns.TypeNone), rcode: dns.RcodeFormatError, ede: []wire.EDE{{Code: 30}}, last: Local},
		{name: "type OPT", query: dig("example.com.", dns.TypeOPT), rcode: dns.RcodeFormatError, ede: []wire.EDE{{Code: 30}}, last: Local},
		{name: "type TSIG", query: dig("example.com.", dns.TypeTSIG), rcode: dns.RcodeFormatError, ede: []wire.EDE{{Code: 30}}, last: Local},
		{name: "type NXNAME", query: dig("example.com.", dns.TypeNXNAME), rcode: dns.RcodeFormatError, ede: []wire.EDE{{Code: 30}}, last: Local},
		{name: "type TKEY", query: dig("example.com.", dns.TypeTKEY), rcode: dns.RcodeNotImplemented, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "type MAILA", query: dig("example.com.", dns.TypeMAILA), rcode: dns.RcodeNotImplemented, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "type MAILB", query: dig("example.com.", dns.TypeMAILB), rcode: dns.RcodeNotImplemented, ede: []wire.EDE{{Code: 21}}, last: Local},
		{name: "a TSIG record", query: dig("example.com.", dns.TypeA, func(m *dns.Msg) { m.Extra = append(m.Extra, signature) }),
			rcode: dns.RcodeNotAuth, last: Local},
		{name: "a TSIG record without EDNS", query: dig("example.com.", dns.TypeA, func(m *dns.Msg) { m.Extra = []dns.RR{signature} }),
			rcode: dns.RcodeNotAuth, last: Local},
	} {
		for _, transport := range transports {
			t.Run(fmt.Sprintf("%s/%v", tt.name, transport), func(t *testing.T) {
				seen := &events{}
				p := mustNew(t, Config{Groups: []Group{{Upstream: noUpstream(t)}}, Observer: seen, Chaos: map[string]string{"Version.BIND": `1.2 "three" \`}})
				raw := tt.raw
				if tt.query != nil {
					raw = pack(t, tt.query)
				}
				q := query(p, transport, raw)
				out, v := ask(t, p, q)
				if got := seen.last(t); got.outcome != tt.last || got.transport != transport {
					t.Errorf("observed %v, want the outcome %v over %v", got, tt.last, transport)
				} else if tt.rcode != silence && int(got.rcode) != tt.rcode {
					t.Errorf("observed RCODE %d, want %d", got.rcode, tt.rcode)
				}
				if tt.rcode == silence {
					if out != nil || v != wire.Dropped {
						t.Fatalf("got %x, %v, want silence", out, v)
					}
					return
				}
				got := checkResponse(t, q, out)
				if got.Rcode != tt.rcode {
					t.Errorf("got %s, want %s", dns.RcodeToString[got.Rcode], dns.RcodeToString[tt.rcode])
				}
				if diff := cmp.Diff(edes(got), tt.ede); diff != "" {
					t.Errorf("extended errors, got -, want +:\n%s", diff)
				}
				var answer []string
				for _, rr := range got.Answer {
					answer = append(answer, rr.String())
				}
				if diff := cmp.Diff(answer, tt.want); diff != "" {
					t.Errorf("answer, got -, want +:\n%s", diff)
				}
				if len(got.Ns) > 0 {
					t.Errorf("authority section: %v", got.Ns)
				}
			})
		}
	}
}

// checkResponse holds out, a response to q, to what all responses have in common, and unpacks it.
func checkResponse(t testing.TB, q *wire.Query, out []byte) *dns.Msg {
	t.Helper()
	if out == nil {
		t.Fatal("there is no response")
	}
	m := unpack(t, out)
	if !m.Response || m.Id != q.ID || m.Opcode != int(q.Opcode()) {
		t.Errorf("QR=%v, ID %d, opcode %d; want a response with ID %d and opcode %d", m.Response, m.Id, m.Opcode, q.ID, q.Opcode())
	}
	if m.Authoritative || !m.RecursionAvailable || m.Zero {
		t.Errorf("AA=%v RA=%v Z=%v, want RA only", m.Authoritative, m.RecursionAvailable, m.Zero)
	}
	if m.RecursionDesired != q.RD() || m.CheckingDisabled != q.CD() {
		t.Errorf("RD=%v CD=%v, want those of the query: %v, %v", m.RecursionDesired, m.CheckingDisabled, q.RD(), q.CD())
	}
	if m.AuthenticatedData && !q.AD() && !q.DO {
		t.Error("AD is set and nobody asked for it")
	}
	opt := m.IsEdns0()
	switch {
	case (opt != nil) != q.EDNS:
		t.Errorf("the response has OPT: %v, the query: %v", opt != nil, q.EDNS)
	case opt != nil && (opt.Version() != 0 || opt.Do() != q.DO || opt.UDPSize() != 1232):
		t.Errorf("got %v, want version 0, DO=%v and 1232 octets", opt, q.DO)
	}
	if q.Name != nil {
		if len(m.Question) != 1 || !bytes.HasPrefix(out[wire.HeaderLen:], q.Name) {
			t.Errorf("got the question %v, want it as it was asked", m.Question)
		} else if m.Question[0].Qtype != q.Qtype || m.Question[0].Qclass != q.Qclass {
			t.Errorf("got the question %v, want type %d, class %d", m.Question, q.Qtype, q.Qclass)
		}
	} else if len(m.Question) != 0 {
		t.Errorf("got the question %v, want none", m.Question)
	}
	if q.Transport == wire.UDP && len(out) > int(min(max(q.UDPSize, 512), 1232)) {
		t.Errorf("%d octets over UDP to a client that takes %d", len(out), q.UDPSize)
	}
	checkPadding(t, q, m, len(out))
	return m
}

func checkPadding(t testing.TB, q *wire.Query, m *dns.Msg, n int) {
	t.Helper()
	padded := false
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			padded = padded || o.Option() == dns.EDNS0PADDING
		}
	}
	want := q.Padding && q.Transport.Encrypted()
	if padded != want {
		t.Errorf("padded: %v, want %v", padded, want)
	}
	if want && n%468 != 0 && n < wire.MaxMessage-4 {
		t.Errorf("%d octets, want a multiple of 468", n)
	}
}

// TestQueryUpstream looks at what leaves the gateway: one fresh query, with nothing of the client's in it but the
// question, DO and CD.
func TestQueryUpstream(t *testing.T) {
	ecs := &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}}
	cookie := &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}
	padding := &dns.EDNS0_PADDING{Padding: make([]byte, 60)}
	local := &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("who asks")}
	for _, tt := range []struct {
		name         string
		query        *dns.Msg
		question     dns.Question
		wantDO, want bool // want: CD
	}{
		{name: "plain", query: dig("example.com.", dns.TypeA)},
		{name: "no EDNS", query: dig("example.com.", dns.TypeA, noedns)},
		{name: "no RD, no AD", query: dig("example.com.", dns.TypeA, norec, noad)},
		{name: "DO", query: dig("example.com.", dns.TypeDS, dnssec), wantDO: true},
		{name: "CD", query: dig("example.com.", dns.TypeA, cdflag), want: true},
		{name: "DO and CD", query: dig("example.com.", dns.TypeA, dnssec, cdflag), wantDO: true, want: true},
		{name: "options", query: dig("example.com.", dns.TypeA, bufsize(4096), option(ecs, cookie, padding, local))},
		{name: "the client's letter case", query: dig("eXaMPle.cOM.", dns.TypeA)},
		{name: "a strange name", query: dig("a\\.b\\000\\255\\\".c\\ d.", dns.TypeHTTPS)},
		{name: "the root", query: dig(".", dns.TypeNS)},
		{name: "an unknown type", query: dig("example.com.", 65280)},
		{name: "an unassigned meta type", query: dig("example.com.", 200)},
		{name: "RRSIG", query: dig("example.com.", dns.TypeRRSIG)},
		{name: "class HS", query: dig("example.com.", dns.TypeTXT, class(dns.ClassHESIOD))},
		{name: "an unknown class", query: dig("example.com.", dns.TypeA, class(4242))},
		{name: "additional records", query: dig("example.com.", dns.TypeA, additional("other. 1 IN A 192.0.2.1", "x. 1 IN TXT y"))},
		{name: "records in all sections", query: dig("example.com.", dns.TypeA, additional("other. 1 IN A 192.0.2.1"), func(m *dns.Msg) {
			m.Answer = []dns.RR{mustRR("example.com. 1 IN A 192.0.2.1")}
			m.Ns = []dns.RR{mustRR("example.com. 1 IN NS x.")}
		})},
		{name: "a SIG(0)", query: dig("example.com.", dns.TypeA, func(m *dns.Msg) {
			m.Extra = append(m.Extra, &dns.SIG{RRSIG: dns.RRSIG{
				Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSIG, Class: dns.ClassANY}, SignerName: "me.", Signature: "AAAA",
			}})
		})},
	} {
		for _, transport := range transports {
			t.Run(fmt.Sprintf("%s/%v", tt.name, transport), func(t *testing.T) {
				var sent *dns.Msg
				p := mustNew(t, Config{Cache: mustCache(t), Groups: []Group{{Upstream: exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
					if sent != nil {
						t.Errorf("a second query: %v", req)
					}
					sent = req.Copy()
					return world(ctx, req)
				})}}})
				q := query(p, transport, pack(t, tt.query))
				out, _ := ask(t, p, q)
				checkResponse(t, q, out)
				if sent == nil {
					t.Fatal("nothing was sent")
				}
				want := new(dns.Msg)
				want.RecursionDesired, want.AuthenticatedData, want.CheckingDisabled = true, true, tt.want
				want.Question = tt.query.Question
				want.SetEdns0(1232, tt.wantDO)
				if diff := cmp.Diff(sent, want, cmpopts.IgnoreFields(dns.MsgHdr{}, "Id"), cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("got -, want +:\n%s", diff)
				}
			})
		}
	}
}

// TestFreshID shows that the client's message ID does not leave.
func TestFreshID(t *testing.T) {
	ids := map[uint16]bool{}
	p := mustNew(t, Config{Groups: []Group{{Upstream: exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
		ids[req.Id] = true
		return world(ctx, req)
	})}}})
	m := dig("one.test.", dns.TypeA)
	m.Id = 4711
	for range 50 {
		q := query(p, wire.UDP, pack(t, m))
		out, _ := ask(t, p, q)
		checkResponse(t, q, out)
	}
	if len(ids) < 40 {
		t.Errorf("%d different IDs in 50 queries", len(ids))
	}
}

func TestNewRefuses(t *testing.T) {
	a := mustAccess(t, access.Config{})
	up := exchange(world)
	long := string(bytes.Repeat([]byte("x"), 64)) + ".bind"
	for _, tt := range []struct {
		name   string
		config Config
		want   string
	}{
		{"no access", Config{Groups: []Group{{Upstream: up}}}, "no access control"},
		{"no upstream", Config{Access: a}, "no upstream"},
		{"a group without upstream", Config{Access: a, Groups: []Group{{Upstream: up}, {Name: "corp"}}}, "no upstream"},
		{"a route to nowhere", Config{Access: a, Groups: []Group{{Upstream: up}},
			Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"corp.internal"}})}, "a route to group 1 of 1"},
		{"negative bound", Config{Access: a, Groups: []Group{{Upstream: up}}, Inflight: -1}, "a bound of -1 exchanges"},
		{"bad chaos name", Config{Access: a, Groups: []Group{{Upstream: up}}, Chaos: map[string]string{long: "x"}},
			fmt.Sprintf("%q is not a domain name: dns: bad rdata", long)},
		{"long chaos text", Config{Access: a, Groups: []Group{{Upstream: up}}, Chaos: map[string]string{"id.server": string(make([]byte, 1<<16))}},
			`the text of "id.server" has 65536 octets, want at most 60000`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := New(tt.config)
			if err == nil || err.Error() != tt.want || p != nil {
				t.Errorf("New = %v, %v, want the error %q", p, err, tt.want)
			}
		})
	}
}

func TestLongChaosText(t *testing.T) {
	text := string(bytes.Repeat([]byte("0123456789"), 60)) + `\"é`
	p := mustNew(t, Config{Groups: []Group{{Upstream: noUpstream(t)}}, Chaos: map[string]string{"id.server.": text}})
	q := query(p, wire.TCP, pack(t, dig("ID.server.", dns.TypeTXT, class(dns.ClassCHAOS))))
	out, _ := ask(t, p, q)
	m := checkResponse(t, q, out)
	if len(m.Answer) != 1 {
		t.Fatalf("got %v", m)
	}
	// The record's data, without the lengths of its strings.
	rdata := out[bytes.Index(out, []byte("\x00\x10\x00\x03\x00\x00\x00\x00"))+10:]
	got := ""
	for n := 0; n < 3; n++ {
		got += string(rdata[1 : 1+int(rdata[0])])
		rdata = rdata[1+int(rdata[0]):]
	}
	if got != text {
		t.Errorf("got %q, want %q", got, text)
	}
}
