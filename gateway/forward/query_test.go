package forward

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestQueryForms(t *testing.T) {
	names := []string{".", "a.", "Example.COM.", strings.Repeat(strings.Repeat("x", 63)+".", 3) + strings.Repeat("y", 61) + "."}
	for _, name := range names {
		for _, f := range []form{0, keepalive, padded, padded | keepalive} {
			for _, do := range []bool{false, true} {
				req := question(name)
				if do {
					req.SetEdns0(512, true)
				}
				q, err := queryOf(req)
				if err != nil {
					t.Fatal(err)
				}
				prefix := []byte("before")
				out := q.appendTo(prefix, 0x1234, f)[len(prefix):]
				m := new(dns.Msg)
				if err := m.Unpack(out); err != nil {
					t.Fatalf("%s, form %d: %v", name, f, err)
				}
				if m.Id != 0x1234 || m.Question[0] != req.Question[0] || m.IsEdns0().Do() != do || len(m.Extra) != 1 {
					t.Errorf("%s, form %d: got\n%s", name, f, m)
				}
				if len(out) != q.size(f) || f&padded != 0 && len(out)%padBlock != 0 {
					t.Errorf("%s, form %d: got %d octets, size says %d", name, f, len(out), q.size(f))
				}
			}
		}
	}
}

func TestCheck(t *testing.T) {
	req := question("Name.test.")
	q := must(queryOf(req))
	good := func() *dns.Msg {
		m := new(dns.Msg)
		m.SetReply(req)
		m.Answer = []dns.RR{must(dns.NewRR(`name.test. 60 TXT "x"`))}
		return m
	}
	tests := []struct {
		name   string
		modify func(*dns.Msg)
		raw    func([]byte) []byte
		want   string // of the error; "" means none
		kind   string // of the error, when it is not mismatch
	}{
		{name: "good"},
		{name: "letter case", modify: func(m *dns.Msg) { m.Question[0].Name = "nAME.TEST." }},
		{name: "ID", modify: func(m *dns.Msg) { m.Id++ }, want: "wrong ID"},
		{name: "query", modify: func(m *dns.Msg) { m.Response = false }, want: "not a response"},
		{name: "opcode", modify: func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, want: "opcode 4"},
		{name: "name", modify: func(m *dns.Msg) { m.Question[0].Name = "mame.test." }, want: "wrong question"},
		{name: "longer name", modify: func(m *dns.Msg) { m.Question[0].Name = "a.name.test." }, want: "wrong question"},
		{name: "type", modify: func(m *dns.Msg) { m.Question[0].Qtype = 1 }, want: "wrong question"},
		{name: "class", modify: func(m *dns.Msg) { m.Question[0].Qclass = 3 }, want: "wrong question"},
		{name: "no question", modify: func(m *dns.Msg) { m.Question = nil }, want: "wrong question"},
		{name: "two questions", modify: func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, want: "wrong question"},
		{name: "short", raw: func(b []byte) []byte { return b[:11] }, want: "shorter"},
		{name: "header only", raw: func(b []byte) []byte { return b[:12] }, want: "wrong question"},
		{name: "cut", raw: func(b []byte) []byte { return b[:len(b)-1] }, want: "malformed", kind: KindMalformed},
		{name: "records missing", raw: func(b []byte) []byte { b[7] = 5; return b }, want: "malformed",
			kind: KindMalformed},
	}
	for _, tt := range tests {
		m := good()
		m.Id = 77
		if tt.modify != nil {
			tt.modify(m)
		}
		if tt.kind == "" {
			tt.kind = KindMismatch
		}
		raw := must(m.Pack())
		if tt.raw != nil {
			raw = tt.raw(raw)
		}
		got, _, err := q.check(raw, 77)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want == "" && (got.Rcode != 0 || len(got.TTLs) != 1):
			t.Errorf("%s: got %+v", tt.name, got)
		case tt.want != "" && (kindOf(err) != tt.kind || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v, want kind %s with %q", tt.name, err, tt.kind, tt.want)
		}
		if tt.raw != nil {
			continue
		}
		// What the framework has unpacked is held against the same rules, but for the ID, which it has checked.
		if _, err := q.checkMessage(m); (err != nil) != (tt.want != "") && tt.name != "ID" {
			t.Errorf("%s: checkMessage: got %v", tt.name, err)
		}
	}
}

