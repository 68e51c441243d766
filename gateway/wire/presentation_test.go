package wire

import (
	"bytes"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestParseName(t *testing.T) {
	long := strings.Repeat("a", maxLabel)
	most := strings.Repeat(long+".", 3) + strings.Repeat("a", 61)
	for _, tt := range []struct {
		name, text string
		want       string // "" is an error
		says       string // a part of the error
	}{
		{"a name", "www.Example.com", "\x03www\x07example\x03com\x00", ""},
		{"a dot at the end", "www.example.com.", "\x03www\x07example\x03com\x00", ""},
		{"the root", ".", "\x00", ""},
		{"one label", "localhost", "\x09localhost\x00", ""},
		{"no host's name", "_tcp.0/25.*", "\x04_tcp\x040/25\x01*\x00", ""},
		{"an escaped dot", `a\.b.c`, "\x03a.b\x01c\x00", ""},
		{"an escaped backslash", `a\\.c`, "\x02a\\\x01c\x00", ""},
		{"escaped capital letters", `\A\066`, "\x02ab\x00", ""},
		{"octets in digits", `\000\255.x`, "\x02\x00\xff\x01x\x00", ""},
		{"a dot in digits", `a\046b`, "\x03a.b\x00", ""},
		{"the longest label", long, "\x3f" + long + "\x00", ""},
		{"the longest name", most, strings.Repeat("\x3f"+long, 3) + "\x3d" + strings.Repeat("a", 61) + "\x00", ""},
		{"the longest name with its dot", most + ".", strings.Repeat("\x3f"+long, 3) + "\x3d" + strings.Repeat("a", 61) + "\x00", ""},

		{"nothing", "", "", "empty"},
		{"a dot in front", ".a", "", "label is empty"},
		{"two dots", "a..b", "", "label is empty"},
		{"two dots alone", "..", "", "label is empty"},
		{"two dots at the end", "a..", "", "label is empty"},
		{"a label too long", long + "a.b", "", "63 octets"},
		{"a name too long", most + "a", "", "255 octets"},
		{"a name much too long", strings.Repeat("a.", 5000), "", "255 octets"},
		{"half an escape", `a\`, "", "backslash"},
		{"two digits", `a\12`, "", "backslash"},
		{"two digits and a letter", `a\12b`, "", "backslash"},
		{"too high", `a\256`, "", "backslash"},
		{"an escaped control character", "a\\\n", "", "backslash"},
		{"not ASCII", "b\u00fccher.example", "", "xn--"},
		{"a space", "a b", "", `\032`},
		{"an escape sequence of a terminal", "a\x1b[2J", "", `\027`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseName(tt.text)
			if string(got) != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.says) || strings.ContainsAny(err.Error(), "\x1b\n")) {
				t.Errorf("got %v, want %q in it", err, tt.says)
			}
		})
	}
}

// FuzzParseName proves that whatever is accepted is a name, and that each name is found again when it is written out by
// another hand.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{".", "a", "a.", `\..\\.\000`, "..", `a\25`, strings.Repeat("a", 64), strings.Repeat("a.", 127)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := ParseName(s)
		if err != nil {
			if name != nil {
				t.Errorf("%q: got %q and %v", s, name, err)
			}
			return
		}
		msg := append(make([]byte, HeaderLen), name...)
		c := names{msg: msg}
		if end := c.check(HeaderLen); end != len(msg) {
			t.Fatalf("%q: %q is no name", s, name)
		}
		text, _, err := dns.UnpackDomainName(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseName(text); err != nil || !bytes.Equal(again, name) {
			t.Errorf("%q: got %q, and %q, %v for %q", s, name, again, err, text)
		}
	})
}
