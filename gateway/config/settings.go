package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// draft is a Config while it is being read, with what the checks over several sections need to know.
type draft struct {
	l          *loader
	cfg        *Config
	has        map[string]bool // top-level keys that the file has, sound or not
	listen     []Listener
	groups     []groupItem
	declared   []string // the keys of upstreams, whatever stands there
	fallback   value    // zero if the key is not there
	bootstrap  value    // zero if the key is not there
	rules      []ruleItem
	staleAfter value // zero if the key is not there
	encrypted  bool  // a listener needs a certificate
}

func (d *draft) errorAt(p Place, format string, args ...any) {
	d.l.errs = append(d.l.errs, &Error{Place: p, Msg: fmt.Sprintf(format, args...)})
}

// mistakeIn reports whether a mistake was found in one of the sections: what follows from it need not be said.
func (l *loader) mistakeIn(sections ...string) bool {
	return slices.ContainsFunc(l.errs, func(e *Error) bool {
		return slices.ContainsFunc(sections, func(s string) bool { return strings.HasPrefix(e.Path, s) })
	})
}

// topKeys are the sections of the file.
var topKeys = newTable("",
	entry[draft]{"include", func(value, *draft) {}}, // loader.file has taken it out
	entry[draft]{"listen", readListen},
	entry[draft]{"tls", readTLS},
	entry[draft]{"bootstrap", readBootstrap},
	entry[draft]{"upstreams", readUpstreams},
	entry[draft]{"fallback", func(v value, d *draft) { d.fallback = v }},
	entry[draft]{"rules", readRules},
	entry[draft]{"access", readAccess},
	entry[draft]{"local", func(v value, d *draft) { localKeys.decode(v, &d.cfg.Local) }},
	entry[draft]{"cache", readCache},
	entry[draft]{"limits", func(v value, d *draft) { limitsKeys.decode(v, &d.cfg.Limits) }},
	entry[draft]{"log", readLog},
	entry[draft]{"admin", readAdmin},
)

// private are the networks of RFC 1918 and RFC 4193 and, as their clients are on the same link, RFC 3927 and RFC 4291,
// section 2.5.6.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fe80::/10"),
}

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

var anyone = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// defaults returns the Config of a file that says nothing, but for Listen and Upstreams.
func defaults(source string) *Config {
	return &Config{
		Source: source,
		Access: Access{Allow: slices.Concat(loopback, private), Otherwise: Refuse},
		Cache: Cache{
			Size: 64 << 20, MaxTTL: 24 * time.Hour, NegativeMax: time.Hour,
			// What RFC 8767, section 5 recommends: "a client response timer of 1.8 seconds", "a maximum stale timer of 1 to 3
			// days", and a TTL of 30 seconds.
			Stale:    Stale{After: 1800 * time.Millisecond, For: 24 * time.Hour, TTL: 30 * time.Second},
			Prefetch: Prefetch{Hits: 5, Remaining: 0.1},
			Save:     Save{Every: 5 * time.Minute},
		},
		Limits: Limits{
			PrefixV4: 32,
			PrefixV6: 56, // what one home gets, RFC 6177
			Inflight: 10000,
			// Hundreds of people behind one address are one client prefix, each with a browser and an operating system.
			TCPPerClient: 500,
			TCPPipeline:  100,
			TCPIdle:      10 * time.Second, // RFC 7766, section 6.2.3, asks for "a few seconds"
			UDPSize:      1232,             // avoids fragmentation on IPv6 paths; see https://dnsflagday.net/2020/
		},
		Log:   Log{Level: "info", Output: "stdout"},
		Admin: Admin{Listen: netip.MustParseAddrPort("127.0.0.1:8081")},
	}
}

