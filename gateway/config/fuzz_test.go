package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"
)

// mapDisk is a disk that holds files and nothing else.
func mapDisk(files map[string][]byte) disk {
	clean := func(name string) string { return path.Clean(filepath.ToSlash(name)) }
	return disk{
		read: func(name string, _ bool) ([]byte, error) {
			if data, ok := files[clean(name)]; ok {
				return data, nil
			}
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		},
		glob: func(pattern string) (names []string, err error) {
			for name := range files {
				ok, err := path.Match(clean(pattern), name)
				if err != nil {
					return nil, err
				}
				if ok {
					names = append(names, name)
				}
			}
			return names, nil
		},
		stat: func(name string) (fs.FileInfo, error) {
			return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
		},
		real:     clean,
		writable: func(string) error { return nil },
	}
}

// FuzzLoad proves that no text makes Load panic, that every mistake has a place inside of the file and can be shown, that
// the mistakes are sorted, and that what was loaded keeps what the rest of the program relies on.
func FuzzLoad(f *testing.F) {
	names, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil || len(names) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, name := range names {
		ar, err := txtar.ParseFile(name)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			if file.Name != "want" {
				f.Add(file.Data)
			}
		}
	}
	f.Add(builtin)
	f.Add([]byte(sixLines))
	f.Add([]byte("local:\r\n  chaos:\u2028    {id.server: \"\\x00\"}\u0085cache: 1\r"))
	files := map[string][]byte{
		"conf.d/a.yaml": []byte("listen: [tcp://:9053]\n"), "a.yaml": []byte("include: b.yaml"), "b.yaml": []byte("include: a.yaml"),
		"bad.yaml": []byte("a: [\n"),
	}
	for name, data := range pki() {
		files[name] = data
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := load("-", testOptions(string(data)), mapDisk(files))
		if err == nil {
			checkConfig(t, cfg)
			checkErrors(t, data, cfg.Warnings)
			return
		}
		var errs *Errors
		if !errors.As(err, &errs) || len(*errs) == 0 || cfg != nil {
			t.Fatalf("got %v, %v, want *Errors", cfg, err)
		}
		checkErrors(t, data, *errs)
	})
}

// checkErrors holds the places of errs against the file that they are in.
func checkErrors(t *testing.T, data []byte, errs []*Error) {
	src := newSource(Stdin, "", data)
	for i, e := range errs {
		if e.Msg == "" || !utf8.ValidString(e.Error()) || strings.ContainsAny(e.Error(), "\x00\x1b\r") {
			t.Errorf("%q cannot be shown", e.Error())
		}
		if i > 0 && errs[i-1].File == e.File && errs[i-1].Line > e.Line {
			t.Errorf("%v stands behind %v", e, errs[i-1])
		}
		if e.File != Stdin || e.Line == 0 && strings.HasPrefix(e.Msg, "the file is empty") {
			continue
		}
		if e.Line < 1 || e.Line > len(src.lines) || e.Text != src.lines[e.Line-1] && e.Text != "" {
			t.Errorf("%v: no such line", e)
		} else if e.Col < 1 || e.Col > utf8.RuneCountInString(src.lines[e.Line-1])+1 {
			t.Errorf("%v: no such column", e)
		}
	}
}

