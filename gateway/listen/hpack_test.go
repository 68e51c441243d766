package listen

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2/hpack"
)

// decodeAll reads a block as [][2]string.
func decodeAll(t *fieldTable, block []byte) (fields [][2]string, err error) {
	r := fieldReader{rest: block}
	for {
		f, ok, err := r.next(t)
		if !ok {
			return fields, err
		}
		if f.kind != kindOf(f.name) || f.unsound == soundValue(f.value) {
			panic("a field's kind or soundness is not that of its name and value")
		}
		fields = append(fields, [2]string{string(f.name), string(f.value)})
	}
}

// TestHPACKExamples are those of RFC 7541, appendix C.4 and what its tables are then.
func TestHPACKExamples(t *testing.T) {
	table := fieldTable{max: maxTable}
	for i, tt := range []struct {
		block string
		want  [][2]string
		size  int
	}{
		{"828684418cf1e3c2e5f23a6ba0ab90f4ff",
			[][2]string{{":method", "GET"}, {":scheme", "http"}, {":path", "/"}, {":authority", "www.example.com"}}, 57},
		{"828684be5886a8eb10649cbf",
			[][2]string{{":method", "GET"}, {":scheme", "http"}, {":path", "/"}, {":authority", "www.example.com"},
				{"cache-control", "no-cache"}}, 110},
		{"828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
			[][2]string{{":method", "GET"}, {":scheme", "https"}, {":path", "/index.html"}, {":authority", "www.example.com"},
				{"custom-key", "custom-value"}}, 164},
	} {
		block, err := hex.DecodeString(tt.block)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeAll(&table, block)
		if d := cmp.Diff(got, tt.want); d != "" || err != nil || table.size != tt.size {
			t.Errorf("block %d: %v, size %d, want %d, %s", i, err, table.size, tt.size, d)
		}
	}
}

