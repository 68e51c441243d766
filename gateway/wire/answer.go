package wire

import (
	"encoding/binary"
	"errors"
	"slices"
	"unicode/utf8"
	"unsafe"
)

// Answer is a response as the cache keeps it: header, question and records in packed form, without the hop-by-hop
// records OPT, TSIG and SIG(0). Only [ReadAnswer] and [Answer.Read] make one. Its maker may change Secure and EDE and call
// ClampTTL and Age until it shares the Answer; from then on nobody writes to it, and any number of goroutines may read it.
type Answer struct {
	Msg    []byte   // the packed response; its length is at most MaxMessage
	TTLs   []uint16 // the offset in Msg of every record's TTL field, in the order of the records
	EDE    []EDE    // extended DNS errors to pass on to clients that sent an OPT record, RFC 8914
	Rcode  uint16   // the extended RCODE, 12 bits, RFC 6891, section 6.1.3
	Secure bool     // the gateway has validated it: AD may be set

	movable bool   // it may be made the answer to other questions: see Denial
	qend    uint16 // the offset behind the question
	answers uint16 // ANCOUNT
	auths   uint16 // NSCOUNT
	facts   lifetime
	cuts    []cut // where Msg may be truncated, in ascending order; nil when Msg fits into every UDP payload
}

// EDE is an extended DNS error, RFC 8914. Text may be empty; more than 255 octets of it are not sent.
type EDE struct {
	Code uint16
	Text string
}

// Bounds on the extended DNS errors that are passed on: what a stranger's server says there is copied to the client.
const (
	maxEDE     = 8
	maxEDEText = 255
)

// cut is an offset at which a message may end because no RRset lies on both sides of it.
type cut struct {
	end     uint16 // octets before the cut
	records uint16 // records before the cut
}

// The ways in which a response can be unreadable.
var (
	errHeader   = errors.New("no DNS response header")
	errLength   = errors.New("longer than a DNS message can be")
	errQuestion = errors.New("not one readable question")
	errRecord   = errors.New("a record does not fit in the message")
	errTrailing = errors.New("octets behind the last record")
	errOPT      = errors.New("bad OPT record")
	errSOA      = errors.New("bad SOA record")
	errName     = errors.New("a record with an unreadable name or address")

	errSignature = errors.New("a TSIG or SIG(0) record is not the last one")
)

// ReadAnswer reads a packed response, which it neither changes nor keeps. An OPT record in it is taken out: its extended
// RCODE bits and its extended DNS errors are kept in the Answer, and options is its RDATA, which aliases msg. ReadAnswer
// returns an error for everything that is not one whole response to one question, names that clients could not read
// included, so that bytes from a server may come straight here.
func ReadAnswer(msg []byte) (a *Answer, options []byte, err error) {
	a = new(Answer)
	if options, err = a.Read(msg); err != nil {
		return nil, nil, err
	}
	return a, options, nil
}

// Read makes a what [ReadAnswer] returns, in the memory that a has: who reads one answer after the other and keeps copies
// needs no more than one. a must not be shared. After an error it is no answer, but may be read into again.
func (a *Answer) Read(msg []byte) (options []byte, err error) {
	c := names{msg: msg, ttl: a.TTLs[:0]}
	if len(msg) >= HeaderLen {
		records := int(binary.BigEndian.Uint16(msg[6:])) + int(binary.BigEndian.Uint16(msg[8:])) +
			int(binary.BigEndian.Uint16(msg[10:]))
		c.ttl = slices.Grow(c.ttl, min(records, len(msg)/minRecord))
	}
	l, err := survey(msg, &c)
	if err != nil {
		return nil, err
	}
	kept := a.Msg[:0]
	*a = Answer{
		Rcode:   l.rcode(msg),
		qend:    uint16(l.qend),
		answers: uint16(l.answers),
		auths:   uint16(l.auths),
		facts:   l.lifetime,
		TTLs:    c.ttl,
	}
	if l.optEnd > 0 {
		options = msg[l.optData:l.optEnd]
		a.EDE = readEDE(options)
	}
	end := len(msg)
	if l.signature > 0 {
		end = l.signature
	}
	if l.optEnd == end {
		end, l.optEnd = l.optStart, 0 // it is not even copied
	}
	kept = append(kept, msg[:end]...)
	var whole bool
	if a.Msg, whole = l.strip(kept); !whole {
		// What is gone says nothing about the lifetime of what is left.
		if l, err = survey(a.Msg, nil); err != nil {
			return nil, err
		}
		a.facts = l.lifetime
	}
	if l.optEnd > 0 || !whole || len(a.Msg)+optLen > MinUDPSize {
		a.index()
	}
	a.movable = a.Rcode == RcodeNXDomain && a.answers == 0 && movable(a.Msg, int(a.qend))
	for _, off := range a.TTLs {
		if ttl := a.Msg[off : off+4]; ttl[0] > 0x7f {
			binary.BigEndian.PutUint32(ttl, 0) // RFC 2181, section 8
		}
	}
	return options, nil
}

