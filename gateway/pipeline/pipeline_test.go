package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// reachable is an error as package forward has it.
type reachable struct{ code uint16 }

func (reachable) Error() string                     { return "no" }
func (r reachable) ExtendedError() (uint16, string) { return r.code, "why" }

// reply changes the response that a good server would give.
func reply(change func(m *dns.Msg)) exchange {
	return func(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
		m := new(dns.Msg)
		m.SetReply(req)
		m.Answer = []dns.RR{mustRR("example.com. 300 IN A 192.0.2.1")}
		m.SetEdns0(4096, false)
		change(m)
		return m, nil
	}
}

// TestUpstream has what upstreams may say, sense and nonsense, and what becomes of it.
func TestUpstream(t *testing.T) {
	const good = "example.com.\t300\tIN\tA\t192.0.2.1"
	network := []wire.EDE{{Code: dns.ExtendedErrorCodeNetworkError}}
	for _, tt := range []struct {
		name     string
		upstream exchange
		trustAD  bool
		rcode    int
		ede      []wire.EDE
		answer   []string
		extra    int // records besides the OPT record
		ad       bool
	}{
		{name: "good", upstream: reply(func(*dns.Msg) {}), answer: []string{good}},
		{name: "the question in another letter case", answer: []string{good},
			upstream: reply(func(m *dns.Msg) { m.Question[0].Name = "EXAMPLE.com." })},
		{name: "AD from an upstream that is not trusted", answer: []string{good},
			upstream: reply(func(m *dns.Msg) { m.AuthenticatedData = true })},
		{name: "AD from a trusted upstream", trustAD: true, answer: []string{good}, ad: true,
			upstream: reply(func(m *dns.Msg) { m.AuthenticatedData = true })},
		{name: "no AD from a trusted upstream", trustAD: true, answer: []string{good}, upstream: reply(func(*dns.Msg) {})},
		{name: "AA, Z, no RA", answer: []string{good},
			upstream: reply(func(m *dns.Msg) { m.Authoritative, m.Zero, m.RecursionAvailable = true, true, false })},
		{name: "another ID", answer: []string{good}, upstream: reply(func(m *dns.Msg) { m.Id++ })},
		{name: "answers for another name", answer: []string{"other.test.\t300\tIN\tA\t192.0.2.1"},
			upstream: reply(func(m *dns.Msg) { m.Answer[0].Header().Name = "other.test." })},
		{name: "answers of another class", answer: []string{"example.com.\t300\tCH\tA\t192.0.2.1"},
			upstream: reply(func(m *dns.Msg) { m.Answer[0].Header().Class = dns.ClassCHAOS })},
		{name: "hop-by-hop records", answer: []string{good}, extra: 1,
			upstream: reply(func(m *dns.Msg) { m.Extra = append(m.Extra, mustRR("x. 1 IN A 192.0.2.9"), signature) })},
		{name: "its EDNS options", answer: []string{good}, ede: []wire.EDE{{Code: 3, Text: "old"}, {Code: 65000}},
			upstream: reply(func(m *dns.Msg) {
				option(&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"},
					&dns.EDNS0_EDE{InfoCode: 3, ExtraText: "old"}, &dns.EDNS0_PADDING{Padding: make([]byte, 99)},
					&dns.EDNS0_EDE{InfoCode: 65000}, &dns.EDNS0_NSID{Code: dns.EDNS0NSID, Nsid: "aabb"})(m)
			})},
		{name: "NXDOMAIN", rcode: dns.RcodeNameError, upstream: reply(func(m *dns.Msg) { m.Rcode, m.Answer = dns.RcodeNameError, nil })},
		{name: "YXDOMAIN, for a DNAME that makes too long a name", rcode: dns.RcodeYXDomain, answer: []string{good},
			upstream: reply(func(m *dns.Msg) { m.Rcode = dns.RcodeYXDomain })},
		{name: "SERVFAIL with its reasons", rcode: dns.RcodeServerFailure, ede: []wire.EDE{{Code: 6, Text: "no DNSKEY"}, {Code: 9}},
			upstream: reply(func(m *dns.Msg) {
				m.Rcode, m.Answer = dns.RcodeServerFailure, nil
				option(&dns.EDNS0_EDE{InfoCode: 6, ExtraText: "no DNSKEY"}, &dns.EDNS0_EDE{InfoCode: 9})(m)
			})},
		{name: "REFUSED", rcode: dns.RcodeRefused, upstream: reply(func(m *dns.Msg) { m.Rcode, m.Answer = dns.RcodeRefused, nil })},
		{name: "another question", rcode: dns.RcodeServerFailure, ede: network,
			upstream: reply(func(m *dns.Msg) { m.Question[0].Name = "example.net." })},
		{name: "another type", rcode: dns.RcodeServerFailure, ede: network, upstream: reply(func(m *dns.Msg) { m.Question[0].Qtype++ })},
		{name: "another class", rcode: dns.RcodeServerFailure, ede: network, upstream: reply(func(m *dns.Msg) { m.Question[0].Qclass++ })},
		{name: "BADVERS is between us and them", rcode: dns.RcodeServerFailure, ede: network,
			upstream: reply(func(m *dns.Msg) { m.Rcode = dns.RcodeBadVers })},
		{name: "BADCOOKIE is as well", rcode: dns.RcodeServerFailure, ede: network,
			upstream: reply(func(m *dns.Msg) { m.Rcode = dns.RcodeBadCookie })},
		{name: "a nil response", rcode: dns.RcodeServerFailure, ede: network,
			upstream: func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, nil }},
		{name: "no server", rcode: dns.RcodeServerFailure, ede: []wire.EDE{{Code: 22}},
			upstream: func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") }},
		{name: "no server, and why", rcode: dns.RcodeServerFailure, ede: []wire.EDE{{Code: 23, Text: "why"}},
			upstream: func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, fmt.Errorf("asking: %w", reachable{23}) }},
	} {
		for _, transport := range transports {
			t.Run(fmt.Sprintf("%s/%v", tt.name, transport), func(t *testing.T) {
				seen := &events{}
				p := mustNew(t, Config{Groups: []Group{{Upstream: tt.upstream, TrustAD: tt.trustAD}}, Observer: seen, Cache: mustCache(t)})
				q := query(p, transport, pack(t, dig("example.com.", dns.TypeA)))
				out, _ := ask(t, p, q)
				m := checkResponse(t, q, out)
				if m.Rcode != tt.rcode {
					t.Errorf("got %s, want %s", dns.RcodeToString[m.Rcode], dns.RcodeToString[tt.rcode])
				}
				if diff := cmp.Diff(edes(m), tt.ede); diff != "" {
					t.Errorf("extended errors, got -, want +:\n%s", diff)
				}
				var answer []string
				for _, rr := range m.Answer {
					answer = append(answer, rr.String())
				}
				if diff := cmp.Diff(answer, tt.answer); diff != "" {
					t.Errorf("answer, got -, want +:\n%s", diff)
				}
				if n := len(m.Extra) - 1; n != tt.extra || len(m.Ns) != 0 {
					t.Errorf("%d additional and %d authority records, want %d and 0", n, len(m.Ns), tt.extra)
				}
				if m.AuthenticatedData != tt.ad {
					t.Errorf("AD=%v, want %v", m.AuthenticatedData, tt.ad)
				}
				if got := seen.last(t); got != (event{transport, uint16(tt.rcode), Miss, 0}) {
					t.Errorf("observed %v", got)
				}
			})
		}
	}
}

