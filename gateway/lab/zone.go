package lab

import (
	_ "embed"
	"fmt"
	"hash/fnv"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

//go:embed zone.txt
var zoneText string

const (
	// slowness is how long slow.lab.test and everything below it takes.
	slowness = time.Second
	// ednsSize is the UDP payload size that the servers advertise and keep to; see https://dnsflagday.net/2020/.
	ednsSize = 1232
	// padBlock is the block length of padded responses, RFC 8467, section 4.1.
	padBlock = 468
)

// The names that are answered by rule and not by record.
const (
	slowName     = "slow.lab.test."
	loadName     = "load.lab.test."
	edeName      = "ede.lab.test."
	servFailName = "servfail.lab.test."
	refusedName  = "refused.lab.test."
	// Below this name every HTTPS record has its SvcParams out of order, which RFC 9460, section 2.2 forbids.
	unreadableName = "unreadable.lab.test."
)

// The Extended DNS Error of ede.lab.test.
const (
	edeCode = dns.ExtendedErrorCodeDNSBogus
	edeText = "lab: this name is broken on purpose"
)

// zone is all data of the lab. It is read-only once loaded; what it answers depends on the question alone.
type zone struct {
	records map[string]map[uint16][]dns.RR // by lower-case owner
	exists  map[string]bool                // owners and their ancestors: empty non-terminals exist too (RFC 8020)
	soas    map[string]dns.RR              // by apex
}

func loadZone(text string) (*zone, error) {
	z := &zone{
		records: make(map[string]map[uint16][]dns.RR), exists: make(map[string]bool), soas: make(map[string]dns.RR),
	}
	p := dns.NewZoneParser(strings.NewReader(text), ".", "zone.txt")
	for rr, ok := p.Next(); ok; rr, ok = p.Next() {
		z.add(rr)
	}
	if err := p.Err(); err != nil {
		return nil, fmt.Errorf("reading the lab's zone: %w", err)
	}
	// Twelve strings are 3 kB: no UDP answer holds them.
	big := &dns.TXT{Hdr: header("big.lab.test.", dns.TypeTXT, 300)}
	for i := range 12 {
		big.Txt = append(big.Txt, strings.Repeat(string(rune('a'+i)), 250))
	}
	z.add(big)
	// A hundred records of 16 octets: an RRset that is dropped whole.
	for i := range 100 {
		z.add(&dns.A{Hdr: header("many.lab.test.", dns.TypeA, 300), A: net.IPv4(192, 0, 2, byte(100+i))})
	}
	for _, name := range []string{loadName, edeName, servFailName, refusedName, unreadableName} {
		z.exists[name] = true
	}
	return z, nil
}

func header(name string, rrtype uint16, ttl uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: ttl}
}

func (z *zone) add(rr dns.RR) {
	h := rr.Header()
	owner := dns.CanonicalName(h.Name)
	if z.records[owner] == nil {
		z.records[owner] = make(map[uint16][]dns.RR)
	}
	z.records[owner][h.Rrtype] = append(z.records[owner][h.Rrtype], rr)
	if h.Rrtype == dns.TypeSOA {
		z.soas[owner] = rr
	}
	for name := owner; ; {
		z.exists[name] = true
		if name == "." {
			return
		}
		name = parent(name)
	}
}

func parent(name string) string {
	if i, end := dns.NextLabel(name, 0); !end {
		return name[i:]
	}
	return "."
}

// answer returns the response to req as a resolver gives it, without OPT, and how long it takes. It does not modify req.
func (z *zone) answer(req *dns.Msg) (*dns.Msg, time.Duration) {
	resp := new(dns.Msg).SetReply(req)
	resp.RecursionAvailable = true
	resp.CheckingDisabled = req.CheckingDisabled
	resp.Compress = true
	switch {
	case req.Opcode != dns.OpcodeQuery:
		resp.Rcode = dns.RcodeNotImplemented
		return resp, 0
	case len(req.Question) != 1:
		resp.Rcode = dns.RcodeFormatError
		return resp, 0
	case req.IsEdns0() != nil && req.IsEdns0().Version() != 0:
		resp.Rcode = dns.RcodeBadVers
		return resp, 0
	}
	q := req.Question[0]
	if q.Qclass != dns.ClassINET || q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR {
		resp.Rcode = dns.RcodeRefused
		return resp, 0
	}
	var takes time.Duration
	name := dns.CanonicalName(q.Name)
	if dns.IsSubDomain(slowName, name) {
		takes = slowness
	}
	switch name {
	case edeName, servFailName:
		resp.Rcode = dns.RcodeServerFailure
	case refusedName:
		resp.Rcode = dns.RcodeRefused
	default:
		z.fill(resp, q.Name, q.Qtype)
	}
	return resp, takes
}

