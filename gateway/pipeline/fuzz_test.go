package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// seeds are queries of all kinds.
func seeds(f *testing.F) {
	ecs := &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}}
	padding := &dns.EDNS0_PADDING{Padding: make([]byte, 20)}
	for i, m := range []*dns.Msg{
		dig("one.test.", dns.TypeA),
		dig("Alias.test.", dns.TypeAAAA, noedns, noad),
		dig("big.test.", dns.TypeTXT, bufsize(700), dnssec),
		dig("nxdomain.test.", dns.TypeMX, cdflag, option(padding)),
		dig("nodata.test.", 65280, option(ecs, padding)),
		dig("nodata.tesT.", 65280, option(padding)),
		dig("servfail.test.", dns.TypeA, norec),
		dig("records.test.", dns.TypeTXT, option(padding)),
		dig("referral.test.", dns.TypeNS, class(dns.ClassHESIOD)),
		dig("version.bind.", dns.TypeTXT, class(dns.ClassCHAOS)),
		dig("example.com.", dns.TypeANY),
		dig("example.com.", dns.TypeAXFR),
		dig("example.com.", dns.TypeSOA, opcode(dns.OpcodeUpdate)),
		dig("example.com.", dns.TypeA, func(m *dns.Msg) { m.Extra = append(m.Extra, signature) }),
		dig("tc.test.", dns.TypeA, additional("x. 1 IN A 192.0.2.1")),
	} {
		raw, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, uint8(i))
	}
	f.Add(message(0x0100, 2, 0, 0, 0, questionA+questionA), uint8(0))
	f.Add(message(0x0100, 1, 0, 0, 2, questionA+optOK+optOK), uint8(0))
}

// honest fails the test when anything but a clean QUERY goes out.
func honest(t testing.TB) exchange {
	return func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
		question := req.Question[0]
		switch opt := req.IsEdns0(); {
		case req.Response || req.Opcode != dns.OpcodeQuery || !req.RecursionDesired || req.Rcode != 0:
			t.Errorf("this went out:\n%v", req)
		case len(req.Question) != 1 || len(req.Answer)+len(req.Ns) != 0 || len(req.Extra) != 1:
			t.Errorf("this went out:\n%v", req)
		case opt == nil || len(opt.Option) != 0 || opt.Version() != 0 || opt.UDPSize() != 1232:
			t.Errorf("this went out:\n%v", req)
		}
		switch question.Qtype {
		case dns.TypeNone, dns.TypeOPT, dns.TypeTSIG, dns.TypeTKEY, dns.TypeAXFR, dns.TypeIXFR, dns.TypeANY, dns.TypeNXNAME:
			t.Errorf("a question for %v went out", question)
		}
		switch question.Qclass {
		case 0, dns.ClassCHAOS, dns.ClassNONE, dns.ClassANY:
			t.Errorf("a question for %v went out", question)
		}
		if _, err := req.Pack(); err != nil {
			t.Errorf("a query that cannot be packed went out: %v\n%v", err, req)
		}
		return world(ctx, req)
	}
}

// FuzzFastEqualsSlow holds the two halves of the pipeline equal: the same bytes through ServeWire after a store, and
// through Resolve with no cache.
func FuzzFastEqualsSlow(f *testing.F) {
	seeds(f)
	store, err := cache.New(cache.Config{MaxBytes: 4 << 20})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte, n uint8) {
		transport := transports[int(n)%len(transports)]
		store.FlushName([]byte{0}, true)
		clock := newClock()
		fast := mustNew(t, Config{Cache: store, Groups: []Group{{Upstream: honest(t)}}, Now: clock.Now})
		slow := mustNew(t, Config{Groups: []Group{{Upstream: honest(t)}}, Now: clock.Now})

		want, wantVerdict := ask(t, slow, query(slow, transport, bytes.Clone(raw)))
		first, v := ask(t, fast, query(fast, transport, bytes.Clone(raw)))
		if v != wantVerdict || !bytes.Equal(first, want) {
			t.Fatalf("%x: before the store: %v\n%x\nwant %v\n%x", raw, v, first, wantVerdict, want)
		}
		second, v := ask(t, fast, query(fast, transport, bytes.Clone(raw)))
		if !bytes.Equal(second, want) {
			t.Fatalf("%x: after the store: %v\n%x\nwant\n%x", raw, v, second, want)
		}
		if q := query(fast, transport, raw); v == wire.Answered && q.Kind == wire.Plain != (wantVerdict == wire.Miss) {
			t.Errorf("%x: the verdict is %v, and %v without a cache", raw, v, wantVerdict)
		}
		q := query(fast, transport, bytes.Clone(raw))
		if wantVerdict != wire.Miss || q.Qclass != wire.ClassIN {
			return
		}
		followed(t, honest(t), q, want)
		below(t, fast, q, unpack(t, want))
		stale(t, q)
		unanswered(t, q)
	})
}