// minRecord is the length of the shortest record: the root's, without RDATA.
const minRecord = 11

// index fills in the offsets of the TTLs and the places where Msg may be cut. Msg has been surveyed.
func (a *Answer) index() {
	records := int(a.answers) + int(a.auths) + int(binary.BigEndian.Uint16(a.Msg[10:]))
	a.TTLs = a.TTLs[:0]
	var ends []cut
	var sets []uint64
	big := len(a.Msg)+optLen > MinUDPSize
	off := int(a.qend)
	for i := range records {
		r, next := readRecord(a.Msg, off)
		a.TTLs = append(a.TTLs, uint16(r.data-6))
		if big {
			sets = append(sets, a.rrset(i, off, next, r))
			ends = append(ends, cut{end: uint16(next), records: uint16(i + 1)})
		}
		off = next
	}
	a.cuts = cuts(ends, sets)
}

// rrset returns a number that is the same for all records of one RRset and for the RRSIG records that cover it, and
// different for other records, but for rare collisions; those only make truncation coarser.
func (a *Answer) rrset(i, off, next int, r record) uint64 {
	section := byte(0)
	switch {
	case i >= int(a.answers)+int(a.auths):
		section = 2
	case i >= int(a.answers):
		section = 1
	}
	typ := r.typ
	if typ == TypeRRSIG && next-r.data >= 2 {
		typ = binary.BigEndian.Uint16(a.Msg[r.data:]) // the type covered, RFC 4034, section 3.1.1
	}
	h := hashName(fnvOffset, a.Msg, off)
	for _, c := range [...]byte{section, byte(typ >> 8), byte(typ), byte(r.class >> 8), byte(r.class)} {
		h = (h ^ uint64(c)) * fnvPrime
	}
	return h
}

// cuts returns those of ends that no RRset spans, without the last, which is the whole message.
func cuts(ends []cut, sets []uint64) []cut {
	if len(ends) == 0 {
		return nil
	}
	last := make(map[uint64]int, len(sets))
	for i, h := range sets {
		last[h] = i
	}
	n, reach := 0, 0
	for i, h := range sets[:len(sets)-1] {
		reach = max(reach, last[h])
		if reach == i {
			ends[n] = ends[i]
			n++
		}
	}
	return slices.Clip(slices.Clone(ends[:n]))
}

// ClampTTL raises every TTL of a to at least low and lowers it to at most high seconds. It must not be called once a is
// shared.
func (a *Answer) ClampTTL(low, high uint32) {
	for _, off := range a.TTLs {
		field := a.Msg[off : off+4]
		binary.BigEndian.PutUint32(field, min(max(binary.BigEndian.Uint32(field), low), high))
	}
	a.facts.ttl = min(max(a.facts.ttl, low), high)
}

// Age takes seconds off every TTL of a, as a cache on the way has used them up. It must not be called once a is shared.
func (a *Answer) Age(seconds uint32) {
	for _, off := range a.TTLs {
		field := a.Msg[off : off+4]
		ttl := binary.BigEndian.Uint32(field)
		binary.BigEndian.PutUint32(field, ttl-min(ttl, seconds))
	}
	a.facts.ttl -= min(a.facts.ttl, seconds)
}

// AD reports whether the response that a was made of had AD set: its sender says that it is secure.
func (a *Answer) AD() bool { return a.Msg[3]&byte(FlagAD) != 0 }

// Answers reports whether the response that a was made of had q's question, letter case aside.
func (a *Answer) Answers(q Question) bool {
	end := HeaderLen + len(q.Name)
	return int(a.qend) == end+4 && SameName(a.Msg[HeaderLen:end], q.Name) &&
		binary.BigEndian.Uint16(a.Msg[end:]) == q.Qtype && binary.BigEndian.Uint16(a.Msg[end+2:]) == q.Qclass
}

// CloneLen returns how many octets [Answer.CloneInto] needs for a copy of a behind a front of so many octets.
func (a *Answer) CloneLen(front int) int {
	n := front + front&1 + 2*len(a.TTLs) + int(unsafe.Sizeof(cut{}))*len(a.cuts) + len(a.Msg)
	for i := range a.EDE {
		n += len(a.EDE[i].Text)
	}
	return n
}

