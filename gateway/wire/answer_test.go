package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/miekg/dns"
)

var shape = Shape{UDPSize: 1232, Keepalive: 300, PadBlock: 468}

// response makes a response to name and type out of records in presentation form; a line "--" starts the next section.
func response(t testing.TB, name string, qtype uint16, records string) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.Response, m.Compress = true, true
	sections := []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra}
	for line := range strings.Lines(records) {
		switch line = strings.TrimSpace(line); line {
		case "":
		case "--":
			sections = sections[1:]
		default:
			rr, err := dns.NewRR(line)
			if err != nil {
				t.Fatal(err)
			}
			*sections[0] = append(*sections[0], rr)
		}
	}
	return m
}

func answer(t testing.TB, m *dns.Msg) *Answer {
	t.Helper()
	a, _, err := ReadAnswer(pack(t, m))
	if err != nil {
		t.Fatalf("%v in\n%v", err, m)
	}
	return a
}

// query makes a question over transport, changed by the functions.
func query(t testing.TB, transport Transport, name string, qtype uint16, change ...func(*dns.Msg)) *Query {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	for _, f := range change {
		f(m)
	}
	q := &Query{Transport: transport}
	q.Parse(pack(t, m))
	return q
}

func edns(size uint16, do bool, options ...dns.EDNS0) func(*dns.Msg) {
	return func(m *dns.Msg) {
		m.SetEdns0(size, do)
		m.IsEdns0().Option = options
	}
}

func setAD(m *dns.Msg) { m.AuthenticatedData = true }

func unpack(t testing.TB, raw []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		t.Fatalf("%v in % x", err, raw)
	}
	return m
}

func TestAppendAnswerHeader(t *testing.T) {
	const a = "www.example.org. 300 A 192.0.2.1"
	noRD := func(m *dns.Msg) { m.RecursionDesired = false }
	cd := func(m *dns.Msg) { m.CheckingDisabled = true }
	type header struct {
		RD, CD, AD, TC, EDNS, DO bool
	}
	tests := []struct {
		name   string
		secure bool
		tc     bool
		change []func(*dns.Msg)
		want   header
	}{
		{"plain", false, false, nil, header{RD: true}},
		{"no RD", false, false, []func(*dns.Msg){noRD}, header{}},
		{"CD", false, false, []func(*dns.Msg){cd}, header{RD: true, CD: true}},
		{"EDNS", false, false, []func(*dns.Msg){edns(4096, false)}, header{RD: true, EDNS: true}},
		{"DO", false, false, []func(*dns.Msg){edns(4096, true)}, header{RD: true, EDNS: true, DO: true}},
		{"AD asked, not secure", false, false, []func(*dns.Msg){setAD}, header{RD: true}},
		{"secure, AD not asked", true, false, []func(*dns.Msg){edns(4096, false)}, header{RD: true, EDNS: true}},
		{"secure, AD asked", true, false, []func(*dns.Msg){setAD}, header{RD: true, AD: true}},
		{"secure, DO", true, false, []func(*dns.Msg){edns(4096, true)}, header{RD: true, AD: true, EDNS: true, DO: true}},
		{"upstream truncated", false, true, nil, header{RD: true, TC: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := response(t, "www.example.org.", dns.TypeA, a)
			m.Authoritative, m.AuthenticatedData, m.Zero, m.CheckingDisabled = true, true, true, true // nothing of it passes
			m.Truncated = tt.tc
			ans := answer(t, m)
			ans.Secure = tt.secure
			q := query(t, UDP, "wWw.eXample.ORG.", dns.TypeA, tt.change...)
			got := unpack(t, shape.AppendAnswer(nil, q, ans, 0))
			if got.Id != q.ID || !got.Response || !got.RecursionAvailable || got.Authoritative || got.Zero || got.Rcode != 0 {
				t.Errorf("got\n%v", got)
			}
			h := header{RD: got.RecursionDesired, CD: got.CheckingDisabled, AD: got.AuthenticatedData, TC: got.Truncated}
			if o := got.IsEdns0(); o != nil {
				h.EDNS, h.DO = true, o.Do()
				if o.UDPSize() != 1232 || o.Version() != 0 || o.Z() != 0 || len(o.Option) != 0 {
					t.Errorf("got %v", o)
				}
			}
			if diff := cmp.Diff(h, tt.want); diff != "" {
				t.Errorf("(-got +want)\n%s", diff)
			}
			if want := "wWw.eXample.ORG."; got.Question[0].Name != want || got.Answer[0].Header().Name != want {
				t.Errorf("got %v, want the spelling %v", got, want)
			}
		})
	}
}

func TestAppendAnswerAge(t *testing.T) {
	m := response(t, "a.example.", dns.TypeA, `
		a.example. 300 CNAME b.example.
		b.example. 20 A 192.0.2.1
		--
		example. 4000000000 NS ns.example.
		--
		ns.example. 2147483647 A 192.0.2.2`)
	a := answer(t, m)
	q := query(t, UDP, "a.example.", dns.TypeA, edns(1232, true))
	for _, tt := range []struct {
		age  uint32
		want []uint32
	}{
		{0, []uint32{300, 20, 0, 2147483647}}, // RFC 2181, section 8: 4000000000 is 0
		{1, []uint32{299, 19, 0, 2147483646}},
		{20, []uint32{280, 0, 0, 2147483627}},
		{21, []uint32{279, 0, 0, 2147483626}},
		{4294967295, []uint32{0, 0, 0, 0}},
	} {
		got := unpack(t, shape.AppendAnswer(nil, q, a, tt.age))
		var ttls []uint32
		for _, rr := range slices.Concat(got.Answer, got.Ns, got.Extra[:1]) {
			ttls = append(ttls, rr.Header().Ttl)
		}
		if diff := cmp.Diff(ttls, tt.want); diff != "" {
			t.Errorf("age %d (-got +want)\n%s", tt.age, diff)
		}
		if opt := got.IsEdns0(); opt == nil || opt.Hdr.Ttl != 1<<15 {
			t.Errorf("age %d: the OPT record aged: %v", tt.age, opt)
		}
	}
}

func TestAppendAnswerOtherQuestion(t *testing.T) {
	a := answer(t, response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1"))
	got := unpack(t, shape.AppendAnswer(nil, query(t, UDP, "longer.example.", dns.TypeA), a, 0))
	if got.Rcode != dns.RcodeServerFailure || len(got.Answer) != 0 || got.Question[0].Name != "longer.example." {
		t.Errorf("got\n%v", got)
	}
}

func TestExtendedErrors(t *testing.T) {
	m := response(t, "a.example.", dns.TypeA, "")
	m.SetEdns0(4096, false)
	m.Rcode = dns.RcodeBadCookie // 23, an extended one
	long := strings.Repeat("é", 300)
	m.IsEdns0().Option = []dns.EDNS0{
		&dns.EDNS0_NSID{Nsid: "61"},
		&dns.EDNS0_EDE{InfoCode: 6, ExtraText: "bogus\x00"},
		&dns.EDNS0_EDE{InfoCode: 22},
		&dns.EDNS0_EDE{InfoCode: 7, ExtraText: "a\xffb"},
		&dns.EDNS0_EDE{InfoCode: 8, ExtraText: long},
	}
	a := answer(t, m)
	want := []EDE{{6, "bogus"}, {22, ""}, {7, "a\uFFFDb"}, {8, strings.Repeat("é", 127)}}
	if diff := cmp.Diff(a.EDE, want); diff != "" || a.Rcode != 23 {
		t.Errorf("rcode %d (-got +want)\n%s", a.Rcode, diff)
	}

	got := unpack(t, shape.AppendAnswer(nil, query(t, UDP, "a.example.", dns.TypeA, edns(1232, false)), a, 0))
	if diff := cmp.Diff(errorsOf(got), want); diff != "" || got.Rcode != 23 {
		t.Errorf("rcode %d (-got +want)\n%s", got.Rcode, diff)
	}
	got = unpack(t, shape.AppendAnswer(nil, query(t, UDP, "a.example.", dns.TypeA), a, 0))
	if got.IsEdns0() != nil || got.Rcode != dns.RcodeServerFailure {
		t.Errorf("without EDNS: got\n%v", got)
	}

	for range 20 {
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_EDE{InfoCode: 1})
	}
	if got := len(answer(t, m).EDE); got != maxEDE {
		t.Errorf("%d errors are kept, want %d", got, maxEDE)
	}
}

