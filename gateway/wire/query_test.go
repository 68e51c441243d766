package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// unhex turns readable hex with spaces and comments into octets.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(s) {
		line, _, _ = strings.Cut(line, ";")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parsed is what a Query says about a message.
type parsed struct {
	Kind      Kind
	Fault     uint16
	ID        uint16
	Name      string
	Qtype     uint16
	Qclass    uint16
	EDNS      bool
	UDPSize   uint16
	DO        bool
	Padding   bool
	Keepalive bool
}

func parse(raw []byte) parsed {
	var q Query
	q.Parse(raw)
	return parsed{q.Kind, q.Fault, q.ID, string(q.Name), q.Qtype, q.Qclass, q.EDNS, q.UDPSize, q.DO, q.Padding, q.Keepalive}
}

func TestParse(t *testing.T) {
	const (
		head  = "1234 0100 0001 0000 0000 0000 "
		head1 = "1234 0100 0001 0000 0000 0001 "
		aIN   = "01 61 00 0001 0001 "
		opt   = "00 0029 04d0 00000000 0000 "
	)
	name := "\x01a\x00"
	plain := parsed{Kind: Plain, ID: 0x1234, Name: name, Qtype: 1, Qclass: 1, UDPSize: 512}
	with := func(p parsed, change func(*parsed)) parsed { change(&p); return p }
	odd := with(plain, func(p *parsed) { p.Kind = Odd })
	formerr := with(odd, func(p *parsed) { p.Fault = RcodeFormErr })
	edns := with(plain, func(p *parsed) { p.EDNS, p.UDPSize = true, 1232 })
	junk := parsed{Kind: Junk, Fault: RcodeFormErr, ID: 0x1234, UDPSize: 512}
	label63 := "3f " + strings.Repeat("61", 63)
	tests := []struct {
		name string
		raw  string
		want parsed
	}{
		{"nothing", "", parsed{UDPSize: 512}},
		{"eleven octets", "1234 0100 0001 0000 0000 00", parsed{UDPSize: 512}},
		{"response", "1234 8100 0001 0000 0000 0000" + aIN, parsed{ID: 0x1234, UDPSize: 512}},
		{"plain", head + aIN, plain},
		{"root", head + "00 0002 0001", with(plain, func(p *parsed) { p.Name, p.Qtype = "\x00", 2 })},
		{"header only, QDCOUNT 0", "1234 0100 0000 0000 0000 0000", parsed{Odd, RcodeFormErr, 0x1234, "", 0, 0, false, 512, false, false, false}},
		{"header only, QDCOUNT 1", head, junk},
		{"QDCOUNT 2", "1234 0100 0002 0000 0000 0000" + aIN + aIN, parsed{Kind: Odd, Fault: RcodeFormErr, ID: 0x1234, UDPSize: 512}},
		{"QDCOUNT 2, one there", "1234 0100 0002 0000 0000 0000" + aIN, junk},
		{"QDCOUNT 65535", "1234 0100 ffff 0000 0000 0000" + aIN, junk},
		{"QDCOUNT 2 with OPT", "1234 0100 0002 0000 0000 0001" + aIN + aIN + opt, parsed{Kind: Odd, Fault: RcodeFormErr, ID: 0x1234, EDNS: true, UDPSize: 1232}},
		{"question without class", head + "01 61 00 0001", junk},
		{"pointer to itself", head + "c00c 0001 0001", junk},
		{"pointer ending in 0", head + "c000 0001 0001", junk},
		{"label and pointer ending in 0", head + "01 61 c000 0001 0001", junk},
		{"label type 01", head + "41 00 0001 0001", junk},
		{"label type 10", head + "81 00 0001 0001", junk},
		{"name runs out", head + "3f 61 61", junk},
		{"name of 255 octets", head + strings.Repeat(label63, 3) + "3d" + strings.Repeat("61", 61) + "00 0001 0001",
			with(plain, func(p *parsed) {
				p.Name = strings.Repeat("\x3f"+strings.Repeat("a", 63), 3) + "\x3d" + strings.Repeat("a", 61) + "\x00"
			})},
		{"name of 256 octets", head + strings.Repeat(label63, 3) + "3e" + strings.Repeat("61", 62) + "00 0001 0001", junk},
		{"name of 257 octets", head + strings.Repeat(label63, 4) + "00 0001 0001", junk},
		{"trailing octet", head + aIN + "00", formerr},
		{"class CH", head + "01 61 00 0010 0003", with(odd, func(p *parsed) { p.Qtype, p.Qclass = 16, 3 })},
		{"class ANY", head + "01 61 00 0001 00ff", with(odd, func(p *parsed) { p.Qclass = 255 })},
		{"ANY", head + "01 61 00 00ff 0001", with(odd, func(p *parsed) { p.Qtype = 255 })},
		{"AXFR", head + "01 61 00 00fc 0001", with(odd, func(p *parsed) { p.Qtype = 252 })},
		{"IXFR", head + "01 61 00 00fb 0001", with(odd, func(p *parsed) { p.Qtype = 251 })},
		{"TKEY", head + "01 61 00 00f9 0001", with(odd, func(p *parsed) { p.Qtype = 249 })},
		{"OPT", head + "01 61 00 0029 0001", with(odd, func(p *parsed) { p.Qtype = 41 })},
		{"unknown type", head + "01 61 00 ff01 0001", with(plain, func(p *parsed) { p.Qtype = 0xff01 })},
		{"UPDATE", "1234 2800 0001 0000 0001 0000" + aIN + aIN + "00000000 0000", with(odd, func(p *parsed) { p.Fault = RcodeNotImp })},
		{"NOTIFY, no question", "1234 2000 0000 0000 0000 0000", parsed{Kind: Odd, Fault: RcodeNotImp, ID: 0x1234, UDPSize: 512}},
		{"opcode 15, junk", "1234 7900 ffff ffff ffff ffff 41", parsed{Kind: Odd, Fault: RcodeNotImp, ID: 0x1234, UDPSize: 512}},
		{"answer record", "1234 0100 0001 0001 0000 0000" + aIN + "c00c 0001 0001 00000000 0004 7f000001", odd},
		{"answer record with bad RDLENGTH", "1234 0100 0001 0001 0000 0000" + aIN + "c00c 0001 0001 00000000 0005 7f000001", formerr},
		{"answer record missing", "1234 0100 0001 0001 0000 0000" + aIN, formerr},
		{"TSIG", head1 + aIN + "00 00fa 00ff 00000000 0000", odd},
		{"OPT", head1 + aIN + opt, edns},
		{"OPT and TSIG", "1234 0100 0001 0000 0000 0002" + aIN + opt + "00 00fa 00ff 00000000 0000", with(edns, func(p *parsed) { p.Kind = Odd })},
		{"OPT with small size", head1 + aIN + "00 0029 0001 00000000 0000", with(edns, func(p *parsed) { p.UDPSize = 512 })},
		{"OPT with large size", head1 + aIN + "00 0029 ffff 00000000 0000", with(edns, func(p *parsed) { p.UDPSize = 65535 })},
		{"OPT with DO", head1 + aIN + "00 0029 04d0 00008000 0000", with(edns, func(p *parsed) { p.DO = true })},
		{"OPT with unknown flags", head1 + aIN + "00 0029 04d0 00007fff 0000", edns},
		{"OPT with padding", head1 + aIN + "00 0029 04d0 00000000 0006 000c 0002 0000", with(edns, func(p *parsed) { p.Padding = true })},
		{"OPT with keepalive", head1 + aIN + "00 0029 04d0 00000000 0004 000b 0000", with(edns, func(p *parsed) { p.Keepalive = true })},
		{"OPT with unknown option and padding", head1 + aIN + "00 0029 04d0 00000000 0009 fde9 0001 61 000c 0000",
			with(edns, func(p *parsed) { p.Padding = true })},
		{"OPT with half an option header", head1 + aIN + "00 0029 04d0 00000000 0003 000c 00",
			with(edns, func(p *parsed) { p.Kind, p.Fault = Odd, RcodeFormErr })},
		{"OPT with an option that is too long", head1 + aIN + "00 0029 04d0 00000000 0005 000c 0002 00",
			with(edns, func(p *parsed) { p.Kind, p.Fault = Odd, RcodeFormErr })},
		{"OPT version 1", head1 + aIN + "00 0029 04d0 00018000 0004 000c 0000",
			with(edns, func(p *parsed) { p.Kind, p.Fault, p.DO = Odd, RcodeBadVers, true })},
		{"OPT version 1 and junk", head1 + aIN + "00 0029 04d0 00010000 0000 00",
			with(edns, func(p *parsed) { p.Kind, p.Fault = Odd, RcodeFormErr })},
		{"OPT not the root's", head1 + aIN + "01 61" + opt, formerr},
		{"OPT by a pointer", head1 + aIN + "c00e 0029 04d0 00000000 0000", formerr},
		{"two OPTs", "1234 0100 0001 0000 0000 0002" + aIN + opt + opt, with(edns, func(p *parsed) { p.Kind, p.Fault = Odd, RcodeFormErr })},
		{"OPT as an answer", "1234 0100 0001 0001 0000 0000" + aIN + opt, formerr},
		{"OPT as authority", "1234 0100 0001 0000 0001 0000" + aIN + opt, formerr},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(parse(unhex(t, tt.raw)), tt.want); diff != "" {
				t.Errorf("(-got +want)\n%s", diff)
			}
		})
	}
}

