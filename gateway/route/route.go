// Package route says which upstream group a question goes to, by the question's name.
//
// It owns matching: an ordered list of rules, of which the first that matches decides. Where the rules come from, what a
// group is, and which one gets the rest is its caller's business.
//
// What surprises a newcomer: the order of the rules counts, but Match does not walk them. It looks up the name and each of
// its parents in one map, and takes the earliest rule of those that it finds; only regular expressions are tried in turn.
package route

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
)

// maxName is the longest name in wire form, RFC 1035, section 2.3.4; maxLabels is how many labels it may have, the root not
// counted: each takes two octets at least.
const (
	maxName   = 255
	maxLabels = 127
)

// Rule sends names to a group. Names are in presentation form without escapes, with or without the dot at the end, and "" is
// the root. Letter case does not matter.
type Rule struct {
	Group   int      // what Match returns; not negative
	Below   []string // these names and everything below them
	Exact   []string // these names alone
	Regexps []string // Go regular expressions; see Match for what they are held against
}

// Table finds the first rule that matches a name. It is never changed, and safe for concurrent use. A nil Table, like one
// without rules, matches nothing.
type Table struct {
	names   map[string]match // by lower-case name in wire form, without the root's octet
	labels  int              // the most labels of a name in names
	regexps []expression     // in the order of the rules
	groups  []int            // by rule
}

// match has the first rule for a name alone, and for it and everything below it; none stands for no rule.
type match struct{ exact, below int }

type expression struct {
	rule int
	re   *regexp.Regexp
}

// none is behind every rule, so that the earlier of two is the smaller one.
const none = int(^uint(0) >> 1)

// New builds a Table of rules, the first one first.
func New(rules []Rule) (*Table, error) {
	t := &Table{names: make(map[string]match)}
	for i, r := range rules {
		if r.Group < 0 {
			return nil, fmt.Errorf("rule %d: a group with the number %d", i, r.Group)
		}
		if len(r.Below)+len(r.Exact)+len(r.Regexps) == 0 {
			return nil, fmt.Errorf("rule %d: matches nothing", i)
		}
		t.groups = append(t.groups, r.Group)
		for _, s := range r.Below {
			if err := t.add(s, match{exact: none, below: i}); err != nil {
				return nil, fmt.Errorf("rule %d: %w", i, err)
			}
		}
		for _, s := range r.Exact {
			if err := t.add(s, match{exact: i, below: none}); err != nil {
				return nil, fmt.Errorf("rule %d: %w", i, err)
			}
		}
		for _, s := range r.Regexps {
			re, err := regexp.Compile(s)
			if err != nil {
				return nil, fmt.Errorf("rule %d: %w", i, err)
			}
			t.regexps = append(t.regexps, expression{rule: i, re: re})
		}
	}
	return t, nil
}

// Groups returns one more than the highest group that Match returns: how many groups its caller has to have.
func (t *Table) Groups() int {
	n := 0
	if t != nil {
		for _, g := range t.groups {
			n = max(n, g+1)
		}
	}
	return n
}

func (t *Table) add(name string, m match) error {
	wire, labels, err := pack(name)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	if have, ok := t.names[wire]; ok {
		m = match{exact: min(m.exact, have.exact), below: min(m.below, have.below)}
	}
	t.names[wire] = m
	t.labels = max(t.labels, labels)
	return nil
}

// pack returns name in lower case and wire form without the root's octet.
func pack(name string) (wire string, labels int, err error) {
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return "", 0, nil
	}
	var b strings.Builder
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return "", 0, errors.New("a label has 1 to 63 octets")
		}
		b.WriteByte(byte(len(label)))
		for i := range len(label) {
			b.WriteByte(lower(label[i]))
		}
		labels++
	}
	if b.Len()+1 > maxName {
		return "", 0, fmt.Errorf("a name has at most %d octets", maxName)
	}
	return b.String(), labels, nil
}

// lower folds the ASCII letters and nothing else, RFC 4343, section 3.
func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + ('a' - 'A')
	}
	return c
}

// Match returns the group of the first rule that matches name, which is in wire form, uncompressed, in any letter case. ok is
// false if none does. It does not keep name, and allocates nothing.
//
// Those are held against the name in presentation form, in lower case and without the dot at its end; the root is "". In it
// "\." and "\\" are a dot and a backslash inside of a label, and an octet that is no visible ASCII character is a backslash
// and three decimal digits (RFC 4343, section 2.1).
func (t *Table) Match(name []byte) (group int, ok bool) {
	if t == nil || len(t.groups) == 0 {
		return 0, false
	}
	var (
		buf    [maxName]byte
		starts [maxLabels + 1]uint8 // where each label begins in buf; the root's is the last
	)
	n, labels, ok := split(name, &buf, &starts)
	if !ok {
		return 0, false
	}
	rule := none
	if labels <= t.labels {
		if m, ok := t.names[string(buf[:n])]; ok {
			rule = min(m.exact, m.below)
		}
	}
	// Parents that have more labels than any name of the table are not looked up: a question of 127 labels costs no more than
	// the longest name of the rules.
	for i := max(labels-t.labels, 1); i <= labels; i++ {
		if m, ok := t.names[string(buf[starts[i]:n])]; ok {
			rule = min(rule, m.below)
		}
	}
	if len(t.regexps) > 0 && t.regexps[0].rule < rule {
		rule = t.matchRegexps(buf[:n], rule)
	}
	if rule == none {
		return 0, false
	}
	return t.groups[rule], true
}

// split copies name to buf in lower case and without the root's octet, and finds its labels. It returns the length of the
// copy. ok is false for what is no whole name in wire form.
func split(name []byte, buf *[maxName]byte, starts *[maxLabels + 1]uint8) (n, labels int, ok bool) {
	if len(name) > maxName {
		return 0, 0, false
	}
	for {
		if n >= len(name) || labels > maxLabels {
			return 0, 0, false
		}
		starts[labels] = uint8(n)
		length := int(name[n])
		if length == 0 {
			return n, labels, n+1 == len(name)
		}
		if length > 63 || n+1+length >= len(name) {
			return 0, 0, false
		}
		buf[n] = byte(length)
		for i := n + 1; i <= n+length; i++ {
			buf[i] = lower(name[i])
		}
		n += 1 + length
		labels++
	}
}

// texts holds room for names in presentation form: an expression that is held against one takes it to the heap. The longest
// has four octets for each of the name.
var texts = sync.Pool{New: func() any { return new([4 * maxName]byte) }}

// matchRegexps returns the first rule before limit that has an expression which matches the lower-case name in wire form,
// without the root's octet, or limit.
func (t *Table) matchRegexps(name []byte, limit int) int {
	text := texts.Get().(*[4 * maxName]byte)
	defer texts.Put(text)
	form := presentation(text[:0], name)
	for _, e := range t.regexps {
		if e.rule >= limit {
			break
		}
		if e.re.Match(form) {
			return e.rule
		}
	}
	return limit
}

// presentation appends name, in wire form without the root's octet, in the form that Match promises.
func presentation(dst, name []byte) []byte {
	for len(name) > 0 {
		n := int(name[0])
		for _, c := range name[1 : 1+n] {
			switch {
			case c == '.' || c == '\\':
				dst = append(dst, '\\', c)
			case c <= ' ' || c > '~':
				dst = append(dst, '\\', '0'+c/100, '0'+c/10%10, '0'+c%10)
			default:
				dst = append(dst, c)
			}
		}
		if name = name[1+n:]; len(name) > 0 {
			dst = append(dst, '.')
		}
	}
	return dst
}
