package forward

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/dns"
)

const (
	headerLen = 12
	// maxMessage is the largest message that a stream carries, RFC 1035, section 4.2.2.
	maxMessage = 65535
	// udpSize avoids fragmentation on IPv6 paths; see https://dnsflagday.net/2020/.
	udpSize = 1232
	// padBlock is the block length of padded queries, RFC 8467, section 4.1.
	padBlock = 128

	flagQR, flagTC, flagRD, flagAD, flagCD uint16 = 1 << 15, 1 << 9, 1 << 8, 1 << 5, 1 << 4

	optionKeepalive, optionPadding uint16 = 11, 12
)

// form says what a transport wants of a packed query.
type form uint8

const (
	padded    form = 1 << iota // RFC 7830: over encrypted transports
	keepalive                  // RFC 7828: over TCP and DoT, never over UDP, DoH or DoQ (RFC 9250, section 5.5.2)
)

// query is one question as it goes out, packed once for all servers that it is sent to. It is never written to after
// newQuery, and so is shared by all attempts.
type query struct {
	id       uint16       // the caller's, put into the response
	asked    dns.Question // as the caller spelled it
	flags    uint16       // RD, AD and CD
	do       bool
	question []byte // QNAME, QTYPE and QCLASS in wire form
	hash     uint64 // of the lower-case QNAME
}

// newQuery takes from req what is sent upstream: the question, RD, AD, CD and DO. Everything else that a client said
// (EDNS options, records) stays here.
func newQuery(req *dns.Msg) (*query, error) {
	if len(req.Question) != 1 {
		return nil, fmt.Errorf("request has %d questions, want 1", len(req.Question))
	}
	q := &query{id: req.Id, asked: req.Question[0]}
	if req.RecursionDesired {
		q.flags |= flagRD
	}
	if req.AuthenticatedData {
		q.flags |= flagAD
	}
	if req.CheckingDisabled {
		q.flags |= flagCD
	}
	if opt := req.IsEdns0(); opt != nil {
		q.do = opt.Do()
	}
	buf := make([]byte, 260)
	n, err := dns.PackDomainName(dns.Fqdn(q.asked.Name), buf, 0, nil, false)
	if err != nil {
		return nil, fmt.Errorf("packing question: %w", err)
	}
	q.hash = fnvLower(buf[:n])
	binary.BigEndian.PutUint16(buf[n:], q.asked.Qtype)
	binary.BigEndian.PutUint16(buf[n+2:], q.asked.Qclass)
	q.question = buf[:n+4]
	return q, nil
}

// size returns the length of the message that appendTo appends for f.
func (q *query) size(f form) int {
	n := headerLen + len(q.question) + 11
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
		dst = append(dst, 0, byte(optionKeepalive), 0, 0)
	}
	if f&padded != 0 {
		pad := total - (len(dst) - start) - 4
		dst = be.AppendUint16(dst, optionPadding)
		dst = be.AppendUint16(dst, uint16(pad))
		n := len(dst)
		dst = append(dst, make([]byte, pad)...)
		clear(dst[n:])
	}
	return dst
}

// message returns the query as the framework's clients want it. The caller owns it.
func (q *query) message() *dns.Msg {
	m := &dns.Msg{Question: []dns.Question{q.asked}}
	m.Id = dns.Id()
	m.RecursionDesired = q.flags&flagRD != 0
	m.AuthenticatedData = q.flags&flagAD != 0
	m.CheckingDisabled = q.flags&flagCD != 0
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

// check reads msg, which claims to be the answer to q with the given ID, and returns it with the caller's ID and
// question. It holds msg against RFC 1035, section 7.3: QR, opcode, ID and the whole question, whose letters may differ
// in case; an error response may have no question at all, as old servers without EDNS do it. The result shares no memory
// with msg. An error of KindMalformed is a fault of this answer alone.
func (q *query) check(msg []byte, id uint16) (*dns.Msg, error) {
	if err := checkHeader(msg); err != nil {
		return nil, err
	}
	if got := binary.BigEndian.Uint16(msg); got != id {
		return nil, mismatch("wrong ID")
	}
	if !sameQuestion(msg, q.question) && !bareError(msg) {
		return nil, mismatch("wrong question")
	}
	resp := new(dns.Msg)
	if err := resp.Unpack(msg); err != nil {
		return nil, malformed("malformed message: %v", err)
	}
	// Unpack takes a message that ends before its counts do; a cut answer is none.
	be := binary.BigEndian
	if len(resp.Answer) != int(be.Uint16(msg[6:])) || len(resp.Ns) != int(be.Uint16(msg[8:])) ||
		len(resp.Extra) != int(be.Uint16(msg[10:])) {
		return nil, malformed("fewer records than the header says")
	}
	return q.adopt(resp), nil
}

// adopt gives resp the caller's ID and spelling.
func (q *query) adopt(resp *dns.Msg) *dns.Msg {
	resp.Id = q.id
	resp.Question = []dns.Question{q.asked}
	return resp
}

// checkMessage is check for answers that the framework has unpacked.
func (q *query) checkMessage(resp *dns.Msg) (*dns.Msg, error) {
	switch {
	case resp == nil || !resp.Response || resp.Opcode != dns.OpcodeQuery:
		return nil, mismatch("not a response")
	case len(resp.Question) != 1:
		return nil, mismatch("wrong question")
	}
	got := resp.Question[0]
	if got.Qtype != q.asked.Qtype || got.Qclass != q.asked.Qclass {
		return nil, mismatch("wrong question")
	}
	var buf [260]byte
	n, err := dns.PackDomainName(dns.Fqdn(got.Name), buf[:], 0, nil, false)
	if err != nil || !equalFold(buf[:n], q.question[:len(q.question)-4]) {
		return nil, mismatch("wrong question")
	}
	return q.adopt(resp), nil
}

// errShort has a value of its own, because the stream reader makes it for any two octets that a stranger sends.
var errShort = errors.New("shorter than a header")

// checkHeader reports whether msg can be a response at all.
func checkHeader(msg []byte) error {
	if len(msg) < headerLen {
		return &Error{Kind: KindMismatch, Err: errShort}
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&flagQR == 0 {
		return mismatch("not a response")
	}
	if op := flags >> 11 & 15; op != dns.OpcodeQuery {
		return mismatch("opcode %d", op)
	}
	return nil
}

// sameQuestion reports whether the one question of msg, which is at least a header long, is question.
func sameQuestion(msg, question []byte) bool {
	end := headerLen + len(question)
	if binary.BigEndian.Uint16(msg[4:]) != 1 || len(msg) < end {
		return false
	}
	n := len(question) - 4
	return equalFold(msg[headerLen:end-4], question[:n]) && string(msg[end-4:end]) == string(question[n:])
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

// equalFold compares names in wire form. Label lengths are below 'A', so they fold to themselves.
func equalFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if c-'A' < 26 {
		return c + 'a' - 'A'
	}
	return c
}

// fnvLower is FNV-1a over name with its letters folded. It is the same in every process, so that `sticky` sends a name
// to the same server after a restart.
func fnvLower[T ~string | ~[]byte](name T) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(lower(name[i]))) * 1099511628211
	}
	return h
}
