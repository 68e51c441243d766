package wire

import (
	"encoding/binary"
	"slices"
)

// Types whose RDATA has domain names that a server may compress (RFC 3597, section 4 has the list), or might compress
// though it must not. All others are opaque here, but for addresses, whose length is known.
const (
	typeNS    = 2
	typeMD    = 3
	typeMF    = 4
	typeCNAME = 5
	typeMB    = 7
	typeMG    = 8
	typeMR    = 9
	typePTR   = 12
	typeHINFO = 13
	typeMINFO = 14
	typeMX    = 15
	typeTXT   = 16
	typeRP    = 17
	typeAFSDB = 18
	typeRT    = 21
	typeSIG   = 24
	typePX    = 26
	typeNXT   = 30
	typeSRV   = 33
	typeNAPTR = 35
	typeKX    = 36
	typeDNAME = 39
	typeNSEC  = 47
	typeSVCB  = 64
	typeHTTPS = 65
	typeSPF   = 99
)

// names checks the names of a message from its front to its end, compression pointers followed.
//
// A name may point back to anything that stays as it is. What does not are the header and the TTLs, which are the
// client's and the clock's, and the OPT record, which is taken out: a name that runs over them would be another one in each
// response.
type names struct {
	msg []byte
	ttl []uint16 // the offsets of the TTL fields so far, ascending; not those of records that are taken out
	opt int      // the offset of the OPT record, 0 if there was none so far
}

// check returns the offset behind the name at off, or -1 when it is none: RFC 1035, section 4.1.4.
func (c *names) check(off int) int {
	msg := c.msg
	end, start, length := -1, off, 1
	limit := len(msg) // what is pointed to ends before the name that points to it begins
	for p := off; p < limit; {
		b := int(msg[p])
		switch {
		case b == 0:
			if start != off && !c.fixed(start, p) {
				return -1
			}
			if end < 0 {
				end = p + 1
			}
			return end
		case b < 64:
			if length += b + 1; length > MaxName {
				return -1
			}
			p += b + 1
		case b >= 0xc0 && p+1 < limit:
			if start != off && !c.fixed(start, p+1) {
				return -1
			}
			if end < 0 {
				end = p + 2
			}
			target := int(binary.BigEndian.Uint16(msg[p:]) & 0x3fff)
			if target < HeaderLen || target >= start {
				return -1 // "a prior occurrence": there is no loop
			}
			p, start, limit = target, target, start
		default:
			return -1
		}
	}
	return -1
}

// fixed reports whether no octet from start to end is part of a TTL, and they do not run into the OPT record. (What begins
// within that is not to be moved up, see moveUp.)
func (c *names) fixed(start, end int) bool {
	if start < c.opt && end >= c.opt {
		return false
	}
	if len(c.ttl) == 0 || end < int(c.ttl[0]) {
		return true
	}
	i, _ := slices.BinarySearchFunc(c.ttl, start, func(ttl uint16, start int) int { return int(ttl) + 3 - start })
	return i == len(c.ttl) || end < int(c.ttl[i])
}

// sound reports whether the RDATA msg[data:end] is what typ has, as far as it is looked into. Addresses have another form
// in classes other than IN.
func (c *names) sound(typ, class uint16, data, end int) bool {
	off, count := data, 0
	switch typ {
	case TypeA:
		return end-data == 4 || class != ClassIN
	case TypeAAAA:
		return end-data == 16 || class != ClassIN
	case typeTXT, typeSPF, typeHINFO:
		for off < end {
			off += 1 + int(c.msg[off])
		}
		return off == end
	case typeNS, typeMD, typeMF, typeCNAME, typeMB, typeMG, typeMR, typePTR, typeDNAME:
		count = 1
	case typeMINFO, typeRP:
		count = 2
	case TypeSOA:
		return c.run(off, 2, end) == end-20
	case typeMX, typeAFSDB, typeRT, typeKX:
		off, count = off+2, 1
	case typePX:
		off, count = off+2, 2
	case typeSRV:
		off, count = off+6, 1
	case typeNAPTR:
		off, count = off+4, 1
		for range 3 { // three character strings
			if off >= end {
				return false
			}
			off += 1 + int(c.msg[off])
		}
	case typeSIG, TypeRRSIG:
		return c.run(off+18, 1, end) >= 0
	case typeNXT, typeNSEC:
		return c.run(off, 1, end) >= 0
	case typeSVCB, typeHTTPS:
		return c.run(off+2, 1, end) >= 0
	default:
		return true
	}
	return c.run(off, count, end) == end
}

// run returns the offset behind count names from off on, or -1 when they do not end by end.
func (c *names) run(off, count, end int) int {
	for range count {
		if off < 0 || off >= end {
			return -1
		}
		off = c.check(off)
	}
	if off > end {
		return -1
	}
	return off
}