func errorsOf(m *dns.Msg) []EDE {
	var list []EDE
	for _, o := range m.IsEdns0().Option {
		if e, ok := o.(*dns.EDNS0_EDE); ok {
			list = append(list, EDE{e.InfoCode, e.ExtraText})
		}
	}
	return list
}

// TestErrorsBeforeAnswers fills a response until not all fits: extended errors go first.
func TestErrorsBeforeAnswers(t *testing.T) {
	for n := 1; n < 80; n++ {
		m := response(t, "a.example.", dns.TypeA, "")
		for i := range n {
			rr, _ := dns.NewRR(fmt.Sprintf("a.example. 60 A 192.0.2.%d", i))
			m.Answer = append(m.Answer, rr)
		}
		a := answer(t, m)
		a.EDE = []EDE{{3, strings.Repeat("x", 100)}, {4, strings.Repeat("y", 50)}}
		raw := shape.AppendAnswer(nil, query(t, UDP, "a.example.", dns.TypeA, edns(1232, false)), a, 0)
		got := unpack(t, raw)
		base := len(a.Msg) + optLen
		want := 2
		if base+6+100+6+50 > 1232 {
			want = 1
		}
		if base+6+100 > 1232 {
			want = 0
		}
		if got := len(errorsOf(got)); got != want && base <= 1232 { // what is left of a truncated response has room again
			t.Errorf("%d records, %d octets: %d errors, want %d", n, len(raw), got, want)
		}
		if full := base <= 1232; full == got.Truncated || full != (len(got.Answer) == n) {
			t.Errorf("%d records, %d octets: %d records, TC %v", n, base, len(got.Answer), got.Truncated)
		}
	}
}

func TestAppendError(t *testing.T) {
	none := []EDE(nil)
	tests := []struct {
		name  string
		q     *Query
		rcode uint16
		ede   []EDE
		want  []EDE
	}{
		{"no EDNS", query(t, UDP, "A.example.", dns.TypeA), RcodeRefused, []EDE{{18, "no"}}, none},
		{"EDNS", query(t, UDP, "A.example.", dns.TypeA, edns(1232, false)), RcodeServFail, []EDE{{22, "none"}, {23, ""}}, []EDE{{22, "none"}, {23, ""}}},
		{"no room", query(t, UDP, "A.example.", dns.TypeA, edns(512, true)), RcodeServFail,
			[]EDE{{22, strings.Repeat("a", 250)}, {23, strings.Repeat("b", 250)}}, []EDE{{22, strings.Repeat("a", 250)}}},
		{"long text", query(t, TCP, "A.example.", dns.TypeA, edns(512, true)), RcodeServFail,
			[]EDE{{22, strings.Repeat("ü", 40000)}}, []EDE{{22, strings.Repeat("ü", 127)}}},
		{"BADVERS", query(t, UDP, "A.example.", dns.TypeA, edns(512, true)), RcodeBadVers, none, none},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw := shape.AppendError([]byte("xy"), tt.q, tt.rcode, tt.ede...)[2:]
			got := unpack(t, raw)
			if got.Rcode != int(tt.rcode) || got.Id != tt.q.ID || got.Question[0].Name != "A.example." || (got.IsEdns0() != nil) != tt.q.EDNS {
				t.Errorf("got\n%v", got)
			}
			if got.IsEdns0() == nil {
				return
			}
			if diff := cmp.Diff(errorsOf(got), tt.want); diff != "" || got.IsEdns0().Do() != tt.q.DO {
				t.Errorf("(-got +want)\n%s", diff)
			}
		})
	}

	var q Query
	q.Parse(unhex(t, "abcd 2a30 0000 0000 0000 0000")) // an UPDATE without anything; TC and AD do not come back
	want := unhex(t, "abcd a890 0000 0000 0000 0000")
	want[2], want[3] = 0xa8, 0x94
	if got := shape.AppendError(nil, &q, RcodeNotImp); !bytes.Equal(got, want) {
		t.Errorf("got % x, want % x", got, want)
	}
}

func TestAppendTruncated(t *testing.T) {
	got := unpack(t, shape.AppendTruncated(nil, query(t, UDP, "A.example.", dns.TypeA, edns(1232, true), setAD)))
	if !got.Truncated || got.Rcode != 0 || got.IsEdns0() == nil || got.Question[0].Name != "A.example." || got.AuthenticatedData {
		t.Errorf("got\n%v", got)
	}
}

func TestKeepalive(t *testing.T) {
	a := answer(t, response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1"))
	for tr := range NumTransports {
		for _, asked := range []bool{false, true} {
			var options []dns.EDNS0
			if asked {
				options = append(options, &dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE})
			}
			q := query(t, tr, "a.example.", dns.TypeA, edns(1232, false, options...))
			if q.Keepalive != asked {
				t.Fatalf("%v: the query has keepalive %v, want %v", tr, q.Keepalive, asked)
			}
			want := asked && (tr == TCP || tr == DoT)
			for _, s := range []Shape{shape, {UDPSize: 1232}} {
				got := unpack(t, s.AppendAnswer(nil, q, a, 0)).IsEdns0().Option
				if s.Keepalive == 0 && len(got) > 0 || s.Keepalive > 0 && (len(got) == 1) != want {
					t.Errorf("%v, asked %v, shape %v: got %v", tr, asked, s, got)
				}
				if len(got) == 1 && got[0].(*dns.EDNS0_TCP_KEEPALIVE).Timeout != 300 {
					t.Errorf("%v: got %v", tr, got[0])
				}
			}
		}
	}
}

// sized returns an answer whose message is n octets long.
func sized(t *testing.T, n int) *Answer {
	t.Helper()
	m := response(t, "a.example.", dns.TypeNULL, "")
	base := m.Len()
	for n > base {
		room := n - base - 12 // a record with a compressed owner name
		if room < 0 {
			t.Fatalf("no answer of %d octets", n)
		}
		size := min(room, 60000)
		if rest := room - size; rest > 0 && rest < 12 {
			size -= 12
		}
		m.Answer = append(m.Answer, &dns.NULL{
			Hdr:  dns.RR_Header{Name: "a.example.", Rrtype: dns.TypeNULL, Class: dns.ClassINET, Ttl: 60},
			Data: strings.Repeat("x", size),
		})
		base += 12 + size
	}
	a := answer(t, m)
	if len(a.Msg) != n {
		t.Fatalf("got %d octets, want %d", len(a.Msg), n)
	}
	return a
}