// whyNot is an error that tells the client why there is no answer.
type whyNot string

func (e whyNot) Error() string                   { return string(e) }
func (e whyNot) ExtendedError() (uint16, string) { return dns.ExtendedErrorCodeNetworkError, string(e) }

// unanswered holds the response to q when nobody answers equal to the one that the cache gives after it.
func unanswered(t *testing.T, q *wire.Query) {
	t.Helper()
	asked := false
	up := exchange(func(context.Context, *dns.Msg) (*dns.Msg, error) {
		asked = true
		return nil, whyNot(strings.Repeat("ü", len(q.Raw)%200))
	})
	want, _ := ask(t, mustNew(t, Config{Groups: []Group{{Upstream: up}}}), query(mustNew(t, Config{}), q.Transport, bytes.Clone(q.Raw)))
	p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Cache: staleCache(t)})
	first, _ := ask(t, p, query(p, q.Transport, bytes.Clone(q.Raw)))
	p.groups[0].Upstream = noUpstream(t)
	second, v := ask(t, p, query(p, q.Transport, bytes.Clone(q.Raw)))
	if !bytes.Equal(first, want) || !bytes.Equal(second, want) || (v == wire.Answered) != (asked && q.Kind == wire.Plain) {
		t.Errorf("%x: nobody answers:\n%x\n%x, %v\nwant\n%x", q.Raw, first, second, v, want)
	}
}

// followed holds the response of a query that follows another one, of the same name in another letter case, equal to want,
// which is what it gets alone.
func followed(t *testing.T, up exchange, q *wire.Query, want []byte) {
	t.Helper()
	var p *Pipeline
	var followers sync.WaitGroup
	p = mustNew(t, Config{Groups: []Group{{Upstream: exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
		joined := make(chan bool)
		followers.Go(func() {
			follower := query(p, q.Transport, q.Raw)
			out, err := p.Resolve(context.Background(), nil, follower)
			if err != nil || !bytes.Equal(lower(out), lower(want)) {
				t.Errorf("%x: who follows gets\n%x, %v, want\n%x", q.Raw, out, err, want)
			}
		})
		go func() {
			defer close(joined)
			for { // there is no other way to know that it waits
				s := p.flights.shard(q.Hash(p.hash))
				s.mu.Lock()
				n := 0
				if s.oldest != nil {
					n = s.oldest.waiting
				}
				s.mu.Unlock()
				if n == 2 {
					return
				}
				runtime.Gosched()
			}
		}()
		<-joined
		return up(ctx, req)
	})}}})
	leader := *q
	leader.Raw = lower(q.Raw)
	leader.Parse(leader.Raw)
	if leader.Name == nil || !bytes.Equal(leader.Key(0), q.Key(0)) {
		return // what else is in the message is not a matter of letters
	}
	q.Hash(p.hash)
	if _, err := p.Resolve(context.Background(), nil, &leader); err != nil {
		t.Errorf("%x: the leader: %v", q.Raw, err)
	}
	followers.Wait()
}