func TestAccess(t *testing.T) {
	const stranger, neighbour = "192.0.2.1:53", "10.0.0.1:53"
	for _, tt := range []struct {
		name      string
		config    access.Config
		client    string
		plain     int // RCODE over UDP and TCP, -1 for silence
		encrypted int // over the others
	}{
		{"private network", access.Config{}, neighbour, 0, 0},
		{"stranger", access.Config{}, stranger, dns.RcodeRefused, 0},
		{"stranger, drop", access.Config{Drop: true}, stranger, -1, 0},
		{"stranger, everywhere", access.Config{Everywhere: true, Allow: access.PrivateNetworks()}, stranger,
			dns.RcodeRefused, dns.RcodeRefused},
		{"stranger, everywhere, drop", access.Config{Everywhere: true, Allow: access.PrivateNetworks(), Drop: true}, stranger, -1, -1},
	} {
		for _, transport := range transports {
			for _, form := range []struct {
				name  string
				query []byte
				rcode int // when admitted
			}{
				{"miss", pack(t, dig("one.test.", dns.TypeA)), 0},
				{"hit", pack(t, dig("one.test.", dns.TypeA)), 0},
				{"own", pack(t, dig("one.test.", dns.TypeAXFR, noedns)), dns.RcodeRefused},
				{"fault", message(0x0100, 0, 0, 0, 0, ""), dns.RcodeFormatError},
				{"opcode", pack(t, dig("one.test.", dns.TypeSOA, opcode(dns.OpcodeNotify))), dns.RcodeNotImplemented},
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", tt.name, transport, form.name), func(t *testing.T) {
					seen := &events{}
					want := tt.plain
					if transport.Encrypted() {
						want = tt.encrypted
					}
					admitted := want == 0
					if admitted {
						want = form.rcode
					}
					upstream := exchange(world)
					if !admitted {
						upstream = noUpstream(t)
					}
					store := mustCache(t)
					if form.name == "hit" {
						warm := mustNew(t, Config{Cache: store})
						ask(t, warm, query(warm, wire.UDP, form.query))
					}
					p := mustNew(t, Config{Access: mustAccess(t, tt.config), Observer: seen, Groups: []Group{{Upstream: upstream}}, Cache: store})
					q := query(p, transport, form.query)
					q.Client = netip.MustParseAddrPort(tt.client)
					out, v := ask(t, p, q)
					got := seen.last(t)
					if want < 0 {
						if out != nil || v != wire.Dropped || got.outcome != Dropped {
							t.Errorf("got %x, %v, observed %v; want silence", out, v, got)
						}
						return
					}
					m := checkResponse(t, q, out)
					if m.Rcode != want {
						t.Errorf("got %s, want %s", dns.RcodeToString[m.Rcode], dns.RcodeToString[want])
					}
					if admitted == (got.outcome == Refused) {
						t.Errorf("admitted: %v, and observed as %v", admitted, got.outcome)
					}
					if !admitted && q.EDNS && !cmp.Equal(edes(m), []wire.EDE{{Code: 18}}) {
						t.Errorf("extended errors %v, want 18", edes(m))
					}
				})
			}
		}
	}
}

