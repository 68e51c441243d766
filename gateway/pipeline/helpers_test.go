package pipeline

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

var transports = []wire.Transport{wire.UDP, wire.TCP, wire.DoT, wire.DoH, wire.DoH3, wire.DoQ}

// clock is the time of a test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// exchange is an Exchanger made of a function.
type exchange func(ctx context.Context, req *dns.Msg) (*dns.Msg, error)

// noUpstream fails the test when a query gets out.
func noUpstream(t testing.TB) exchange {
	return func(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
		t.Errorf("this went upstream:\n%v", req)
		return nil, context.Canceled
	}
}

// event is one call of an Observer.
type event struct {
	transport wire.Transport
	rcode     uint16
	outcome   Outcome
	d         time.Duration
}

type events struct {
	mu     sync.Mutex
	list   []event
	counts [NumEvents]int
}

func (e *events) Query(t wire.Transport, _ uint8, rcode uint16, outcome Outcome) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, event{t, rcode, outcome, 0})
	return true
}

// Took writes to the last event, which is the right one where queries come one after the other.
func (e *events) Took(_ wire.Transport, _ uint8, _ Outcome, d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list[len(e.list)-1].d = d
}

func (e *events) Count(event Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.counts[event]++
}

// counted returns how often an event was.
func (e *events) counted(event Event) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.counts[event]
}

// outcomes returns how often each outcome was.
func (e *events) outcomes() map[Outcome]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := make(map[Outcome]int)
	for _, event := range e.list {
		n[event.outcome]++
	}
	return n
}

// last returns the only event since the last call.
func (e *events) last(t testing.TB) event {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.list) != 1 {
		t.Fatalf("the observer was called %d times, want once: %v", len(e.list), e.list)
	}
	got := e.list[0]
	e.list = nil
	return got
}

// noErrors is a log that fails the test at level error: nothing that a stranger sends may write there.
func noErrors(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(failingWriter{t}, &slog.HandlerOptions{Level: slog.LevelError}))
}

type failingWriter struct{ t testing.TB }

func (w failingWriter) Write(b []byte) (int, error) {
	w.t.Errorf("logged: %s", b)
	return len(b), nil
}

func mustAccess(t testing.TB, c access.Config) *access.Control {
	t.Helper()
	a, err := access.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func mustCache(t testing.TB) *cache.Cache {
	t.Helper()
	c, err := cache.New(cache.Config{MaxBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// mustNew fills in what the test does not care about.
func mustNew(t testing.TB, c Config) *Pipeline {
	t.Helper()
	if c.Access == nil {
		c.Access = mustAccess(t, access.Config{})
	}
	if c.Groups == nil {
		c.Groups = []Group{{Upstream: exchange(world)}}
	}
	if c.Logger == nil {
		c.Logger = noErrors(t)
	}
	if c.Now == nil {
		c.Now = newClock().Now
	}
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// query reads raw as it would come from a client on loopback.
func query(p *Pipeline, transport wire.Transport, raw []byte) *wire.Query {
	q := &wire.Query{
		Client:    netip.MustParseAddrPort("127.0.0.1:5353"),
		Local:     netip.MustParseAddrPort("127.0.0.1:53"),
		Transport: transport,
		Received:  p.now().UnixNano(),
	}
	q.Parse(raw)
	return q
}

// ask takes q through both doors as a listener does. The response is nil when there is none. It begins behind some
// octets that are not the pipeline's, like the length of a message over TCP.
func ask(t testing.TB, p *Pipeline, q *wire.Query) ([]byte, wire.Verdict) {
	t.Helper()
	const prefix = "\x00\x00"
	out, v := p.ServeWire([]byte(prefix), q)
	switch v {
	case wire.Miss:
		if string(out) != prefix {
			t.Fatalf("Miss, but %x was appended", out)
		}
		var err error
		if out, err = p.Resolve(context.Background(), []byte(prefix), q); err != nil {
			return nil, v
		}
	case wire.Dropped:
		if string(out) != prefix {
			t.Fatalf("Dropped, but %x was appended", out)
		}
		return nil, v
	}
	if !strings.HasPrefix(string(out), prefix) {
		t.Fatalf("the octets before the response were changed: %x", out)
	}
	return out[len(prefix):], v
}

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func unpack(t testing.TB, raw []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		t.Fatalf("the response cannot be read: %v\n%x", err, raw)
	}
	return m
}

// dig makes a query as dig does: RD and AD set, with an OPT record.
func dig(name string, qtype uint16, options ...func(*dns.Msg)) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	m.AuthenticatedData = true
	m.SetEdns0(1232, false)
	for _, o := range options {
		o(m)
	}
	return m
}

func class(c uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.Question[0].Qclass = c } }
func noedns(m *dns.Msg)             { m.Extra = nil }
func dnssec(m *dns.Msg)             { m.IsEdns0().SetDo() }
func cdflag(m *dns.Msg)             { m.CheckingDisabled = true }
func noad(m *dns.Msg)               { m.AuthenticatedData = false }
func norec(m *dns.Msg)              { m.RecursionDesired = false }

func opcode(n int) func(*dns.Msg) { return func(m *dns.Msg) { m.Opcode = n } }

func bufsize(n uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.IsEdns0().SetUDPSize(n) } }

func option(o ...dns.EDNS0) func(*dns.Msg) {
	return func(m *dns.Msg) { opt := m.IsEdns0(); opt.Option = append(opt.Option, o...) }
}

func additional(s ...string) func(*dns.Msg) {
	return func(m *dns.Msg) {
		for _, s := range s {
			m.Extra = append([]dns.RR{mustRR(s)}, m.Extra...)
		}
	}
}

func mustRR(s string) dns.RR {
	rr, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return rr
}

// edes returns the codes and texts of the extended DNS errors in m.
func edes(m *dns.Msg) []wire.EDE {
	var list []wire.EDE
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				list = append(list, wire.EDE{Code: e.InfoCode, Text: e.ExtraText})
			}
		}
	}
	return list
}