// TestParseForgets reuses a Query: nothing of the first message may be left.
func TestParseForgets(t *testing.T) {
	full := unhex(t, `1234 0130 0001 0000 0000 0001  01 61 00 0001 0001
		00 0029 04d0 00008000 0008 000b 0000 000c 0000`)
	var q Query
	q.Parse(full)
	if !q.AD() || !q.CD() || !q.RD() || !q.DO || !q.Padding || !q.Keepalive {
		t.Fatalf("got %+v, want all bits", q)
	}
	q.Parse(nil)
	q.key = [len(q.key)]byte{}
	if want := (Query{UDPSize: 512}); !reflect.DeepEqual(q, want) {
		t.Errorf("got %+v, want %+v", q, want)
	}
}

func TestKey(t *testing.T) {
	base := func() *dns.Msg { return new(dns.Msg).SetQuestion("Example.ORG.", dns.TypeA) }
	key := func(m *dns.Msg, view uint32) string {
		var q Query
		q.Parse(pack(t, m))
		return string(q.Key(view))
	}
	want := "\x07example\x03org\x00" + "\x00\x01" + "\x00" + "\x00\x00\x00\x07"
	if got := key(base(), 7); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	same := map[string]func(*dns.Msg){
		"letter case": func(m *dns.Msg) { m.Question[0].Name = "eXAMPLE.org." },
		"ID":          func(m *dns.Msg) { m.Id++ },
		"RD":          func(m *dns.Msg) { m.RecursionDesired = false },
		"AD":          func(m *dns.Msg) { m.AuthenticatedData = true },
		"EDNS":        func(m *dns.Msg) { m.SetEdns0(4096, false) },
	}
	for name, change := range same {
		m := base()
		change(m)
		if got := key(m, 7); got != want {
			t.Errorf("other %s: got %q, want %q", name, got, want)
		}
	}
	seen := map[string]string{want: "none"}
	other := map[string]func(*dns.Msg) uint32{
		"name":   func(m *dns.Msg) uint32 { m.Question[0].Name = "example.com."; return 7 },
		"labels": func(m *dns.Msg) uint32 { m.Question[0].Name = `example\.org.`; return 7 },
		"type":   func(m *dns.Msg) uint32 { m.Question[0].Qtype = dns.TypeAAAA; return 7 },
		"DO":     func(m *dns.Msg) uint32 { m.SetEdns0(4096, true); return 7 },
		"CD":     func(m *dns.Msg) uint32 { m.CheckingDisabled = true; return 7 },
		"DO CD":  func(m *dns.Msg) uint32 { m.SetEdns0(4096, true); m.CheckingDisabled = true; return 7 },
		"view":   func(m *dns.Msg) uint32 { return 8 },
	}
	for name, change := range other {
		m := base()
		got := key(m, change(m))
		if before, ok := seen[got]; ok {
			t.Errorf("%s: has the key of %s, %q", name, before, got)
		}
		seen[got] = name
	}
}