// TestLimited empties a client's bucket. Over UDP every second query then gets an empty answer with TC set, the others
// nothing; over the transports whose addresses cannot be forged, REFUSED says why.
func TestLimited(t *testing.T) {
	for _, transport := range transports {
		for _, options := range [][]func(*dns.Msg){nil, {noedns}, {bufsize(4096), dnssec}} {
			t.Run(fmt.Sprintf("%v/%d", transport, len(options)), func(t *testing.T) {
				seen := &events{}
				p := mustNew(t, Config{Access: mustAccess(t, access.Config{PerClient: 1}), Observer: seen, Cache: mustCache(t)})
				raw := pack(t, dig("big.test.", dns.TypeTXT, options...))
				for range 10 {
					q := query(p, transport, raw)
					out, _ := ask(t, p, q)
					if m := checkResponse(t, q, out); m.Rcode != 0 {
						t.Fatalf("within the burst: %v", m)
					}
					seen.last(t)
				}
				for i := range 6 {
					q := query(p, transport, raw)
					out, v := ask(t, p, q)
					got := seen.last(t)
					if transport == wire.UDP && i%2 == 1 {
						if out != nil || v != wire.Dropped || got.outcome != Dropped {
							t.Errorf("query %d: %x, %v, %v; want silence", i, out, v, got)
						}
						continue
					}
					m := checkResponse(t, q, out)
					if v != wire.Answered || got.outcome != Limited || len(m.Answer) != 0 {
						t.Errorf("query %d: %v, %v, %v", i, v, got, m)
					}
					if transport == wire.UDP {
						if !m.Truncated || m.Rcode != 0 || len(out) > len(raw) {
							t.Errorf("query %d: TC=%v, RCODE %d, %d octets for %d", i, m.Truncated, m.Rcode, len(out), len(raw))
						}
						continue
					}
					if m.Truncated || m.Rcode != dns.RcodeRefused {
						t.Errorf("query %d: TC=%v, RCODE %d", i, m.Truncated, m.Rcode)
					}
					if q.EDNS && !cmp.Equal(edes(m), []wire.EDE{{Code: 0, Text: "query rate limit exceeded"}}) {
						t.Errorf("query %d: %v", i, edes(m))
					}
				}
				// Broken messages over UDP get nothing: who sends them does not come back over TCP.
				q := query(p, transport, message(0x0100, 0, 0, 0, 0, ""))
				if out, v := ask(t, p, q); (v == wire.Dropped) != (transport == wire.UDP) {
					t.Errorf("FORMERR: %x, %v", out, v)
				}
				// Forged responses take no tokens; a second later there is one again.
				q = query(p, transport, raw)
				q.Received += int64(time.Second)
				if out, _ := ask(t, p, q); len(out) == 0 {
					t.Error("a second later: silence")
				} else if m := unpack(t, out); m.Rcode != 0 || len(m.Answer) == 0 && !m.Truncated {
					t.Errorf("a second later: %v", m)
				}
			})
		}
	}
}

func TestJunkTakesNoToken(t *testing.T) {
	p := mustNew(t, Config{Access: mustAccess(t, access.Config{PerClient: 1})})
	for range 100 {
		ask(t, p, query(p, wire.UDP, message(0x8180, 1, 0, 0, 0, questionA)))
	}
	q := query(p, wire.UDP, pack(t, dig("one.test.", dns.TypeA)))
	out, _ := ask(t, p, q)
	if m := checkResponse(t, q, out); len(m.Answer) != 1 {
		t.Errorf("got %v, want an answer", m)
	}
}

// TestSizes asks for 30 TXT records of 100 to 129 octets each.
func TestSizes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []func(*dns.Msg)
		most    int
	}{
		{"no EDNS", []func(*dns.Msg){noedns}, 512},
		{"too small a size", []func(*dns.Msg){bufsize(100)}, 512},
		{"800", []func(*dns.Msg){bufsize(800)}, 800},
		{"1232", nil, 1232},
		{"4096", []func(*dns.Msg){bufsize(4096)}, 1232},
		{"padded", []func(*dns.Msg){option(&dns.EDNS0_PADDING{Padding: make([]byte, 8)})}, 1232},
	} {
		for _, transport := range transports {
			t.Run(fmt.Sprintf("%s/%v", tt.name, transport), func(t *testing.T) {
				p := mustNew(t, Config{Cache: mustCache(t)})
				raw := pack(t, dig("big.test.", dns.TypeTXT, tt.options...))
				for _, when := range []string{"miss", "hit"} {
					q := query(p, transport, raw)
					out, _ := ask(t, p, q)
					m := checkResponse(t, q, out)
					if transport == wire.UDP {
						if !m.Truncated || len(m.Answer) != 0 || len(out) > tt.most {
							t.Errorf("%s: TC=%v, %d records, %d octets", when, m.Truncated, len(m.Answer), len(out))
						}
					} else if m.Truncated || len(m.Answer) != 30 {
						t.Errorf("%s: TC=%v, %d records", when, m.Truncated, len(m.Answer))
					}
				}
			})
		}
	}
}

