package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// maxPlainRcode is the highest RCODE that the header alone can hold. Those above it are between two neighbours
// (BADVERS, BADCOOKIE, BADKEY, ...; RFC 6895, section 2.3): what an upstream holds against our query is not the client's.
const maxPlainRcode = 15

// responseError is a response that cannot be passed on.
type responseError string

func (e responseError) Error() string { return "upstream response: " + string(e) }

// ExtendedError implements the interface that [Exchanger] documents: the server was reached, and did not make sense.
func (e responseError) ExtendedError() (uint16, string) { return dns.ExtendedErrorCodeNetworkError, "" }

// exchange asks the upstream group. It returns an answer, or nil and what to tell the client.
func (p *Pipeline) exchange(ctx context.Context, q *wire.Query) (*wire.Answer, wire.EDE) {
	defer p.exchanges.Add(-1)
	req, err := p.request(q)
	if err != nil {
		return nil, edeInternal // Parse has read this name
	}
	resp, err := p.upstream.Exchange(ctx, req)
	if err == nil {
		var a *wire.Answer
		if a, err = p.answer(req.Question[0], resp); err == nil {
			return a, wire.EDE{}
		}
	}
	if p.log.Enabled(ctx, slog.LevelDebug) {
		p.log.Debug("no answer from upstream", "question", req.Question[0].String(), "transport", q.Transport.String(),
			"err", err)
	}
	return nil, extendedError(err)
}

// request makes the query that goes out. Nothing of the client's is in it but the question, in its letter case, and the
// CD and DO bits. In particular none of its EDNS options: they are for the next hop only (RFC 6891, section 6.2.6), or
// say who asks (RFC 7871). Padding is the business of the transport that knows whether it helps.
//
// AD is always set: it asks for an AD bit in the response (RFC 6840, section 5.7), which the cache then has for the
// clients that want it, whoever asked first.
func (p *Pipeline) request(q *wire.Query) (*dns.Msg, error) {
	name, err := presentation(q)
	if err != nil {
		return nil, err
	}
	m := &dns.Msg{
		MsgHdr: dns.MsgHdr{
			Id:                uint16(rand.Uint32()), // ChaCha8, seeded by the operating system
			RecursionDesired:  true,
			AuthenticatedData: true,
			CheckingDisabled:  q.CD(),
		},
		Question: []dns.Question{{Name: name, Qtype: q.Qtype, Qclass: q.Qclass}},
	}
	m.SetEdns0(p.shape.UDPSize, q.DO)
	return m, nil
}

// answer checks resp, which was given for question, and turns it into what the cache keeps and clients get.
func (p *Pipeline) answer(question dns.Question, resp *dns.Msg) (*wire.Answer, error) {
	switch {
	case resp == nil:
		return nil, responseError("there is none")
	case !resp.Response:
		return nil, responseError("it is a query")
	case resp.Opcode != dns.OpcodeQuery:
		return nil, responseError("it has another opcode")
	case !echoes(resp, question):
		return nil, responseError("it has another question")
	case resp.Rcode < 0 || resp.Rcode > maxPlainRcode:
		return nil, responseError(fmt.Sprintf("RCODE %d is about our query, not about the question", resp.Rcode))
	}
	// A message of our own around the records: resp is not changed, as its sender may still hold it.
	m := dns.Msg{
		MsgHdr:   dns.MsgHdr{Response: true, Truncated: resp.Truncated, Rcode: resp.Rcode},
		Compress: true,
		Question: []dns.Question{question},
		Answer:   endToEnd(resp.Answer),
		Ns:       endToEnd(resp.Ns),
		Extra:    endToEnd(resp.Extra),
	}
	if opt := extendedErrors(resp); opt != nil {
		m.Extra = append(m.Extra, opt)
	}
	packed, err := m.Pack()
	if err != nil {
		return nil, responseError(err.Error())
	}
	a, err := wire.NewAnswer(packed)
	if err != nil {
		return nil, responseError(err.Error())
	}
	a.Secure = p.trustAD && resp.AuthenticatedData
	return a, nil
}

// echoes reports whether resp is about question, letter case aside. An error may come without its question, as when the
// server could not read it.
func echoes(resp *dns.Msg, question dns.Question) bool {
	if len(resp.Question) == 0 {
		return resp.Rcode != dns.RcodeSuccess && resp.Rcode != dns.RcodeNameError
	}
	got := resp.Question[0]
	return len(resp.Question) == 1 && got.Qtype == question.Qtype && got.Qclass == question.Qclass &&
		strings.EqualFold(got.Name, question.Name)
}

// endToEnd returns the records of a section that are meant for the client, in a new slice: all but those between two
// neighbours, which are OPT (RFC 6891, section 6.2.1), TSIG (RFC 8945, section 5.1) and SIG(0) (RFC 2931, section 3).
func endToEnd(section []dns.RR) []dns.RR {
	rrs := make([]dns.RR, 0, len(section)+1) // one more for an OPT record of our own
	for _, rr := range section {
		switch rr := rr.(type) {
		case nil, *dns.OPT, *dns.TSIG:
			continue
		case *dns.SIG:
			if rr.TypeCovered == 0 {
				continue
			}
		}
		rrs = append(rrs, rr)
	}
	return rrs
}

// extendedErrors returns an OPT record with the extended DNS errors of resp and nothing else, or nil if it has none. They
// are passed on, RFC 8914, section 3; wire.NewAnswer bounds and mends them.
func extendedErrors(resp *dns.Msg) *dns.OPT {
	from := resp.IsEdns0()
	if from == nil {
		return nil
	}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	for _, o := range from.Option {
		if ede, ok := o.(*dns.EDNS0_EDE); ok && ede != nil {
			opt.Option = append(opt.Option, ede)
		}
	}
	if len(opt.Option) == 0 {
		return nil
	}
	return opt
}

// extendedError returns what err says to the client: its own extended DNS error, or 22 (No Reachable Authority).
func extendedError(err error) wire.EDE {
	var e interface {
		ExtendedError() (code uint16, text string)
	}
	if errors.As(err, &e) {
		code, text := e.ExtendedError()
		return wire.EDE{Code: code, Text: text}
	}
	return wire.EDE{Code: dns.ExtendedErrorCodeNoReachableAuthority}
}
