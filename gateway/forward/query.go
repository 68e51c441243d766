package forward

import (
	"encoding/binary"
	"errors"
	"fmt"

	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

const (
	// udpSize avoids fragmentation on IPv6 paths; see https://dnsflagday.net/2020/.
	udpSize = 1232
	// padBlock is the block length of padded queries, RFC 8467, section 4.1.
	padBlock = 128
)

// form says what a transport wants of a packed query.
type form uint8

const (
	padded    form = 1 << iota // RFC 7830: over encrypted transports
	keepalive                  // RFC 7828: over TCP and DoT, never over UDP, DoH or DoQ (RFC 9250, section 5.5.2)
)

// query is one question as it goes out, packed once for all servers that it is sent to. It is never written to after it
// was made, and so is shared by all attempts.
type query struct {
	flags    uint16 // RD, AD and CD
	do       bool
	question []byte // QNAME, QTYPE and QCLASS in wire form
	hash     uint64 // of the lower-case QNAME
}

// newQuery returns the query for question, of which it keeps nothing. RD is set, and AD, which asks for an AD bit in the
// response (RFC 6840, section 5.7).
func newQuery(question wire.Question) *query {
	q := &query{flags: wire.FlagRD | wire.FlagAD, do: question.DO, hash: fnvLower(question.Name)}
	if question.CD {
		q.flags |= wire.FlagCD
	}
	q.question = make([]byte, 0, len(question.Name)+4)
	q.question = append(q.question, question.Name...)
	q.question = binary.BigEndian.AppendUint16(q.question, question.Qtype)
	q.question = binary.BigEndian.AppendUint16(q.question, question.Qclass)
	return q
}

// queryOf takes from req what is sent upstream: the question, RD, AD, CD and DO. Everything else that a client said
// (EDNS options, records) stays here.
func queryOf(req *dns.Msg) (*query, error) {
	if len(req.Question) != 1 {
		return nil, fmt.Errorf("request has %d questions, want 1", len(req.Question))
	}
	asked := req.Question[0]
	buf := make([]byte, 260)
	n, err := dns.PackDomainName(dns.Fqdn(asked.Name), buf, 0, nil, false)
	if err != nil {
		return nil, fmt.Errorf("packing question: %w", err)
	}
	opt := req.IsEdns0()
	q := newQuery(wire.Question{Name: buf[:n], Qtype: asked.Qtype, Qclass: asked.Qclass, CD: req.CheckingDisabled,
		DO: opt != nil && opt.Do()})
	if !req.RecursionDesired {
		q.flags &^= wire.FlagRD
	}
	if !req.AuthenticatedData {
		q.flags &^= wire.FlagAD
	}
	return q, nil
}

// size returns the length of the message that appendTo appends for f.
func (q *query) size(f form) int {
	n := wire.HeaderLen + len(q.question) + 11
	if f&keepalive != 0 {
		n += 4
	}
	if f&padded != 0 {
		n += 4
		n = (n + padBlock - 1) / padBlock * padBlock
	}
	return n
}

// appendTo appends the query with our own OPT record to dst.
func (q *query) appendTo(dst []byte, id uint16, f form) []byte {
	be := binary.BigEndian
	start, total := len(dst), q.size(f)
	dst = be.AppendUint16(dst, id)
	dst = be.AppendUint16(dst, q.flags)
	dst = append(dst, 0, 1, 0, 0, 0, 0, 0, 1)
	dst = append(dst, q.question...)
	dst = append(dst, 0) // the root's name
	dst = be.AppendUint16(dst, dns.TypeOPT)
	dst = be.AppendUint16(dst, udpSize)
	var ttl uint32
	if q.do {
		ttl = 1 << 15
	}
	dst = be.AppendUint32(dst, ttl)
	dst = be.AppendUint16(dst, uint16(total-(len(dst)-start)-2))
	if f&keepalive != 0 {
		dst = append(dst, 0, byte(wire.OptionKeepalive), 0, 0)
	}
	if f&padded != 0 {
		pad := total - (len(dst) - start) - 4
		dst = be.AppendUint16(dst, wire.OptionPadding)
		dst = be.AppendUint16(dst, uint16(pad))
		n := len(dst)
		dst = append(dst, make([]byte, pad)...)
		clear(dst[n:])
	}
	return dst
}

// message returns the query as the framework's clients want it. The caller owns it.
func (q *query) message() *dns.Msg {
	m := new(dns.Msg)
	m.Id = dns.Id()
	m.RecursionDesired = q.flags&wire.FlagRD != 0
	m.AuthenticatedData = q.flags&wire.FlagAD != 0
	m.CheckingDisabled = q.flags&wire.FlagCD != 0
	name, end, err := dns.UnpackDomainName(q.question, 0)
	if err != nil {
		panic("forward: a question that does not unpack: " + err.Error()) // its makers have read it
	}
	m.Question = []dns.Question{{Name: name, Qtype: binary.BigEndian.Uint16(q.question[end:]),
		Qclass: binary.BigEndian.Uint16(q.question[end+2:])}}
	m.SetEdns0(udpSize, q.do)
	return m
}

// errMismatch says why bytes are not the answer that was waited for.
type errMismatch string

func (e errMismatch) Error() string { return string(e) }

func mismatch(format string, args ...any) error {
	return &Error{Kind: KindMismatch, Err: errMismatch(fmt.Sprintf(format, args...))}
}

// malformed is a mismatch that is one name's matter: the answer is to the question and framed as it should be, but its
// records cannot be read. Whoever owns a zone can have that happen, so it says nothing against connection and server.
func malformed(format string, args ...any) error {
	return &Error{Kind: KindMalformed, Err: errMismatch(fmt.Sprintf(format, args...))}
}

// check reads msg, which claims to be the answer to q with the given ID, and returns it. It holds msg against RFC 1035,
// section 7.3: QR, opcode, ID and the whole question, whose letters may differ in case; an error response may have no
// question at all, as old servers without EDNS do it. The result shares no memory with msg; options, which do, are the
// RDATA of its OPT record. An error of KindMalformed is a fault of this answer alone.
func (q *query) check(msg []byte, id uint16) (a *wire.Answer, options []byte, err error) {
	if err := checkHeader(msg); err != nil {
		return nil, nil, err
	}
	if got := binary.BigEndian.Uint16(msg); got != id {
		return nil, nil, mismatch("wrong ID")
	}
	switch {
	case sameQuestion(msg, q.question):
	case bareError(msg):
		whole := append(make([]byte, 0, len(msg)+len(q.question)), msg[:wire.HeaderLen]...)
		whole[5] = 1
		msg = append(append(whole, q.question...), msg[wire.HeaderLen:]...)
	default:
		return nil, nil, mismatch("wrong question")
	}
	a, options, err = wire.ReadAnswer(msg)
	if err != nil {
		return nil, nil, malformed("malformed message: %v", err)
	}
	return a, options, nil
}

// checkMessage is check for answers that the framework has unpacked.
func (q *query) checkMessage(resp *dns.Msg) (*wire.Answer, error) {
	if resp == nil {
		return nil, mismatch("no response")
	}
	msg, err := resp.Pack()
	if err != nil {
		return nil, malformed("packing the response: %v", err)
	}
	a, _, err := q.check(msg, resp.Id)
	return a, err
}

// messageOf returns a as a message that answers req.
func messageOf(a *wire.Answer, req *dns.Msg) (*dns.Msg, error) {
	m := new(dns.Msg)
	if err := m.Unpack(a.Msg); err != nil {
		return nil, malformed("malformed message: %v", err)
	}
	m.Id, m.Question = req.Id, []dns.Question{req.Question[0]}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	for _, e := range a.EDE {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: e.Code, ExtraText: e.Text})
	}
	if len(opt.Option) > 0 || a.Rcode > wire.MaxPlainRcode {
		m.Extra = append(m.Extra, opt)
	}
	m.Rcode = int(a.Rcode)
	return m, nil
}