func TestTransport(t *testing.T) {
	names := map[string]bool{}
	for tr := range NumTransports + 1 {
		names[tr.String()] = true
		if got, want := tr.Encrypted(), tr != UDP && tr != TCP; got != want {
			t.Errorf("%v: encrypted %v, want %v", tr, got, want)
		}
	}
	if len(names) != int(NumTransports)+1 {
		t.Errorf("names are not distinct: %v", names)
	}
}

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatalf("packing\n%v: %v", m, err)
	}
	return b
}

// FuzzParse holds Parse and AppendError against miekg/dns.
func FuzzParse(f *testing.F) {
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeHTTPS)
	f.Add(pack(f, m), uint8(0))
	m.SetEdns0(4096, true)
	m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_PADDING{Padding: make([]byte, 9)}, &dns.EDNS0_TCP_KEEPALIVE{})
	f.Add(pack(f, m), uint8(DoT))
	m.Extra = append(m.Extra, m.Extra[0])
	f.Add(pack(f, m), uint8(TCP))
	f.Add(unhex(f, "1234 0100 0001 0000 0000 0000 01 61 c000 0001 0001"), uint8(1))
	f.Fuzz(func(t *testing.T, raw []byte, transport uint8) {
		q := Query{Transport: Transport(transport) % NumTransports}
		q.Parse(raw)
		if q.Kind == Plain && q.Fault != RcodeSuccess {
			t.Fatalf("plain with fault %d", q.Fault)
		}
		var m dns.Msg
		if q.Kind == Plain {
			// miekg/dns reads into the options, Parse does not have to.
			if err := m.Unpack(raw); err == nil {
				comparePlain(t, &q, &m)
			} else if !q.EDNS {
				t.Fatalf("plain, but %v", err)
			}
			if key := q.Key(1); len(key) != len(q.Name)+7 {
				t.Fatalf("key of %d octets for a name of %d", len(key), len(q.Name))
			}
		}
		if q.Kind == Junk && q.Fault == RcodeSuccess {
			return
		}
		checkEmpty(t, &q, RcodeServFail)
		checkEmpty(t, &q, q.Fault)
	})
}

