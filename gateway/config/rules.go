package config

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
)

// ruleItem is a Rule while it is being read.
type ruleItem struct {
	Rule
	use     value // zero if the key is not there
	private bool  // its group is
}

var ruleKeys = newTable("rules[]",
	entry[ruleItem]{"if", func(v value, r *ruleItem) {
		if !conditionKeys.decode(v, r) {
			return
		}
		if _, ok := v.get("name"); !ok {
			v.errorf("the key \"name\" is missing, such as name: corp.internal")
		}
	}},
	entry[ruleItem]{"use", func(v value, r *ruleItem) {
		if s, ok := v.text("the name of a group of upstreams"); ok {
			r.Use, r.use = s, v
		}
	}},
)

var conditionKeys = newTable("rules[].if",
	entry[ruleItem]{"name", func(v value, r *ruleItem) {
		for _, item := range v.list("name, such as corp.internal") {
			s, ok := item.text("a name such as corp.internal")
			if !ok {
				continue
			}
			n := Name{Place: item.place(), Text: s}
			if err := n.parse(s); err != nil {
				item.errorf("%v", err)
				continue
			}
			r.Names = append(r.Names, n)
		}
	}},
)

// readRules reads `rules`.
func readRules(v value, d *draft) {
	if v.n.kind != listKind {
		if !v.bad() {
			v.errorf("want a list of rules such as [{if: {name: corp.internal}, use: corp}], got %s", v.n)
		}
		return
	}
	for _, item := range v.items() {
		r := ruleItem{Rule: Rule{Place: item.place()}}
		if !ruleKeys.decode(item, &r) {
			continue
		}
		for _, key := range []struct{ name, such string }{{"if", "if: {name: corp.internal}"}, {"use", "use: default"}} {
			if item.n.field(key.name) == nil {
				item.errorf("the key %q is missing, such as %s", key.name, key.such)
			}
		}
		d.rules = append(d.rules, r)
	}
}

// parse reads one name of a rule.
func (n *Name) parse(s string) error {
	if s == "" {
		return errors.New("the name is empty; the root, and so every name, is \".\"")
	}
	if strings.HasPrefix(s, "file:") {
		return errors.New("a list of names in a file is not known here; write the names, or rules in a file of their own (`include`)")
	}
	if expr, ok := strings.CutPrefix(s, "/"); ok {
		return n.parseRegexp(s, expr)
	}
	exact, isExact := strings.CutPrefix(s, "=")
	if zones, is, err := reverseZones(strings.TrimPrefix(s, "=")); is {
		switch {
		case err != nil:
			return err
		case isExact:
			return fmt.Errorf("%s: \"=\" stands before one name, and a network is many", quote(s))
		}
		n.Match, n.Values = Below, zones
		return nil
	}
	n.Match = Below
	name := s
	if isExact {
		n.Match, name = Exact, exact
	}
	name, err := parseName(name)
	n.Values = []string{name}
	return err
}