func TestPadding(t *testing.T) {
	padding := &dns.EDNS0_PADDING{Padding: make([]byte, 3)}
	for tr := range NumTransports {
		for _, asked := range []bool{false, true} {
			var options []dns.EDNS0
			if asked {
				options = append(options, padding)
			}
			q := query(t, tr, "a.example.", dns.TypeNULL, edns(1232, false, options...))
			for _, n := range []int{100, 468 - 16, 468 - 15, 468 - 14, 468 - 11, 468, 936 - 15, 1000} {
				raw := shape.AppendAnswer([]byte("ab"), q, sized(t, n), 1)[2:]
				want := n + optLen
				if asked && tr.Encrypted() {
					want = (n + optLen + 4 + 467) / 468 * 468
				}
				if len(raw) != want {
					t.Errorf("%v, asked %v, %d octets: got %d, want %d", tr, asked, n, len(raw), want)
				}
				unpack(t, raw)
			}
		}
	}
	q := query(t, DoT, "a.example.", dns.TypeNULL, edns(1232, false, padding))
	for _, tt := range []struct{ octets, want int }{
		{65520 - 15, 65520},
		{65520 - 14, 65535},
		{65535 - 15, 65535},
		{65535 - 14, 65535 - 14 + 11}, // no room for the option
		{65535 - 11, 65535},
	} {
		raw := shape.AppendAnswer(nil, q, sized(t, tt.octets), 1)
		if got := unpack(t, raw); len(raw) != tt.want || got.Truncated {
			t.Errorf("%d octets: got %d, want %d, TC %v", tt.octets, len(raw), tt.want, got.Truncated)
		}
	}
	// Used memory must not leak into the padding, RFC 7830, section 3.
	dirty := bytes.Repeat([]byte{0xaa}, 1000)
	raw := shape.AppendError(dirty[:0], q, RcodeServFail)
	if tail := raw[len(raw)-400:]; !bytes.Equal(tail, make([]byte, 400)) {
		t.Errorf("padding is % x", tail)
	}
	// One octet more than a message with an OPT record can have: the answer gives way.
	raw = shape.AppendAnswer(nil, q, sized(t, 65535-10), 1)
	if got := unpack(t, raw); !got.Truncated || got.IsEdns0() == nil || len(raw)%468 != 0 {
		t.Errorf("got %d octets\n%v", len(raw), got)
	}
}

func TestTruncation(t *testing.T) {
	sig := func(name, typ string) string {
		return name + " 60 RRSIG " + typ + " 13 2 60 20300101000000 20200101000000 1 example. " + strings.Repeat("A", 84) + "AA=="
	}
	many := func(name string, n int) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprintf("%s 60 A 192.0.2.%d", name, i))
		}
		return list
	}
	lines := func(parts ...any) string {
		var b strings.Builder
		for _, p := range parts {
			switch p := p.(type) {
			case string:
				b.WriteString(p + "\n")
			case []string:
				b.WriteString(strings.Join(p, "\n") + "\n")
			}
		}
		return b.String()
	}
	cname := "a.example. 60 CNAME b.example."
	ns := "example. 60 NS ns.example."
	type kept struct {
		Answer, Ns, Extra int
		TC                bool
	}
	tests := []struct {
		name    string
		records string
		edns    bool
		want    kept
	}{
		{"all fits", lines(many("a.example.", 29)), false, kept{29, 0, 0, false}},                        // 12+15+29*16 = 491
		{"one RRset", lines(many("a.example.", 31)), false, kept{0, 0, 0, true}},                         // 523
		{"one RRset that fits without OPT", lines(many("a.example.", 30)), false, kept{30, 0, 0, false}}, // 507
		{"one RRset that does not fit with OPT", lines(many("a.example.", 30)), true, kept{0, 0, 0, true}},
		{"chain", lines(cname, many("b.example.", 31)), false, kept{1, 0, 0, true}},
		{"chain with signatures", lines(cname, sig("a.example.", "CNAME"), many("b.example.", 22), sig("b.example.", "A")), false, kept{2, 0, 0, true}},
		{"signatures at the end", lines(cname, many("b.example.", 22), sig("a.example.", "CNAME"), sig("b.example.", "A")), false, kept{0, 0, 0, true}},
		{"letter case does not part an RRset", lines(many("a.example.", 25), many("A.EXAMPLE.", 7)), false, kept{0, 0, 0, true}},
		{"authority goes before the answer", lines(many("a.example.", 28), "--", ns, sig("example.", "NS")), false, kept{28, 0, 0, true}},
		{"additional goes without TC", lines(many("a.example.", 20), "--", ns, "--", many("ns.example.", 10)), false, kept{20, 1, 0, false}},
		{"additional in part", lines(many("a.example.", 20), "--", ns, "--", many("ns.example.", 2), many("ns2.example.", 9)), false, kept{20, 1, 2, false}},
		{"same set in two sections", lines(many("a.example.", 20), "--", "--", many("a.example.", 12)), false, kept{20, 0, 0, false}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := answer(t, response(t, "a.example.", dns.TypeA, tt.records))
			for _, size := range []uint16{0, 1, 512} {
				q := query(t, UDP, "a.example.", dns.TypeA)
				if tt.edns {
					q = query(t, UDP, "a.example.", dns.TypeA, edns(size, false))
				}
				raw := shape.AppendAnswer(nil, q, a, 0)
				got := unpack(t, raw)
				k := kept{len(got.Answer), len(got.Ns), len(got.Extra) - btoi(tt.edns), got.Truncated}
				if diff := cmp.Diff(k, tt.want); diff != "" || len(raw) > 512 {
					t.Errorf("%d octets (-got +want)\n%s", len(raw), diff)
				}
				s := Shape{UDPSize: size} // ours is the smaller one
				q = query(t, UDP, "a.example.", dns.TypeA, edns(4096, false))
				if raw := s.AppendAnswer(nil, q, a, 0); len(raw) > 512 {
					t.Errorf("%d octets, want at most 512", len(raw))
				}
			}
			if got := unpack(t, shape.AppendAnswer(nil, query(t, TCP, "a.example.", dns.TypeA), a, 0)); got.Truncated {
				t.Errorf("truncated over TCP:\n%v", got)
			}
		})
	}
}

// TestTruncationLaws cuts random answers at every size: whole RRsets, the longest part that fits.
func TestTruncationLaws(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		m := response(t, "q.example.", dns.TypeA, "")
		for _, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
			for range rnd.IntN(12) {
				name := fmt.Sprintf("%c.Example.", 'a'+rnd.IntN(4))
				text := name + " 60 A 192.0.2.1"
				switch rnd.IntN(3) {
				case 0:
					text = name + " 60 TXT " + strings.Repeat("x", rnd.IntN(200)+1)
				case 1:
					text = name + " 60 RRSIG A 13 2 60 20300101000000 20200101000000 1 example. AAAA"
				}
				rr, err := dns.NewRR(text)
				if err != nil {
					t.Fatal(err)
				}
				*section = append(*section, rr)
			}
		}
		a := answer(t, m)
		full := unpack(t, a.Msg)
		before := -1
		for size := uint16(512); size < 2600; size += 37 {
			s := Shape{UDPSize: 65535}
			raw := s.AppendAnswer(nil, query(t, UDP, "q.example.", dns.TypeA, edns(size, false)), a, 0)
			got := unpack(t, raw)
			if len(raw) > int(size) {
				t.Fatalf("%d octets, want at most %d", len(raw), size)
			}
			checkWhole(t, got, full)
			n := len(got.Answer) + len(got.Ns) + len(got.Extra)
			if n < before {
				t.Fatalf("size %d: %d records, fewer than with less room, %d", size, n, before)
			}
			before = n
		}
	}
}