// TestCache follows pairs of queries: which answer is shared with whom.
func TestCache(t *testing.T) {
	for _, tt := range []struct {
		name          string
		first, second *dns.Msg
		want          Outcome // of the second
		after         time.Duration
	}{
		{"the same", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA), Hit, 0},
		{"letter case", dig("one.test.", dns.TypeA), dig("ONE.teST.", dns.TypeA), Hit, 0},
		{"with and without EDNS", dig("one.test.", dns.TypeA, noedns), dig("one.test.", dns.TypeA, bufsize(4000)), Hit, 0},
		{"with and without AD and RD", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA, noad, norec), Hit, 0},
		{"an hour later", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA), Miss, time.Hour},
		{"a minute later", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA), Hit, time.Minute},
		{"another type", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeAAAA), Miss, 0},
		{"DO", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA, dnssec), Miss, 0},
		{"CD", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA, cdflag), Miss, 0},
		{"DO, twice", dig("one.test.", dns.TypeA, dnssec), dig("one.test.", dns.TypeA, dnssec), Hit, 0},
		{"another class, second", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA, class(4)), Miss, 0},
		{"another class, first", dig("one.test.", dns.TypeA, class(4)), dig("one.test.", dns.TypeA), Miss, 0},
		{"another class, twice", dig("one.test.", dns.TypeA, class(4)), dig("one.test.", dns.TypeA, class(4)), Miss, 0},
		{"NXDOMAIN", dig("nxdomain.test.", dns.TypeA), dig("nxdomain.test.", dns.TypeA), Hit, 0},
		{"NODATA", dig("nodata.test.", dns.TypeA), dig("nodata.test.", dns.TypeA), Hit, 0},
		{"SERVFAIL", dig("servfail.test.", dns.TypeA), dig("servfail.test.", dns.TypeA), Hit, 0},
		{"SERVFAIL, six seconds later", dig("servfail.test.", dns.TypeA), dig("servfail.test.", dns.TypeA), Miss, 6 * time.Second},
		{"REFUSED", dig("refused.test.", dns.TypeA), dig("refused.test.", dns.TypeA), Miss, 0},
		{"truncated", dig("tc.test.", dns.TypeA), dig("tc.test.", dns.TypeA), Miss, 0},
		{"an unknown type", dig("one.test.", 65280), dig("one.test.", 65280), Hit, 0},
		{"an odd query, second", dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeA, additional("x. 1 IN A 192.0.2.1")), Hit, 0},
		{"an odd query, first", dig("one.test.", dns.TypeA, additional("x. 1 IN A 192.0.2.1")), dig("one.test.", dns.TypeA), Hit, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seen, clock := &events{}, newClock()
			p := mustNew(t, Config{Cache: mustCache(t), View: 7, Observer: seen, Now: clock.Now})
			q := query(p, wire.TCP, pack(t, tt.first))
			out, _ := ask(t, p, q)
			first := checkResponse(t, q, out)
			if got := seen.last(t); got.outcome != Miss {
				t.Fatalf("the first was a %v", got)
			}
			clock.add(tt.after)
			q = query(p, wire.TCP, pack(t, tt.second))
			out, v := ask(t, p, q)
			second := checkResponse(t, q, out)
			if got := seen.last(t); got.outcome != tt.want || int(got.rcode) != second.Rcode {
				t.Errorf("got %v and RCODE %d, want a %v", got, second.Rcode, tt.want)
			}
			if q.Kind == wire.Plain && (v == wire.Answered) != (tt.want == Hit) {
				t.Errorf("got the verdict %v", v)
			}
			if tt.want == Hit {
				for i, rr := range second.Answer {
					if got, want := rr.Header().Ttl, first.Answer[i].Header().Ttl-uint32(tt.after.Seconds()); got != want {
						t.Errorf("TTL %d, want %d", got, want)
					}
				}
			}
		})
	}
}

// TestViews shows that a pipeline of another view does not see what is in the same cache.
func TestViews(t *testing.T) {
	store := mustCache(t)
	raw := pack(t, dig("one.test.", dns.TypeA))
	for _, tt := range []struct {
		view uint32
		want Outcome
	}{{1, Miss}, {1, Hit}, {2, Miss}, {2, Hit}, {1, Hit}} {
		seen := &events{}
		p := mustNew(t, Config{Cache: store, View: tt.view, Observer: seen})
		ask(t, p, query(p, wire.DoT, raw))
		if got := seen.last(t); got.outcome != tt.want {
			t.Errorf("view %d: %v, want %v", tt.view, got.outcome, tt.want)
		}
	}
}