// config decodes root, fills in the defaults and checks the whole.
func (l *loader) config(source string, root *node) *Config {
	d := &draft{l: l, cfg: defaults(source), has: make(map[string]bool)}
	for _, f := range root.fields {
		d.has[f.name] = true
	}
	topKeys.decode(value{l: l, n: root}, d)
	if !d.has["listen"] {
		d.listen = l.builtin().Listen
	}
	if !d.has["upstreams"] {
		g := l.builtin().Upstreams[0]
		if d.has["fallback"] {
			g.Tiers = g.Tiers[:1]
		}
		d.groups = append(d.groups, groupItem{Group: g})
	}
	d.addFallback()
	d.checkListeners()
	d.checkUpstreams()
	d.checkRules()
	d.checkAdmin()
	d.checkSave()
	d.checkStale()
	if f := root.field("tls"); f != nil && !d.encrypted && !l.mistakeIn("listen") {
		value{l: l, n: f.value, path: "tls", key: f.place}.warnf("has no effect: no listener is tls://, https:// or quic://")
	}
	d.cfg.Listen = d.listen
	for _, g := range d.groups {
		d.cfg.Upstreams = append(d.cfg.Upstreams, g.Group)
	}
	for _, r := range d.rules {
		d.cfg.Rules = append(d.cfg.Rules, r.Rule)
	}
	return d.cfg
}

// builtin returns the embedded default, whose parts stand in for missing ones.
func (l *loader) builtin() *Config {
	cfg, err := load("", l.opts, l.disk)
	if err != nil {
		panic("config: the embedded default is broken: " + err.Error())
	}
	return cfg
}

var accessKeys = newTable("access",
	entry[Access]{"allow", readAllow},
	entry[Access]{"otherwise", func(v value, a *Access) {
		if s, ok := v.oneOf(string(Refuse), string(Drop)); ok {
			a.Otherwise = Otherwise(s)
		}
	}},
)

// readAccess reads `access`: a mapping, or the list of those who are allowed.
func readAccess(v value, d *draft) {
	a := &d.cfg.Access
	a.Set, a.Allow = true, nil
	if v.n.kind != mapKind {
		readAllow(v, a)
		return
	}
	accessKeys.decode(v, a)
	if _, ok := v.get("allow"); !ok {
		v.errorf("the key \"allow\" is missing; say who may ask, such as allow: [loopback, private]")
	}
}

func readAllow(v value, a *Access) {
	seen := make(map[netip.Prefix]bool)
	items := v.list("client, such as private")
	for _, item := range items {
		s, ok := item.text("an address, a network, any, private or loopback")
		if !ok {
			continue
		}
		prefixes, err := clients(s)
		if err != nil {
			item.errorf("%v", err)
			continue
		}
		if !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return !seen[p] }) {
			item.errorf("%s is already in the list", quote(s))
			continue
		}
		if s == "any" && len(items) > 1 {
			item.warnf("any covers everyone: the rest of the list has no effect")
		}
		for _, p := range prefixes {
			if !seen[p] {
				seen[p] = true
				a.Allow = append(a.Allow, p)
			}
		}
	}
}

// clients returns the networks that an item of `allow` stands for.
func clients(s string) ([]netip.Prefix, error) {
	switch s {
	case "any":
		return anyone, nil
	case "private":
		return private, nil
	case "loopback":
		return loopback, nil
	}
	if hint := didYouMean(s, []string{"any", "private", "loopback", "localhost"}); hint != "" {
		if s == "localhost" {
			hint = `; did you mean "loopback"?`
		}
		return nil, fmt.Errorf("%s is nobody that is known%s", quote(s), hint)
	}
	p, err := parsePrefix(s)
	return []netip.Prefix{p}, err
}

var limitsKeys = newTable("limits",
	entry[Limits]{"per_client", func(v value, l *Limits) {
		if r, ok := v.rate(); ok {
			l.PerClient = r
		}
	}},
	entry[Limits]{"prefix", func(v value, l *Limits) { prefixKeys.decode(v, l) }},
	entry[Limits]{"inflight", func(v value, l *Limits) { v.into(&l.Inflight, 1, 1_000_000) }},
	entry[Limits]{"tcp_per_client", func(v value, l *Limits) { v.into(&l.TCPPerClient, 1, 1_000_000) }},
	entry[Limits]{"tcp_pipeline", func(v value, l *Limits) { v.into(&l.TCPPipeline, 1, 65535) }},
	entry[Limits]{"tcp_idle", func(v value, l *Limits) {
		if d, ok := v.duration(100*time.Millisecond, time.Hour); ok {
			l.TCPIdle = d
		}
	}},
	// 512 is what every client takes (RFC 6891, section 6.2.3); above 4096 answers only ever arrive in fragments.
	entry[Limits]{"udp_size", func(v value, l *Limits) { v.into(&l.UDPSize, 512, 4096) }},
)

