// Package wire reads and patches DNS messages in place, as bytes.
//
// It owns the two ends of a query's way: [Query.Parse] turns received bytes into a [Query], and the Append functions
// turn an [Answer] or an RCODE into the bytes that go back. It knows RFC 1035 framing and RFC 6891 EDNS and nothing of
// policy: who may ask, what is cached and where questions go is decided elsewhere.
//
// What surprises a newcomer: nothing here allocates but [ReadAnswer] and what copies an [Answer], and a [Query] aliases
// the buffer that it was parsed from.
package wire

import (
	"encoding/binary"
	"net/netip"
)

// Transport is how a query arrived.
type Transport uint8

// The inbound transports. The zero value is plain UDP.
const (
	UDP  Transport = iota
	TCP            // RFC 7766
	DoT            // RFC 7858
	DoH            // RFC 8484 over HTTP/1.1 and HTTP/2
	DoH3           // RFC 8484 over HTTP/3
	DoQ            // RFC 9250
	NumTransports
)

// String returns the transport's name as it stands in metrics and logs.
func (t Transport) String() string {
	switch t {
	case UDP:
		return "udp"
	case TCP:
		return "tcp"
	case DoT:
		return "dot"
	case DoH:
		return "doh"
	case DoH3:
		return "doh3"
	case DoQ:
		return "doq"
	}
	return "unknown"
}

// Encrypted reports whether the client's bytes were protected on their way here.
func (t Transport) Encrypted() bool { return t >= DoT }

// Kind says how much of the gateway a query needs.
type Kind uint8

const (
	// Junk is dropped, or answered with Query.Fault when that is not RcodeSuccess.
	Junk Kind = iota
	// Odd has a sound header and question, and something that the fast path does not serve.
	Odd
	// Plain is one IN question with nothing else but an OPT of version 0.
	Plain
)

// Verdict is the outcome of the fast path.
type Verdict uint8

const (
	// Miss means that nothing was appended and that Resolve has to be called.
	Miss Verdict = iota
	// Answered means that a whole response was appended to dst.
	Answered
	// Dropped means that no response may be sent.
	Dropped
)

// RCODE values, RFC 6895, section 2.3.
const (
	RcodeSuccess  uint16 = 0
	RcodeFormErr  uint16 = 1
	RcodeServFail uint16 = 2
	RcodeNXDomain uint16 = 3
	RcodeNotImp   uint16 = 4
	RcodeRefused  uint16 = 5
	RcodeBadVers  uint16 = 16

	// MaxPlainRcode is the highest RCODE that the header alone can hold. Those above it are between two neighbours (BADVERS,
	// BADCOOKIE, BADKEY, ...): what a server holds against our query is not the client's.
	MaxPlainRcode uint16 = 15
)

// Types, classes and option codes that the fast path has to know.
const (
	TypeA     uint16 = 1
	TypeSOA   uint16 = 6
	TypeAAAA  uint16 = 28
	TypeOPT   uint16 = 41
	TypeRRSIG uint16 = 46
	TypeTSIG  uint16 = 250
	TypeIXFR  uint16 = 251
	TypeAXFR  uint16 = 252
	TypeANY   uint16 = 255

	ClassIN uint16 = 1
	ClassCH uint16 = 3

	OptionKeepalive uint16 = 11 // RFC 7828
	OptionPadding   uint16 = 12 // RFC 7830
	OptionEDE       uint16 = 15 // RFC 8914
)

// Header bits of the second and third octet, RFC 1035, section 4.1.1 and RFC 4035, section 3.
const (
	FlagQR uint16 = 1 << 15
	FlagAA uint16 = 1 << 10
	FlagTC uint16 = 1 << 9
	FlagRD uint16 = 1 << 8
	FlagRA uint16 = 1 << 7
	FlagAD uint16 = 1 << 5
	FlagCD uint16 = 1 << 4

	opcodeMask uint16 = 0xf << 11
)

const (
	// HeaderLen is the length of a message header in octets.
	HeaderLen = 12
	// MaxName is the longest name in wire form, RFC 1035, section 2.3.4.
	MaxName = 255
	// MaxMessage is the longest message that a stream transport can carry.
	MaxMessage = 65535
	// MinUDPSize is the UDP payload that every client takes, RFC 6891, section 6.2.3.
	MinUDPSize = 512
)

