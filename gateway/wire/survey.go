package wire

import (
	"encoding/binary"
	"math"
	"strings"
)

// lifetime is what a response says about how long it may be kept.
type lifetime struct {
	ttl     uint32 // the smallest TTL of all records but OPT, TSIG and SIG(0); 0 if there are none
	minimum uint32 // the smallest MINIMUM field of the SOA records in the authority section
	soa     bool   // there is such an SOA record
	data    bool   // the answer section has a record of the type that was asked for
	some    bool   // there is a record
}

// Negative reports whether a says that the name or the type does not exist: NXDOMAIN, or NOERROR without a record of
// the type that was asked for, be it behind a CNAME record (RFC 2308, section 2). A referral looks so too, but has no
// Lifetime.
func (a *Answer) Negative() bool { return a.facts.negative(a.Rcode) }

// Truncated reports whether the response that a was made of had TC set.
func (a *Answer) Truncated() bool { return a.Msg[2]&byte(FlagTC>>8) != 0 }

// Lifetime returns for how many seconds a may be kept, by the rules of the function [Lifetime].
func (a *Answer) Lifetime() uint32 { return a.facts.seconds(a.Rcode, a.Truncated()) }

func (l *lifetime) negative(rcode uint16) bool {
	return rcode == RcodeNXDomain || rcode == RcodeSuccess && !l.data
}

func (l *lifetime) seconds(rcode uint16, truncated bool) uint32 {
	switch {
	case truncated, rcode != RcodeSuccess && rcode != RcodeNXDomain:
		return 0
	case !l.negative(rcode):
		return l.ttl
	case l.soa:
		return min(l.ttl, l.minimum)
	}
	return 0
}

// Lifetime returns for how many seconds the packed response msg may be kept, for instance by an HTTP cache (RFC 8484,
// section 5.1): the smallest TTL of all its records. For a negative answer that is also at most the SOA record's MINIMUM
// field (RFC 2308, section 5), and 0 if there is no SOA record, as in a referral. It is 0 for a truncated response, for
// one with an RCODE other than NOERROR and NXDOMAIN, and for one that cannot be read. It does not allocate.
func Lifetime(msg []byte) uint32 {
	l, err := survey(msg, nil)
	if err != nil {
		return 0
	}
	return l.seconds(l.rcode(msg), binary.BigEndian.Uint16(msg[2:])&FlagTC != 0)
}

// layout is where the parts of a response are.
type layout struct {
	lifetime
	qend           int // the offset behind the question
	answers, auths int
	records        int // all records but OPT, TSIG and SIG(0)
	beforeOPT      int // those of them that come before the OPT record
	optStart       int // the OPT record
	optData        int // its RDATA
	optEnd         int // the offset behind it, 0 if there is none
	optRcode       uint16
	signature      int // the offset of the TSIG or SIG(0) record, 0 if there is none
}

// rcode returns the extended RCODE of msg.
func (l *layout) rcode(msg []byte) uint16 { return l.optRcode | uint16(msg[3]&0xf) }

// survey walks a packed response from end to end. With c, it also looks into names and RDATA.
func survey(msg []byte, c *names) (layout, error) {
	var l layout
	if len(msg) < HeaderLen || binary.BigEndian.Uint16(msg[2:])&(FlagQR|opcodeMask) != FlagQR {
		return l, errHeader
	}
	if len(msg) > MaxMessage {
		return l, errLength
	}
	end := plainName(msg, HeaderLen)
	if binary.BigEndian.Uint16(msg[4:]) != 1 || end < 0 || end+4 > len(msg) {
		return l, errQuestion
	}
	qtype := binary.BigEndian.Uint16(msg[end:])
	l.qend = end + 4
	l.answers = int(binary.BigEndian.Uint16(msg[6:]))
	l.auths = int(binary.BigEndian.Uint16(msg[8:]))
	additional := int(binary.BigEndian.Uint16(msg[10:]))

	off := l.qend
	for i := range l.answers + l.auths + additional {
		r, next := readRecord(msg, off)
		if next < 0 {
			return l, errRecord
		}
		if err := l.record(msg, i, off, next, r, qtype); err != nil {
			return l, err
		}
		if c != nil {
			c.opt = l.optStart
			if c.check(off) < 0 {
				return l, errName
			}
			if len(c.ttl) < l.records {
				c.ttl = append(c.ttl, uint16(r.data-6))
			}
			if !c.sound(r.typ, r.class, r.data, next) {
				return l, errName
			}
		}
		off = next
	}
	if off != len(msg) {
		return l, errTrailing
	}
	return l, nil
}

// record takes note of record number i, which lies between off and next.
func (l *layout) record(msg []byte, i, off, next int, r record, qtype uint16) error {
	inAdditional := i >= l.answers+l.auths
	if l.signature > 0 {
		return errSignature // RFC 8945, section 5.1 and RFC 2931, section 3.2
	}
	switch r.typ {
	case TypeOPT:
		if !inAdditional || l.optEnd > 0 || msg[off] != 0 || !soundOptions(msg[r.data:next]) {
			return errOPT // RFC 6891, section 6.1.1
		}
		l.optStart, l.optData, l.optEnd = off, r.data, next
		l.optRcode = uint16(r.ttl >> 24 << 4)
		l.beforeOPT = l.records
		return nil
	case TypeTSIG:
		if !inAdditional {
			return errSignature
		}
		l.signature = off
		return nil
	case typeSIG:
		// A SIG record that covers no type is SIG(0): a transaction's, as TSIG, and meant for us.
		if inAdditional && next-r.data >= 2 && binary.BigEndian.Uint16(msg[r.data:]) == 0 {
			l.signature = off
			return nil
		}
	case TypeSOA:
		if i >= l.answers && !inAdditional {
			minimum, ok := soaMinimum(msg, r.data, next)
			if !ok {
				return errSOA
			}
			if !l.soa || minimum < l.minimum {
				l.soa, l.minimum = true, minimum
			}
		}
	}
	l.records++
	if i < l.answers && (r.typ == qtype || qtype == TypeANY) {
		l.data = true
	}
	if r.ttl > math.MaxInt32 {
		r.ttl = 0 // RFC 2181, section 8
	}
	if !l.some || r.ttl < l.ttl {
		l.some, l.ttl = true, r.ttl
	}
	return nil
}