func TestHPACKErrors(t *testing.T) {
	for _, tt := range []struct {
		name, block string
		want        hpackError
	}{
		{"index 0", "80", errHPACKIndex},
		{"index that there is not", "be", errHPACKIndex},
		{"name that there is not", "7f00", errHPACKIndex},
		{"cut index", "ff", errHPACKCut},
		{"cut name", "4003", errHPACKCut},
		{"no value", "400161", errHPACKCut},
		{"integer without an end", "ffffffffffffffffffffffff", errHPACKInteger},
		{"EOS", "400184ffffffff", errHPACKCut},
		{"EOS in Huffman code", "0084ffffffff00", errHPACKHuffman},
		{"a whole octet of padding", "00821fff00", errHPACKHuffman},
		{"padding of zeros", "00811800", errHPACKHuffman},
		{"table larger than allowed", "3fe21f", errHPACKUpdate},
		{"size update behind a field", "8220", errHPACKUpdate},
	} {
		block, err := hex.DecodeString(tt.block)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeAll(&fieldTable{max: maxTable}, block); err != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

// TestHPACKTable sends fields with ever different values through the table: what is in it is what x/net has, its memory
// has a bound and nothing is allocated once that is reached.
func TestHPACKTable(t *testing.T) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	table := fieldTable{max: maxTable}
	r := fieldReader{}
	value := bytes.Repeat([]byte("x"), 500)
	block := func(i int) []byte {
		buf.Reset()
		value[0] = byte('a' + i%26)
		_ = enc.WriteField(hpack.HeaderField{Name: "some-name", Value: string(value[:1+i*37%len(value)])})
		_ = enc.WriteField(hpack.HeaderField{Name: "accept", Value: "*/*"})
		return buf.Bytes()
	}
	i := 0
	step := func() {
		r = fieldReader{rest: block(i), text: r.text[:0]}
		i++
		for range 2 {
			if f, ok, err := r.next(&table); !ok || err != nil || len(f.value) == 0 {
				t.Fatalf("block %d: %v, %v", i, ok, err)
			}
		}
	}
	for range 2000 {
		step()
		if cap(table.octets) > 2*maxTable || cap(table.entries) > 2*maxTable/fieldOverhead || table.size > maxTable {
			t.Fatalf("block %d: %d octets and %d entries of room for %d", i, cap(table.octets), cap(table.entries), table.size)
		}
	}
	blocks := make([][]byte, 300)
	for j := range blocks {
		blocks[j] = slices.Clone(block(i + j))
	}
	j := 0
	if n := testing.AllocsPerRun(len(blocks)-1, func() {
		r = fieldReader{rest: blocks[j], text: r.text[:0]}
		j++
		for ok := true; ok; {
			_, ok, _ = r.next(&table)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestSoundValue(t *testing.T) {
	for c := range 256 {
		want := c >= ' ' && c != 0x7f || c == '\t'
		for n := range 20 {
			v := []byte(strings.Repeat("a", n) + string([]byte{byte(c)}) + "aaaa")
			if n > 0 && soundValue(v) != want {
				t.Errorf("%q: got %v", v, !want)
			}
		}
	}
	for _, v := range []string{" a", "a ", "\ta", "a\t", " "} {
		if soundValue([]byte(v)) {
			t.Errorf("%q is sound", v)
		}
	}
	if !soundValue(nil) || !soundValue([]byte("a\tb c")) || !soundValue([]byte("\xff\x80 12345678\xff")) {
		t.Error("a sound value is not")
	}
}

// FuzzHPACK decodes blocks on one connection, by x/net and by ours: the same fields, or an error of both. Size updates are
// the difference: x/net takes them behind fields while its table is empty, and no two in a row when it is not.
func FuzzHPACK(f *testing.F) {
	for _, s := range []string{
		"828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf", "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
		"3fe11f82", "20823f01", "1f2f8c", "00841c6490b200", "0085fffffffc7f00", "3f45400161016240016201634001630164be",
	} {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		theirs := hpack.NewDecoder(maxTable, nil)
		ours := fieldTable{max: maxTable}
		for _, block := range [][]byte{first, second} {
			list, wantErr := theirs.DecodeFull(block)
			got, err := decodeAll(&ours, block)
			if updates(block) && (err != nil || wantErr != nil) {
				return
			}
			if (err != nil) != (wantErr != nil) {
				t.Fatalf("got %v, x/net has %v", err, wantErr)
			}
			if err != nil {
				return
			}
			var want [][2]string
			for _, f := range list {
				want = append(want, [2]string{f.Name, f.Value})
			}
			if d := cmp.Diff(got, want); d != "" {
				t.Fatal(d)
			}
			if ours.size > ours.max || cap(ours.octets) > 2*maxTable {
				t.Fatalf("a table of %d, %d octets, at most %d allowed", ours.size, cap(ours.octets), ours.max)
			}
		}
	})
}

// updates reports whether there is a size update in block that is not its first instruction.
func updates(block []byte) bool {
	r := fieldReader{rest: block}
	for i := 0; len(r.rest) > 0; i++ {
		var err error
		switch b := r.rest[0]; {
		case b >= 0x80:
			_, err = r.integer(7)
		case b >= 0x40 || b < 0x20:
			prefix := uint(4)
			if b >= 0x40 {
				prefix = 6
			}
			var name uint64
			if name, err = r.integer(prefix); err == nil && name == 0 {
				_, err = r.string()
			}
			if err == nil {
				_, err = r.string()
			}
		default:
			if i > 0 {
				return true
			}
			_, err = r.integer(5)
		}
		if err != nil {
			return false
		}
	}
	return false
}

// FuzzHuffman decodes and encodes.
func FuzzHuffman(f *testing.F) {
	f.Add([]byte("abc"), true)
	f.Add([]byte{0xff, 0xff, 0xff, 0xfc}, false)
	f.Fuzz(func(t *testing.T, b []byte, encode bool) {
		if encode {
			got, ok := huffman.decode(nil, hpack.AppendHuffmanString(nil, string(b)))
			if !ok || !bytes.Equal(got, b) {
				t.Fatalf("%q came back as %q, %v", b, got, ok)
			}
			return
		}
		want, err := hpack.HuffmanDecodeToString(b)
		got, ok := huffman.decode(nil, b)
		if ok != (err == nil) || ok && string(got) != want {
			t.Fatalf("got %q, %v, x/net has %q, %v", got, ok, want, err)
		}
	})
}

func BenchmarkHuffman(b *testing.B) {
	coded := hpack.AppendHuffmanString(nil, "/dns-query?dns=AAABAAABAAAAAAAAA3d3dwdleGFtcGxlA2NvbQAAAQAB")
	var dst []byte
	for b.Loop() {
		dst, _ = huffman.decode(dst[:0], coded)
	}
}