// FuzzReplyReader gives foreign octets to what reads the answers of a stream and matches them with the queries in
// flight. Nothing may panic; a query that gets an answer gets its own; and one that gets none is told so.
func FuzzReplyReader(f *testing.F) {
	req := question("name.test.")
	req.Id = 1
	frame := func(m *dns.Msg) []byte {
		out := must(m.Pack())
		return append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
	}
	good := new(dns.Msg)
	good.SetReply(req)
	good.Answer = []dns.RR{must(dns.NewRR(`name.test. 60 TXT "x"`)), must(dns.NewRR(`name.test. 60 SVCB 1 . alpn=h2`))}
	good.SetEdns0(1232, true)
	good.IsEdns0().Option = append(good.IsEdns0().Option, &dns.EDNS0_TCP_KEEPALIVE{Code: 11, Timeout: 10},
		&dns.EDNS0_EDE{InfoCode: 9, ExtraText: "x"})
	f.Add(frame(good))
	f.Add(append(frame(good), frame(good)...))
	f.Add(frame(good)[:20])
	f.Add([]byte{0, 0})
	f.Add([]byte{255, 255, 1, 2})
	other := good.Copy()
	other.Question[0].Name = "other.test."
	f.Add(frame(other))
	q := must(queryOf(req))
	f.Fuzz(func(t *testing.T, data []byte) {
		near, far := net.Pipe()
		defer far.Close()
		l := &streamLink{conn: near, form: keepalive, pending: make(map[uint16]*call), wake: make(chan struct{}, 1),
			gone: make(chan struct{})}
		l.born(l.shut)
		// Three queries in flight, under IDs that the seeds use; one was given up.
		all := map[uint16]chan result{1: nil, 2: nil, 3: nil}
		for id := range all {
			all[id] = make(chan result, 2)
			l.pending[id] = &call{q: q, results: all[id], index: int(id), givenUp: id == 3}
			l.beginLocked(time.Now())
		}
		l.live--
		r := bufio.NewReaderSize(bytes.NewReader(data), 16)
		var buf []byte
		for {
			msg, err := readFrame(r, &buf)
			if err == nil {
				err = l.deliver(msg)
			}
			if err != nil {
				l.die(err)
				break
			}
		}
		for id, results := range all {
			if id == 3 {
				if len(results) > 0 {
					t.Fatal("told, though given up")
				}
				continue
			}
			select {
			case r := <-results:
				if (r.resp == nil) == (r.err == nil) || r.index != int(id) {
					t.Fatalf("query %d: got %+v", id, r)
				}
				if r.err == nil && (!sameQuestion(r.resp.Msg, q.question) || r.resp.Truncated()) {
					t.Fatalf("query %d: got another's answer: %x", id, r.resp.Msg)
				}
			default:
				t.Fatalf("query %d: nobody told it anything", id)
			}
			if len(results) != 0 {
				t.Fatalf("query %d: told twice", id)
			}
		}
	})
}

func TestStamps(t *testing.T) {
	// Made after https://dnscrypt.info/stamps-specifications.
	tests := []struct {
		name  string
		stamp string
		want  Server
	}{
		{"DoH", stampURL(2, "127.0.0.1:8443", "dns.test", "/q"), Server{Scheme: "https", Host: "127.0.0.1", Port: 8443,
			Path: "/q", VerifyName: "dns.test"}},
		{"DoH by name", stampURL(2, "", "dns.test:444", "/q"), Server{Scheme: "https", Host: "dns.test", Port: 444,
			Path: "/q", VerifyName: "dns.test"}},
		{"DoT", stampURL(3, "127.0.0.1", "dns.test", ""), Server{Scheme: "tls", Host: "127.0.0.1", Port: 853,
			VerifyName: "dns.test"}},
		{"DoQ", stampURL(4, "[2001:db8::1]", "dns.test", ""), Server{Scheme: "quic", Host: "2001:db8::1", Port: 853,
			VerifyName: "dns.test"}},
	}
	for _, tt := range tests {
		got, err := readStamp(Server{URL: tt.stamp})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		tt.want.URL = tt.stamp
		got.tbsHashes = nil
		if diff := cmp.Diff(got, tt.want, cmp.AllowUnexported(Server{})); diff != "" {
			t.Errorf("%s: got, want:\n%s", tt.name, diff)
		}
	}
	f := newFake(t, "tls", "a")
	s := Server{URL: stampURL(3, (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(f.server.Port)}).String(), "dns.test", ""),
		Scheme: "sdns", Roots: pki().roots}
	if _, err := newTestClient(t, s).Exchange(question("name.test.")); err != nil {
		t.Errorf("a DoT stamp: %v", err)
	}
}

func BenchmarkStream(b *testing.B) {
	f := newFake(b, "tcp", "a")
	c := newTestClient(b, f.server)
	q := must(queryOf(question("name.test.")))
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := c.ask(b.Context(), q); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkSearch is the engine's own cost of a question: order, attempt, books.
func BenchmarkSearch(b *testing.B) {
	for _, tt := range []struct{ name, scheme string }{{"goroutine", ""}, {"stream", "tcp"}} {
		b.Run(tt.name, func(b *testing.B) {
			tiers := [][]Server{{{URL: "a"}, {URL: "b"}}}
			open := func(s Server, _ ServerObserver) (client, error) {
				return &script{name: s.URL, play: says(s.URL, 0, 0)}, nil
			}
			if tt.scheme != "" {
				tiers = [][]Server{{newFake(b, tt.scheme, "a").server}}
				open = func(s Server, _ ServerObserver) (client, error) {
					return newClient(s, environment{timeout: time.Second})
				}
			}
			g := &Group{name: "g", pick: PickFastest, deadline: DefaultDeadline, nextOn: NextOn{true, true, true, true}, log: discard}
			g.searches.New = newSearch
			g.addTiers(Config{Tiers: tiers, Breaker: Breaker{3, time.Second, time.Second}}, open)
			defer g.Close()
			q := must(queryOf(question("name.test.")))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := g.ask(b.Context(), q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