// fill answers name and rrtype into resp, following aliases.
func (z *zone) fill(resp *dns.Msg, name string, rrtype uint16) {
	seen := make(map[string]bool)
	for !seen[dns.CanonicalName(name)] {
		seen[dns.CanonicalName(name)] = true
		rrs, found := z.lookup(name, rrtype)
		resp.Answer = append(resp.Answer, rrs...)
		if len(rrs) == 0 {
			if !found {
				resp.Rcode = dns.RcodeNameError
			}
			resp.Ns = append(resp.Ns, z.negative(name))
			return
		}
		alias, ok := rrs[0].(*dns.CNAME)
		if !ok || rrtype == dns.TypeCNAME || rrtype == dns.TypeANY {
			return
		}
		name = alias.Target
	}
}

// lookup returns the records of rrtype at name, or its alias; found is false if the name does not exist. The records
// are copies that carry name as their owner, in its letters.
func (z *zone) lookup(name string, rrtype uint16) (rrs []dns.RR, found bool) {
	key := dns.CanonicalName(name)
	if key != loadName && dns.IsSubDomain(loadName, key) {
		return loadRecords(name, rrtype), true
	}
	if rrtype == dns.TypeA && dns.IsSubDomain(unreadableName, key) {
		return []dns.RR{&dns.RFC3597{Hdr: header(name, rrtype, 300), Rdata: "7f0000"}}, true // three octets
	}
	source := key
	switch {
	case z.exists[key]:
	case key != slowName && dns.IsSubDomain(slowName, key):
		source = slowName
	default:
		// RFC 4592, section 3.3.1: the star below the closest encloser.
		encloser := parent(key)
		for !z.exists[encloser] {
			encloser = parent(encloser)
		}
		source = "*." + encloser
		if !z.exists[source] {
			return nil, false
		}
	}
	types := z.records[source]
	chosen := types[rrtype]
	if rrtype == dns.TypeANY && len(types) > 0 { // RFC 8482, section 4.2
		chosen = []dns.RR{&dns.HINFO{Hdr: header(name, dns.TypeHINFO, 3600), Cpu: "RFC8482"}}
	} else if chosen == nil {
		chosen = types[dns.TypeCNAME]
	}
	for _, rr := range chosen {
		rr = dns.Copy(rr)
		rr.Header().Name = name
		rrs = append(rrs, rr)
	}
	return rrs, true
}

// negative returns the SOA record for a negative answer about name: its TTL is the smaller of its own and MINIMUM,
// RFC 2308, section 3.
func (z *zone) negative(name string) dns.RR {
	apex := dns.CanonicalName(name)
	for z.soas[apex] == nil {
		apex = parent(apex)
	}
	soa := dns.Copy(z.soas[apex]).(*dns.SOA)
	soa.Hdr.Ttl = min(soa.Hdr.Ttl, soa.Minttl)
	return soa
}

// loadRecords makes the records of a name below load.lab.test: every one exists, and its addresses come from its hash.
// IPv4 addresses are from 198.18.0.0/15, RFC 2544, appendix C.2.2.
func loadRecords(name string, rrtype uint16) []dns.RR {
	h := fnv.New32a()
	h.Write([]byte(dns.CanonicalName(name)))
	sum := h.Sum32()
	switch rrtype {
	case dns.TypeA:
		ip := net.IPv4(198, 18|byte(sum>>16)&1, byte(sum>>8), byte(sum))
		return []dns.RR{&dns.A{Hdr: header(name, rrtype, 300), A: ip}}
	case dns.TypeAAAA:
		ip := net.ParseIP("2001:db8:18::")
		ip[12], ip[13], ip[14], ip[15] = byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum)
		return []dns.RR{&dns.AAAA{Hdr: header(name, rrtype, 300), AAAA: ip}}
	}
	return nil
}