// TestInflight holds two exchanges open: the third is shed at once, own answers and hits are not.
func TestInflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		seen := &events{}
		p := mustNew(t, Config{Cache: mustCache(t), Inflight: 2, Observer: seen,
			Groups: []Group{{Upstream: exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
				if strings.HasPrefix(req.Question[0].Name, "records") {
					select {
					case <-release:
					case <-ctx.Done():
						return nil, ctx.Err()
					}
				}
				return world(ctx, req)
			})}}})
		ask(t, p, query(p, wire.UDP, pack(t, dig("one.test.", dns.TypeA))))
		seen.last(t)
		type end struct {
			name string
			m    *dns.Msg
		}
		ends := make(chan end, 10)
		begin := func(name string) {
			go func() {
				out, _ := ask(t, p, query(p, wire.TCP, pack(t, dig(name, dns.TypeTXT))))
				ends <- end{name, unpack(t, out)}
			}()
			synctest.Wait()
		}
		begin("records.one.test.")
		begin("records.two.test.")
		if got := p.Inflight(); got != 2 || len(ends) != 0 {
			t.Errorf("%d in flight, %d answered, want 2 and 0", got, len(ends))
		}
		begin("Records.two.test.") // follows: it needs no place
		if got := p.Inflight(); got != 2 || len(ends) != 0 {
			t.Errorf("%d in flight, %d answered after one that follows, want 2 and 0", got, len(ends))
		}
		begin("records.three.test.") // takes the place of the oldest
		if len(ends) != 1 {
			t.Fatalf("%d are answered, want the oldest alone", len(ends))
		}
		shed := <-ends
		if shed.name != "records.one.test." || shed.m.Rcode != dns.RcodeServerFailure ||
			!cmp.Equal(edes(shed.m), []wire.EDE{{Code: 0, Text: "too many queries in flight"}}) {
			t.Errorf("%s was shed with RCODE %d, %v", shed.name, shed.m.Rcode, edes(shed.m))
		}
		if got := p.Inflight(); got != 2 {
			t.Errorf("%d in flight, want 2", got)
		}
		seen.list = nil
		for _, tt := range []struct {
			name  string
			query *dns.Msg
			want  Outcome
		}{
			{"hit", dig("one.test.", dns.TypeA), Hit},
			{"odd hit", dig("one.test.", dns.TypeA, additional("x. 1 IN A 192.0.2.1")), Hit},
			{"own", dig("one.test.", dns.TypeANY), Local},
		} {
			q := query(p, wire.TCP, pack(t, tt.query))
			out, _ := ask(t, p, q)
			m := checkResponse(t, q, out)
			if got := seen.last(t); got.outcome != tt.want || m.Rcode != 0 {
				t.Errorf("%s: %v, RCODE %d; want %v", tt.name, got, m.Rcode, tt.want)
			}
		}
		close(release)
		synctest.Wait()
		if len(ends) != 3 {
			t.Fatalf("%d are answered, want 3", len(ends))
		}
		for range 3 {
			if e := <-ends; e.m.Rcode != 0 || len(e.m.Answer) == 0 || e.m.Question[0].Name != e.name {
				t.Errorf("%s: got\n%v", e.name, e.m)
			}
		}
		if got := p.Inflight(); got != 0 {
			t.Errorf("Inflight = %d when all is done, want 0", got)
		}
	})
}

// TestPanic shows that a panic behind the door costs one SERVFAIL, one line in the log, and no place in the bound.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	seen, clock := &events{}, newClock()
	p := mustNew(t, Config{Inflight: 1, Observer: seen, Now: clock.Now, Logger: slog.New(slog.NewTextHandler(&log, nil)),
		Groups: []Group{{Upstream: exchange(func(context.Context, *dns.Msg) (*dns.Msg, error) { panic("a broken invariant") })}}})
	for i, transport := range transports {
		q := query(p, transport, pack(t, dig("secret.test.", dns.TypeA)))
		out, _ := ask(t, p, q)
		m := checkResponse(t, q, out)
		if m.Rcode != dns.RcodeServerFailure || !cmp.Equal(edes(m), []wire.EDE{{Code: 0, Text: "internal error"}}) {
			t.Errorf("query %d: %v", i, m)
		}
		if got := seen.last(t); got.outcome != Local || got.rcode != wire.RcodeServFail {
			t.Errorf("query %d: observed %v", i, got)
		}
	}
	line := log.String()
	if strings.Count(line, "\n") != 1 || !strings.Contains(line, "a broken invariant") ||
		!strings.Contains(line, "pipeline_test.go") || !strings.Contains(line, "level=ERROR") {
		t.Errorf("the log has %q, want one line with the reason and the stack", line)
	}
	if strings.Contains(line, "secret") || strings.Contains(line, "127.0.0.1") {
		t.Errorf("the log names a question or a client: %q", line)
	}
	log.Reset()
	clock.add(time.Minute)
	ask(t, p, query(p, wire.UDP, pack(t, dig("secret.test.", dns.TypeA))))
	if want := fmt.Sprintf("panics=%d", len(transports)); !strings.Contains(log.String(), want) {
		t.Errorf("a minute later the log has %q, want %s", log.String(), want)
	}
}

// badObserver panics.
type badObserver struct{}

func (badObserver) Query(wire.Transport, uint8, uint16, Outcome) bool  { panic("observer") }
func (badObserver) Took(wire.Transport, uint8, Outcome, time.Duration) { panic("observer") }
func (badObserver) Count(Event)                                        { panic("observer") }

// TestPanicEverywhere breaks what the recovery itself stands on: there is no response, and no crash.
func TestPanicEverywhere(t *testing.T) {
	n := 0
	p := mustNew(t, Config{Observer: badObserver{}, Logger: slog.New(slog.DiscardHandler), Now: func() time.Time {
		if n++; n > 1 {
			panic("clock")
		}
		return time.Unix(1e9, 0)
	}})
	for _, m := range []*dns.Msg{dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeANY), dig("x.", dns.TypeA, opcode(5))} {
		n = 0
		q := query(p, wire.UDP, pack(t, m))
		if out, _ := ask(t, p, q); out != nil {
			t.Errorf("got %x", out)
		}
	}
}