// checkWhole checks that got is the beginning of full, cut between RRsets.
func checkWhole(t *testing.T, got, full *dns.Msg) {
	t.Helper()
	got.Extra = slices.DeleteFunc(got.Extra, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeOPT })
	set := func(rr dns.RR) string {
		typ := rr.Header().Rrtype
		if s, ok := rr.(*dns.RRSIG); ok {
			typ = s.TypeCovered
		}
		return strings.ToLower(rr.Header().Name) + dns.TypeToString[typ]
	}
	short := false
	for i, pair := range [][2][]dns.RR{{got.Answer, full.Answer}, {got.Ns, full.Ns}, {got.Extra, full.Extra}} {
		g, f := pair[0], pair[1]
		if short && len(g) > 0 {
			t.Fatalf("section %d has records although one before it is short", i)
		}
		seen := map[string]bool{}
		for j := range g {
			if g[j].String() != f[j].String() {
				t.Fatalf("got %v, want %v", g[j], f[j])
			}
			seen[set(g[j])] = true
		}
		for _, rr := range f[len(g):] {
			if seen[set(rr)] {
				t.Fatalf("RRset %s is torn:\n%v", set(rr), got)
			}
		}
		short = short || len(g) < len(f)
		if i == 1 && got.Truncated != short {
			t.Fatalf("TC is %v, want %v", got.Truncated, short)
		}
	}
}

func TestNewAnswerTakesOPTOut(t *testing.T) {
	const records = `
		a.example. 60 A 192.0.2.1
		--
		example. 60 NS ns.other.test.
		--
		ns.other.test. 60 A 192.0.2.2
		ns.other.test. 60 AAAA 2001:db8::1
		ns.other.test. 60 RRSIG A 13 2 60 20300101000000 20200101000000 1 test. AAAA
		mx.third.test. 60 A 192.0.2.3
		mx.third.test. 60 A 192.0.2.4
		mx.third.test. 60 MX 10 mx.third.test.
		mx.third.test. 60 A 192.0.2.5`
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: 6}}
	want := response(t, "a.example.", dns.TypeA, records)
	for at := range len(want.Extra) + 1 {
		for _, tsig := range []bool{false, true} {
			m := want.Copy()
			m.Extra = slices.Insert(m.Extra, at, dns.RR(opt))
			if tsig {
				m.Extra = append(m.Extra, &dns.TSIG{Hdr: dns.RR_Header{Name: "key.", Rrtype: dns.TypeTSIG, Class: dns.ClassANY}, Algorithm: "hmac-sha256."})
			}
			a := answer(t, m)
			got := unpack(t, a.Msg)
			keep := len(want.Extra)
			if at <= 5 {
				keep = 5 // the MX record, which has a name inside, cannot be moved
			}
			text := func(list []dns.RR) string { return fmt.Sprint(list) }
			if text(got.Answer) != text(want.Answer) || text(got.Ns) != text(want.Ns) || text(got.Extra) != text(want.Extra[:keep]) {
				t.Errorf("OPT at %d, TSIG %v: got\n%v", at, tsig, got)
			}
			if len(a.EDE) != 1 || len(a.TTLs) != 2+keep {
				t.Errorf("OPT at %d: got %d errors, %d TTLs", at, len(a.EDE), len(a.TTLs))
			}
		}
	}
}

// TestMoveUpPointers has owner names that no server should send.
func TestMoveUpPointers(t *testing.T) {
	const head = "1234 8180 0001 0000 0000 0002  01 61 00 0001 0001 " // 19 octets
	const opt = "00 0029 04d0 00000000 0000 "                         // 19 to 30
	const rest = " 0001 0001 00000001 0004 7f000001"
	for _, tt := range []struct {
		name, owner string
		records     int
		want        string
	}{
		{"plain", "01 62 00", 1, "01 62 00"},
		{"plain, octets like a pointer", "02 61 ff 00", 1, "02 61 ff 00"},
		{"root", "00", 1, "00"},
		{"question", "c00c", 1, "c00c"},
		{"label and question", "01 62 c00c", 1, "01 62 c00c"},
		{"into the OPT record", "c014", 0, ""},
	} {
		a, _, err := ReadAnswer(unhex(t, head+opt+tt.owner+rest))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		want := unhex(t, head+tt.want)
		want[11] = byte(tt.records)
		if tt.records > 0 {
			want = append(want, unhex(t, rest)...)
		}
		if !bytes.Equal(a.Msg, want) {
			t.Errorf("%s: got % x, want % x", tt.name, a.Msg, want)
		}
	}
}

func TestNewAnswerErrors(t *testing.T) {
	const question = "01 61 00 0001 0001 "
	tests := []struct {
		name, raw string
		want      error
	}{
		{"nothing", "", errHeader},
		{"short", "1234 8180 0001 0000 0000 00", errHeader},
		{"a query", "1234 0100 0001 0000 0000 0000" + question, errHeader},
		{"opcode", "1234 a980 0001 0000 0000 0000" + question, errHeader},
		{"no question", "1234 8180 0000 0000 0000 0000", errQuestion},
		{"two questions", "1234 8180 0002 0000 0000 0000" + question + question, errQuestion},
		{"pointer in the question", "1234 8180 0001 0000 0000 0000 01 61 c000 0001 0001", errQuestion},
		{"question runs out", "1234 8180 0001 0000 0000 0000 01 61 00 0001", errQuestion},
		{"too many records", "1234 8180 0001 0002 0000 0000" + question + "c00c 0001 0001 00000001 0004 7f000001", errRecord},
		{"too few records", "1234 8180 0001 0000 0000 0000" + question + "c00c 0001 0001 00000001 0004 7f000001", errTrailing},
		{"RDLENGTH", "1234 8180 0001 0001 0000 0000" + question + "c00c 0001 0001 00000001 0005 7f000001", errRecord},
		{"half a record", "1234 8180 0001 0001 0000 0000" + question + "c00c 0001 0001 0000", errRecord},
		{"half a pointer", "1234 8180 0001 0001 0000 0000" + question + "c0", errRecord},
		{"OPT as answer", "1234 8180 0001 0001 0000 0000" + question + "00 0029 04d0 00000000 0000", errOPT},
		{"two OPTs", "1234 8180 0001 0000 0000 0002" + question + "00 0029 04d0 00000000 0000 00 0029 04d0 00000000 0000", errOPT},
		{"OPT with owner", "1234 8180 0001 0000 0000 0001" + question + "c00c 0029 04d0 00000000 0000", errOPT},
		{"OPT with half an option", "1234 8180 0001 0000 0000 0001" + question + "00 0029 04d0 00000000 0005 000f 0002 00", errOPT},
		{"TSIG as answer", "1234 8180 0001 0001 0000 0000" + question + "00 00fa 00ff 00000000 0000", errSignature},
		{"TSIG before another", "1234 8180 0001 0000 0000 0002" + question + "00 00fa 00ff 00000000 0000 00 0029 04d0 00000000 0000", errSignature},
		{"SOA too short", "1234 8180 0001 0000 0001 0000" + question + "c00c 0006 0001 00000001 0015 00 00" + strings.Repeat("00", 19), errSOA},
		{"SOA too long", "1234 8180 0001 0000 0001 0000" + question + "c00c 0006 0001 00000001 0017 00 00" + strings.Repeat("00", 21), errSOA},
		{"SOA without names", "1234 8180 0001 0000 0001 0000" + question + "c00c 0006 0001 00000001 0000", errSOA},
	}
	for _, tt := range tests {
		if _, _, err := ReadAnswer(unhex(t, tt.raw)); err != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
		if got := Lifetime(unhex(t, tt.raw)); got != 0 {
			t.Errorf("%s: lifetime %d, want 0", tt.name, got)
		}
	}
	if _, _, err := ReadAnswer(append(pack(t, response(t, "a.", 1, "")), make([]byte, 65536)...)); err != errLength {
		t.Errorf("got %v, want %v", err, errLength)
	}
}