// CloneInto makes b a copy of a that shares no memory with it: behind a copy of front, all that b refers to but the list of
// its extended DNS errors lies in array, which has at least CloneLen octets, is aligned for a uint16, and has no other user
// from then on. The list is a new one only if b.EDE has no room for it.
func (a *Answer) CloneInto(b *Answer, array, front []byte) {
	off := copy(array, front)
	off += off & 1 // so that what follows is aligned
	list := b.EDE[:0]
	*b = *a
	if n := len(a.TTLs); n > 0 {
		b.TTLs = unsafe.Slice((*uint16)(unsafe.Pointer(&array[off])), n)
		off += 2 * copy(b.TTLs, a.TTLs)
	}
	if n := len(a.cuts); n > 0 {
		b.cuts = unsafe.Slice((*cut)(unsafe.Pointer(&array[off])), n)
		off += int(unsafe.Sizeof(cut{})) * copy(b.cuts, a.cuts)
	}
	end := off + len(a.Msg)
	b.Msg = array[off:end:end]
	copy(b.Msg, a.Msg)
	b.EDE = append(list, a.EDE...)
	for i := range b.EDE {
		n := copy(array[end:], b.EDE[i].Text)
		b.EDE[i].Text = unsafe.String(unsafe.SliceData(array[end:]), n)
		end += n
	}
}

// AppendPacked appends a to dst as a packed response, of which [ReadAnswer] makes an equal Answer, Secure aside, and returns
// the longer slice. Extended DNS errors beyond what ReadAnswer takes are left out, and those that do not fit.
func (a *Answer) AppendPacked(dst []byte) []byte {
	start := len(dst)
	dst = append(dst, a.Msg...)
	if len(a.EDE) == 0 && a.Rcode <= MaxPlainRcode || len(a.Msg)+optLen > MaxMessage {
		return dst
	}
	additional := dst[start+10:]
	binary.BigEndian.PutUint16(additional, binary.BigEndian.Uint16(additional)+1)
	dst = append(dst, 0, 0, byte(TypeOPT), 0, 0, byte(a.Rcode>>4), 0, 0, 0, 0, 0)
	options := len(dst)
	dst = appendEDE(dst, a.EDE[:min(len(a.EDE), maxEDE)], start+MaxMessage)
	binary.BigEndian.PutUint16(dst[options-2:], uint16(len(dst)-options))
	return dst
}

// Shape is what the gateway puts on every response of its own and on every response that it passes on. A Shape is not
// changed once it is used; its methods may be called from any goroutine.
type Shape struct {
	// UDPSize is our largest UDP response, and the size that our OPT record advertises; less than 512 means 512.
	UDPSize uint16
	// Keepalive is the edns-tcp-keepalive timeout in units of 100 ms, sent over TCP and DoT to clients that sent the
	// option, RFC 7828; 0 means that it is not sent.
	Keepalive uint16
	// PadBlock is the multiple of octets to which responses over encrypted transports are padded when the query was
	// padded, RFC 7830; RFC 8467, section 4.1 recommends 468. 0 means no padding.
	PadBlock int
}

// optLen is the length of an OPT record without options.
const optLen = 11

// AppendAnswer appends the response to q that a gives, a being age seconds old, to dst and returns the longer slice. It
// is the one last step of a cache hit and of a resolved answer, so that both are equal. It does not allocate when dst
// has room. dst must not overlap q.Raw.
//
// a must answer q's question; q's spelling of the name replaces a's. The header is our own: QR and RA are set, AA is
// clear, ID, RD and CD are the query's, AD is set only when a is secure and the client asked for it (RFC 6840, section
// 5.8). An OPT record is there exactly when q had one (RFC 6891, section 6.1.1).
//
// A response that is too large (over UDP: larger than the client or the Shape allows) first loses extended DNS errors
// (RFC 8914, section 3), then whole RRsets together with their signatures, from the end: additional section, authority
// section, answer section. TC is set when something of the last two is missing (RFC 2181, section 9).
//
// It is also enough that a is an [Answer.Denial] of q's name or of one that q's name is below.
func (s *Shape) AppendAnswer(dst []byte, q *Query, a *Answer, age uint32) []byte {
	return s.appendAnswer(dst, q, a, variant{age: age})
}