// parseRegexp reads an expression, which stands between slashes as s.
func (n *Name) parseRegexp(s, expr string) error {
	expr, closed := strings.CutSuffix(expr, "/")
	switch {
	case !closed:
		return fmt.Errorf("%s: an expression stands between two slashes, as in /^ads?[0-9]*\\./", quote(s))
	case expr == "":
		return errors.New("the expression is empty; the name \".\" is for every name")
	}
	_, err := regexp.Compile(expr)
	if err != nil {
		return fmt.Errorf("%s: %s", quote(s), strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
	if plain := noLetters.ReplaceAllString(expr, ""); plain != strings.ToLower(plain) && !foldsCase.MatchString(expr) {
		return fmt.Errorf("%s: names are compared in lower case, so a capital letter never matches; write it small", quote(s))
	}
	n.Match, n.Values = Regexp, []string{expr}
	return nil
}

var (
	noLetters = regexp.MustCompile(`\\(?:[pPx]\{[^}]*\}|[pP].|.)`) // \S and \p{Greek} are capital letters that match none
	foldsCase = regexp.MustCompile(`\(\?[a-zA-Z]*i`)               // (?i): letter case does not matter
)

// maxNameLen is the longest name in presentation form without the dot at its end: 255 octets in wire form, RFC 1035,
// section 2.3.4.
const maxNameLen = 253

// parseName reads a name of the DNS. Names of hosts are not all there is: labels such as _tcp, 0/25 (RFC 2317) are names too.
func parseName(s string) (string, error) {
	if s == "." {
		return "", nil
	}
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	if strings.ContainsFunc(name, func(r rune) bool { return r >= 0x80 }) {
		profile := idna.New(idna.MapForLookup(), idna.Transitional(false), idna.StrictDomainName(false))
		ascii, err := profile.ToASCII(name)
		if err != nil {
			return "", fmt.Errorf("%s is not ASCII, and no internationalized name either", quote(s))
		}
		return "", fmt.Errorf("%s is not what stands in questions; write %s", quote(s), quote(ascii))
	}
	if rest, ok := strings.CutPrefix(name, "*."); ok {
		return "", fmt.Errorf("%s: a name is itself and everything below it; write %s", quote(s), quote(rest))
	}
	if rest, ok := strings.CutPrefix(name, "."); ok && rest != "" && rest[0] != '.' {
		return "", fmt.Errorf("%s: a name is itself and everything below it; write %s", quote(s), quote(rest))
	}
	if scheme, _, ok := strings.Cut(name, "://"); ok {
		return "", fmt.Errorf("%s is a URL; write the name in it, without %s://", quote(s), scheme)
	}
	if len(name) > maxNameLen {
		return "", fmt.Errorf("%s is longer than a name can be", quote(s))
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return "", fmt.Errorf("%s is not a name: a label has 1 to 63 letters", quote(s))
		}
		if i := strings.IndexFunc(label, func(r rune) bool { return r != '/' && notLDH(r) }); i >= 0 {
			return "", fmt.Errorf("%s is not a name: it holds %q; an expression between slashes can say anything", quote(s), label[i:i+1])
		}
	}
	return name, nil
}

// reverseZones returns the zones in which the addresses of s, a network or an address, have their names: RFC 1035,
// section 3.5 and RFC 3596, section 2.5. is tells whether s is meant for one at all.
func reverseZones(s string) (zones []string, is bool, err error) {
	host, _, slash := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err != nil {
		return nil, false, nil
	}
	p := netip.PrefixFrom(addr, addr.BitLen())
	if slash {
		p, err = netip.ParsePrefix(s)
	}
	switch {
	case err != nil || host != addr.String() && strings.HasPrefix(host, "["):
		return nil, true, fmt.Errorf("%s is not a network such as 10.0.0.0/8 or fd00::/8", quote(s))
	case addr.Zone() != "":
		return nil, true, fmt.Errorf("%s: the name of an address knows no interface; leave %q out", quote(s), "%"+addr.Zone())
	case addr.Is4In6():
		return nil, true, fmt.Errorf("%s is IPv4 in IPv6 form; write it as IPv4", quote(s))
	case p != p.Masked():
		return nil, true, fmt.Errorf("%s has bits set behind its /%d; did you mean %q?", quote(s), p.Bits(), p.Masked())
	}
	unit, base, root := 8, 10, "in-addr.arpa" // a label is an octet
	if addr.Is6() {
		unit, base, root = 4, 16, "ip6.arpa" // a label is half an octet
	}
	// A label is cut where the prefix ends inside of it: then there is a zone for each value that it may have.
	whole, rest := p.Bits()/unit, p.Bits()%unit
	raw := p.Addr().AsSlice()
	label := func(i int) int {
		if unit == 8 {
			return int(raw[i])
		}
		return int(raw[i/2]>>(4*(1-i%2))) & 0xf
	}
	suffix := root
	for i := range whole {
		suffix = strconv.FormatInt(int64(label(i)), base) + "." + suffix
	}
	if rest == 0 {
		return []string{suffix}, true, nil
	}
	for i := range 1 << (unit - rest) {
		zones = append(zones, strconv.FormatInt(int64(label(whole)+i), base)+"."+suffix)
	}
	return zones, true, nil
}

// claim is a name of a rule in an index.
type claim struct {
	name *Name
	rule int // its index
	re   *regexp.Regexp
}

// index finds the names that cover another one. It holds the first of those that are equal.
type index struct {
	below, exact map[string]claim
	regexps      []claim
}

func newIndex() *index { return &index{below: make(map[string]claim), exact: make(map[string]claim)} }

func (x *index) add(n *Name, rule int) {
	c := claim{name: n, rule: rule}
	if n.Match == Regexp {
		c.re = regexp.MustCompile(n.Values[0])
		x.regexps = append(x.regexps, c)
		return
	}
	for _, v := range n.Values {
		if _, ok := x.of(n.Match)[v]; !ok {
			x.of(n.Match)[v] = c
		}
	}
}

func (x *index) of(m Match) map[string]claim {
	if m == Exact {
		return x.exact
	}
	return x.below
}

// covering returns a name that matches whatever v, which is compared as m says, matches.
func (x *index) covering(v string, m Match) (claim, bool) {
	if m == Regexp {
		for _, c := range x.regexps {
			if c.name.Values[0] == v {
				return c, true
			}
		}
		c, ok := x.below[""]
		return c, ok
	}
	if m == Exact {
		if c, ok := x.exact[v]; ok {
			return c, true
		}
		for _, c := range x.regexps {
			if c.re.MatchString(v) {
				return c, true
			}
		}
	}
	for rest := v; ; {
		if c, ok := x.below[rest]; ok {
			return c, true
		}
		if rest == "" {
			return claim{}, false
		}
		_, rest, _ = strings.Cut(rest, ".")
	}
}

// show says what the value v of n stands for, in messages: the name as written, or the zone of a network.
func (n *Name) show(v string) string {
	switch {
	case n.Match == Regexp || len(n.Values) == 1:
		return strings.TrimPrefix(n.Text, "=")
	case v == "":
		return "."
	}
	return v
}

// covers says what n covers, in messages.
func (n *Name) covers() string {
	switch {
	case n.Match == Regexp || n.Match == Exact:
		return n.show(n.Values[0])
	case n.Values[0] == "":
		return "every name"
	}
	return n.Text + " and everything below it"
}

// checkRules finds groups that nobody asks, rules that nothing reaches, and names of private groups that others could get.
func (d *draft) checkRules() {
	group := func(name string) int {
		return slices.IndexFunc(d.groups, func(g groupItem) bool { return g.Name == name })
	}
	used := map[string]bool{DefaultGroup: true}
	for i := range d.rules {
		r := &d.rules[i]
		if r.use.n == nil {
			continue
		}
		used[r.Use] = true
		if g := group(r.Use); g >= 0 {
			r.private = d.groups[g].Private
		} else if !slices.Contains(d.declared, r.Use) {
			known := []string{DefaultGroup}
			for _, g := range d.groups {
				known = append(known, g.Name)
			}
			r.use.errorf("there is no group %s in upstreams%s", quote(r.Use), didYouMean(r.Use, known))
		}
	}
	if !d.l.mistakeIn("rules") {
		for _, g := range d.groups {
			if !used[g.Name] {
				d.errorAt(g.Place, "the group %q never gets a question; give it one with rules: [{if: {name: corp.internal}, use: %s}]",
					g.Name, g.Name)
			}
		}
	}
	d.checkReach(d.checkPrivate())
}

// checkPrivate finds names that only a private group may get, in the rules of groups that are not private. It returns them.
func (d *draft) checkPrivate() (leaks map[*Name]bool) {
	leaks = make(map[*Name]bool)
	closed, last := newIndex(), -1
	for i := range d.rules {
		if r := &d.rules[i]; r.private {
			last = i
			for j := range r.Names {
				closed.add(&r.Names[j], i)
			}
		}
	}
	if last < 0 {
		return leaks
	}
	for i := range d.rules {
		r := &d.rules[i]
		if r.private || r.use.n == nil {
			continue
		}
		for j := range r.Names {
			n := &r.Names[j]
			if msg := d.leak(n, i, r.Use, closed, last); msg != "" {
				leaks[n] = true
				d.errorAt(n.Place, "%s", msg)
			}
		}
	}
	d.checkLookups(closed)
	return leaks
}

// leak says why n, a name of rule i that goes to group use, could take a name from a private group, or returns "". closed
// has the private groups' names, the last of them in the rule last.
func (d *draft) leak(n *Name, i int, use string, closed *index, last int) string {
	if n.Match == Regexp {
		// Nobody can tell what an expression matches: the private rules have to come first.
		re := regexp.MustCompile(n.Values[0])
		for k := i + 1; k <= last; k++ {
			for _, p := range d.rules[k].Names {
				if !d.rules[k].private || p.Match == Exact && !re.MatchString(p.Values[0]) {
					continue
				}
				return fmt.Sprintf("the expression may match names of %s, which is private to group %s (%s); put this rule behind "+
					"that one", p.show(p.Values[0]), d.rules[k].Use, lineOf(p.Place, n.Place))
			}
		}
	}
	for _, v := range n.Values {
		if c, ok := closed.covering(v, n.Match); ok {
			return fmt.Sprintf("%s is private to group %s (%s): %s cannot go to %s", c.name.covers(), d.rules[c.rule].Use,
				lineOf(c.name.Place, n.Place), n.show(v), use)
		}
	}
	for _, c := range closed.regexps {
		if n.Match == Below && c.rule > i {
			return fmt.Sprintf("%s may match names of %s, and is private to group %s (%s); put this rule behind that one", c.name.Text,
				n.show(n.Values[0]), d.rules[c.rule].Use, lineOf(c.name.Place, n.Place))
		}
	}
	return ""
}

// checkLookups finds servers whose own name is a private group's, and would have to be looked up elsewhere. Who names
// bootstrap servers has said who may know.
func (d *draft) checkLookups(closed *index) {
	if d.bootstrap.n != nil {
		return
	}
	for _, g := range d.groups {
		for _, s := range slices.Concat(g.Tiers...) {
			if _, ok := s.address(); ok || s.Scheme == SDNS {
				continue
			}
			if c, ok := closed.covering(s.Host, Exact); ok {
				d.errorAt(s.Place, "%s is private to group %s (%s), and would be looked up elsewhere; write the server's address and "+
					"the name behind it, as in tls://10.0.0.53#%s, or say with bootstrap who finds it", s.Host,
					d.rules[c.rule].Use, lineOf(c.name.Place, s.Place), s.Host)
			}
		}
	}
}

// checkReach finds names that an earlier one covers, so that they never match. Those of leaks were reported already.
func (d *draft) checkReach(leaks map[*Name]bool) {
	seen := newIndex()
	for i := range d.rules {
		for j := range d.rules[i].Names {
			n := &d.rules[i].Names[j]
			var first *Name
			covered := true
			for _, v := range n.Values {
				c, ok := seen.covering(v, n.Match)
				if covered = covered && ok; ok && first == nil {
					first = c.name
				}
			}
			if covered && !leaks[n] {
				d.errorAt(n.Place, "never reached: %s has %s already", lineOf(first.Place, n.Place), first.covers())
			}
			seen.add(n, i)
		}
	}
}