// Query is one received message, read in place. The listener sets the exported fields of the first group before it
// calls Parse; Parse sets the others. A Query is used by one goroutine at a time and may be reused by another Parse.
type Query struct {
	Client    netip.AddrPort // who asked, unmapped
	Local     netip.AddrPort // the address that was asked
	Transport Transport
	Listener  string // the listener's name in the file, or its URL
	Received  int64  // when it was read, in Unix nanoseconds
	// Lane numbers the goroutine that reads queries where this one was read, so that what is counted on different cores can
	// be kept apart. Any number will do, it is only slower when two cores share one.
	Lane uint8

	Raw    []byte // the message; aliases the listener's buffer
	ID     uint16
	Flags  uint16 // the second 16 bits of the header as received
	Name   []byte // QNAME in wire form as the client spelled it; aliases Raw; nil when there is no sound question
	Qtype  uint16
	Qclass uint16
	Kind   Kind
	Fault  uint16 // the RCODE that the message itself earns, RcodeSuccess if it is sound

	EDNS      bool   // an OPT record was there
	UDPSize   uint16 // the client's UDP payload size: 512 without EDNS, never below 512
	DO        bool
	Padding   bool // the padding option was there, RFC 7830
	Keepalive bool // the edns-tcp-keepalive option was there, RFC 7828

	// The cache key, kept from ServeWire to Resolve: made of the name once, and hashed once.
	key    [MaxName + 7]byte
	hash   uint64
	view   uint32
	keyed  bool // key holds the name and all behind it for view, but perhaps QTYPE 0
	hashed bool
}

// RD reports whether recursion was desired.
func (q *Query) RD() bool { return q.Flags&FlagRD != 0 }

// CD reports whether the client disabled checking.
func (q *Query) CD() bool { return q.Flags&FlagCD != 0 }

// AD reports whether the client understands the AD bit, RFC 6840, section 5.7.
func (q *Query) AD() bool { return q.Flags&FlagAD != 0 }

// Opcode returns the OPCODE, RFC 1035, section 4.1.1.
func (q *Query) Opcode() uint8 { return uint8(q.Flags & opcodeMask >> 11) }

// Question is what leaves the gateway of a query: its question as the client spelled it, and the bits that change what an
// answer is. Name is in wire form; whoever keeps a Question copies it.
type Question struct {
	Name   []byte
	Qtype  uint16
	Qclass uint16
	DO     bool
	CD     bool
}

// Question returns q's. Its name aliases q.Raw.
func (q *Query) Question() Question {
	return Question{Name: q.Name, Qtype: q.Qtype, Qclass: q.Qclass, DO: q.DO, CD: q.CD()}
}

// Key returns the cache key of q for view: QNAME in lower case, QTYPE, DO, CD and the view's number. It aliases q and is
// valid until the next Parse, Key or NameKey. It must not be called without a sound question. The class is not in it: only
// answers to questions of class IN may be kept under it. A copy of q takes the key along.
func (q *Query) Key(view uint32) []byte { return q.keyOf(view, q.Qtype) }

// NameKey returns the cache key for all types of q's name without its first skip octets, which are whole labels: QTYPE 0,
// which no question that leaves the gateway has. It is else like Key.
func (q *Query) NameKey(view uint32, skip int) []byte { return q.keyOf(view, 0)[skip:] }

func (q *Query) keyOf(view uint32, qtype uint16) []byte {
	n := len(q.Name)
	if !q.keyed || q.view != view {
		appendLower(q.key[:0], q.Name)
		var bits byte
		if q.DO {
			bits |= 1
		}
		if q.CD() {
			bits |= 2
		}
		q.key[n+2] = bits
		binary.BigEndian.PutUint32(q.key[n+3:], view)
		q.keyed, q.view, q.hashed = true, view, false
	}
	binary.BigEndian.PutUint16(q.key[n:], qtype)
	return q.key[:n+7]
}