// AppendStale is AppendAnswer for an a whose time is over: every TTL is ttl, RFC 8767, section 4, and an extended DNS error
// says so, RFC 8914, section 4.4 and section 4.20.
func (s *Shape) AppendStale(dst []byte, q *Query, a *Answer, ttl uint32) []byte {
	v := variant{stale: true, ttl: ttl, ede: edeStale[:]}
	if a.Rcode == RcodeNXDomain {
		v.ede = edeStaleNXDomain[:]
	}
	return s.appendAnswer(dst, q, a, v)
}

var (
	edeStale         = [...]EDE{{Code: 3}}  // Stale Answer
	edeStaleNXDomain = [...]EDE{{Code: 19}} // Stale NXDOMAIN Answer
)

// variant says how a response differs from the answer that it is made of.
type variant struct {
	age   uint32 // taken off every TTL, or
	stale bool   // every TTL is
	ttl   uint32 // this
	ede   []EDE  // goes before the answer's own
}

func (s *Shape) appendAnswer(dst []byte, q *Query, a *Answer, v variant) []byte {
	qend := HeaderLen + len(q.Name) + 4
	shift := qend - int(a.qend)
	if shift != 0 && (!a.movable || shift < 0) {
		return s.AppendError(dst, q, RcodeServFail) // another question's answer: a fault of the caller's
	}
	flags := uint16(0)
	if a.Secure && (q.AD() || q.DO) {
		flags = FlagAD
	}
	room := s.limit(q) - s.optLen(q) - shift
	end, records := len(a.Msg), len(a.TTLs)
	if end > room {
		end, records = a.cut(room)
	}
	if a.Truncated() || records < int(a.answers)+int(a.auths) {
		flags |= FlagTC
	}
	start := len(dst)
	if shift == 0 {
		dst = append(dst, a.Msg[:end]...)
		copy(dst[start+HeaderLen:], q.Name)
	} else {
		dst = append(dst, a.Msg[:HeaderLen]...)
		dst = append(dst, q.Name...)
		dst = append(dst, a.Msg[a.qend-4:end]...)
		move(dst[start:], qend, shift)
	}
	msg := dst[start:]
	if a.movable {
		binary.BigEndian.PutUint16(msg[qend-4:], q.Qtype)
	}
	s.putHeader(msg, q, a.Rcode, flags)
	an := min(records, int(a.answers))
	ns := min(records-an, int(a.auths))
	binary.BigEndian.PutUint16(msg[6:], uint16(an))
	binary.BigEndian.PutUint16(msg[8:], uint16(ns))
	binary.BigEndian.PutUint16(msg[10:], uint16(records-an-ns+btoi(q.EDNS)))
	switch {
	case v.stale:
		for _, off := range a.TTLs[:records] {
			binary.BigEndian.PutUint32(msg[int(off)+shift:], v.ttl)
		}
	case v.age > 0:
		for _, off := range a.TTLs[:records] {
			field := msg[int(off)+shift:][:4]
			ttl := binary.BigEndian.Uint32(field)
			binary.BigEndian.PutUint32(field, ttl-min(ttl, v.age))
		}
	}
	return s.appendOPT(dst, start, q, a.Rcode, v.ede, a.EDE)
}

// cut returns the length of the longest part of Msg that fits in room, and the number of records in it.
func (a *Answer) cut(room int) (end, records int) {
	i, _ := slices.BinarySearchFunc(a.cuts, room+1, func(c cut, n int) int { return int(c.end) - n })
	if i == 0 {
		return int(a.qend), 0
	}
	return int(a.cuts[i-1].end), int(a.cuts[i-1].records)
}

// AppendError appends an empty response to q with rcode to dst and returns the longer slice: the header with q's opcode,
// the question if q has one, and an OPT record exactly when q had one, with as many of the ede entries as fit. An
// extended rcode that the client cannot be told for want of EDNS becomes SERVFAIL. It does not allocate when dst has
// room, and dst must not overlap q.Raw.
func (s *Shape) AppendError(dst []byte, q *Query, rcode uint16, ede ...EDE) []byte {
	return s.appendEmpty(dst, q, rcode, 0, ede)
}

// AppendTruncated appends an empty response to q with TC set to dst and returns the longer slice. It tells a client to
// ask again over TCP, which a forger of source addresses cannot do. It does not allocate when dst has room, and dst must
// not overlap q.Raw.
func (s *Shape) AppendTruncated(dst []byte, q *Query) []byte {
	return s.appendEmpty(dst, q, RcodeSuccess, FlagTC, nil)
}