// errShort has a value of its own, because the stream reader makes it for any two octets that a stranger sends.
var errShort = errors.New("shorter than a header")

// checkHeader reports whether msg can be a response at all.
func checkHeader(msg []byte) error {
	if len(msg) < wire.HeaderLen {
		return &Error{Kind: KindMismatch, Err: errShort}
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&wire.FlagQR == 0 {
		return mismatch("not a response")
	}
	if op := flags >> 11 & 15; op != dns.OpcodeQuery {
		return mismatch("opcode %d", op)
	}
	return nil
}

// sameQuestion reports whether the one question of msg, which is at least a header long, is question.
func sameQuestion(msg, question []byte) bool {
	end := wire.HeaderLen + len(question)
	if binary.BigEndian.Uint16(msg[4:]) != 1 || len(msg) < end {
		return false
	}
	n := len(question) - 4
	return wire.SameName(msg[wire.HeaderLen:end-4], question[:n]) && string(msg[end-4:end]) == string(question[n:])
}

// bareError reports whether msg, which is at least a header long, is an error without any section but perhaps OPT:
// FORMERR, SERVFAIL, NOTIMP or REFUSED from a server that did not read as far as the question.
func bareError(msg []byte) bool {
	if binary.BigEndian.Uint64(msg[4:])>>16 != 0 {
		return false
	}
	switch msg[3] & 0xf {
	case dns.RcodeFormatError, dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
		return true
	}
	return false
}

// fnvLower is FNV-1a over name with its letters folded. It is the same in every process, so that `sticky` sends a name
// to the same server after a restart.
func fnvLower[T ~string | ~[]byte](name T) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(wire.Lower(name[i]))) * 1099511628211
	}
	return h
}