func TestLifetime(t *testing.T) {
	const soa = "\nexample. 900 SOA ns.example. root.example. 1 2 3 4 "
	tests := []struct {
		name     string
		qtype    uint16
		rcode    int
		records  string
		want     uint32
		negative bool
	}{
		{"smallest of the answer", dns.TypeA, 0, "a.example. 300 A 192.0.2.1\na.example. 200 A 192.0.2.2", 200, false},
		{"smallest of all sections", dns.TypeA, 0, "a.example. 300 A 192.0.2.1\n--\nexample. 200 NS n.\n--\nn. 100 A 192.0.2.1", 100, false},
		{"zero", dns.TypeA, 0, "a.example. 0 A 192.0.2.1\na.example. 200 A 192.0.2.2", 0, false},
		{"highest bit set", dns.TypeA, 0, "a.example. 2147483648 A 192.0.2.1", 0, false},
		{"largest", dns.TypeA, 0, "a.example. 2147483647 A 192.0.2.1", 2147483647, false},
		{"chain", dns.TypeA, 0, "a.example. 50 CNAME b.example.\nb.example. 60 A 192.0.2.1", 50, false},
		{"CNAME asked for", dns.TypeCNAME, 0, "a.example. 50 CNAME b.example.", 50, false},
		{"ANY", dns.TypeANY, 0, "a.example. 50 HINFO RFC8482 \"\"", 50, false},
		{"positive with SOA", dns.TypeA, 0, "a.example. 1000 A 192.0.2.1\n--" + soa + "5", 900, false},
		{"NODATA, MINIMUM", dns.TypeA, 0, "--" + soa + "60", 60, true},
		{"NODATA, TTL", dns.TypeA, 0, "--" + soa + "6000", 900, true},
		{"NODATA, MINIMUM 0", dns.TypeA, 0, "--" + soa + "0", 0, true},
		{"NODATA, MINIMUM with the highest bit", dns.TypeA, 0, "--" + soa + "2147483648", 0, true},
		{"NXDOMAIN", dns.TypeA, dns.RcodeNameError, "--" + soa + "60", 60, true},
		{"NXDOMAIN behind a CNAME", dns.TypeA, dns.RcodeNameError, "a.example. 50 CNAME b.example.\n--" + soa + "60", 50, true},
		{"NODATA behind a CNAME", dns.TypeA, 0, "a.example. 70 CNAME b.example.\n--" + soa + "60", 60, true},
		{"NODATA behind a CNAME without SOA", dns.TypeA, 0, "a.example. 70 CNAME b.example.", 0, true},
		{"NODATA with NSEC", dns.TypeA, 0, "--" + soa + "60\na.example. 40 NSEC b.example. TXT", 40, true},
		{"NODATA without SOA", dns.TypeA, 0, "", 0, true},
		{"NXDOMAIN without SOA", dns.TypeA, dns.RcodeNameError, "--\nexample. 60 NS ns.example.", 0, true},
		{"SOA in the wrong section", dns.TypeA, dns.RcodeNameError, "--\n--" + soa + "60", 0, true},
		{"referral", dns.TypeA, 0, "--\na.example. 60 NS ns.a.example.\n--\nns.a.example. 60 A 192.0.2.1", 0, true},
		{"NODATA with NS and SOA", dns.TypeA, 0, "--\nexample. 70 NS ns.example." + soa + "60", 60, true},
		{"two SOAs", dns.TypeA, 0, "--" + soa + "60" + soa + "30" + soa + "90", 30, true},
		{"SERVFAIL", dns.TypeA, dns.RcodeServerFailure, "a.example. 300 A 192.0.2.1", 0, false},
		{"REFUSED", dns.TypeA, dns.RcodeRefused, "--" + soa + "60", 0, false},
		{"BADVERS", dns.TypeA, dns.RcodeBadVers, "a.example. 300 A 192.0.2.1", 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := response(t, "a.example.", tt.qtype, tt.records)
			m.SetEdns0(1232, true)
			m.Rcode = tt.rcode
			if got := Lifetime(pack(t, m)); got != tt.want {
				t.Errorf("Lifetime: got %d, want %d", got, tt.want)
			}
			a := answer(t, m)
			if got := a.Lifetime(); got != tt.want {
				t.Errorf("Answer.Lifetime: got %d, want %d", got, tt.want)
			}
			if got := a.Negative(); got != tt.negative {
				t.Errorf("Negative: got %v, want %v", got, tt.negative)
			}
			m.Truncated = true
			if got, got2 := Lifetime(pack(t, m)), answer(t, m).Lifetime(); got != 0 || got2 != 0 {
				t.Errorf("truncated: got %d and %d, want 0", got, got2)
			}
		})
	}
}

