package pipeline

import (
	"errors"
	"fmt"
	"strings"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// ownAnswer is a response that the gateway gives by itself: an answer, or else an RCODE with or without an EDE.
type ownAnswer struct {
	answer *wire.Answer
	rcode  uint16
	ede    *wire.EDE
}

// anyTTL keeps a client that asks for ANY from asking again soon, and leaves the policy changeable within the hour;
// RFC 8482, section 4.2.
const anyTTL = 3600

// maxChaosText leaves room in a message for all that stands around the text.
const maxChaosText = 60000

// own answers what never leaves the gateway. Everything else goes on, types and classes that nobody has heard of
// included (RFC 3597), and so do queries with RD clear: nothing here is authoritative, so there is no other answer to
// give, and one from the cache would only tell what others have asked.
//
// What a query carries besides its question and its OPT record is not looked at and goes nowhere: QUERY has no use for
// it but in IXFR, and a server need not check a SIG(0) (RFC 2931, section 3). A TSIG record is the exception. Its
// sender has to discard a response that is not signed (RFC 8945, section 5.4), so nobody upstream is asked in vain: every
// key is unknown here, which is NOTAUTH (section 5.2.1). That response should bring a TSIG record with BADKEY; without
// one it says the same to who reads its RCODE.
func (p *Pipeline) own(q *wire.Query) (ownAnswer, bool) {
	switch q.Qclass {
	case dns.ClassCHAOS:
		if q.Qtype == dns.TypeTXT {
			// A key begins with the name in lower case.
			if a := p.chaos[string(q.Key(0)[:len(q.Name)])]; a != nil {
				return ownAnswer{answer: a}, true
			}
		}
		return ownAnswer{rcode: wire.RcodeRefused, ede: &edeNotSupported}, true
	case 0: // reserved, RFC 6895, section 3.2
		return ownAnswer{rcode: wire.RcodeFormErr}, true
	case dns.ClassNONE, dns.ClassANY: // for UPDATE (RFC 2136, section 2.4), and for data of all classes at once
		return ownAnswer{rcode: wire.RcodeRefused, ede: &edeNotSupported}, true
	}
	switch q.Qtype {
	case dns.TypeAXFR, dns.TypeIXFR:
		return ownAnswer{rcode: wire.RcodeRefused, ede: &edeNotSupported}, true
	case dns.TypeANY:
		return anyAnswer(q), true
	case dns.TypeNone, dns.TypeOPT, dns.TypeTSIG, dns.TypeNXNAME:
		// Records of these types are never data. RFC 9824, section 3.5 says of NXNAME that a question for it is not
		// well-formed and never forwarded, and has the EDE for all of them.
		return ownAnswer{rcode: wire.RcodeFormErr, ede: &edeInvalidType}, true
	case dns.TypeTKEY, dns.TypeMAILB, dns.TypeMAILA: // questions to the server itself, and obsolete ones
		return ownAnswer{rcode: wire.RcodeNotImp, ede: &edeNotSupported}, true
	}
	if signed(q) {
		return ownAnswer{rcode: dns.RcodeNotAuth}, true
	}
	return ownAnswer{}, false
}

// appendOwn appends a and tells the observer.
func (p *Pipeline) appendOwn(dst []byte, q *wire.Query, a ownAnswer) []byte {
	switch {
	case a.answer != nil:
		a.rcode = a.answer.Rcode
		dst = p.shape.AppendAnswer(dst, q, a.answer, 0)
	case a.ede != nil:
		dst = p.shape.AppendError(dst, q, a.rcode, *a.ede)
	default:
		dst = p.shape.AppendError(dst, q, a.rcode)
	}
	p.observe(q, a.rcode, Local)
	return dst
}

// anyAnswer is the minimal answer to a question for ANY: one HINFO record, RFC 8482, section 4.2. It is the same over
// every transport; truncation over UDP would only move the amplification to who resolves for us.
func anyAnswer(q *wire.Query) ownAnswer {
	name, err := presentation(q.Name)
	if err != nil {
		return ownAnswer{rcode: wire.RcodeFormErr}
	}
	rr := &dns.HINFO{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeHINFO, Class: q.Qclass, Ttl: anyTTL},
		Cpu: "RFC8482",
	}
	a, err := newAnswer(dns.Question{Name: name, Qtype: q.Qtype, Qclass: q.Qclass}, rr)
	if err != nil {
		return ownAnswer{rcode: wire.RcodeServFail, ede: &edeInternal}
	}
	return ownAnswer{answer: a}
}

// signed reports whether q ends in a TSIG record. A message that cannot be read as a whole is not signed.
func signed(q *wire.Query) bool {
	if q.Kind == wire.Plain {
		return false
	}
	var m dns.Msg
	return m.Unpack(q.Raw) == nil && m.IsTsig() != nil
}

// presentation returns a name in wire form as people write it, in the letter case that it has.
func presentation(name []byte) (string, error) {
	s, _, err := dns.UnpackDomainName(name, 0)
	return s, err
}

// chaosAnswers makes the answers to class CH questions, by their lower-case QNAMEs in wire form.
func chaosAnswers(texts map[string]string) (map[string]*wire.Answer, error) {
	answers := make(map[string]*wire.Answer, len(texts))
	var errs []error
	for name, text := range texts {
		fqdn := dns.CanonicalName(name)
		var key [wire.MaxName]byte
		n, err := dns.PackDomainName(fqdn, key[:], 0, nil, false)
		if err != nil {
			errs = append(errs, fmt.Errorf("%q is not a domain name: %w", name, err))
			continue
		}
		if len(text) > maxChaosText {
			errs = append(errs, fmt.Errorf("the text of %q has %d octets, want at most %d", name, len(text), maxChaosText))
			continue
		}
		rr := &dns.TXT{
			// Nobody should keep for long what the next start may change.
			Hdr: dns.RR_Header{Name: fqdn, Rrtype: dns.TypeTXT, Class: dns.ClassCHAOS, Ttl: 0},
			Txt: txtStrings(text),
		}
		a, err := newAnswer(dns.Question{Name: fqdn, Qtype: dns.TypeTXT, Qclass: dns.ClassCHAOS}, rr)
		if err != nil {
			errs = append(errs, fmt.Errorf("the text of %q: %w", name, err))
			continue
		}
		answers[string(key[:n])] = a
	}
	return answers, errors.Join(errs...)
}

// txtStrings cuts text into character strings of at most 255 octets (RFC 1035, section 3.3.14), each in the escaped form
// that the dns package wants.
func txtStrings(text string) []string {
	const most = 255
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	var list []string
	for len(text) > most {
		list = append(list, escape.Replace(text[:most]))
		text = text[most:]
	}
	return append(list, escape.Replace(text))
}

// newAnswer packs a response of our own.
func newAnswer(question dns.Question, rr dns.RR) (*wire.Answer, error) {
	m := dns.Msg{
		MsgHdr:   dns.MsgHdr{Response: true},
		Compress: true,
		Question: []dns.Question{question},
		Answer:   []dns.RR{rr},
	}
	packed, err := m.Pack()
	if err != nil {
		return nil, err
	}
	a, _, err := wire.ReadAnswer(packed)
	return a, err
}
