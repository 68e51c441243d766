package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// responseError is a response that cannot be passed on.
type responseError string

func (e responseError) Error() string { return "upstream response: " + string(e) }

// ExtendedError implements the interface that [Exchanger] documents: the server was reached, and did not make sense.
func (e responseError) ExtendedError() (uint16, string) { return dns.ExtendedErrorCodeNetworkError, "" }

// exchange asks the upstream group of q's name, and no other one. It returns an answer, or nil and what to tell the client.
//
// Nothing of the client's goes out but the question, in its letter case, and the CD and DO bits. In particular none of its
// EDNS options: they are for the next hop only (RFC 6891, section 6.2.6), or say who asks (RFC 7871). Padding is the
// business of the transport that knows whether it helps.
func (p *Pipeline) exchange(ctx context.Context, q *wire.Query) (*wire.Answer, wire.EDE) {
	defer p.exchanges.Add(-1)
	g := p.group(q)
	a, err := g.Upstream.Ask(ctx, q.Question())
	if err == nil {
		if err = p.check(a, q); err == nil {
			a.Secure = g.TrustAD && a.AD()
			return a, wire.EDE{}
		}
	}
	if p.log.Enabled(ctx, slog.LevelDebug) {
		name, _ := presentation(q)
		p.log.Debug("no answer from upstream", "group", g.Name, "name", name, "type", dns.Type(q.Qtype).String(), "transport",
			q.Transport.String(), "err", err)
	}
	return nil, extendedError(err)
}

// group returns the group that q goes to.
func (p *Pipeline) group(q *wire.Query) *Group {
	if i, ok := p.routes.Match(q.Name); ok {
		return &p.groups[i]
	}
	return &p.groups[0]
}

// check reports why a cannot be passed on as the answer to q. Its sender has checked what can be wrong with bytes from a
// network; this is what would be wrong for a client.
func (p *Pipeline) check(a *wire.Answer, q *wire.Query) error {
	switch {
	case a == nil:
		return responseError("there is none")
	case !a.Answers(q):
		return responseError("it has another question")
	case a.Rcode > wire.MaxPlainRcode:
		return responseError(fmt.Sprintf("RCODE %d is about our query, not about the question", a.Rcode))
	}
	return nil
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
