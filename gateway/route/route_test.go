package route

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// name returns s in wire form; its letter case stays.
func name(s string) []byte {
	var b []byte
	if s != "" {
		for label := range strings.SplitSeq(s, ".") {
			b = append(append(b, byte(len(label))), label...)
		}
	}
	return append(b, 0)
}

// rules is a table as a file would have it.
var rules = []Rule{
	{Group: 1, Below: []string{"lab.corp.internal"}},
	{Group: 2, Below: []string{"corp.internal", "10.in-addr.arpa"}, Exact: []string{"corp.example"}},
	{Group: 3, Regexps: []string{`^ads?[0-9]*\.`, `^secret$`}},
	{Group: 4, Below: []string{"Example.", "test"}},
	{Group: 5, Exact: []string{""}, Regexps: []string{`\\000|\\\.`}},
	{Group: 0, Below: []string{"org"}},
	{Group: 6, Exact: []string{"www.test", "x.invalid"}},
	{Group: 7, Below: []string{"x.invalid"}},
}

func TestMatch(t *testing.T) {
	table, err := New(rules)
	if err != nil {
		t.Fatal(err)
	}
	if got := table.Groups(); got != 8 {
		t.Errorf("got %d groups, want 8", got)
	}
	longest := strings.Repeat("a.", 126) + "a" // 127 labels
	tests := []struct {
		name string
		want int // -1: no rule
	}{
		{"corp.internal", 2}, {"CORP.Internal", 2}, {"a.b.corp.internal", 2}, {"notcorp.internal", -1}, {"internal", -1},
		{"lab.corp.internal", 1}, {"x.lab.corp.internal", 1}, {"xlab.corp.internal", 2},
		{"corp.example", 2}, {"a.corp.example", 4}, {"example", 4}, {"b.EXAMPLE", 4},
		{"1.0.0.10.in-addr.arpa", 2}, {"10.in-addr.arpa", 2}, {"1.0.0.110.in-addr.arpa", -1},
		{"ads.test", 3}, {"AD7.nowhere", 3}, {"ad.corp.internal", 2}, {"secret", 3}, {"top.secret", -1},
		{"", 5}, {"a.org", 0}, {"com", -1}, {"www.test", 4}, {"x.invalid", 6}, {"y.x.invalid", 7},
		{longest, -1}, {longest[4:] + ".org", 0},
	}
	for _, tt := range tests {
		got, ok := table.Match(name(tt.name))
		if !ok {
			got = -1
		}
		if got != tt.want {
			t.Errorf("%q: got group %d, want %d", tt.name, got, tt.want)
		}
	}
	// Octets that are no letters.
	for _, tt := range []struct {
		wire string
		want int
	}{
		{"\x01\x00\x03com\x00", 5}, {"\x03a.b\x03com\x00", 5}, {"\x0dcorp.internal\x00", 5}, {"\x04corp\x08intern\xc1l\x00", -1},
		{"\x05secre\x00", -1}, {"\x04c\x4fRp\x08iNternal\x00", 2},
	} {
		got, ok := table.Match([]byte(tt.wire))
		if !ok {
			got = -1
		}
		if got != tt.want {
			t.Errorf("%q: got group %d, want %d", tt.wire, got, tt.want)
		}
	}
}

// TestNoName gives Match what is no name.
func TestNoName(t *testing.T) {
	table, err := New([]Rule{{Group: 1, Below: []string{""}}})
	if err != nil {
		t.Fatal(err)
	}
	long := name(strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 62))
	for _, b := range [][]byte{nil, {}, {1}, {1, 'a'}, {2, 'a', 0}, {0, 0}, {64}, {0xc0, 0x0c}, append([]byte{64}, make([]byte, 65)...),
		long, bytes.Repeat([]byte{1, 'a'}, 200), make([]byte, 1000)} {
		if _, ok := table.Match(b); ok {
			t.Errorf("%q matches", b)
		}
	}
	if g, ok := table.Match(long[1:]); ok {
		t.Errorf("got %d for a name without its first octet", g)
	}
	fits := name(strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 61))
	if g, ok := table.Match(fits); !ok || g != 1 || len(fits) != maxName {
		t.Errorf("got %d, %v for the longest name of %d octets, want 1", g, ok, len(fits))
	}
}

func TestEmpty(t *testing.T) {
	empty, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range []*Table{nil, {}, empty} {
		if g, ok := table.Match(name("example")); ok || g != 0 || table.Groups() != 0 {
			t.Errorf("got %d, %v of %d groups, want nothing", g, ok, table.Groups())
		}
	}
}

func TestNewMistakes(t *testing.T) {
	for _, r := range []Rule{
		{}, {Group: -1, Below: []string{"a"}}, {Below: []string{"a..b"}}, {Exact: []string{".."}}, {Regexps: []string{"("}},
		{Below: []string{strings.Repeat("a", 64)}}, {Exact: []string{strings.Repeat("abcdefg.", 32)}}, {Below: []string{".a"}},
	} {
		if table, err := New([]Rule{{Group: 1, Below: []string{"ok"}}, r}); err == nil {
			t.Errorf("%+v: got %+v, want a mistake", r, table)
		}
	}
}