// soaMinimum reads the MINIMUM field of the SOA record whose RDATA is msg[data:end], RFC 1035, section 3.3.13.
func soaMinimum(msg []byte, data, end int) (uint32, bool) {
	off := data
	for range 2 {
		if off = skipName(msg[:end], off); off < 0 {
			return 0, false
		}
	}
	if end-off != 20 {
		return 0, false
	}
	minimum := binary.BigEndian.Uint32(msg[end-4:])
	if minimum > math.MaxInt32 {
		minimum = 0
	}
	return minimum, true
}

// strip takes the OPT record, if l knows of one, out of msg, and corrects ARCOUNT.
//
// Records that follow the OPT record move up, and with them what compression pointers mean. Only for a few types is it
// certain that their RDATA has none, so a record of another type, and all behind it, go too: additional records are a
// courtesy, and most servers send the OPT record last. whole reports whether all records are still there.
func (l *layout) strip(msg []byte) (stripped []byte, whole bool) {
	kept := l.records
	if l.optEnd > 0 {
		n, end := moveUp(msg, l.optStart, l.optEnd)
		kept = l.beforeOPT + n
		msg = append(msg[:l.optStart], msg[l.optEnd:end]...)
	}
	binary.BigEndian.PutUint16(msg[10:], uint16(kept-l.answers-l.auths))
	return msg, kept == l.records
}

// moveUp makes the records behind the OPT record msg[start:end] ready to be moved to start. It returns how many of them
// can be moved, and the offset behind the last of those.
func moveUp(msg []byte, start, end int) (n, off int) {
	off = end
	for off < len(msg) {
		r, next := readRecord(msg, off)
		if r.typ != TypeA && r.typ != TypeAAAA && (r.typ != TypeRRSIG || r.class != ClassIN || pointsAway(msg, r.data+18)) {
			break
		}
		if p := r.data - 12; pointsAway(msg, off) {
			target := int(binary.BigEndian.Uint16(msg[p:]) & 0x3fff)
			if target >= off || target >= start && target < end {
				break // not a prior name, RFC 1035, section 4.1.4
			}
			if target >= end {
				binary.BigEndian.PutUint16(msg[p:], uint16(0xc000|target-(end-start)))
			}
		}
		n++
		off = next
	}
	return n, off
}

// pointsAway reports whether the name at off, which can be read, ends in a compression pointer.
func pointsAway(msg []byte, off int) bool {
	for msg[off] > 0 && msg[off] < 64 {
		off += int(msg[off]) + 1
	}
	return msg[off] >= 0xc0
}

// soundOptions reports whether data is a sequence of whole EDNS options, RFC 6891, section 6.1.2.
func soundOptions(data []byte) bool {
	for len(data) > 0 {
		_, _, rest, ok := NextOption(data)
		if !ok {
			return false
		}
		data = rest
	}
	return true
}

// NextOption splits the first EDNS option off data, the RDATA of an OPT record (RFC 6891, section 6.1.2). It is not ok when
// data ends within the option. The results alias data.
func NextOption(data []byte) (code uint16, value, rest []byte, ok bool) {
	if len(data) < 4 {
		return 0, nil, nil, false
	}
	n := 4 + int(binary.BigEndian.Uint16(data[2:]))
	if n > len(data) {
		return 0, nil, nil, false
	}
	return binary.BigEndian.Uint16(data), data[4:n], data[n:], true
}

// readEDE returns the extended DNS errors among the options in data, which are sound. Text that is not UTF-8 is mended,
// and a final NUL goes (RFC 8914, section 2).
func readEDE(data []byte) []EDE {
	var list []EDE
	for len(data) > 0 && len(list) < maxEDE {
		code, value, rest, _ := NextOption(data)
		data = rest
		if code != OptionEDE || len(value) < 2 {
			continue
		}
		text := strings.TrimRight(string(value[2:]), "\x00")
		text = cutText(strings.ToValidUTF8(text, "\uFFFD"), maxEDEText)
		list = append(list, EDE{Code: binary.BigEndian.Uint16(value), Text: strings.Clone(text)})
	}
	return list
}

// The FNV-1a hash, http://www.isthe.com/chongo/tech/comp/fnv/.
const (
	fnvOffset uint64 = 14695981039346656037
	fnvPrime  uint64 = 1099511628211
)

// hashName adds the name at off to the hash h, without regard to letter case and compression. Of a name that cannot be
// read it adds what can be.
func hashName(h uint64, msg []byte, off int) uint64 {
	for n := 0; n < MaxName && off < len(msg); {
		c := int(msg[off])
		switch {
		case c == 0:
			return h
		case c < 64:
			for _, b := range msg[off:min(off+1+c, len(msg))] {
				h = (h ^ uint64(Lower(b))) * fnvPrime
			}
			off += 1 + c
			n += 1 + c
		case c >= 0xc0 && off+1 < len(msg):
			target := int(binary.BigEndian.Uint16(msg[off:]) & 0x3fff)
			if target >= off {
				return h // not a prior name: it could be a loop
			}
			off = target
			n++
		default:
			return h
		}
	}
	return h
}