// TurnNameKey makes of key, which is a Key, the NameKey of the same name.
func TurnNameKey(key []byte) { clear(key[len(key)-7 : len(key)-5]) }

// Hash returns the hash of the last Key, which is computed by f once. f has to be the same function for as long as q is not
// parsed again.
func (q *Query) Hash(f func(key []byte) uint64) uint64 {
	if !q.hashed {
		q.hash, q.hashed = f(q.key[:len(q.Name)+7]), true
	}
	return q.hash
}

// appendLower appends name with its ASCII letters folded, eight octets at once: QNAMEs are 10 to 40 octets long.
func appendLower(dst, name []byte) []byte {
	const (
		ones = 0x0101010101010101
		high = 0x80 * ones
	)
	for ; len(name) >= 8; name = name[8:] {
		w := binary.LittleEndian.Uint64(name)
		low := w &^ high
		// The high bit of an octet of fromA is set when it is 'A' or above, of aboveZ when it is above 'Z'.
		fromA, aboveZ := low+(0x80-'A')*ones, low+(0x7f-'Z')*ones
		upper := (fromA ^ aboveZ) & high &^ w
		dst = binary.LittleEndian.AppendUint64(dst, w|upper>>2) // 0x80>>2 is 'a'-'A'
	}
	for _, c := range name {
		dst = append(dst, Lower(c))
	}
	return dst
}

// Lower folds ASCII letters. Label lengths are at most 63, below 'A', and so stay as they are.
func Lower(c byte) byte {
	if c-'A' < 26 {
		return c + 'a' - 'A'
	}
	return c
}

// SameName reports whether two names in wire form, not compressed, are the same, letter case aside.
func SameName(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if Lower(a[i]) != Lower(b[i]) {
			return false
		}
	}
	return true
}

// Parse reads raw into q. It never fails: what is wrong with the message stands in q.Kind and q.Fault.
//
//   - a message shorter than a header, or with QR=1, is Junk without a fault: dropped in silence;
//   - an opcode other than QUERY is NOTIMP, RFC 1035, section 4.1.1;
//   - QDCOUNT other than 1 is FORMERR, RFC 9619, section 4; so is everything that cannot be read to its end;
//   - two OPT records, or one that is not the root's, are FORMERR, RFC 6891, section 6.1.1;
//   - an EDNS version other than 0 is BADVERS, RFC 6891, section 6.1.3.
func (q *Query) Parse(raw []byte) {
	q.Raw, q.Name = raw, nil
	q.ID, q.Flags, q.Qtype, q.Qclass = 0, 0, 0, 0
	q.Kind, q.Fault = Junk, RcodeSuccess
	q.keyed, q.hashed = false, false
	q.EDNS, q.UDPSize, q.DO, q.Padding, q.Keepalive = false, MinUDPSize, false, false, false
	if len(raw) < HeaderLen {
		return
	}
	q.ID = binary.BigEndian.Uint16(raw)
	q.Flags = binary.BigEndian.Uint16(raw[2:])
	if q.Flags&FlagQR != 0 {
		return
	}
	qd := binary.BigEndian.Uint16(raw[4:])
	others := int(binary.BigEndian.Uint16(raw[6:])) + int(binary.BigEndian.Uint16(raw[8:]))
	additional := int(binary.BigEndian.Uint16(raw[10:]))

	q.Kind = Odd
	off := HeaderLen
	if qd == 1 {
		off = q.parseQuestion(off)
	} else {
		q.Fault = RcodeFormErr
		for range qd {
			if off = skipQuestion(raw, off); off < 0 {
				break
			}
		}
	}
	if off < 0 {
		q.Kind, q.Fault = Junk, RcodeFormErr
	} else {
		q.parseRecords(off, others, additional)
	}
	if q.Opcode() != 0 {
		// The sections of other opcodes have other meanings (RFC 2136): what was found wrong above does not count.
		q.Kind, q.Fault = Odd, RcodeNotImp
		return
	}
	if q.Fault == RcodeSuccess && q.Kind == Odd && others == 0 && q.Qclass == ClassIN && additional == btoi(q.EDNS) &&
		q.Qtype != TypeOPT && !metaType(q.Qtype) {
		q.Kind = Plain
	}
}

