package wire

import (
	"encoding/binary"
	"slices"
)

// Denial reports whether a is the NXDOMAIN answer to a question, and may be made the answer to the questions for all types of
// that name and of all names below it: the Append methods of [Shape] do that. The caller vouches for the names, and for the
// same DO and CD bits.
//
// NXDOMAIN is about a name with all its types (RFC 2308, section 5), and says that there is nothing below it (RFC 8020,
// section 2). What proves that a name does not exist proves it for what is below as well. An NSEC record that covers a name
// covers all below it, which come next to it in canonical order (RFC 4034, section 6.1): the record's next name is not among
// them, or the name would exist as an empty non-terminal. Of NSEC3 records, the proof has the same closest encloser, the same
// next closer name and the same wildcard (RFC 5155, section 8.4).
//
// It has to be certain what the octets mean, since the question's name becomes longer and all behind it moves: an answer
// with a record of another type than denials of existence have, or with compression pointers to anything but labels, is the
// answer to its own question only. So is one behind a CNAME record: that NXDOMAIN is another name's (RFC 6604, section 2.1).
func (a *Answer) Denial() bool { return a.movable }

// Types of records in a denial of existence, besides those that are known for other reasons.
const (
	typeDS    = 43
	typeNSEC3 = 50
)

// maxMovable is the most that a compression pointer may hold so that the longest name does not make it overflow.
const maxMovable = 0x3fff - MaxName

// movable reports whether the records of msg, which has been surveyed, stay the same when another name that ends in the one
// of its question, and another type, take the place of those: whether each compression pointer points to a label of the
// question's name, which such a name has too, or to one of a name before it, and none is hidden from us.
func movable(msg []byte, qend int) bool {
	// The labels so far, in ascending order. A denial has about 30; one that has more is none that we have to know.
	var labels [128]uint16
	n := 0
	label := func(off int) bool {
		if n == len(labels) {
			return false
		}
		labels[n] = uint16(off)
		n++
		return true
	}
	pointer := func(off int) bool {
		target := binary.BigEndian.Uint16(msg[off:]) & 0x3fff
		_, ok := slices.BinarySearch(labels[:n], target)
		return ok && target <= maxMovable
	}
	_, ok := walkName(msg, HeaderLen, label, pointer)
	return ok && walkNames(msg, qend, label, pointer)
}

// move adds shift to every compression pointer of msg behind its question: all that they point to has moved by as much.
func move(msg []byte, qend, shift int) {
	walkNames(msg, qend, func(int) bool { return true }, func(off int) bool {
		p := msg[off : off+2]
		binary.BigEndian.PutUint16(p, binary.BigEndian.Uint16(p)+uint16(shift))
		return true
	})
}

// walkNames calls label and pointer with the offset of every label and every compression pointer of the records from off to
// the end of msg, which has been surveyed. It reports false when one of them did, or when there is a record of a type that
// may have names in places unknown here.
func walkNames(msg []byte, off int, label, pointer func(off int) bool) bool {
	for off < len(msg) {
		r, next := readRecord(msg, off)
		count, data := 0, r.data
		switch r.typ {
		case TypeA, TypeAAAA, typeDS, typeNSEC3:
		case typeNS, typeNSEC:
			count = 1
		case TypeSOA:
			count = 2
		case TypeRRSIG:
			count, data = 1, data+18
		default:
			return false
		}
		if _, ok := walkName(msg, off, label, pointer); !ok || r.class != ClassIN {
			return false
		}
		for range count {
			var ok bool
			if data, ok = walkName(msg, data, label, pointer); !ok {
				return false
			}
		}
		off = next
	}
	return true
}

// walkName is walkNames for the name at off. It returns the offset behind it.
func walkName(msg []byte, off int, label, pointer func(off int) bool) (int, bool) {
	for {
		if msg[off] >= 0xc0 {
			return off + 2, pointer(off)
		}
		if !label(off) {
			return 0, false
		}
		if msg[off] == 0 {
			return off + 1, true
		}
		off += int(msg[off]) + 1
	}
}