func comparePlain(t *testing.T, q *Query, m *dns.Msg) {
	t.Helper()
	if len(m.Question) != 1 || len(m.Answer)+len(m.Ns) > 0 || m.Opcode != dns.OpcodeQuery {
		t.Fatalf("plain, but\n%v", m)
	}
	name, _, err := dns.UnpackDomainName(q.Name, 0)
	got := dns.Question{Name: name, Qtype: q.Qtype, Qclass: q.Qclass}
	if err != nil || got != m.Question[0] || q.ID != m.Id || q.CD() != m.CheckingDisabled {
		t.Fatalf("got %v %v, want\n%v", got, err, m)
	}
	opt := m.IsEdns0()
	if q.EDNS != (opt != nil) || len(m.Extra) > 1 {
		t.Fatalf("EDNS: %v, but\n%v", q.EDNS, m)
	}
	if opt != nil && (q.DO != opt.Do() || q.UDPSize != max(opt.UDPSize(), 512)) {
		t.Fatalf("got DO %v, size %d, want\n%v", q.DO, q.UDPSize, opt)
	}
}

// checkEmpty appends an error and reads it again.
func checkEmpty(t *testing.T, q *Query, rcode uint16) {
	t.Helper()
	s := Shape{UDPSize: 1232, Keepalive: 100, PadBlock: 468}
	raw := s.AppendError([]byte("before"), q, rcode, EDE{22, strings.Repeat("x", 250)}, EDE{23, strings.Repeat("y", 300)})
	if string(raw[:6]) != "before" {
		t.Fatal("dst was overwritten")
	}
	raw = raw[6:]
	if q.Transport == UDP && len(raw) > int(min(q.UDPSize, s.UDPSize)) {
		t.Fatalf("%d octets for a client that takes %d", len(raw), q.UDPSize)
	}
	var m dns.Msg
	if err := m.Unpack(raw); err != nil {
		t.Fatalf("%v: % x", err, raw)
	}
	if m.Id != q.ID || !m.Response || m.Opcode != int(q.Opcode()) || (m.IsEdns0() != nil) != q.EDNS || len(m.Question) != btoi(q.Name != nil) {
		t.Fatalf("got\n%v", &m)
	}
	if m.Rcode != int(rcode) { // only BADVERS does not fit in the header, and that needs an OPT record
		t.Fatalf("got %d, want %d", m.Rcode, rcode)
	}
	if q.Name != nil && string(raw[HeaderLen:HeaderLen+len(q.Name)]) != string(q.Name) {
		t.Fatalf("question was not echoed")
	}
	if q.Padding && q.Transport.Encrypted() && len(raw)%468 != 0 {
		t.Fatalf("padded to %d", len(raw))
	}
}