// metaType reports whether t is a QTYPE or meta type, such as ANY and AXFR, and no type of data; RFC 6895, section 3.1.
func metaType(t uint16) bool { return t >= 128 && t <= 255 }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// parseQuestion reads the one question at off and returns the offset behind it, or -1.
func (q *Query) parseQuestion(off int) int {
	end := plainName(q.Raw, off)
	if end < 0 || end+4 > len(q.Raw) {
		return -1
	}
	q.Name = q.Raw[off:end]
	q.Qtype = binary.BigEndian.Uint16(q.Raw[end:])
	q.Qclass = binary.BigEndian.Uint16(q.Raw[end+2:])
	return end + 4
}

// parseRecords walks the records behind the question to the end of the message and reads the OPT record among the
// additional ones.
func (q *Query) parseRecords(off, others, additional int) {
	msg := q.Raw
	for i := range others + additional {
		r, next := readRecord(msg, off)
		if next < 0 {
			q.fail(RcodeFormErr)
			return
		}
		if r.typ == TypeOPT {
			if i < others || q.EDNS || msg[off] != 0 {
				q.fail(RcodeFormErr)
				return
			}
			q.parseOPT(r, msg[r.data:next])
		}
		off = next
	}
	if off != len(msg) {
		q.fail(RcodeFormErr)
	}
}

// fail records a fault; a FORMERR outranks a BADVERS that was found before it.
func (q *Query) fail(rcode uint16) {
	if q.Fault == RcodeSuccess || rcode == RcodeFormErr {
		q.Fault = rcode
	}
}

func (q *Query) parseOPT(r record, data []byte) {
	q.EDNS = true
	q.UDPSize = max(r.class, MinUDPSize)
	q.DO = r.ttl&(1<<15) != 0
	if byte(r.ttl>>16) != 0 {
		q.fail(RcodeBadVers)
		return // the options of an unknown version mean nothing to us
	}
	for len(data) > 0 {
		code, _, rest, ok := NextOption(data)
		if !ok {
			q.fail(RcodeFormErr)
			return
		}
		switch code {
		case OptionPadding:
			q.Padding = true
		case OptionKeepalive:
			q.Keepalive = true
		}
		data = rest
	}
}

// record is one resource record's fixed part; data is the offset of its RDATA.
type record struct {
	typ, class uint16
	ttl        uint32
	data       int
}

// readRecord reads the record at off and returns the offset behind it, or -1 when it does not fit in msg.
func readRecord(msg []byte, off int) (r record, next int) {
	end := skipName(msg, off)
	if end < 0 || end+10 > len(msg) {
		return r, -1
	}
	r.typ = binary.BigEndian.Uint16(msg[end:])
	r.class = binary.BigEndian.Uint16(msg[end+2:])
	r.ttl = binary.BigEndian.Uint32(msg[end+4:])
	r.data = end + 10
	next = r.data + int(binary.BigEndian.Uint16(msg[end+8:]))
	if next > len(msg) {
		return r, -1
	}
	return r, next
}

// skipName returns the offset behind the name at off, or -1. It does not follow compression pointers.
func skipName(msg []byte, off int) int {
	for off < len(msg) {
		switch c := msg[off]; {
		case c == 0:
			return off + 1
		case c < 64:
			off += int(c) + 1
		case c >= 192:
			if off+2 > len(msg) {
				return -1
			}
			return off + 2
		default:
			return -1 // RFC 6891, section 5: extended label types are gone
		}
	}
	return -1
}

// plainName returns the offset behind the name at off, or -1. It takes labels only, and at most MaxName octets: the name
// in a question has nothing before it that a compression pointer could mean.
func plainName(msg []byte, off int) int {
	for start := off; off < len(msg) && off-start < MaxName; {
		c := msg[off]
		if c == 0 {
			return off + 1
		}
		if c >= 64 {
			return -1
		}
		off += int(c) + 1
	}
	return -1
}

// skipQuestion returns the offset behind the question at off, or -1.
func skipQuestion(msg []byte, off int) int {
	if end := skipName(msg, off); end >= 0 && end+4 <= len(msg) {
		return end + 4
	}
	return -1
}