// checkConfig holds cfg against what its fields promise.
func checkConfig(t *testing.T, cfg *Config) {
	for _, l := range cfg.Listen {
		https := l.Scheme == HTTPS
		if !l.Addr.IsValid() || l.Name == "" || https != (len(l.HTTP) > 0) || https != strings.HasPrefix(l.Path, "/") {
			t.Errorf("listener %+v", l)
		}
		if (https || l.Scheme == TLS || l.Scheme == QUIC) && len(cfg.TLS) == 0 {
			t.Errorf("listener %+v without a certificate", l)
		}
	}
	i := slices.IndexFunc(cfg.Upstreams, func(g Group) bool { return g.Name == DefaultGroup })
	if len(cfg.Listen) == 0 || i < 0 {
		t.Fatalf("got %d listeners, groups %+v", len(cfg.Listen), cfg.Upstreams)
	}
	for _, g := range cfg.Upstreams {
		if len(g.Tiers) == 0 || g.Deadline < minDeadline || g.Deadline > maxDeadline || g.NextOn == (NextOn{}) || g.Pick == "" {
			t.Errorf("group %+v", g)
		}
		if h, b := g.Hedge, g.Breaker; h.After < 0 || h.After >= g.Deadline || h.Never && h.After != 0 || b.OpenAfter < 1 ||
			b.OpenAfter > 100 || b.Probe < minProbe || b.MaxProbe < b.Probe || b.MaxProbe > maxProbe {
			t.Errorf("group %+v", g)
		}
		for _, tier := range g.Tiers {
			if len(tier) == 0 {
				t.Errorf("group %+v has an empty tier", g)
			}
			for _, s := range tier {
				_, known := s.address()
				if s.Scheme == Discover && !known {
					t.Errorf("server %+v", s)
				}
				if !known && len(cfg.Bootstrap) == 0 || s.Scheme != SDNS && (s.Host == "" || s.Port == 0 || s.VerifyName == "") {
					t.Errorf("server %+v", s)
				}
			}
		}
	}
	for _, s := range cfg.Bootstrap {
		if _, ok := s.address(); !ok || s.Scheme == Discover {
			t.Errorf("bootstrap server %+v has no address", s)
		}
	}
	checkRules(t, cfg)
	l := cfg.Limits
	if l.PerClient < 0 || l.PrefixV4 < 1 || l.PrefixV4 > 32 || l.PrefixV6 < 1 || l.PrefixV6 > 128 || l.Inflight < 1 ||
		l.TCPPerClient < 1 || l.TCPPipeline < 1 || l.TCPIdle <= 0 || l.UDPSize < 512 || l.UDPSize > 4096 {
		t.Errorf("limits %+v", l)
	}
	if c := cfg.Cache; c.Size < 0 || c.MinTTL < 0 || c.MinTTL > c.NegativeMax || c.NegativeMax > c.MaxTTL || c.MaxTTL == 0 {
		t.Errorf("cache %+v", c)
	}
	s, p := cfg.Cache.Stale, cfg.Cache.Prefetch
	if s.For == 0 && s != (Stale{}) || s.For < 0 || s.For > maxStaleFor || s.After < 0 || s.After > maxStaleAfter ||
		s.For != 0 && (s.TTL < time.Second || s.TTL > maxStaleTTL || s.TTL%time.Second != 0) {
		t.Errorf("stale %+v", s)
	}
	if p.Hits == 0 && p != (Prefetch{}) || p.Hits < 0 || p.Hits > 255 || p.Hits > 0 && (p.Remaining < 0.01 || p.Remaining > 0.5) {
		t.Errorf("prefetch %+v", p)
	}
	if s := cfg.Cache.Save; s.Every < time.Second || s.Every > 24*time.Hour {
		t.Errorf("save %+v", s)
	}
	if len(cfg.Access.Allow) == 0 {
		t.Error("nobody may ask")
	}
}

// matches reports whether n matches name, in the slow and obvious way.
func matches(n Name, name string) bool {
	return slices.ContainsFunc(n.Values, func(v string) bool {
		switch n.Match {
		case Below:
			return v == "" || name == v || strings.HasSuffix(name, "."+v)
		case Exact:
			return name == v
		}
		return regexp.MustCompile(v).MatchString(name)
	})
}

// TestRulesAtRandom loads small sets of rules over few names and asks for all of these. What is accepted is reached, and
// leaks no private name; what is called unreachable is.
func TestRulesAtRandom(t *testing.T) {
	const upstreams = "upstreams:\n  default: [tls://9.9.9.9]\n  corp: {try: tls://10.0.0.53, private: true}\n" +
		"  lab: {try: tls://10.0.1.53, private: true}\n  other: [tls://1.1.1.1]\n"
	universe := []string{""}
	for i := 0; len(universe) < 31; i++ {
		for _, label := range []string{"a", "b"} {
			universe = append(universe, strings.TrimSuffix(label+"."+universe[i], "."))
		}
	}
	patterns := []string{"/^a/", "/b/", "/^b$/"}
	rng := rand.New(rand.NewPCG(1, 2))
	accepted, rejected := 0, 0
	for range 1000 {
		var b strings.Builder
		b.WriteString(upstreams + "rules:\n")
		all := map[string]Name{} // by path
		for i := range 1 + rng.IntN(4) {
			group := []string{"default", "corp", "lab", "other"}[rng.IntN(4)]
			var list []string
			for j := range 1 + rng.IntN(2) {
				name := cmp.Or(universe[rng.IntN(15)], ".")
				switch rng.IntN(6) {
				case 0:
					name = patterns[rng.IntN(len(patterns))]
				case 1, 2:
					name = "=" + name
				}
				n := Name{}
				if err := n.parse(name); err != nil {
					t.Fatal(err)
				}
				all[fmt.Sprintf("rules[%d].if.name[%d]", i, j)] = n
				list = append(list, name)
			}
			fmt.Fprintf(&b, "  - {if: {name: ['%s']}, use: %s}\n", strings.Join(list, "', '"), group)
		}
		b.WriteString("  - {if: {name: =x.invalid}, use: corp}\n  - {if: {name: =y.invalid}, use: lab}\n  - {if: {name: =z.invalid}, use: other}\n")
		cfg, err := load("-", testOptions(b.String()), mapDisk(nil))
		if err == nil {
			accepted++
			checkRules(t, cfg)
			checkReached(t, cfg, universe)
		} else {
			rejected++
			var errs *Errors
			if !errors.As(err, &errs) {
				t.Fatal(err)
			}
			for _, e := range *errs {
				if n, ok := all[e.Path]; ok && strings.HasPrefix(e.Msg, "never reached") {
					checkNeverReached(t, e, n, all, universe)
				}
			}
		}
		if t.Failed() {
			t.Fatal(b.String())
		}
	}
	if accepted < 100 || rejected < 100 {
		t.Errorf("got %d sets accepted and %d rejected: this test proves little", accepted, rejected)
	}
}