func TestClampAndClone(t *testing.T) {
	a := answer(t, response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1\na.example. 20 A 192.0.2.2"))
	a.EDE = []EDE{{1, "text"}}
	var b Answer
	a.CloneInto(&b, make([]byte, a.CloneLen(0)), nil)
	b.ClampTTL(30, 200)
	b.EDE[0].Code = 2
	ttls := func(a *Answer) (list []uint32) {
		for _, off := range a.TTLs {
			list = append(list, binary.BigEndian.Uint32(a.Msg[off:]))
		}
		return append(list, a.Lifetime(), uint32(a.EDE[0].Code))
	}
	if diff := cmp.Diff(ttls(a), []uint32{300, 20, 20, 1}); diff != "" {
		t.Errorf("the original (-got +want)\n%s", diff)
	}
	if diff := cmp.Diff(ttls(&b), []uint32{200, 30, 30, 2}); diff != "" {
		t.Errorf("the copy (-got +want)\n%s", diff)
	}
}

// TestCloneInto looks at where a copy lies: in one array behind what is put in front.
func TestCloneInto(t *testing.T) {
	small := answer(t, response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1"))
	some := sized(t, 2000)
	some.EDE = []EDE{{1, "one"}, {2, ""}, {3, "three"}}
	for _, a := range []*Answer{small, some} {
		for front := range 4 {
			list := make([]EDE, 1, 3)
			b := Answer{EDE: list}
			array := make([]byte, a.CloneLen(front))
			a.CloneInto(&b, array, []byte("key")[:front])
			if string(array[:front]) != "key"[:front] {
				t.Errorf("got %q in front", array[:front])
			}
			if len(b.EDE) > 0 && &b.EDE[0] != &list[0] {
				t.Error("the list that was lent is not used")
			}
			want := len(a.Msg) + 2*len(a.TTLs) + 4*len(a.cuts) + front + front&1 + len("onethree")*min(len(a.EDE), 1)
			if len(array) != want {
				t.Errorf("CloneLen is %d octets, want %d", len(array), want)
			}
			if cap(b.Msg) != len(b.Msg) || cap(b.TTLs) != len(b.TTLs) || cap(b.cuts) != len(b.cuts) {
				t.Error("appending to one part would write into the next")
			}
			b.EDE = append([]EDE(nil), b.EDE...)
			if diff := cmp.Diff(&b, a, cmp.AllowUnexported(Answer{}, cut{}, lifetime{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-got +want)\n%s", diff)
			}
			clear(array)
			if a.Msg[5] != 1 || len(a.EDE) > 0 && a.EDE[0].Text != "one" {
				t.Fatal("the copy shares memory with the original")
			}
		}
	}
}

// TestAppendPacked reads again what was packed.
func TestAppendPacked(t *testing.T) {
	small := response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1\n--\n--\nb.example. 20 A 192.0.2.2")
	long := strings.Repeat("x", 255)
	for _, tt := range []struct {
		name  string
		rcode uint16
		ede   []EDE
		want  []EDE
	}{
		{"plain", 0, nil, nil},
		{"extended errors", 0, []EDE{{3, "stale"}, {22, ""}}, []EDE{{3, "stale"}, {22, ""}}},
		{"an extended RCODE", 0xabc&^0xf | RcodeNXDomain, nil, nil},
		{"too many", 0, make([]EDE, 9), make([]EDE, 8)},
		{"too long", 0, []EDE{{3, long + "y"}}, []EDE{{3, long}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := answer(t, small)
			a.EDE, a.Rcode = tt.ede, tt.rcode
			a.Msg[3] |= byte(tt.rcode & 0xf)
			b, _, err := ReadAnswer(a.AppendPacked([]byte("front"))[5:])
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(b.EDE, tt.want); diff != "" || b.Rcode != tt.rcode || !bytes.Equal(b.Msg, a.Msg) {
				t.Errorf("RCODE %d, %x, want %x (-got +want)\n%s", b.Rcode, b.Msg, a.Msg, diff)
			}
		})
	}
}

// checkReadAgain holds that a packed Answer is read as itself.
func checkReadAgain(t *testing.T, a *Answer) {
	t.Helper()
	b, _, err := ReadAnswer(a.AppendPacked(nil))
	if err != nil {
		t.Fatalf("what was packed cannot be read: %v", err)
	}
	b.Secure = a.Secure
	if len(a.Msg) > MaxMessage-optLen-maxEDE*(6+maxEDEText) {
		b.EDE, b.Rcode = a.EDE, a.Rcode // there may be no room for them
	}
	if diff := cmp.Diff(b, a, cmp.AllowUnexported(Answer{}, cut{}, lifetime{}), cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("an Answer is read again as another one (-got +want)\n%s", diff)
	}
}

// checkReadUsed proves that what an Answer was before leaves nothing in it: msg, of which ReadAnswer has made a or err, is read
// into one that was long, and that again into the same.
func checkReadUsed(t *testing.T, long, msg []byte, a *Answer, err error) {
	t.Helper()
	var used Answer
	for range 2 {
		if _, err := used.Read(long); err != nil {
			t.Fatalf("a used Answer cannot be used again: %v", err)
		}
		used.Secure = true
		_, got := used.Read(msg)
		if got != err {
			t.Fatalf("a used Answer: got error %v, want %v", got, err)
		}
		if err != nil {
			continue
		}
		if diff := cmp.Diff(&used, a, cmp.AllowUnexported(Answer{}, cut{}, lifetime{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("a used Answer is another one (-got +want)\n%s", diff)
		}
	}
}

func TestCutText(t *testing.T) {
	for _, s := range []string{"", "abc", "äöü", "日本語", "\x80\x80\x80\x80"} {
		for n := range 12 {
			got := cutText(s, n)
			if len(got) > n || !strings.HasPrefix(s, got) || len(s) <= n && got != s || utf8.ValidString(s) && !utf8.ValidString(got) {
				t.Errorf("cutText(%q, %d) = %q", s, n, got)
			}
		}
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	small := answer(t, response(t, "a.example.", dns.TypeA, "a.example. 300 A 192.0.2.1"))
	small.EDE = []EDE{{3, "stale"}}
	big := sized(t, 5000)
	dst := make([]byte, 0, 70000)
	padding, keepalive := &dns.EDNS0_PADDING{}, &dns.EDNS0_TCP_KEEPALIVE{}
	q := query(t, UDP, "a.example.", dns.TypeA, edns(1232, true))
	dot := query(t, DoT, "a.example.", dns.TypeA, edns(1232, true, padding, keepalive))
	packed := shape.AppendAnswer(nil, q, small, 0)
	for name, f := range map[string]func(){
		"answer":    func() { shape.AppendAnswer(dst, q, small, 7) },
		"truncated": func() { shape.AppendAnswer(dst, q, big, 7) },
		"padded":    func() { shape.AppendAnswer(dst, dot, big, 7) },
		"error":     func() { shape.AppendError(dst, q, RcodeServFail) },
		"error with EDE": func() {
			shape.AppendError(dst, q, RcodeServFail, EDE{22, "no reachable authority"}, EDE{23, q.Listener})
		},
		"rate limit": func() { shape.AppendTruncated(dst, q) },
		"lifetime":   func() { Lifetime(packed) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocs, want 0", name, n)
		}
	}
}

// FuzzAnswer reads foreign bytes as a response and gives it to all kinds of clients.
func FuzzAnswer(f *testing.F) {
	m := response(f, "www.example.org.", dns.TypeA, `
		www.example.org. 300 CNAME example.org.
		example.org. 200 A 192.0.2.1
		--
		example.org. 60 SOA ns.example.org. root.example.org. 1 2 3 4 5
		--
		ns.example.org. 60 A 192.0.2.1`)
	m.SetEdns0(1232, true)
	m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: 6, ExtraText: "bogus"}}
	f.Add(pack(f, m), uint8(0), uint8(7), uint16(1232), uint32(5))
	m.Extra = append(m.Extra, m.Extra[0])
	f.Add(pack(f, m), uint8(DoT), uint8(0xff), uint16(1232), uint32(5))
	for range 100 {
		m.Answer = append(m.Answer, m.Answer[1])
	}
	long := pack(f, m)
	f.Add(long, uint8(0), uint8(1), uint16(600), uint32(1000))
	f.Fuzz(func(t *testing.T, msg []byte, transport, bits uint8, size uint16, age uint32) {
		lifetime := Lifetime(msg)
		a, _, err := ReadAnswer(bytes.Clone(msg))
		checkReadUsed(t, long, msg, a, err)
		if err != nil {
			return
		}
		if got := a.Lifetime(); got != lifetime && len(a.TTLs) == originalRecords(msg) {
			t.Fatalf("lifetimes differ: %d and %d", got, lifetime)
		}
		a.Secure = bits&1 != 0
		q := Query{Transport: Transport(transport) % NumTransports}
		q.Parse(ask(a, bits, size))
		if q.Fault != RcodeSuccess || q.Name == nil {
			t.Fatalf("the question does not parse: %+v", q)
		}
		raw := shape.AppendAnswer(nil, &q, a, age)
		checkAnswer(t, &q, a, raw, age)
		var b Answer
		if a.CloneInto(&b, make([]byte, a.CloneLen(0)), nil); !bytes.Equal(shape.AppendAnswer(nil, &q, &b, age), raw) {
			t.Fatal("a clone answers differently")
		}
		checkReadAgain(t, a)
		var original dns.Msg
		if original.Unpack(msg) != nil || len(original.Question) != 1 {
			return
		}
		if len(a.TTLs) == originalRecords(msg) && !slices.ContainsFunc(slices.Concat(original.Answer, original.Ns,
			original.Extra), isOpaque) {
			checkRecords(t, raw, original.Copy(), age)
		}
		checkPacked(t, &q, &original, age)
	})
}

// isOpaque reports whether ReadAnswer does not look into rr, so that a name in it, if it were compressed against the
// RFCs, could mean anything.
func isOpaque(rr dns.RR) bool {
	switch rr.Header().Rrtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeNS, dns.TypeCNAME, dns.TypeSOA, dns.TypePTR, dns.TypeMX, dns.TypeTXT, dns.TypeSRV,
		dns.TypeRRSIG, dns.TypeNSEC, dns.TypeSVCB, dns.TypeHTTPS, dns.TypeDNAME, dns.TypeNAPTR, dns.TypeOPT:
		return rr.Header().Class != dns.ClassINET && rr.Header().Rrtype != dns.TypeOPT
	}
	return true
}

// TestNames reads one record behind the question a., which lies at 12 to 15 and ends with class and type at 19. The
// records' owner is at 19, its TTL at 25 for an owner of two octets.
func TestNames(t *testing.T) {
	const head = "1234 8180 0001 0001 0000 0000  01 61 00 0001 0001 "
	long := strings.Repeat("3f"+strings.Repeat("61", 63), 3) // 192 octets
	for _, tt := range []struct {
		name, record string
		ok           bool
	}{
		{"question's name", "c00c 0001 0001 00000001 0004 7f000001", true},
		{"below it", "01 62 c00c 0001 0001 00000001 0004 7f000001", true},
		{"its root", "c00e 0001 0001 00000001 0004 7f000001", true},
		{"to itself", "c013 0001 0001 00000001 0004 7f000001", false},
		{"forward", "c020 0001 0001 00000001 0004 7f000001", false},
		{"header", "c004 0001 0001 00000001 0004 7f000001", false},
		{"reserved label type", "40 0001 0001 00000001 0004 7f000001", false},
		{"256 octets", long + "3e" + strings.Repeat("62", 62) + "c00e 0001 0001 00000001 0004 7f000001", false},
		{"255 octets", long + "3d" + strings.Repeat("62", 61) + "c00e 0001 0001 00000001 0004 7f000001", true},
		{"A of three octets", "c00c 0001 0001 00000001 0003 7f0000", false},
		{"AAAA of four octets", "c00c 001c 0001 00000001 0004 7f000001", false},
		{"CNAME", "c00c 0005 0001 00000001 0004 01 62 c00c", true},
		{"CNAME and more", "c00c 0005 0001 00000001 0005 01 62 c00c 00", false},
		{"CNAME beyond its end", "c00c 0005 0001 00000001 0003 01 62 c0", false},
		{"CNAME into the TTL", "c00c 0005 0001 00000001 0002 c01a", false},
		{"CNAME over the TTL", "c00c 0005 0001 01000001 0002 c014", false},
		{"CNAME to the owner", "01 62 c00c 0005 0001 00000001 0002 c013", true},
		{"MX", "c00c 000f 0001 00000001 0004 0001 c00c", true},
		{"MX without a name", "c00c 000f 0001 00000001 0002 0001", false},
		{"SRV", "c00c 0021 0001 00000001 0008 0001 0001 0035 c00c", true},
		{"SRV too short", "c00c 0021 0001 00000001 0007 0001 0001 0035 c0", false},
		{"NAPTR", "c00c 0023 0001 00000001 000a 0001 0001 01 53 00 00 c00c", true},
		{"NAPTR that ends in a string", "c00c 0023 0001 00000001 0008 0001 0001 09 53 00 00", false},
		{"SOA", "c00c 0006 0001 00000001 0018 c00c c00c" + strings.Repeat("00000001", 5), true},
		{"SOA too short", "c00c 0006 0001 00000001 0014 c00c c00c" + strings.Repeat("00000001", 4), false},
		{"RRSIG", "c00c 002e 0001 00000001 0014 " + strings.Repeat("00", 18) + "00 61", true},
		{"RRSIG too short", "c00c 002e 0001 00000001 0012 " + strings.Repeat("00", 18), false},
		{"HTTPS", "c00c 0041 0001 00000001 0003 0001 00", true},
		{"HTTPS without target", "c00c 0041 0001 00000001 0002 0001", false},
		{"unknown type", "c00c ff00 0001 00000001 0002 c0ff", true},
		{"TXT", "c00c 0010 0001 00000001 0004 01 61 01 62", true},
		{"TXT beyond its end", "c00c 0010 0001 00000001 0004 01 61 02 62", false},
		{"CNAME of another class", "c00c 0005 0003 00000001 0002 c0ff", false},
		{"A of another class", "c00c 0001 0003 00000001 0003 7f0000", true},
	} {
		if _, _, err := ReadAnswer(unhex(t, head+tt.record)); (err == nil) != tt.ok {
			t.Errorf("%s: got %v, want success %v", tt.name, err, tt.ok)
		}
	}
}

// checkPacked packs what miekg/dns has read, as a resolver does, and compares the answer made of that.
func checkPacked(t *testing.T, q *Query, original *dns.Msg, age uint32) {
	t.Helper()
	original.Compress = true
	msg, err := original.Pack()
	if err != nil || new(dns.Msg).Unpack(msg) != nil {
		return // miekg/dns reads RDATA that is too short, an SOA record's for one, and then packs what it cannot read
	}
	a, _, err := ReadAnswer(msg)
	if err != nil {
		return
	}
	raw := shape.AppendAnswer(nil, q, a, age)
	checkAnswer(t, q, a, raw, age)
	checkRecords(t, raw, original, age)
}

// originalRecords counts the records of msg but OPT and TSIG.
func originalRecords(msg []byte) int {
	l, _ := survey(msg, nil)
	return l.records
}

// ask makes a query for a's question, its letters in other case.
func ask(a *Answer, bits uint8, size uint16) []byte {
	raw := []byte{byte(bits), byte(size), 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	if bits&2 != 0 {
		raw[2] |= byte(FlagRD >> 8)
	}
	if bits&4 != 0 {
		raw[3] |= byte(FlagAD)
	}
	if bits&8 != 0 {
		raw[3] |= byte(FlagCD)
	}
	raw = append(raw, a.Msg[HeaderLen:a.qend]...)
	for i, c := range raw[HeaderLen : len(raw)-4] {
		if c := c | 0x20; c >= 'a' && c <= 'z' && i%2 == 0 {
			raw[HeaderLen+i] ^= 0x20
		}
	}
	if bits&16 != 0 {
		raw[11] = 1
		raw = append(raw, 0, 0, byte(TypeOPT))
		raw = binary.BigEndian.AppendUint16(raw, size)
		raw = append(raw, 0, 0, bits&32<<2, 0, 0, 8, 0, byte(OptionPadding), 0, 0, 0, byte(OptionKeepalive), 0, 0)
	}
	return raw
}

// checkAnswer holds raw against the laws of AppendAnswer.
func checkAnswer(t *testing.T, q *Query, a *Answer, raw []byte, age uint32) {
	t.Helper()
	limit := MaxMessage
	if q.Transport == UDP {
		limit = int(min(q.UDPSize, shape.UDPSize))
	}
	if len(raw) > limit {
		t.Fatalf("%d octets, want at most %d", len(raw), limit)
	}
	l, err := survey(raw, nil)
	if err != nil {
		t.Fatalf("%v in % x", err, raw)
	}
	if binary.BigEndian.Uint16(raw) != q.ID || !bytes.Equal(raw[HeaderLen:l.qend], q.Raw[HeaderLen:HeaderLen+len(q.Name)+4]) {
		t.Fatalf("other ID or question: % x", raw)
	}
	flags := binary.BigEndian.Uint16(raw[2:])
	if flags&(FlagRD|FlagCD) != q.Flags&(FlagRD|FlagCD) || flags&FlagRA == 0 || flags&FlagAA != 0 || flags&(1<<6) != 0 {
		t.Fatalf("flags %#x", flags)
	}
	if ad := flags&FlagAD != 0; ad != (a.Secure && (q.AD() || q.DO)) {
		t.Fatalf("AD is %v", ad)
	}
	if (l.optEnd > 0) != q.EDNS || q.EDNS && (l.optEnd != len(raw) || l.rcode(raw) != a.Rcode) {
		t.Fatalf("OPT: %+v, RCODE %d of %d", l, l.rcode(raw), a.Rcode)
	}
	if q.Padding && q.Transport.Encrypted() && len(raw)%468 != 0 && len(raw) < MaxMessage-4 {
		t.Fatalf("%d octets are not padded", len(raw))
	}
	if short := l.answers+l.auths < int(a.answers)+int(a.auths); (short || a.Truncated()) != (flags&FlagTC != 0) {
		t.Fatalf("TC is %v", flags&FlagTC != 0)
	}
	for _, off := range a.TTLs[:l.records] {
		before, after := binary.BigEndian.Uint32(a.Msg[off:]), binary.BigEndian.Uint32(raw[off:])
		if after != before-min(before, age) {
			t.Fatalf("TTL %d became %d at age %d", before, after, age)
		}
	}
	if l.records == len(a.TTLs) && Lifetime(raw) > a.Lifetime() {
		t.Fatalf("lifetime %d became %d", a.Lifetime(), Lifetime(raw))
	}
}

// checkRecords compares raw with what miekg/dns reads in the original.
func checkRecords(t *testing.T, raw []byte, original *dns.Msg, age uint32) {
	t.Helper()
	var got dns.Msg
	if err := got.Unpack(raw); err != nil {
		t.Fatalf("%v in % x", err, raw)
	}
	hop := func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeOPT || rr.Header().Rrtype == dns.TypeTSIG }
	for i, pair := range [][2][]dns.RR{{got.Answer, original.Answer}, {got.Ns, original.Ns}, {got.Extra, original.Extra}} {
		g, o := slices.DeleteFunc(pair[0], hop), slices.DeleteFunc(pair[1], hop)
		if len(g) > len(o) {
			t.Fatalf("section %d grew from %d to %d records", i, len(o), len(g))
		}
		for j := range g {
			want := dns.Copy(o[j])
			if h := want.Header(); h.Ttl > 1<<31-1 {
				h.Ttl = 0
			} else {
				h.Ttl -= min(h.Ttl, age)
			}
			if !strings.EqualFold(g[j].String(), want.String()) {
				t.Fatalf("got %v, want %v", g[j], want)
			}
		}
	}
}

func BenchmarkAppendAnswer(b *testing.B) {
	a := answer(b, response(b, "www.example.org.", dns.TypeA, "www.example.org. 300 A 192.0.2.1\nwww.example.org. 300 A 192.0.2.2"))
	plain := query(b, UDP, "www.example.org.", dns.TypeA)
	opt := query(b, UDP, "www.example.org.", dns.TypeA, edns(1232, false))
	for _, bb := range []struct {
		name string
		q    *Query
		age  uint32
	}{
		{"plain", plain, 0},
		{"plain aged", plain, 5},
		{"EDNS", opt, 0},
		{"EDNS aged", opt, 5},
	} {
		b.Run(bb.name, func(b *testing.B) {
			dst := make([]byte, 0, 2048)
			b.ReportAllocs()
			for b.Loop() {
				shape.AppendAnswer(dst, bb.q, a, bb.age)
			}
		})
	}
}

func BenchmarkNewAnswer(b *testing.B) {
	msg := pack(b, response(b, "www.example.org.", dns.TypeA, "www.example.org. 300 A 192.0.2.1\nwww.example.org. 300 A 192.0.2.2"))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := ReadAnswer(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLifetime(b *testing.B) {
	msg := pack(b, response(b, "www.example.org.", dns.TypeA, "www.example.org. 300 A 192.0.2.1\nwww.example.org. 300 A 192.0.2.2"))
	b.ReportAllocs()
	for b.Loop() {
		if Lifetime(msg) != 300 {
			b.Fatal("wrong lifetime")
		}
	}
}

// TestPointerIntoTTL has a name whose compression pointer would be half a TTL: it would mean another name when the TTL
// changes.
func TestPointerIntoTTL(t *testing.T) {
	const head = "1234 8180 0001 0002 0000 0000  01 61 00 0001 0001 "
	// The class of the first record, 00c0, ends at 24, and its TTL begins at 25: together they look like c00c.
	if _, _, err := ReadAnswer(unhex(t, head+"c00c ff00 00c0 0c000000 0000"+"c018 0001 0001 00000001 0004 7f000001")); err == nil {
		t.Error("got it read, want an error")
	}
}

// TestSignatureBehindOPT takes out an OPT record in front of an RRSIG record whose signer's name is compressed, against
// RFC 4034, section 3.1.7: it goes too, as what it points to moves.
func TestSignatureBehindOPT(t *testing.T) {
	const head = "1234 8180 0001 0000 0000 0003  01 61 00 0001 0001 "
	const opt = "00 0029 04d0 00000000 0000 "                  // 19 to 30
	const target = "01 78 00 0001 0001 00000001 0004 7f000001" // at 30
	for signer, records := range map[string]int{"c01e": 1, "01 62 c01e": 1, "00": 2} {
		rdata := strings.Repeat("00", 18) + strings.ReplaceAll(signer, " ", "") + "ff"
		a, _, err := ReadAnswer(unhex(t, head+opt+target+fmt.Sprintf("c00c 002e 0001 00000001 %04x", len(rdata)/2)+rdata))
		if err != nil || len(a.TTLs) != records || new(dns.Msg).Unpack(a.Msg) != nil {
			t.Errorf("signer %s: got %+v, %v, want %d readable records", signer, a, err, records)
		}
	}
}