var prefixKeys = newTable("limits.prefix",
	entry[Limits]{"v4", func(v value, l *Limits) { v.into(&l.PrefixV4, 1, 32) }},
	entry[Limits]{"v6", func(v value, l *Limits) { v.into(&l.PrefixV6, 1, 128) }},
)

// into reads a whole number from least to most into n.
func (v value) into(n *int, least, most int) {
	if got, ok := v.number(least, most); ok {
		*n = got
	}
}

var localKeys = newTable("local",
	entry[Local]{"chaos", func(v value, l *Local) { chaosKeys.decode(v, l) }},
)

var chaosKeys = newTable("local.chaos",
	entry[Local]{"version.bind", readChaos},
	entry[Local]{"version.server", readChaos},
	entry[Local]{"hostname.bind", readChaos},
	entry[Local]{"id.server", readChaos},
)

// readChaos reads the text of one CH TXT name, a character-string of RFC 1035, section 3.3.
func readChaos(v value, l *Local) {
	s, ok := v.text("a text")
	switch {
	case !ok:
	case s == "" || len(s) > 255:
		v.errorf("a text has 1 to 255 octets, this one has %d", len(s))
	default:
		if l.Chaos == nil {
			l.Chaos = make(map[string]string)
		}
		name, _ := strings.CutPrefix(v.path, "local.chaos.")
		l.Chaos[strings.Trim(name, `"`)] = s
	}
}

var levels = []string{"debug", "info", "warn", "error"}

var formats = []string{"text", "json"}

var logKeys = newTable("log",
	entry[Log]{"level", func(v value, l *Log) {
		if s, ok := v.oneOf(levels...); ok {
			l.Level = s
		}
	}},
	entry[Log]{"format", func(v value, l *Log) {
		if s, ok := v.oneOf(formats...); ok {
			l.Format = s
		}
	}},
	entry[Log]{"output", readOutput},
)

// readLog reads `log`: a mapping, or one word that is a format or a level.
func readLog(v value, d *draft) {
	if v.n.kind != scalarKind {
		logKeys.decode(v, &d.cfg.Log)
		return
	}
	switch s, ok := v.oneOf(slices.Concat(formats, levels)...); {
	case !ok:
	case slices.Contains(formats, s):
		d.cfg.Log.Format = s
	default:
		d.cfg.Log.Level = s
	}
}

func readOutput(v value, l *Log) {
	s, ok := v.text("stdout, stderr or file:PATH")
	if !ok {
		return
	}
	name, file := strings.CutPrefix(s, "file:")
	switch {
	case s == "stdout" || s == "stderr":
		l.Output = s
		return
	case !file && strings.ContainsAny(s, `/\.`):
		v.errorf("want stdout, stderr or file:PATH; did you mean %s?", quote("file:"+s))
		return
	case !file:
		v.errorf("want stdout, stderr or file:PATH, got %s%s", quote(s), didYouMean(s, []string{"stdout", "stderr"}))
		return
	case name == "":
		v.errorf("the name of the file is empty")
		return
	}
	path, ok := v.output(name)
	if !ok {
		return
	}
	if path == "stdout" || path == "stderr" {
		path = "." + string(os.PathSeparator) + path // a file of that name, and not the stream
	}
	l.Output = path
}

// output returns the path of a file that the program is going to write: its folder has to be there already.
func (v value) output(name string) (path string, ok bool) {
	path = v.resolve(name)
	if info, err := v.l.disk.stat(path); err == nil && info.IsDir() {
		v.errorf("%s is a directory, not a file", path)
		return "", false
	}
	dir := filepath.Dir(path)
	if info, err := v.l.disk.stat(dir); err != nil {
		v.errorf("the directory %s: %s", dir, strings.Replace(reason(err), "file", "directory", 1))
		return "", false
	} else if !info.IsDir() {
		v.errorf("%s is not a directory", dir)
		return "", false
	}
	return path, true
}

