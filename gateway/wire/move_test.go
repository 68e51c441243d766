package wire

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// denial is an NXDOMAIN response for name with the records.
func denial(t testing.TB, name string, records ...string) []byte {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	m.Response, m.Rcode, m.Compress = true, dns.RcodeNameError, true
	for _, s := range records {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		m.Ns = append(m.Ns, rr)
	}
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

const (
	soaRecord   = "example. 300 IN SOA ns.example. hostmaster.example. 1 2 3 4 60"
	nsecRecord  = "a.example. 60 IN NSEC c.example. A NSEC"
	nsec3Record = "0p9mhaveqvm6t7vbl5lop2u3t2rp3tom.example. 60 IN NSEC3 1 0 0 - 2t7b4g4vsa5smi47k61mv5bv1a22bojr A RRSIG"
	rrsigRecord = "example. 60 IN RRSIG SOA 13 1 300 20300101000000 20200101000000 4711 example. AAAA"
)

// below makes a query for a name below that of raw's question, of another type.
func below(t testing.TB, labels, name string, transport Transport) *Query {
	t.Helper()
	return query(t, transport, labels+name, dns.TypeTXT, edns(1232, true))
}

func TestDenial(t *testing.T) {
	s := &Shape{UDPSize: 1232}
	for _, tt := range []struct {
		name    string
		records []string
	}{
		{"SOA", []string{soaRecord}},
		{"SOA of the name's own zone", []string{"gone.example. 300 IN SOA ns.gone.example. hostmaster.gone.example. 1 2 3 4 60"}},
		{"signed with NSEC", []string{soaRecord, rrsigRecord, nsecRecord, rrsigRecord, "example. 60 IN NSEC a.example. NS"}},
		{"signed with NSEC3", []string{soaRecord, rrsigRecord, nsec3Record, rrsigRecord}},
	} {
		raw := denial(t, "Gone.example.", tt.records...)
		a, _, err := ReadAnswer(raw)
		if err != nil || !a.Denial() {
			t.Fatalf("%s: %v, a denial: %v", tt.name, err, a.Denial())
		}
		want := unpack(t, raw)
		for _, labels := range []string{"", "x.", "A.bb.ccc.", strings.Repeat("y.", 100)} {
			for _, stale := range []bool{false, true} {
				q := below(t, labels, "gONE.example.", TCP)
				before := bytes.Clone(a.Msg)
				out := s.AppendAnswer([]byte("ab"), q, a, 7)
				if stale {
					out = s.AppendStale([]byte("ab"), q, a, 30)
				}
				got := unpack(t, out[2:])
				if !bytes.Equal(a.Msg, before) {
					t.Fatal("the shared answer was changed")
				}
				if got.Rcode != dns.RcodeNameError || got.Question[0].Name != labels+"gONE.example." || got.Question[0].Qtype != dns.TypeTXT {
					t.Errorf("%s, below by %q: %v", tt.name, labels, got)
				}
				for i, rr := range got.Ns {
					w := dns.Copy(want.Ns[i])
					if w.Header().Ttl -= 7; stale {
						w.Header().Ttl = 30
					}
					if a, b := strings.ToLower(rr.String()), strings.ToLower(w.String()); a != b {
						t.Errorf("%s, below by %q: got %s, want %s", tt.name, labels, a, b)
					}
				}
				if len(got.Ns) != len(want.Ns) || got.Truncated {
					t.Errorf("%s: %d records, want %d", tt.name, len(got.Ns), len(want.Ns))
				}
				var codes []uint16
				for _, o := range got.IsEdns0().Option {
					codes = append(codes, o.(*dns.EDNS0_EDE).InfoCode)
				}
				if stale != cmp.Equal(codes, []uint16{dns.ExtendedErrorCodeStaleNXDOMAINAnswer}) {
					t.Errorf("%s, stale %v: extended errors %v", tt.name, stale, codes)
				}
			}
		}
	}
}

// TestDenialTruncated has denials that fit into their own UDP response, and not into that of a longer name.
func TestDenialTruncated(t *testing.T) {
	records := []string{soaRecord}
	for i := range 25 {
		records = append(records, fmt.Sprintf("%d.example. 60 IN NSEC c%d.example. A NSEC", i, i))
	}
	a, _, err := ReadAnswer(denial(t, "gone.example.", records...))
	if err != nil || !a.Denial() {
		t.Fatalf("%v, a denial: %v", err, a.Denial())
	}
	for size := uint16(512); size < 1400; size += 7 {
		for _, labels := range []string{"", "x.", strings.Repeat("y.", 100)} {
			s := &Shape{UDPSize: size}
			q := below(t, labels, "gone.example.", UDP)
			q.UDPSize = size
			out := s.AppendAnswer(nil, q, a, 0)
			m := unpack(t, out)
			if len(out) > int(size) || m.Truncated != (len(m.Ns) < len(records)) {
				t.Fatalf("size %d, below by %q: %d octets, %d records, TC=%v", size, labels, len(out), len(m.Ns), m.Truncated)
			}
		}
	}
}

// TestNoDenial has answers that are for their own question only, and what becomes of who uses them for another.
func TestNoDenial(t *testing.T) {
	pointer := func(offset byte) []byte { return []byte{0xc0, offset} }
	header := []byte{0, 1, 0x81, 0x83, 0, 1, 0, 0, 0, 1, 0, 0}
	question := []byte("\x04gone\x07example\x00\x00\x01\x00\x01")
	soa := func(mname, rname []byte) []byte {
		data := append(append(bytes.Clone(mname), rname...), make([]byte, 20)...)
		return append([]byte{0, 6, 0, 1, 0, 0, 0, 60, 0, byte(len(data))}, data...)
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, tt := range []struct {
		name string
		raw  []byte
		want bool
	}{
		{"control", join(header, question, pointer(17), soa(pointer(12), pointer(17))), true},
		{"a pointer into a label", join(header, []byte("\x04\x01a\x00x\x07example\x00\x00\x01\x00\x01"), pointer(13), soa(pointer(12), pointer(12))), false},
		{"a pointer to the type", join(header, question, pointer(26), soa(pointer(12), pointer(17))), false},
		{"a record of an unknown type", denial(t, "gone.example.", soaRecord, "example. 60 IN TYPE65280 \\# 1 00"), false},
		{"a TXT record", denial(t, "gone.example.", soaRecord, "example. 60 IN TXT x"), false},
		{"another class", denial(t, "gone.example.", "example. 60 CH SOA ns.example. h.example. 1 2 3 4 60"), false},
		{"too many labels", denial(t, "gone.example.", soaRecord, strings.Repeat("a.", 60)+" 60 IN NS "+strings.Repeat("b.", 60),
			strings.Repeat("c.", 60)+" 60 IN NS "+strings.Repeat("d.", 60)), false},
	} {
		a, _, err := ReadAnswer(tt.raw)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if a.Denial() != tt.want {
			t.Errorf("%s: a denial: %v, want %v", tt.name, a.Denial(), tt.want)
		}
		s := &Shape{UDPSize: 1232}
		q := query(t, TCP, "x."+unpack(t, tt.raw).Question[0].Name, dns.TypeA)
		if m := unpack(t, s.AppendAnswer(nil, q, a, 0)); !tt.want && (m.Rcode != dns.RcodeServerFailure || len(m.Ns) != 0) {
			t.Errorf("%s: got %v, want SERVFAIL", tt.name, m)
		}
	}
	m := unpack(t, denial(t, "gone.example.", soaRecord))
	m.Answer = []dns.RR{&dns.CNAME{Hdr: dns.RR_Header{Name: "gone.example.", Rrtype: dns.TypeCNAME, Class: 1, Ttl: 60}, Target: "x.example."}}
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if a, _, err := ReadAnswer(raw); err != nil || a.Denial() {
		t.Errorf("behind a CNAME record: %v, a denial: %v", err, a.Denial())
	}
	m.Answer, m.Rcode = nil, 0
	if raw, err = m.Pack(); err != nil {
		t.Fatal(err)
	}
	if a, _, err := ReadAnswer(raw); err != nil || a.Denial() {
		t.Errorf("NODATA: %v, a denial: %v", err, a.Denial())
	}
}

// FuzzDenial reads any bytes as a denial and makes of it the answer to a question for a longer name and another type: it has
// the same records as the denial itself.
func FuzzDenial(f *testing.F) {
	for _, records := range [][]string{{soaRecord}, {soaRecord, rrsigRecord, nsecRecord}, {soaRecord, nsec3Record, rrsigRecord}} {
		f.Add(denial(f, "gone.example.", records...), "x.y.")
	}
	f.Fuzz(func(t *testing.T, raw []byte, labels string) {
		a, _, err := ReadAnswer(raw)
		if err != nil || !a.Denial() {
			return
		}
		name := a.Msg[HeaderLen : a.qend-4]
		var front []byte
		for label := range strings.SplitSeq(labels, ".") {
			if n := len(label); n > 0 && n < 64 && len(front)+1+n+len(name) <= MaxName {
				front = append(append(front, byte(n)), label...)
			}
		}
		ask := func(name []byte, qtype uint16) []byte {
			var q Query
			q.Transport = TCP
			m := append([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, name...)
			q.Parse(append(m, byte(qtype>>8), byte(qtype), 0, 1))
			s := &Shape{}
			return s.AppendAnswer(nil, &q, a, 0)
		}
		own := ask(name, uint16(a.Msg[a.qend-4])<<8|uint16(a.Msg[a.qend-3]))
		other := ask(append(front, name...), 65280)
		var want, got dns.Msg
		if want.Unpack(own) != nil {
			return // names that are fine on the wire and not in the test's eyes
		}
		if err := got.Unpack(other); err != nil {
			t.Fatalf("%x below by %q: %v\n%x", raw, labels, err, other)
		}
		if got.Rcode != want.Rcode || len(got.Question) != 1 || got.Question[0].Qtype != 65280 {
			t.Fatalf("got %v, want %v", &got, &want)
		}
		if len(other) >= MaxMessage-300 || got.Truncated {
			return
		}
		for _, sections := range [][2][]dns.RR{{got.Answer, want.Answer}, {got.Ns, want.Ns}, {got.Extra, want.Extra}} {
			if diff := cmp.Diff(fmt.Sprint(sections[0]), fmt.Sprint(sections[1])); diff != "" {
				t.Fatalf("%x below by %q: got -, want +:\n%s", raw, labels, diff)
			}
		}
	})
}

// TestStale has every TTL of a stale answer at the same value, and the error that says so before the answer's own.
func TestStale(t *testing.T) {
	s := &Shape{UDPSize: 1232}
	m := new(dns.Msg)
	m.SetQuestion("a.example.", dns.TypeA)
	m.Response = true
	for i := range 3 {
		rr, err := dns.NewRR(fmt.Sprintf("a.example. %d IN A 192.0.2.%d", 5+i*100, i))
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a, _, err := ReadAnswer(raw)
	if err != nil {
		t.Fatal(err)
	}
	a.EDE = []EDE{{Code: 9, Text: "x"}}
	for _, transport := range []Transport{UDP, TCP, DoH} {
		out := s.AppendStale(nil, query(t, transport, "A.example.", dns.TypeA, edns(1232, false)), a, 30)
		got := unpack(t, out)
		for _, rr := range got.Answer {
			if rr.Header().Ttl != 30 {
				t.Errorf("%v: %v", transport, rr)
			}
		}
		if got := Lifetime(out); got != 30 {
			t.Errorf("lifetime %d, want 30", got)
		}
		var codes []uint16
		for _, o := range got.IsEdns0().Option {
			codes = append(codes, o.(*dns.EDNS0_EDE).InfoCode)
		}
		if diff := cmp.Diff(codes, []uint16{3, 9}); diff != "" {
			t.Errorf("extended errors, got -, want +:\n%s", diff)
		}
	}
}

func TestDenialAllocations(t *testing.T) {
	s := &Shape{UDPSize: 1232}
	a, _, err := ReadAnswer(denial(t, "gone.example.", soaRecord, rrsigRecord, nsecRecord))
	if err != nil {
		t.Fatal(err)
	}
	q := below(t, "x.y.", "gone.example.", UDP)
	dst := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() { s.AppendAnswer(dst, q, a, 7) }); n != 0 {
		t.Errorf("fresh: %v allocs, want 0", n)
	}
	if n := testing.AllocsPerRun(100, func() { s.AppendStale(dst, q, a, 30) }); n != 0 {
		t.Errorf("stale: %v allocs, want 0", n)
	}
}