func (s *Shape) appendEmpty(dst []byte, q *Query, rcode, flags uint16, ede []EDE) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, byte(btoi(q.EDNS)))
	s.putHeader(dst[start:], q, rcode, flags)
	if q.Name != nil {
		dst[start+5] = 1
		dst = append(dst, q.Name...)
		dst = binary.BigEndian.AppendUint16(dst, q.Qtype)
		dst = binary.BigEndian.AppendUint16(dst, q.Qclass)
	}
	return s.appendOPT(dst, start, q, rcode, nil, ede)
}

// putHeader writes ID, flags and RCODE of the response to q into msg.
func (s *Shape) putHeader(msg []byte, q *Query, rcode, flags uint16) {
	if rcode > 0xf && !q.EDNS {
		rcode = RcodeServFail // the lower four bits alone would say something else
	}
	flags |= FlagQR | FlagRA | q.Flags&(opcodeMask|FlagRD|FlagCD) | rcode&0xf
	binary.BigEndian.PutUint16(msg, q.ID)
	binary.BigEndian.PutUint16(msg[2:], flags)
}

// limit returns the length that the response to q may not exceed.
func (s *Shape) limit(q *Query) int {
	if q.Transport != UDP {
		return MaxMessage
	}
	return int(max(min(q.UDPSize, s.UDPSize), MinUDPSize))
}

// optLen returns the length of the OPT record in the response to q, without what may be left out.
func (s *Shape) optLen(q *Query) int {
	switch {
	case !q.EDNS:
		return 0
	case s.keepalive(q):
		return optLen + 6
	}
	return optLen
}

// keepalive reports whether the response to q carries the edns-tcp-keepalive option. The transports behind DoT have their
// own ways to say it: RFC 8484, section 10 and RFC 9250, section 5.5.2.
func (s *Shape) keepalive(q *Query) bool {
	return q.Keepalive && s.Keepalive > 0 && (q.Transport == TCP || q.Transport == DoT)
}

// appendOPT appends the OPT record of the response that begins at dst[start], if q asks for one. ARCOUNT counts it
// already. Of the extended DNS errors, those of first go before those of ede.
func (s *Shape) appendOPT(dst []byte, start int, q *Query, rcode uint16, first, ede []EDE) []byte {
	if !q.EDNS {
		return dst
	}
	limit := start + s.limit(q)
	dst = append(dst, 0, 0, byte(TypeOPT))
	dst = binary.BigEndian.AppendUint16(dst, max(s.UDPSize, MinUDPSize))
	var do byte
	if q.DO {
		do = 0x80
	}
	dst = append(dst, byte(rcode>>4), 0, do, 0, 0, 0)
	options := len(dst)
	if s.keepalive(q) {
		dst = appendOption(dst, OptionKeepalive, 2)
		dst = binary.BigEndian.AppendUint16(dst, s.Keepalive)
	}
	dst = appendEDE(dst, first, limit)
	dst = appendEDE(dst, ede, limit)
	dst = s.pad(dst, start, q)
	binary.BigEndian.PutUint16(dst[options-2:], uint16(len(dst)-options))
	return dst
}

// appendEDE appends as many of ede as keep dst within limit.
func appendEDE(dst []byte, ede []EDE, limit int) []byte {
	for _, e := range ede {
		text := cutText(e.Text, maxEDEText)
		if len(dst)+6+len(text) > limit {
			break
		}
		dst = appendOption(dst, OptionEDE, 2+len(text))
		dst = binary.BigEndian.AppendUint16(dst, e.Code)
		dst = append(dst, text...)
	}
	return dst
}

func appendOption(dst []byte, code uint16, n int) []byte {
	dst = binary.BigEndian.AppendUint16(dst, code)
	return binary.BigEndian.AppendUint16(dst, uint16(n))
}

// pad appends the padding option when q asks for it, so that the message from dst[start] on is a multiple of PadBlock
// long, or as long as a message can be (RFC 8467, section 4.1).
func (s *Shape) pad(dst []byte, start int, q *Query) []byte {
	n := len(dst) - start + 4
	if !q.Padding || !q.Transport.Encrypted() || s.PadBlock <= 0 || n > MaxMessage {
		return dst
	}
	zeros := min((n+s.PadBlock-1)/s.PadBlock*s.PadBlock, MaxMessage) - n
	dst = appendOption(dst, OptionPadding, zeros)
	dst = slices.Grow(dst, zeros)[:len(dst)+zeros]
	clear(dst[len(dst)-zeros:])
	return dst
}

// cutText returns s, or as many whole characters of it as fit in n octets.
func cutText(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