func TestParseDoesNotAllocate(t *testing.T) {
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA).SetEdns0(1232, true)
	raw := pack(t, m)
	var q Query
	if n := testing.AllocsPerRun(100, func() { q.Parse(raw) }); n != 0 {
		t.Errorf("Parse: %v allocs, want 0", n)
	}
	if n := testing.AllocsPerRun(100, func() { q.Key(1) }); n != 0 {
		t.Errorf("Key: %v allocs, want 0", n)
	}
}

func BenchmarkParse(b *testing.B) {
	question := func() *dns.Msg { return new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA) }
	for _, bb := range []struct {
		name string
		m    *dns.Msg
	}{
		{"plain", question()},
		{"EDNS", question().SetEdns0(1232, true)},
	} {
		b.Run(bb.name, func(b *testing.B) {
			raw := pack(b, bb.m)
			var q Query
			b.ReportAllocs()
			for b.Loop() {
				q.Parse(raw)
				if q.Kind != Plain {
					b.Fatal(q.Kind)
				}
			}
		})
	}
}

func BenchmarkKey(b *testing.B) {
	var q Query
	q.Parse(pack(b, new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA)))
	b.ReportAllocs()
	for b.Loop() {
		if binary.BigEndian.Uint32(q.Key(3)[len(q.Name)+3:]) != 3 {
			b.Fatal("wrong view")
		}
	}
}

// TestKeys has the keys for all types, for names above, and one hash for each query.
func TestKeys(t *testing.T) {
	var q, parent, any Query
	raw := []byte("\x00\x01\x01\x10\x00\x01\x00\x00\x00\x00\x00\x00\x01X\x0aEXAMPLE\xc1[@\x03oRg\x00\x00\x1c\x00\x01")
	q.Parse(raw)
	parent.Parse(append(bytes.Clone(raw[:12]), raw[14:]...))
	any.Parse(bytes.Clone(raw))
	any.Qtype = 0
	hashes := 0
	hash := func(key []byte) uint64 {
		hashes++
		if string(key) != "\x01x\x0aexample\xc1[@\x03org\x00\x00\x1c\x02\x00\x00\x00\x07" {
			t.Errorf("hash of %q", key)
		}
		return 4711
	}
	for range 3 {
		key := q.Key(7)
		if h := q.Hash(hash); h != 4711 {
			t.Errorf("hash %d", h)
		}
		turned := bytes.Clone(key)
		TurnNameKey(turned)
		want := string(any.Key(7))
		if got := string(q.NameKey(7, 0)); got != want || string(turned) != want {
			t.Errorf("got %q and %q, want %q", got, turned, want)
		}
		if got, want := string(q.NameKey(7, 2)), string(parent.NameKey(7, 0)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		q = Query(q) // a copy takes the key along
	}
	if hashes != 1 {
		t.Errorf("hashed %d times, want once", hashes)
	}
	q.Parse(raw)
	q.Key(7)
	if q.Hash(hash); hashes != 2 {
		t.Error("not hashed again after Parse")
	}
	q.Key(8)
	if q.Hash(func([]byte) uint64 { return 5 }) != 5 {
		t.Error("not hashed again for another view")
	}
}

// TestAppendLower holds the eight at once equal to one by one.
func TestAppendLower(t *testing.T) {
	for n := range 20 {
		for c := range 256 {
			for _, other := range []byte{0, 'A', 'Z', 0x80, 0xff} {
				in := bytes.Repeat([]byte{other}, n)
				if n > 0 {
					in[c%n] = byte(c)
				}
				want := bytes.Clone(in)
				for i := range want {
					want[i] = Lower(want[i])
				}
				if got := appendLower(nil, in); !bytes.Equal(got, want) {
					t.Fatalf("%x: got %x, want %x", in, got, want)
				}
			}
		}
	}
}