// below asks for a name below that of q, which p has in its cache if it may be there: where q's name does not exist, the
// answer comes from the cache with the same records.
func below(t *testing.T, p *Pipeline, q *wire.Query, own *dns.Msg) {
	t.Helper()
	if n := dns.CountLabel(own.Question[0].Name); n == 0 || n > maxCuts || own.Rcode != dns.RcodeNameError || own.Truncated ||
		len(q.Name)+2 > wire.MaxName || q.Kind != wire.Plain {
		return
	}
	raw := append(bytes.Clone(q.Raw[:wire.HeaderLen]), 1, 'x')
	lowerQuery := query(p, wire.TCP, append(raw, q.Raw[wire.HeaderLen:]...))
	p.groups[0].Upstream = noUpstream(t)
	out, v := ask(t, p, lowerQuery)
	m := checkResponse(t, lowerQuery, out)
	if v != wire.Answered || m.Rcode != own.Rcode || fmt.Sprint(m.Ns) != fmt.Sprint(own.Ns) {
		t.Errorf("%x: what is below gets %v\n%v\nwant\n%v", q.Raw, v, m, own)
	}
}

// stale lets the time of the answer to q be over while upstreams are dead: what ServeWire says then and what Resolve says are
// the same, and but for the TTLs and one extended error it is the answer.
func stale(t *testing.T, q *wire.Query) {
	t.Helper()
	store, clock := staleCache(t), newClock()
	atOnce := mustNew(t, Config{Cache: store, Groups: []Group{{Upstream: honest(t)}}, Now: clock.Now})
	patient := mustNew(t, Config{Cache: store, Now: clock.Now, Stale: StaleConfig{After: time.Hour}, Groups: []Group{{Upstream: exchange(
		func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") })}}})
	raw := bytes.Clone(q.Raw)
	first, _ := ask(t, atOnce, query(atOnce, q.Transport, raw))
	before := unpack(t, first)
	if _, v := ask(t, atOnce, query(atOnce, wire.TCP, raw)); v != wire.Answered || before.Rcode == dns.RcodeServerFailure {
		return // not kept, not Plain, or kept as a failure
	}
	clock.add(20 * time.Minute)
	fast, v := ask(t, atOnce, query(atOnce, q.Transport, raw))
	slow, _ := ask(t, patient, query(patient, q.Transport, raw))
	if v != wire.Answered || !bytes.Equal(fast, slow) {
		t.Fatalf("%x: stale: %v\n%x\nand by the other door\n%x", q.Raw, v, fast, slow)
	}
	m := checkResponse(t, query(atOnce, q.Transport, raw), fast)
	if m.Rcode != before.Rcode || !before.Truncated && len(m.Answer) != len(before.Answer) {
		t.Errorf("%x: stale: got\n%v\nwant but for the TTLs\n%v", q.Raw, m, before)
	}
	for _, rr := range slices.Concat(m.Answer, m.Ns) {
		if rr.Header().Ttl != defaultStaleTTL {
			t.Errorf("%x: stale: %v", q.Raw, rr)
		}
	}
}

// FuzzAnything sends any bytes: the gateway does not crash, logs nothing, forwards nothing but queries, and a response
// is one that its client can take.
func FuzzAnything(f *testing.F) {
	seeds(f)
	control, err := access.New(access.Config{Everywhere: true, Allow: access.PrivateNetworks()})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte, n uint8) {
		transport := transports[int(n)%len(transports)]
		p := mustNew(t, Config{Access: control, Cache: nil, Groups: []Group{{Upstream: honest(t)}}, Chaos: map[string]string{"version.bind": "x"}})
		q := query(p, transport, bytes.Clone(raw))
		stranger := n >= 128
		if stranger {
			q.Client = netip.MustParseAddrPort("192.0.2.1:53")
			p.groups[0].Upstream = noUpstream(t)
		}
		out, v := ask(t, p, q)
		if !bytes.Equal(q.Raw, raw) {
			t.Fatal("the query was changed")
		}
		if len(raw) < wire.HeaderLen || raw[2]&0x80 != 0 {
			if out != nil || v != wire.Dropped {
				t.Fatalf("junk is answered: %x", out)
			}
			return
		}
		m := checkResponse(t, q, out)
		if opcode := raw[2] >> 3 & 15; !stranger && opcode != 0 && m.Rcode != dns.RcodeNotImplemented {
			t.Errorf("opcode %d: RCODE %d, want NOTIMP", opcode, m.Rcode)
		}
		if stranger && m.Rcode != dns.RcodeRefused {
			t.Errorf("a stranger got RCODE %d", m.Rcode)
		}
		// What EDE may add is all that an error is longer than its query.
		if v == wire.Answered && transport == wire.UDP && len(out) > len(raw)+6 {
			t.Errorf("%d octets for %d", len(out), len(raw))
		}
		checkOffer(t, raw, transport, m, len(out))
	})
}

// checkOffer reads the client's offer with other eyes than the gateway does.
func checkOffer(t *testing.T, raw []byte, transport wire.Transport, m *dns.Msg, n int) {
	t.Helper()
	var asked dns.Msg
	if transport != wire.UDP || asked.Unpack(raw) != nil {
		return
	}
	size := 512
	if opt := asked.IsEdns0(); opt != nil {
		size = max(size, int(opt.UDPSize()))
	}
	if n > min(size, 1232) {
		t.Errorf("%d octets to a client that offers %d", n, size)
	}
	if m.Rcode == 0 && len(asked.Question) == 1 && (len(m.Question) != 1 || m.Question[0] != asked.Question[0]) {
		t.Errorf("the question came back as %v, want %v", m.Question, asked.Question)
	}
}

// FuzzUpstream sends any bytes as the upstream's response to one question: the client gets a response to that question
// or SERVFAIL, and the cache gives the same one.
func FuzzUpstream(f *testing.F) {
	for _, name := range []string{"one", "alias", "big", "nxdomain", "nodata", "servfail", "referral", "records", "tc"} {
		resp, err := world(context.Background(), dig(name+".test.", dns.TypeTXT, dnssec))
		if err != nil {
			f.Fatal(err)
		}
		resp.Question[0].Name = "example.com."
		raw, err := resp.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, uint8(len(name)))
	}
	store, err := cache.New(cache.Config{MaxBytes: 4 << 20})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte, n uint8) {
		store.FlushName([]byte{0}, true)
		p := mustNew(t, Config{Cache: store, Groups: []Group{{Upstream: exchange(func(context.Context, *dns.Msg) (*dns.Msg, error) {
			resp := new(dns.Msg)
			return resp, resp.Unpack(raw)
		}), TrustAD: true}}})
		asked := pack(t, dig("eXample.com.", dns.TypeTXT, option(&dns.EDNS0_PADDING{})))
		transport := transports[int(n)%len(transports)]
		first, _ := ask(t, p, query(p, transport, asked))
		if m := checkResponse(t, query(p, transport, asked), first); m.Rcode > int(wire.MaxPlainRcode) {
			t.Errorf("%x: RCODE %d passed", raw, m.Rcode)
		}
		second, _ := ask(t, p, query(p, transport, asked))
		if !bytes.Equal(first, second) {
			t.Errorf("%x: a hit differs from the miss:\n%x\n%x", raw, second, first)
		}
		// What is below, and another type, get the same records, if the answer is a denial that they can be made of.
		own, _ := ask(t, p, query(p, wire.TCP, asked))
		want := unpack(t, own)
		for _, other := range []*dns.Msg{dig("x.y.eXample.com.", dns.TypeMX, option(&dns.EDNS0_PADDING{})), dig("eXample.com.", 65280)} {
			q := query(p, wire.TCP, pack(t, other))
			out, v := p.ServeWire(nil, q)
			if v != wire.Answered {
				continue
			}
			if m := checkResponse(t, q, out); m.Rcode != dns.RcodeNameError || want.Rcode != m.Rcode ||
				fmt.Sprint(m.Ns, want.Extra[:len(want.Extra)-1]) != fmt.Sprint(want.Ns, m.Extra[:len(m.Extra)-1]) {
				t.Errorf("%x: %s gets\n%v\nand the name itself\n%v", raw, other.Question[0].Name, m, want)
			}
		}
	})
}
