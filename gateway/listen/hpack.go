package listen

import (
	"encoding/binary"
	"slices"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// HPACK, RFC 7541, the half that decodes. golang.org/x/net/http2/hpack makes a string of every name and value; here they
// stay octets of the block, of a scratch buffer or of a table, so that a request costs no allocation. That package
// lends us the constants of the RFC's appendices, and is what the fuzz test compares with. What we send is encoded
// without a dynamic table; see [doh.appendHeader].

// fieldKind is what a field's name means to us.
type fieldKind uint8

const (
	fieldOther fieldKind = iota
	fieldMethod
	fieldScheme
	fieldAuthority
	fieldPath
	fieldAccept
	fieldContentType
	fieldContentEncoding
	fieldContentLength
	fieldExpect
	fieldHost
	fieldTE
	fieldForbidden // names a property of an HTTP/1.1 connection (RFC 9113, section 8.2.2), or cannot be a name
)

// kindOf classifies a name.
func kindOf(name []byte) fieldKind {
	switch string(name) {
	case ":method":
		return fieldMethod
	case ":scheme":
		return fieldScheme
	case ":authority":
		return fieldAuthority
	case ":path":
		return fieldPath
	case "accept":
		return fieldAccept
	case "content-type":
		return fieldContentType
	case "content-encoding":
		return fieldContentEncoding
	case "content-length":
		return fieldContentLength
	case "expect":
		return fieldExpect
	case "host":
		return fieldHost
	case "te":
		return fieldTE
	case "", "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return fieldForbidden
	}
	for _, c := range name {
		if !tokenChar[c] { // a pseudo-header field that is none of a request's too
			return fieldForbidden
		}
	}
	return fieldOther
}

// tokenChar holds the characters of names: those of RFC 9110, section 5.6.2 without capitals (RFC 9113, section 8.2.1).
var tokenChar = func() (set [256]bool) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz") {
		set[c] = true
	}
	return set
}()

// soundValue reports whether v may be a value: no control characters but tabs, and no white space at its ends (RFC
// 9110, section 5.5 and RFC 9113, section 8.2.1).
func soundValue(v []byte) bool {
	if len(v) == 0 {
		return true
	}
	if first, last := v[0], v[len(v)-1]; first == ' ' || first == '\t' || last == ' ' || last == '\t' {
		return false
	}
	for ; len(v) >= 8; v = v[8:] {
		const ones = 0x0101010101010101
		x := binary.LittleEndian.Uint64(v)
		del := x ^ 0x7f*ones
		if ((x-0x20*ones)&^x|(del-ones)&^del)&(0x80*ones) != 0 && !soundOctets(v[:8]) {
			return false
		}
	}
	return soundOctets(v)
}