// checkReached finds the names of rules that no name of universe gets to.
func checkReached(t *testing.T, cfg *Config, universe []string) {
	reached := map[*Name]bool{}
	private := map[string]bool{}
	for _, g := range cfg.Upstreams {
		private[g.Name] = g.Private
	}
	for _, name := range universe {
		var first *Name
		use, closed := "", false
		for i := range cfg.Rules {
			for j := range cfg.Rules[i].Names {
				n := &cfg.Rules[i].Names[j]
				if !matches(*n, name) {
					continue
				}
				if first == nil {
					first, use = n, cfg.Rules[i].Use
				}
				closed = closed || private[cfg.Rules[i].Use]
			}
		}
		if closed && !private[use] {
			t.Errorf("the private name %q goes to group %s", name, use)
		}
		reached[first] = true
	}
	for _, r := range cfg.Rules {
		for i, n := range r.Names {
			// Whether an expression is reached behind others cannot be known.
			if !reached[&r.Names[i]] && n.Match != Regexp && !strings.HasSuffix(n.Values[0], "invalid") &&
				!slices.ContainsFunc(cfg.Rules, func(r Rule) bool { return slices.ContainsFunc(r.Names, isRegexp) }) {
				t.Errorf("%s is accepted and never reached", n.Text)
			}
		}
	}
}

func isRegexp(n Name) bool { return n.Match == Regexp }

// checkNeverReached finds a name that reaches n, which e says that none does.
func checkNeverReached(t *testing.T, e *Error, n Name, all map[string]Name, universe []string) {
	for _, name := range universe {
		earlier := false
		for path, other := range all {
			earlier = earlier || path < e.Path && matches(other, name) // fewer than ten rules: the paths sort
		}
		if matches(n, name) && !earlier {
			t.Errorf("%q reaches: %v", name, e)
		}
	}
}

// checkRules holds the rules against what Config promises of them. It asks for each name, and for a name below
// each.
func checkRules(t *testing.T, cfg *Config) {
	group := func(name string) *Group {
		for i := range cfg.Upstreams {
			if cfg.Upstreams[i].Name == name {
				return &cfg.Upstreams[i]
			}
		}
		return nil
	}
	var asked []string
	used := map[string]bool{DefaultGroup: true}
	for _, r := range cfg.Rules {
		used[r.Use] = true
		if group(r.Use) == nil || len(r.Names) == 0 {
			t.Fatalf("rule %+v", r)
		}
		for _, n := range r.Names {
			if len(n.Values) == 0 || n.Match == Regexp && len(n.Values) > 1 {
				t.Errorf("name %+v", n)
			}
			for _, v := range n.Values {
				if n.Match != Regexp {
					asked = append(asked, v, "x."+v)
				}
				if v != strings.ToLower(v) && n.Match != Regexp || strings.HasSuffix(v, ".") && n.Match != Regexp {
					t.Errorf("name %+v", n)
				}
			}
		}
	}
	for _, g := range cfg.Upstreams {
		if !used[g.Name] {
			t.Errorf("group %s gets no question", g.Name)
		}
	}
	// What a private rule names goes to a private group, whatever stands before it.
	for _, name := range asked {
		first, private := "", false
		for _, r := range cfg.Rules {
			if slices.ContainsFunc(r.Names, func(n Name) bool { return matches(n, name) }) {
				if first == "" {
					first = r.Use
				}
				private = private || group(r.Use).Private
			}
		}
		if private && !group(first).Private {
			t.Errorf("the private name %q goes to group %s", name, first)
		}
	}
}

func FuzzURL(f *testing.F) {
	for _, s := range []string{"tls://9.9.9.9#dns.quad9.net", "https://[::1]:8443/dns-query", "dns://*:53",
		"sdns://AAAAAAAAAAAABzkuOS45Ljk", "::1:53", "tls://[", "tls://:", "#", "://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		up := serverItem{}
		if err := up.parse(s); err == nil && up.Scheme != SDNS {
			if up.Host == "" || up.Port == 0 || up.VerifyName == "" || strings.ContainsAny(up.Host, "[]#/@ ") {
				t.Errorf("%q: got %+v", s, up.Server)
			}
		}
		if u, err := splitURL(s, listenSchemes); err == nil {
			if addr, err := u.listenAddr(s); err == nil && (!addr.IsValid() || addr.Addr().Is4In6()) {
				t.Errorf("%q: got %v", s, addr)
			}
		}
	})
}