// TestAllocs holds the table to its budget: nothing, with regular expressions or without.
func TestAllocs(t *testing.T) {
	table, err := New(slices.DeleteFunc(slices.Clone(rules), func(r Rule) bool { return len(r.Regexps) > 0 }))
	if err != nil {
		t.Fatal(err)
	}
	mixed, err := New(rules)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		table *Table
		name  string
	}{{table, "a.b.corp.internal"}, {table, "www.example.com"}, {table, "corp.example"}, {table, ""}, {mixed, "a.b.corp.internal"},
		{mixed, "www.example.com"}, {mixed, "ads7.example.com"}} {
		if raceEnabled && tt.table == mixed {
			continue // the race detector makes pools forget
		}
		q := name(tt.name)
		if n := testing.AllocsPerRun(100, func() { tt.table.Match(q) }); n != 0 {
			t.Errorf("%q: got %v allocations, want 0", tt.name, n)
		}
	}
}

// naive finds the first rule that matches in the order of the rules, by comparing labels.
func naive(rules []Rule, wire []byte) (int, bool) {
	labels, ok := labelsOf(wire)
	if !ok {
		return 0, false
	}
	for _, r := range rules {
		for _, s := range r.Below {
			want, _ := labelsOf(name(strings.TrimSuffix(s, ".")))
			if len(labels) >= len(want) && equal(labels[len(labels)-len(want):], want) {
				return r.Group, true
			}
		}
		for _, s := range r.Exact {
			if want, _ := labelsOf(name(strings.TrimSuffix(s, "."))); equal(labels, want) {
				return r.Group, true
			}
		}
		for _, s := range r.Regexps {
			var text []string
			for _, l := range labels {
				var b strings.Builder
				for i := range len(l) {
					switch c := lower(l[i]); {
					case c == '.' || c == '\\':
						b.WriteString(`\` + string(rune(c)))
					case c < '!' || c > '~':
						fmt.Fprintf(&b, `\%03d`, c)
					default:
						b.WriteByte(c)
					}
				}
				text = append(text, b.String())
			}
			if regexp.MustCompile(s).MatchString(strings.Join(text, ".")) {
				return r.Group, true
			}
		}
	}
	return 0, false
}

func labelsOf(wire []byte) (labels []string, ok bool) {
	if len(wire) > maxName {
		return nil, false
	}
	for len(wire) > 0 {
		n := int(wire[0])
		switch {
		case n == 0:
			return labels, len(wire) == 1
		case n > 63 || n >= len(wire):
			return nil, false
		}
		labels, wire = append(labels, string(wire[1:1+n])), wire[1+n:]
	}
	return nil, false
}

func equal(a, b []string) bool {
	fold := func(s string) string {
		out := []byte(s)
		for i := range out {
			out[i] = lower(out[i])
		}
		return string(out)
	}
	return slices.EqualFunc(a, b, func(x, y string) bool { return fold(x) == fold(y) })
}

// FuzzMatch holds Match against naive. spec is a rule in each line: a group's letter, what the name means (b, e or r), and
// the name.
func FuzzMatch(f *testing.F) {
	f.Add("Abcorp.internal\nBelab.corp.internal\nCb.", name("x.lab.CORP.internal"))
	f.Add("Ar^ads\nBbtest\nCr\\.test$\nDbads.test", name("ads.test"))
	f.Add("Ab\nBea", name(""))
	f.Add("Beb\nAbb\nCbab", name("a.b"))
	f.Add("Ar\\\\000", []byte("\x01\x00\x00"))
	f.Add("Abx", []byte("\xc0\x0c"))
	f.Fuzz(func(t *testing.T, spec string, wire []byte) {
		if len(spec) > 500 {
			return
		}
		var rules []Rule
		for line := range strings.SplitSeq(spec, "\n") {
			if len(line) < 2 || line[0] < 'A' || line[0] > 'Z' {
				continue
			}
			r := Rule{Group: int(line[0] - 'A')}
			switch names := []string{line[2:]}; line[1] {
			case 'b':
				r.Below = names
			case 'e':
				r.Exact = names
			default:
				r.Regexps = names
			}
			rules = append(rules, r)
		}
		table, err := New(rules)
		if err != nil {
			return
		}
		before := bytes.Clone(wire)
		got, ok := table.Match(wire)
		if want, wantOK := naive(rules, wire); got != want || ok != wantOK {
			t.Errorf("%q: got %d, %v, want %d, %v", wire, got, ok, want, wantOK)
		}
		if !bytes.Equal(wire, before) {
			t.Error("the name was changed")
		}
	})
}

// BenchmarkMatch compares the table with a walk over its rules; the names are those of a large file.
func BenchmarkMatch(b *testing.B) {
	var many []Rule
	for i := range 1000 {
		many = append(many, Rule{Group: i, Below: []string{fmt.Sprintf("n%d.corp.internal", i)}})
	}
	table, err := New(many)
	if err != nil {
		b.Fatal(err)
	}
	for _, bb := range []struct{ name, ask string }{
		{"hit", "a.b.n999.corp.internal"}, {"miss", "www.example.com"}, {"deep miss", strings.Repeat("a.", 126) + "a"},
	} {
		q := name(bb.ask)
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				table.Match(q)
			}
		})
	}
	b.Run("walk", func(b *testing.B) {
		q := name("a.b.n999.corp.internal")
		for b.Loop() {
			naive(many, q)
		}
	})
}