// TestContract calls Resolve for what ServeWire has answered.
func TestContract(t *testing.T) {
	p := mustNew(t, Config{Groups: []Group{{Upstream: noUpstream(t)}}})
	q := query(p, wire.UDP, message(0x8180, 1, 0, 0, 0, questionA))
	if out, err := p.Resolve(context.Background(), nil, q); !errors.Is(err, errNoAnswer) || len(out) != 0 {
		t.Errorf("a response: %x, %v", out, err)
	}
	q = query(p, wire.UDP, pack(t, dig("x.", dns.TypeA, opcode(5))))
	out, err := p.Resolve(context.Background(), nil, q)
	if m := checkResponse(t, q, out); err != nil || m.Rcode != dns.RcodeNotImplemented {
		t.Errorf("an UPDATE: %v, %v", m, err)
	}
}

func TestContextAndDuration(t *testing.T) {
	type key struct{}
	clock, seen := newClock(), &events{}
	ctx := context.WithValue(context.Background(), key{}, "passed")
	p := mustNew(t, Config{Now: clock.Now, Observer: seen,
		Groups: []Group{{Upstream: exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
			if ctx.Value(key{}) != "passed" {
				t.Error("another context")
			}
			clock.add(30 * time.Millisecond)
			return world(ctx, req)
		})}}})
	q := query(p, wire.DoQ, pack(t, dig("one.test.", dns.TypeA)))
	if _, err := p.Resolve(ctx, nil, q); err != nil {
		t.Fatal(err)
	}
	if got := seen.last(t); got != (event{wire.DoQ, 0, Miss, 30 * time.Millisecond}) {
		t.Errorf("observed %v", got)
	}
}