var adminKeys = newTable("admin",
	entry[Admin]{"listen", readAdminListen},
	entry[Admin]{"token", readToken},
)

// readAdmin reads `admin`: a mapping, or the address.
func readAdmin(v value, d *draft) {
	if v.n.kind != mapKind {
		readAdminListen(v, &d.cfg.Admin)
		return
	}
	adminKeys.decode(v, &d.cfg.Admin)
	if token, ok := v.get("token"); ok && !d.cfg.Admin.Listen.IsValid() && !v.l.mistakeIn(v.path) {
		token.warnf("has no effect: the admin endpoint is off")
	}
}

// minToken is how many characters make a token that nobody guesses: 96 bits, when it is hexadecimal.
const minToken = 24

// maxToken leaves room in a request for everything else.
const maxToken = 4096

// readToken reads a secret. It is never shown, not even when what stands here is the token itself, by mistake.
func readToken(v value, a *Admin) {
	s, ok := v.text("file:PATH or env:NAME")
	if !ok {
		return
	}
	if !strings.HasPrefix(s, "file:") && !strings.HasPrefix(s, "env:") {
		v.hidden("want file:PATH or env:NAME: where the token is, and not the token itself")
		return
	}
	data, from, ok := v.secret("token")
	if !ok {
		return
	}
	token := strings.TrimSpace(string(data))
	switch {
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		v.errorf("%s holds more than a token, which is one line of visible ASCII characters; `openssl rand -hex 32` makes one", from)
	case len(token) < minToken:
		v.errorf("%s holds a token of %d characters; below %d it can be guessed; `openssl rand -hex 32` makes one", from, len(token),
			minToken)
	case len(token) > maxToken:
		v.errorf("%s holds a token of %d characters; the most is %d", from, len(token), maxToken)
	default:
		a.Token = token
	}
}

func readAdminListen(v value, a *Admin) {
	s, ok := v.text("an address such as 127.0.0.1:8081, or off")
	if !ok {
		return
	}
	a.Place = v.place()
	if s == "off" {
		a.Listen = netip.AddrPort{}
		return
	}
	if _, rest, ok := strings.Cut(s, "://"); ok {
		v.errorf("the admin endpoint is always HTTP; did you mean %s?", quote(strings.TrimSuffix(rest, "/")))
		return
	}
	if strings.Trim(s, "0123456789") == "" && s != "" {
		v.errorf("%s is a port without an address; did you mean %q?", s, "127.0.0.1:"+s)
		return
	}
	u := rawURL{}
	err := u.splitHost(s, s)
	if err == nil && !u.hasPort {
		err = fmt.Errorf("%s has no port; want an address such as 127.0.0.1:8081, or off", quote(s))
	}
	addr := netip.IPv6Unspecified()
	if err == nil && u.host != "" && u.host != "*" {
		if addr, err = netip.ParseAddr(u.host); err != nil {
			err = notAnAddress(u.host)
		}
	}
	if err != nil {
		v.errorf("%v", err)
		return
	}
	a.Listen = netip.AddrPortFrom(addr.Unmap(), u.port)
	if !addr.Unmap().IsLoopback() {
		v.warnf("everyone who reaches %s sees the metrics; 127.0.0.1 is for this machine only", s)
	}
}

// checkAdmin finds a listener on the port of the admin endpoint.
func (d *draft) checkAdmin() {
	a := d.cfg.Admin
	for i := range d.listen {
		l := &d.listen[i]
		if !overlap(l.Addr, a.Listen) || !slices.Contains(l.networks(), "tcp") {
			continue
		}
		if a.Place.Line > 0 {
			d.errorAt(a.Place, "needs the TCP port %d, which %s at %s already has", a.Listen.Port(), quote(l.URL),
				lineOf(l.Place, a.Place))
		} else {
			d.errorAt(l.Place, "%s needs the TCP port %d, which the admin endpoint has; give that another one, "+
				"such as admin: 127.0.0.1:9081, or admin: off", quote(l.URL), l.Addr.Port())
		}
		return
	}
}