// world is an upstream that has a response of some kind for every question, always the same one, in the letters of the
// question. Its kind is the first label, or else chosen by the question's hash. Its lifetimes are within the bounds of
// every cache here.
func world(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
	question := req.Question[0]
	question.Name = strings.ToLower(question.Name)
	kinds := []string{"one", "alias", "big", "nxdomain", "nodata", "servfail", "refused", "referral", "records", "tc"}
	h := fnv.New32a()
	fmt.Fprintf(h, "%s %d %d", question.Name, question.Qtype, question.Qclass)
	kind := kinds[h.Sum32()%uint32(len(kinds))]
	for _, k := range kinds {
		if strings.HasPrefix(question.Name, k+".") {
			kind = k
		}
	}
	m := new(dns.Msg)
	m.SetReply(req)
	m.Question[0] = question
	m.RecursionAvailable, m.Compress = true, true
	header := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: question.Qclass, Ttl: 300 + h.Sum32()%60}
	soa := &dns.SOA{Hdr: dns.RR_Header{Name: "test.", Rrtype: dns.TypeSOA, Class: question.Qclass, Ttl: 60},
		Ns: "ns.test.", Mbox: "hostmaster.test.", Minttl: 60}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(4096)
	opt.Option = append(opt.Option, &dns.EDNS0_PADDING{Padding: make([]byte, 40)},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"})
	switch kind {
	case "one":
		m.Answer = []dns.RR{unknown(header, 4)}
	case "alias":
		target := dns.RR_Header{Name: "target.test.", Rrtype: question.Qtype, Class: question.Qclass, Ttl: 77}
		header.Rrtype = dns.TypeCNAME
		m.Answer = []dns.RR{&dns.CNAME{Hdr: header, Target: "target.test."}, unknown(target, 16)}
	case "big":
		for i := range 30 {
			m.Answer = append(m.Answer, unknown(header, 100+i))
		}
	case "nxdomain":
		m.Rcode = dns.RcodeNameError
		m.Ns = []dns.RR{soa}
	case "nodata":
		m.Ns = []dns.RR{soa}
	case "servfail":
		m.Rcode = dns.RcodeServerFailure
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeDNSBogus, ExtraText: "bogus"})
	case "refused":
		m.Rcode = dns.RcodeRefused
	case "referral":
		m.Ns = []dns.RR{mustRR("test. 300 IN NS ns.test.")}
		m.Extra = []dns.RR{mustRR("ns.test. 300 IN A 192.0.2.53")}
	case "records":
		m.Answer = []dns.RR{unknown(header, 1), unknown(header, 200)}
		m.Ns = []dns.RR{mustRR("test. 300 IN NS ns.test."), mustRR("test. 300 IN NS ns2.test.")}
		m.Extra = []dns.RR{mustRR("ns.test. 300 IN A 192.0.2.53"), mustRR("ns2.test. 300 IN AAAA 2001:db8::53")}
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeStaleAnswer})
	case "tc":
		m.Truncated = true
		m.Answer = []dns.RR{unknown(header, 4)}
	}
	m.Extra = append(m.Extra, opt)
	// Through the wire, as from a server, which compresses names without regard to letter case.
	raw, err := m.Pack()
	if err != nil {
		return nil, err
	}
	if _, err := dns.PackDomainName(req.Question[0].Name, raw, wire.HeaderLen, nil, false); err != nil {
		return nil, err
	}
	resp := new(dns.Msg)
	return resp, resp.Unpack(raw)
}

// unknown returns a record with about n octets of data: of the types that the tests ask for as they should be, of all
// others in the form of RFC 3597.
func unknown(h dns.RR_Header, n int) dns.RR {
	switch h.Rrtype {
	case dns.TypeA:
		return &dns.A{Hdr: h, A: []byte{192, 0, 2, byte(n)}}
	case dns.TypeAAAA:
		return &dns.AAAA{Hdr: h, AAAA: append(make([]byte, 15), byte(n))}
	case dns.TypeTXT:
		return &dns.TXT{Hdr: h, Txt: []string{strings.Repeat("x", n)}}
	}
	return &dns.RFC3597{Hdr: h, Rdata: strings.Repeat("ab", n)}
}

// Ask implements Exchanger.
func (f exchange) Ask(ctx context.Context, q wire.Question) (*wire.Answer, error) {
	name, _, err := dns.UnpackDomainName(q.Name, 0)
	if err != nil {
		return nil, err
	}
	req := &dns.Msg{
		MsgHdr:   dns.MsgHdr{Id: dns.Id(), RecursionDesired: true, AuthenticatedData: true, CheckingDisabled: q.CD},
		Question: []dns.Question{{Name: name, Qtype: q.Qtype, Qclass: q.Qclass}},
	}
	req.SetEdns0(1232, q.DO)
	resp, err := f(ctx, req)
	if resp == nil || err != nil {
		return nil, err
	}
	resp.Compress = true
	msg, err := resp.Pack()
	if err != nil {
		return nil, err
	}
	a, _, err := wire.ReadAnswer(msg)
	return a, err
}