// TestDebugLog has names at level debug only.
func TestDebugLog(t *testing.T) {
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo} {
		var log bytes.Buffer
		p := mustNew(t, Config{Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level})),
			Groups: []Group{{Upstream: exchange(func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") })}}})
		ask(t, p, query(p, wire.UDP, pack(t, dig("secret.test.", dns.TypeA))))
		if got := strings.Contains(log.String(), "secret.test."); got != (level == slog.LevelDebug) {
			t.Errorf("at %v: %q", level, log.String())
		}
	}
}

func TestOutcomeString(t *testing.T) {
	got := fmt.Sprint(Hit, Miss, Local, Refused, Dropped, Limited, Stale, NumOutcomes)
	if want := "hit miss local refused dropped limited stale unknown"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// nothing is an Observer that costs nothing.
type nothing struct{}

func (nothing) Query(wire.Transport, uint8, uint16, Outcome) bool  { return true }
func (nothing) Took(wire.Transport, uint8, Outcome, time.Duration) {}
func (nothing) Count(Event)                                        {}

// TestServeWireAllocates holds the fast path to its budget, which is nothing: for all that it may have to do, with the rate
// limit and an observer that wants to know everything.
func TestServeWireAllocates(t *testing.T) {
	store, clock := staleCache(t), newClock()
	routes := mustRoutes(t, route.Rule{Group: 0, Below: []string{"corp.internal"}})
	everything := Config{Cache: store, Observer: nothing{}, Now: clock.Now, Routes: routes,
		Access: mustAccess(t, access.Config{PerClient: 1e9, Everywhere: true, Allow: access.PrivateNetworks()})}
	open := mustNew(t, everything)
	limited := mustNew(t, Config{Cache: store, Observer: nothing{}, Now: clock.Now, Access: mustAccess(t, access.Config{PerClient: 0.001})})
	closed := mustNew(t, Config{Cache: store, Observer: nothing{}, Now: clock.Now, Access: mustAccess(t, access.Config{Everywhere: true})})
	var down upstream
	down.set("dead")
	patient := mustNew(t, Config{Cache: store, Observer: nothing{}, Now: clock.Now, Routes: routes, Groups: []Group{down.group()},
		Stale: StaleConfig{After: time.Hour}})
	padding := option(&dns.EDNS0_PADDING{Padding: make([]byte, 8)})
	// The time of these answers is over in all that follows, and nobody has to be asked before they are used.
	for _, name := range []string{"one.old.test.", "nxdomain.old.test."} {
		ask(t, open, query(open, wire.TCP, pack(t, dig(name, dns.TypeA))))
	}
	clock.add(30 * time.Minute)
	for _, name := range []string{"one.old.test.", "unanswered.test."} {
		ask(t, patient, query(patient, wire.TCP, pack(t, dig(name, dns.TypeA))))
	}
	hit := pack(t, dig("records.test.", dns.TypeTXT, padding))
	for _, raw := range [][]byte{hit, pack(t, dig("big.test.", dns.TypeTXT)), pack(t, dig("nxdomain.test.", dns.TypeA)),
		pack(t, dig("servfail.test.", dns.TypeA)), pack(t, dig("alias.test.", dns.TypeA, dnssec))} {
		ask(t, open, query(open, wire.TCP, raw))
	}
	for _, transport := range transports {
		for range 20 {
			ask(t, limited, query(limited, transport, hit))
		}
		for _, tt := range []struct {
			name string
			p    *Pipeline
			raw  []byte
			want wire.Verdict
		}{
			{"hit", open, hit, wire.Answered},
			{"hit without EDNS", open, pack(t, dig("Records.test.", dns.TypeTXT, noedns)), wire.Answered},
			{"hit with DO", open, pack(t, dig("alias.test.", dns.TypeA, dnssec)), wire.Answered},
			{"large", open, pack(t, dig("big.test.", dns.TypeTXT)), wire.Answered}, // and truncated over UDP
			{"SERVFAIL", open, pack(t, dig("servfail.test.", dns.TypeA)), wire.Answered},
			{"no answer", patient, pack(t, dig("unanswered.test.", dns.TypeA)), wire.Answered},
			{"NXDOMAIN", open, pack(t, dig("nxdomain.test.", dns.TypeA)), wire.Answered},
			{"NXDOMAIN of another type", open, pack(t, dig("nxdomain.test.", dns.TypeMX)), wire.Answered},
			{"NXDOMAIN of a name above", open, pack(t, dig("a.b.nxdomain.test.", dns.TypeMX)), wire.Answered},
			{"stale", open, pack(t, dig("one.old.test.", dns.TypeA)), wire.Answered},
			{"stale after a failure", patient, pack(t, dig("one.old.test.", dns.TypeA)), wire.Answered},
			{"stale NXDOMAIN", open, pack(t, dig("nxdomain.old.test.", dns.TypeAAAA)), wire.Answered},
			{"miss", open, pack(t, dig("two.test.", dns.TypeTXT)), wire.Miss},
			{"odd", open, pack(t, dig("two.test.", dns.TypeANY)), wire.Miss},
			{"FORMERR", open, message(0x0100, 2, 0, 0, 0, questionA+questionA), wire.Answered},
			{"NOTIMP", open, pack(t, dig("x.", dns.TypeSOA, opcode(5))), wire.Answered},
			{"BADVERS", open, pack(t, dig("x.", dns.TypeSOA, func(m *dns.Msg) { m.IsEdns0().SetVersion(1) })), wire.Answered},
			{"junk", open, message(0x8180, 1, 0, 0, 0, questionA), wire.Dropped},
			{"refusal", closed, hit, wire.Answered},
			{"limited", limited, hit, wire.Answered}, // and Dropped over UDP, in turn
		} {
			t.Run(fmt.Sprintf("%s/%v", tt.name, transport), func(t *testing.T) {
				one := []wire.Query{*query(tt.p, transport, tt.raw)}
				q := &one[0]
				dst := make([]byte, 0, wire.MaxMessage)
				var verdicts [3]int
				n := testing.AllocsPerRun(100, func() {
					q.Parse(tt.raw)
					tt.p.Expect(one)
					_, v := tt.p.ServeWire(dst, q)
					verdicts[v]++
				})
				if n != 0 {
					t.Errorf("%v allocs, want 0", n)
				}
				if verdicts[tt.want] < 50 {
					t.Errorf("verdicts %v, want %v", verdicts, tt.want)
				}
			})
		}
	}
}

// TestExpect expects queries of all kinds, more than are looked up together: they are answered as if nobody had.
func TestExpect(t *testing.T) {
	for _, c := range []*cache.Cache{mustCache(t), nil} {
		p := mustNew(t, Config{Cache: c})
		ask(t, p, query(p, wire.UDP, pack(t, dig("one.test.", dns.TypeA))))
		raws := [][]byte{
			pack(t, dig("one.test.", dns.TypeA)),
			pack(t, dig("two.test.", dns.TypeA)),
			pack(t, dig("oNe.test.", dns.TypeA)),
			pack(t, dig("one.test.", dns.TypeANY)),
			message(0x8180, 1, 0, 0, 0, questionA),
			message(0x0100, 2, 0, 0, 0, questionA+questionA),
			nil,
		}
		var plain, expected []wire.Query
		for i := range 10 * len(raws) {
			plain = append(plain, *query(p, wire.UDP, raws[i%len(raws)]))
			expected = append(expected, *query(p, wire.UDP, raws[i%len(raws)]))
		}
		p.Expect(expected)
		p.Expect(nil)
		verdicts := make(map[wire.Verdict]int)
		for i := range plain {
			want, wantVerdict := p.ServeWire(nil, &plain[i])
			got, verdict := p.ServeWire(nil, &expected[i])
			if verdict != wantVerdict || !bytes.Equal(got, want) {
				t.Errorf("query %d: got %v %x, want %v %x", i, verdict, got, wantVerdict, want)
			}
			verdicts[verdict]++
		}
		hits := 10 // one kind has a fault
		if c != nil {
			hits = 30
		}
		if verdicts[wire.Answered] != hits || verdicts[wire.Dropped] != 20 {
			t.Errorf("got %v, want %d answered", verdicts, hits)
		}
	}
}

// packed is an Exchanger that costs what reading the response does.
type packed []byte

func (r packed) Ask(context.Context, wire.Question) (*wire.Answer, error) {
	a, _, err := wire.ReadAnswer(r)
	return a, err
}

// TestResolveAllocates bounds what a miss costs besides its exchange: 3 objects for the answer, 1 for the cache's copy, and
// those of the flight and its context.
func TestResolveAllocates(t *testing.T) {
	m := dig("example.com.", dns.TypeA)
	resp, err := reply(func(*dns.Msg) {})(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p := mustNew(t, Config{Cache: mustCache(t), Observer: nothing{}, Groups: []Group{{Upstream: packed(pack(t, resp))}}})
	q := query(p, wire.UDP, pack(t, m))
	dst := make([]byte, 0, 4096)
	n := testing.AllocsPerRun(100, func() {
		p.cache.FlushName([]byte{0}, true)
		if _, err := p.Resolve(ctx, dst, q); err != nil {
			t.Fatal(err)
		}
	})
	if n > 14 {
		t.Errorf("%v allocs, want at most 14", n)
	}
}

// TestConcurrent is for the race detector: one pipeline, many clients, hits and misses.
func TestConcurrent(t *testing.T) {
	p := mustNew(t, Config{Cache: mustCache(t), Observer: &events{}, Access: mustAccess(t, access.Config{PerClient: 1e6})})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 100 {
				name := fmt.Sprintf("%s.%d.test.", []string{"one", "big", "nxdomain", "servfail", "alias"}[n%5], n%20)
				q := query(p, transports[(i+n)%len(transports)], pack(t, dig(name, dns.TypeTXT)))
				out, _ := ask(t, p, q)
				checkResponse(t, q, out)
			}
		})
	}
	wg.Wait()
}