func soundOctets(v []byte) bool {
	for _, c := range v {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// field is one field of a header. Its name and value are valid until the next one is read.
type field struct {
	name, value []byte
	kind        fieldKind
	unsound     bool // the value is none
}

// size is what the field counts for: RFC 7541, section 4.1 and RFC 9113, section 6.5.2.
func (f *field) size() int { return len(f.name) + len(f.value) + fieldOverhead }

const (
	fieldOverhead = 32
	// maxTable is the size of the dynamic table, the protocol's default.
	maxTable = 4096
)

// fieldTable is a dynamic table, RFC 7541, section 2.3.2. The zero value with size for its max is an empty one; it takes
// memory as it is filled.
type fieldTable struct {
	octets  []byte       // names and values, oldest first; those of entries that are gone before them
	entries []tableEntry // oldest first
	gone    int          // entries[:gone] are no more
	size    int          // of the entries that are there, RFC 7541, section 4.1
	max     int
}

type tableEntry struct {
	at, name, value uint16 // offset and lengths in octets
	kind            fieldKind
	unsound         bool
}

// staticTable is RFC 7541, appendix A; index 0 is none.
var staticTable = func() (table [62]field) {
	d := hpack.NewDecoder(maxTable, nil)
	for i := 1; i < len(table); i++ {
		f, err := d.DecodeFull([]byte{0x80 | byte(i)})
		if err != nil {
			panic(err)
		}
		table[i] = field{name: []byte(f[0].Name), value: []byte(f[0].Value)}
		table[i].kind = kindOf(table[i].name)
	}
	return table
}()

// at returns the field of an index. It aliases the table.
func (t *fieldTable) at(i uint64) (f field, ok bool) {
	if i < uint64(len(staticTable)) {
		return staticTable[i], i > 0
	}
	if i -= uint64(len(staticTable)); i >= uint64(len(t.entries)-t.gone) {
		return field{}, false
	}
	e := &t.entries[len(t.entries)-1-int(i)]
	value := e.at + e.name
	return field{name: t.octets[e.at:value], value: t.octets[value : value+e.value], kind: e.kind, unsound: e.unsound}, true
}

// add puts f in, which must not alias the table. A field that is too large empties the table (RFC 7541, section 4.4).
func (t *fieldTable) add(f *field) {
	t.evict(t.max - f.size())
	if f.size() > t.max {
		return
	}
	n := len(f.name) + len(f.value)
	if len(t.octets)+n > cap(t.octets) || len(t.entries) == cap(t.entries) {
		t.makeRoom(n)
	}
	t.entries = append(t.entries, tableEntry{
		at: uint16(len(t.octets)), name: uint16(len(f.name)), value: uint16(len(f.value)), kind: f.kind, unsound: f.unsound,
	})
	t.octets = append(append(t.octets, f.name...), f.value...)
	t.size += f.size()
}

// makeRoom moves what is there to the front, where it is no more than half, and takes more memory otherwise: at most
// twice what a full table needs.
func (t *fieldTable) makeRoom(n int) {
	live := t.entries[t.gone:]
	begin := len(t.octets)
	if len(live) > 0 {
		begin = int(live[0].at)
	}
	octets, entries := t.octets[:0], t.entries[:0]
	if need := len(t.octets) - begin + n; 2*need > cap(octets) {
		octets = make([]byte, 0, 2*need)
	}
	if 2*(len(live)+1) > cap(entries) {
		entries = make([]tableEntry, 0, 2*(len(live)+1))
	}
	t.octets = append(octets, t.octets[begin:]...)
	t.entries = append(entries, live...)
	for i := range t.entries {
		t.entries[i].at -= uint16(begin)
	}
	t.gone = 0
}

// evict removes the oldest entries until at most size is left.
func (t *fieldTable) evict(size int) {
	for t.size > max(size, 0) {
		e := &t.entries[t.gone]
		t.size -= int(e.name) + int(e.value) + fieldOverhead
		t.gone++
	}
	if t.size == 0 {
		t.octets, t.entries, t.gone = t.octets[:0], t.entries[:0], 0
	}
}

// fieldReader reads a header block.
type fieldReader struct {
	rest  []byte
	text  []byte // what had to be copied or decoded; whoever reads may cut it when its fields are done with
	began bool   // a field was read
}

// hpackError is a block that cannot be decoded: the tables of both sides differ from now on.
type hpackError string

// Error implements error.
func (e hpackError) Error() string { return string(e) }

const (
	errHPACKCut     hpackError = "header block is cut off"
	errHPACKInteger hpackError = "integer in a header block is too large"
	errHPACKIndex   hpackError = "header block refers to a field that there is not"
	errHPACKHuffman hpackError = "wrong Huffman code in a header block"
	errHPACKUpdate  hpackError = "wrong dynamic table size update"
)

// next reads one field. ok is false at the block's end.
func (r *fieldReader) next(t *fieldTable) (f field, ok bool, err error) {
	for len(r.rest) > 0 {
		switch b := r.rest[0]; {
		case b >= 0x80: // RFC 7541, section 6.1
			i, err := r.integer(7)
			if err != nil {
				return f, false, err
			}
			r.began = true
			if f, ok = t.at(i); !ok {
				return f, false, errHPACKIndex
			}
			return f, true, nil
		case b >= 0x40: // section 6.2.1
			if f, err = r.literal(t, 6, true); err == nil {
				t.add(&f)
			}
			return f, err == nil, err
		case b < 0x20: // sections 6.2.2 and 6.2.3
			f, err = r.literal(t, 4, false)
			return f, err == nil, err
		}
		// Section 6.3. It comes before all fields, section 4.2.
		size, err := r.integer(5)
		if err != nil {
			return f, false, err
		}
		if r.began || size > maxTable {
			return f, false, errHPACKUpdate
		}
		t.max = int(size)
		t.evict(t.max)
	}
	return f, false, nil
}

// literal reads a field that is there in letters, at least its value. keep tells that it goes into the table.
func (r *fieldReader) literal(t *fieldTable, prefix uint, keep bool) (f field, err error) {
	i, err := r.integer(prefix)
	if err != nil {
		return f, err
	}
	r.began = true
	if i > 0 {
		var ok bool
		if f, ok = t.at(i); !ok {
			return f, errHPACKIndex
		}
		if keep && i >= uint64(len(staticTable)) {
			f.name = r.copy(f.name)
		}
	} else {
		if f.name, err = r.string(); err != nil {
			return f, err
		}
		f.kind = kindOf(f.name)
	}
	if f.value, err = r.string(); err != nil {
		return f, err
	}
	f.unsound = !soundValue(f.value)
	return f, nil
}

// copy returns b in r.text.
func (r *fieldReader) copy(b []byte) []byte {
	at := len(r.text)
	r.text = append(r.text, b...)
	return r.text[at:]
}

// integer reads an integer whose first octet has prefix bits for it, RFC 7541, section 5.1.
func (r *fieldReader) integer(prefix uint) (uint64, error) {
	if len(r.rest) == 0 {
		return 0, errHPACKCut
	}
	mask := byte(1<<prefix - 1)
	v := uint64(r.rest[0] & mask)
	if v < uint64(mask) {
		r.rest = r.rest[1:]
		return v, nil
	}
	for i, c := range r.rest[1:] {
		v += uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			r.rest = r.rest[i+2:]
			return v, nil
		}
		if i == 8 {
			return 0, errHPACKInteger
		}
	}
	return 0, errHPACKCut
}

// string reads a string, RFC 7541, section 5.2.
func (r *fieldReader) string() ([]byte, error) {
	coded := len(r.rest) > 0 && r.rest[0] >= 0x80
	n, err := r.integer(7)
	if err != nil {
		return nil, err
	}
	if n > uint64(len(r.rest)) {
		return nil, errHPACKCut
	}
	s := r.rest[:n]
	r.rest = r.rest[n:]
	if !coded {
		return s, nil
	}
	at := len(r.text)
	text, ok := huffman.decode(r.text, s)
	if !ok {
		return nil, errHPACKHuffman
	}
	r.text = text
	return text[at:], nil
}

// huffmanCode is RFC 7541, appendix B: a canonical code, in which longer codes are larger numbers and those of one length
// follow each other.
type huffmanCode struct {
	short   [256]uint16 // by the next 8 bits: length<<8 | symbol, or 0 where the code is longer
	limit   [longestCode + 1]uint64
	base    [longestCode + 1]uint32 // the first code of a length, its bits at the top
	first   [longestCode + 1]int    // and its place in symbols
	symbols [256]byte               // by their codes
}

const shortestCode, longestCode = 5, 30 // in bits

var huffman = func() *huffmanCode {
	h := new(huffmanCode)
	n := 0
	for length := shortestCode; length <= longestCode; length++ {
		h.first[length] = n
		h.limit[length] = h.limit[length-1]
		for c := range 256 {
			// Eight times a character is as many octets as its code has bits.
			eight := strings.Repeat(string([]byte{byte(c)}), 8)
			if hpack.HuffmanEncodeLength(eight) != uint64(length) {
				continue
			}
			code := binary.BigEndian.Uint32(hpack.AppendHuffmanString(nil, eight)) >> (32 - length) << (32 - length)
			if n == h.first[length] {
				h.base[length] = code
			}
			h.symbols[n] = byte(c)
			n++
			h.limit[length] = uint64(code) + 1<<(32-length)
			if length <= 8 {
				for i := range 1 << (8 - length) {
					h.short[int(code>>24)+i] = uint16(length)<<8 | uint16(c)
				}
			}
		}
	}
	return h
}()

// decode appends what src stands for to dst. ok is false for what is no code, and for padding that is longer than seven
// bits or not of ones.
func (h *huffmanCode) decode(dst, src []byte) (decoded []byte, ok bool) {
	at := len(dst)
	dst = slices.Grow(dst, len(src)*8/shortestCode)
	out := dst[:cap(dst)]
	var acc uint64 // the next bits, at the top
	var bits uint  // how many
	for {
		if len(src) >= 8 {
			acc |= binary.BigEndian.Uint64(src) >> bits
			n := (63 - bits) >> 3
			src = src[n:]
			bits += 8 * n
		} else {
			for bits <= 56 && len(src) > 0 {
				acc |= uint64(src[0]) << (56 - bits)
				src = src[1:]
				bits += 8
			}
		}
		for {
			e := h.short[acc>>56]
			length, c := uint(e>>8), byte(e)
			if e == 0 {
				if length, c = h.long(uint32(acc >> 32)); length > longestCode && bits >= longestCode {
					return dst, false
				}
			}
			if length > bits {
				break
			}
			out[at] = c
			at++
			acc <<= length & 63
			bits -= length
			if bits < longestCode && len(src) > 0 {
				break
			}
		}
		if len(src) == 0 {
			return out[:at], bits < 8 && acc == ^(^uint64(0)>>bits)
		}
	}
}

// long finds a code of more than eight bits at the top of v. The length of one that there is not is more than
// longestCode.
func (h *huffmanCode) long(v uint32) (length uint, c byte) {
	for length = 9; length <= longestCode; length++ {
		if uint64(v) < h.limit[length] {
			return length, h.symbols[h.first[length]+int((v-h.base[length])>>(32-length))]
		}
	}
	return length, 0
}