// BenchmarkHit asks for one name, on all cores at once for a client each.
func BenchmarkHit(b *testing.B) {
	p := mustNew(b, Config{Cache: mustCache(b), Observer: nothing{}, Now: time.Now,
		Access: mustAccess(b, access.Config{PerClient: 1e9})})
	raw := pack(b, dig("one.test.", dns.TypeA))
	ask(b, p, query(p, wire.UDP, raw))
	var clients atomic.Int32
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		q := query(p, wire.UDP, raw)
		q.Lane = uint8(clients.Add(1))
		q.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, q.Lane}), 53)
		dst := make([]byte, 0, 4096)
		for pb.Next() {
			q.Received = time.Now().UnixNano()
			q.Parse(raw)
			if _, v := p.ServeWire(dst, q); v != wire.Answered {
				b.Error(v)
				return
			}
		}
	})
}

// BenchmarkHits asks for names at random, of which there are more than the processor's caches hold: one by one, and as a
// listener does that has received many at once.
func BenchmarkHits(b *testing.B) {
	const batch = 32
	raw := pack(b, dig("00000000.example.org.", dns.TypeA))
	for _, names := range []int{1_000, 10_000, 100_000, 1_000_000} {
		c, err := cache.New(cache.Config{MaxBytes: max(int64(names)*400, cache.MinBytes)})
		if err != nil {
			b.Fatal(err)
		}
		p := mustNew(b, Config{Cache: c, Observer: nothing{}, Now: time.Now, Access: mustAccess(b, access.Config{PerClient: 1e9})})
		name := func(raw []byte, i int) {
			for at := range 8 {
				raw[wire.HeaderLen+1+at] = "0123456789abcdef"[i>>(4*at)&15]
			}
		}
		m := dig("00000000.example.org.", dns.TypeA)
		m.Response, m.Answer = true, []dns.RR{mustRR("00000000.example.org. 3600 A 192.0.2.1")}
		m.Compress = true
		response := pack(b, m)
		now := time.Now().UnixNano()
		for i := range names {
			name(response, i)
			a, _, err := wire.ReadAnswer(response)
			if err != nil {
				b.Fatal(err)
			}
			q := query(p, wire.UDP, response)
			q.Raw[2] &= 0x7f
			q.Parse(response)
			key := q.Key(0)
			c.Put(key, c.Hash(key), a, now)
			q.Raw[2] |= 0x80
		}
		for _, together := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d/together=%v", names, together), func(b *testing.B) {
				var qs [batch]wire.Query
				var raws [batch][]byte
				for i := range raws {
					raws[i] = slices.Clone(raw)
					qs[i] = *query(p, wire.UDP, raw)
				}
				dst := make([]byte, 0, 4096)
				b.ReportAllocs()
				next := uint32(0)
				for n := 0; n < b.N; n += batch {
					now := time.Now().UnixNano()
					for i := range qs {
						name(raws[i], int(uint64(next*2654435769)*uint64(names)>>32))
						next++
						qs[i].Received = now
						qs[i].Parse(raws[i])
					}
					if together {
						p.Expect(qs[:])
					}
					for i := range qs {
						if _, v := p.ServeWire(dst, &qs[i]); v != wire.Answered {
							b.Fatal(v)
						}
					}
				}
			})
		}
	}
}

// BenchmarkMiss is a miss but for its exchange and the cache's copy of the answer.
func BenchmarkMiss(b *testing.B) {
	m := dig("example.com.", dns.TypeA)
	resp, err := reply(func(*dns.Msg) {})(b.Context(), m)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	p := mustNew(b, Config{Groups: []Group{{Upstream: packed(pack(b, resp))}}})
	raw := pack(b, m)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		dst := make([]byte, 0, 4096)
		q := query(p, wire.UDP, raw)
		for pb.Next() {
			q.Parse(raw)
			if _, err := p.Resolve(ctx, dst, q); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
