package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// serverItem is a Server while it is being read.
type serverItem struct {
	Server
	bootstrap bool    // it is one of `bootstrap`
	hasURL    bool    // the key `url` is there
	stamp     *stamp  // of an sdns:// URL
	tls       []value // keys that only servers with TLS may have
}

var serverKeys = newTable("upstreams.*.try[][]",
	entry[serverItem]{"url", func(v value, it *serverItem) {
		it.hasURL = true
		it.readURL(v)
	}},
	entry[serverItem]{"discover", func(v value, it *serverItem) {
		if !it.hasURL { // that both are there is said once, in readServer
			it.readDiscover(v)
		}
	}},
	entry[serverItem]{"ca", func(v value, it *serverItem) {
		it.tls = append(it.tls, v)
		it.CA, it.CAFile, _ = v.roots()
	}},
	entry[serverItem]{"pin", func(v value, it *serverItem) {
		it.tls = append(it.tls, v)
		for _, item := range v.list("pin") {
			s, ok := item.text("a pin such as sha256/...")
			if !ok {
				continue
			}
			pin, err := parsePin(s)
			switch {
			case err != nil:
				item.errorf("%v", err)
			case slices.Contains(it.Pins, pin):
				item.errorf("the pin is already in the list")
			default:
				it.Pins = append(it.Pins, pin)
			}
		}
	}},
	entry[serverItem]{"client_cert", func(v value, it *serverItem) {
		it.tls = append(it.tls, v)
		p := pairItem{}
		if clientCertKeys.decode(v, &p) && p.check(v) {
			it.ClientCert = &p.KeyPair
		}
	}},
)

// readServer reads a server: a URL, or a mapping with one. In `bootstrap` an address alone is a server for plain DNS.
func readServer(v value, bootstrap bool) (Server, bool) {
	it := serverItem{bootstrap: bootstrap}
	if v.n.kind != mapKind {
		it.readURL(v)
		return it.Server, it.Scheme != ""
	}
	serverKeys.decode(v, &it)
	_, hasURL := v.get("url")
	discover, hasDiscover := v.get("discover")
	switch {
	case hasURL && hasDiscover:
		discover.atKey().errorf("stands beside url; a server is either given by its URL, or discovered")
		return it.Server, false
	case !hasURL && !hasDiscover:
		v.errorf("the key \"url\" is missing, such as url: tls://9.9.9.9#dns.quad9.net")
	}
	if _, ok := v.get("ca"); !ok && it.Scheme == Discover && it.unlisted() {
		discover.warnf("no public authority certifies the address %s; if what is discovered has a certificate of your own "+
			"authority, name that with ca", it.Host)
	}
	for _, key := range it.tls {
		switch it.Scheme {
		case Discover:
			if strings.HasSuffix(key.path, ".client_cert") {
				key.errorf("has no use with discover: it is shown to servers that the file names; write the server's own URL")
			}
		case UDP, TCP:
			key.errorf("has no use with %s://, which has no certificates", it.Scheme)
		case SDNS:
			key.errorf("cannot be added to a DNS stamp; write the server's own URL")
		}
	}
	return it.Server, it.Scheme != ""
}

// readURL reads the URL of a server into it; it.Scheme stays empty if there is a mistake.
func (it *serverItem) readURL(v value) {
	s, ok := v.text("a URL such as tls://9.9.9.9#dns.quad9.net")
	if !ok {
		return
	}
	it.Place, it.URL = v.place(), s
	if err := it.parse(s); err != nil {
		it.Scheme = ""
		v.errorf("%v", err)
		return
	}
	if it.bootstrap {
		if _, err := netip.ParseAddr(it.Host); err != nil {
			it.Scheme = ""
			v.errorf("%s has no address; a bootstrap server finds names and cannot have to be found", quote(s))
		}
		return // what is asked here is never a client's question
	}
	plain := it.Scheme == UDP || it.Scheme == TCP || it.stamp != nil && it.stamp.protocol == stampPlain
	if plain && !it.loopback() {
		v.warnf("questions leave unencrypted to %s", s)
	}
}

// readDiscover reads the address of a server that is asked where its encrypted ones are, RFC 9462; it.Scheme stays empty
// if there is a mistake.
func (it *serverItem) readDiscover(v value) {
	s, ok := v.text("an address such as 192.0.2.1")
	if !ok {
		return
	}
	addr, err := parseDiscover(s)
	switch {
	case it.bootstrap:
		v.errorf("a bootstrap server is asked as it stands, and nothing is discovered for it; write its address, such as 9.9.9.9 " +
			"or tls://9.9.9.9#dns.quad9.net")
		return
	case err != nil:
		v.errorf("%v", err)
		return
	}
	host := addr.Addr().String()
	it.Place, it.Scheme, it.Host, it.Port, it.VerifyName = v.place(), Discover, host, addr.Port(), host
	it.URL = string(Discover) + "://" + addr.String()
	if addr.Port() == defaultPorts[Discover] {
		it.URL = strings.TrimSuffix(it.URL, ":53")
	}
}

// unlisted reports whether the server's address is one that many networks have, so that public authorities do not certify it.
func (it *serverItem) unlisted() bool {
	addr, ok := it.address()
	return ok && slices.ContainsFunc(slices.Concat(private, loopback), func(p netip.Prefix) bool { return p.Contains(addr.Addr()) })
}

// parseDiscover reads an address, or an address and a port.
func parseDiscover(s string) (netip.AddrPort, error) {
	u := rawURL{}
	addr, err := netip.ParseAddr(s)
	if err != nil {
		if strings.Contains(s, "://") {
			return netip.AddrPort{}, fmt.Errorf("want an address such as 192.0.2.1 without a scheme, got %s; "+
				"a server whose protocol is known goes into url", quote(s))
		}
		if err := u.splitHost(s, s); err != nil {
			return netip.AddrPort{}, err
		}
		if addr, err = netip.ParseAddr(u.host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("%s is not an address, and a name will not do: what is discovered is verified by a "+
				"certificate for the very address that was asked (RFC 9462, section 4.2)", quote(u.host))
		}
	}
	addr = addr.Unmap()
	switch {
	case addr.IsUnspecified() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}, fmt.Errorf("%s is not the address of one server", quote(addr.String()))
	case u.hasPort && u.port == 0:
		return netip.AddrPort{}, errors.New("port 0 is out of range; want 1 to 65535")
	case !u.hasPort:
		u.port = defaultPorts[Discover]
	}
	return netip.AddrPortFrom(addr, u.port), nil
}

// parse fills in Scheme, Host, Port, Path and VerifyName.
func (it *serverItem) parse(s string) error {
	if strings.HasPrefix(strings.ToLower(s), "sdns://") {
		st, err := parseStamp(s)
		it.Scheme, it.stamp = SDNS, st
		return err
	}
	if addr, err := netip.ParseAddr(s); err == nil && it.bootstrap {
		it.Scheme, it.Host, it.Port, it.VerifyName = UDP, addr.Unmap().String(), defaultPorts[UDP], addr.Unmap().String()
		return nil
	}
	u, err := splitURL(s, upstreamSchemes)
	if err == errNoScheme {
		return it.noScheme(s)
	}
	if err != nil {
		return err
	}
	if err := u.checkUpstream(s); err != nil {
		return err
	}
	it.Scheme, it.Host, it.Port, it.Path = u.scheme, strings.TrimSuffix(strings.ToLower(u.host), "."), u.port, u.path
	if addr, err := netip.ParseAddr(u.host); err == nil {
		it.Host = addr.Unmap().String()
	}
	if !u.hasPort {
		it.Port = defaultPorts[u.scheme]
	}
	if (u.scheme == HTTPS || u.scheme == H3) && (u.path == "" || u.path == "/") {
		it.Path = "/dns-query"
	}
	it.VerifyName = it.Host
	if u.hasFrag {
		it.VerifyName = strings.TrimSuffix(strings.ToLower(u.fragment), ".")
	}
	return nil
}

// noScheme guesses what a server without a scheme was meant to be: encrypted, whatever it was, but for bootstrap servers.
func (it *serverItem) noScheme(s string) error {
	if s == "" {
		return fmt.Errorf("the URL is empty; want one such as %q", "tls://9.9.9.9#dns.quad9.net")
	}
	scheme, guess := TLS, strings.TrimSuffix(s, ":53")
	if strings.Contains(s, "/") {
		scheme = HTTPS
	}
	if addr, err := netip.ParseAddr(guess); err == nil && addr.Is6() {
		guess = "[" + guess + "]"
	}
	host, _, _ := strings.Cut(guess, "/")
	if h, _, ok := strings.Cut(host, ":"); ok && !strings.HasPrefix(host, "[") {
		host = h
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	switch {
	case err != nil && checkHostName(host) != nil:
		return checkHostName(host)
	case err != nil && it.bootstrap:
		return fmt.Errorf("%s has no address; a bootstrap server finds names and cannot have to be found", quote(s))
	case it.bootstrap:
		scheme, guess = UDP, s
	}
	return fmt.Errorf("%s has no scheme; did you mean %s?", quote(s), quote(string(scheme)+"://"+guess))
}

// checkUpstream checks the parts of an upstream URL.
func (u *rawURL) checkUpstream(whole string) error {
	encrypted := u.scheme != UDP && u.scheme != TCP
	switch {
	case u.host == "":
		return fmt.Errorf("%s has no host", quote(whole))
	case u.hasPort && u.port == 0:
		return fmt.Errorf("port 0 is out of range; want 1 to 65535")
	case u.path != "" && u.scheme != HTTPS && u.scheme != H3:
		return fmt.Errorf("%s has a path, which only https:// and h3:// have", quote(whole))
	case u.hasFrag && !encrypted:
		return fmt.Errorf("%s has a name behind %q, but %s:// verifies no names", quote(whole), "#", u.scheme)
	case u.hasFrag && u.fragment == "":
		return fmt.Errorf("%s has no name behind %q", quote(whole), "#")
	}
	if u.hasFrag {
		if _, err := netip.ParseAddr(u.fragment); err != nil {
			if err := checkHostName(u.fragment); err != nil {
				return fmt.Errorf("behind %q: %w", "#", err)
			}
		}
	}
	addr, err := netip.ParseAddr(u.host)
	switch {
	case err != nil:
		if err := checkHostName(u.host); err != nil {
			return err
		}
	case addr.IsUnspecified() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%s is not the address of one server", quote(u.host))
	}
	return checkPath(u.path, true)
}

// address returns the server's IP address and port; ok is false if it has a host name.
func (it *Server) address() (netip.AddrPort, bool) {
	if it.Scheme == SDNS {
		st, err := parseStamp(it.URL)
		return st.addr, err == nil && st.addr.IsValid()
	}
	addr, err := netip.ParseAddr(it.Host)
	return netip.AddrPortFrom(addr, it.Port), err == nil
}

func (it *Server) loopback() bool {
	addr, ok := it.address()
	return ok && addr.Addr().IsLoopback()
}

// deadlines of a group; the shorter end is for tests and for local networks.
const (
	minDeadline     = 100 * time.Millisecond
	maxDeadline     = time.Minute
	defaultDeadline = 3 * time.Second
)

// The settings of a breaker.
const (
	defaultOpenAfter = 3
	defaultProbe     = 2 * time.Second
	defaultMaxProbe  = time.Minute
	minProbe         = 100 * time.Millisecond // a server that is down is not asked more often than that
	maxProbe         = 24 * time.Hour
)

// groupItem is a Group while it is being read.
type groupItem struct {
	Group
	pick     value // zero if the key is not there
	hedge    value // zero if the key is not there
	maxProbe bool  // breaker.max_probe is there
}

var groupKeys = newTable("upstreams.*",
	entry[groupItem]{"try", func(v value, g *groupItem) {
		for _, item := range v.list("server") {
			g.addTier(item)
		}
	}},
	entry[groupItem]{"pick", func(v value, g *groupItem) {
		if s, ok := v.oneOf(string(Fastest), string(Random), string(InOrder), string(Race), string(Sticky)); ok {
			g.Pick, g.pick = Pick(s), v
		}
	}},
	entry[groupItem]{"next_on", func(v value, g *groupItem) {
		g.NextOn = NextOn{}
		for _, item := range v.list("of timeout, connect, servfail and refused") {
			s, ok := item.oneOf("timeout", "connect", "servfail", "refused")
			if !ok {
				continue
			}
			set := map[string]*bool{"timeout": &g.NextOn.Timeout, "connect": &g.NextOn.Connect,
				"servfail": &g.NextOn.ServFail, "refused": &g.NextOn.Refused}[s]
			if *set {
				item.errorf("%s is already in the list", s)
			}
			*set = true
		}
	}},
	entry[groupItem]{"deadline", func(v value, g *groupItem) {
		if d, ok := v.duration(minDeadline, maxDeadline); ok {
			g.Deadline = d
		}
	}},
	entry[groupItem]{"hedge", readHedge},
	entry[groupItem]{"breaker", func(v value, g *groupItem) {
		if breakerKeys.decode(v, g) && g.Breaker.MaxProbe < g.Breaker.Probe && !v.l.mistakeIn(v.path+".") {
			v.errorf("max_probe (%s) is shorter than probe (%s)", formatDuration(g.Breaker.MaxProbe), formatDuration(g.Breaker.Probe))
		}
	}},
	entry[groupItem]{"private", func(v value, g *groupItem) {
		if yes, ok := v.boolean(); ok {
			g.Private = yes
		}
	}},
)

// readHedge reads `hedge`. That it is shorter than the deadline is checked when both are known.
func readHedge(v value, g *groupItem) {
	const want = "auto, never, or a duration such as 250ms"
	s, ok := v.text(want)
	if !ok {
		return
	}
	switch s {
	case "auto":
		g.Hedge, g.hedge = Hedge{}, v
		return
	case "never":
		g.Hedge, g.hedge = Hedge{Never: true}, v
		return
	}
	if s == "" || s[0] != '-' && (s[0] < '0' || s[0] > '9') {
		hint := didYouMean(s, []string{"auto", "never"})
		if s == "off" || s == "false" || s == "no" {
			hint = `; did you mean "never"?`
		}
		v.errorf("want %s, got %s%s", want, quote(s), hint)
		return
	}
	switch d, err := parseDuration(s); {
	case isNumber(s) && s != "0":
		v.errorf("needs a unit; did you mean %sms?", s)
	case err != nil:
		v.errorf("%v", err)
	case d == 0:
		v.errorf("%s would ask two servers each time; pick: race asks all servers of a tier at once", quote(s))
	default:
		g.Hedge, g.hedge = Hedge{After: d}, v
	}
}

var breakerKeys = newTable("upstreams.*.breaker",
	entry[groupItem]{"open_after", func(v value, g *groupItem) { v.into(&g.Breaker.OpenAfter, 1, 100) }},
	entry[groupItem]{"probe", func(v value, g *groupItem) {
		if d, ok := v.duration(minProbe, maxProbe); ok {
			g.Breaker.Probe = d
			if !g.maxProbe {
				g.Breaker.MaxProbe = max(g.Breaker.MaxProbe, d)
			}
		}
	}},
	entry[groupItem]{"max_probe", func(v value, g *groupItem) {
		if d, ok := v.duration(minProbe, maxProbe); ok {
			g.Breaker.MaxProbe, g.maxProbe = d, true
		}
	}},
)

// addTier reads one tier: a server, or a list of servers.
func (g *groupItem) addTier(v value) {
	var tier []Server
	for _, item := range v.list("server") {
		if item.n.kind == listKind {
			item.errorf("a list of lists of lists; a tier is a list of servers")
			continue
		}
		s, ok := readServer(item, false)
		if !ok {
			continue
		}
		if i := slices.IndexFunc(tier, s.same); i >= 0 {
			item.errorf("%s is already in the list at %s", quote(s.URL), lineOf(tier[i].Place, s.Place))
			continue
		}
		for _, above := range g.Tiers {
			if i := slices.IndexFunc(above, s.same); i >= 0 {
				item.warnf("%s is asked again, as in the tier above at %s", quote(s.URL), lineOf(above[i].Place, s.Place))
				break
			}
		}
		tier = append(tier, s)
	}
	if len(tier) > 0 {
		g.Tiers = append(g.Tiers, tier)
	}
}

// same reports whether both are one server, asked in one way.
func (it *Server) same(other Server) bool {
	if it.Scheme == SDNS || other.Scheme == SDNS {
		return it.URL == other.URL
	}
	return it.Scheme == other.Scheme && it.Host == other.Host && it.Port == other.Port && it.Path == other.Path &&
		it.VerifyName == other.VerifyName
}

func newGroup(name string, place Place) groupItem {
	return groupItem{Group: Group{Name: name, Place: place, Pick: Fastest, Deadline: defaultDeadline,
		NextOn:  NextOn{Timeout: true, Connect: true, ServFail: true, Refused: true},
		Breaker: Breaker{OpenAfter: defaultOpenAfter, Probe: defaultProbe, MaxProbe: defaultMaxProbe}}}
}

// readUpstreams reads `upstreams`: a list of servers is the first tier of the group "default"; a mapping has groups.
func readUpstreams(v value, d *draft) {
	if v.n.kind != mapKind {
		g := newGroup(DefaultGroup, v.place())
		g.readTier(v)
		d.groups = append(d.groups, g)
		return
	}
	hasDefault := v.n.field(DefaultGroup) != nil
	for _, f := range v.n.fields {
		d.declared = append(d.declared, f.name)
		item := v.child(f)
		isGroup := f.value.field("try") != nil // whatever its name, "private" for one
		switch {
		case !isGroup && slices.Contains(tables["upstreams.*"], f.name):
			item.atKey().errorf("%q is a key of a group; write upstreams: {default: {%s: ...}}", f.name, f.name)
			hasDefault = true
		case slices.Contains(tables["upstreams.*.try[][]"], f.name):
			item.atKey().errorf("%q is a key of a server; write upstreams: [{%s: ...}]", f.name, f.name)
			hasDefault = true
		case f.value.kind == nullKind:
			item.errorf("has no value")
		default:
			readGroup(item, f.name, d)
		}
	}
	if !hasDefault {
		v.errorf(`there is no group "default", which gets every question that no rule sends to another group`)
	}
}

// readTier reads the servers of a group that is a list or a single server.
func (g *groupItem) readTier(v value) {
	for _, item := range v.items() {
		if v.n.kind == listKind && item.n.kind == listKind {
			item.errorf("a list in the list of servers; tiers go into `try`, or into `fallback`")
			return
		}
	}
	g.addTier(v)
}

// readGroup reads one group of the mapping `upstreams`.
func readGroup(v value, name string, d *draft) {
	key := v.atKey()
	key.n.kind, key.n.text = scalarKind, name
	if _, ok := key.word("group's name"); !ok {
		return
	}
	g := newGroup(name, key.place())
	if v.n.kind != mapKind {
		g.readTier(v)
	} else {
		groupKeys.decode(v, &g)
		if _, ok := v.get("try"); !ok {
			v.errorf("the key \"try\" is missing, such as try: [tls://9.9.9.9#dns.quad9.net]")
		}
		if g.Hedge.After >= g.Deadline {
			g.hedge.errorf("%s is not shorter than the group's deadline (%s): no server would ever be asked early",
				quote(g.hedge.n.text), formatDuration(g.Deadline))
		}
	}
	d.groups = append(d.groups, g)
}

// addFallback reads `fallback`, which adds tiers below those of the group "default": a list of servers is one tier, a list
// of lists is one tier each.
func (d *draft) addFallback() {
	v := d.fallback
	if v.n == nil {
		return
	}
	var g *groupItem
	if i := slices.IndexFunc(d.groups, func(g groupItem) bool { return g.Name == DefaultGroup }); i >= 0 {
		g = &d.groups[i]
	} else {
		other := newGroup(DefaultGroup, v.place()) // what is wrong with upstreams was said: still look at the servers
		g = &other
	}
	items := v.list("server")
	lists := 0
	for _, item := range items {
		if item.n.kind == listKind {
			lists++
		}
	}
	if v.n.kind != listKind || lists == 0 {
		g.addTier(v)
		return
	}
	for _, item := range items {
		if item.n.kind != listKind && !item.bad() {
			item.errorf("a server beside lists of servers; put it into a list, as a tier of its own")
			continue
		}
		g.addTier(item)
	}
}

// readBootstrap reads `bootstrap`.
func readBootstrap(v value, d *draft) {
	d.bootstrap = v
	for _, item := range v.list("server, such as 9.9.9.9") {
		s, ok := readServer(item, true)
		if !ok {
			continue
		}
		if i := slices.IndexFunc(d.cfg.Bootstrap, s.same); i >= 0 {
			item.errorf("%s is already in the list at %s", quote(s.URL), lineOf(d.cfg.Bootstrap[i].Place, s.Place))
			continue
		}
		d.cfg.Bootstrap = append(d.cfg.Bootstrap, s)
	}
}

// checkUpstreams finds upstreams whose host cannot be found, and loops.
func (d *draft) checkUpstreams() {
	var byAddress, byName []Server
	closed := false // there are servers that have an address and are not asked for names
	for _, g := range d.groups {
		for _, s := range slices.Concat(g.Tiers...) {
			if _, ok := s.address(); !ok {
				byName = append(byName, s)
			} else {
				d.checkLoop(s)
				// Who is closed to the world's names, as a private group may be, is not asked for them unless told. Nor does a
				// server answer that is only asked where others are.
				finds := s.Scheme != SDNS && s.Scheme != Discover && (!g.Private || g.Name == DefaultGroup)
				closed = closed || !finds && s.Scheme != SDNS
				if finds && !slices.ContainsFunc(byAddress, s.same) {
					byAddress = append(byAddress, s)
				}
			}
		}
	}
	for _, s := range d.cfg.Bootstrap {
		d.checkLoop(s)
	}
	for _, g := range d.groups {
		if g.pick.n != nil && !slices.ContainsFunc(g.Tiers, func(t []Server) bool { return len(t) > 1 }) {
			g.pick.warnf("has no effect: no tier of the group has more than one server")
		}
		if g.hedge.n != nil && len(g.Tiers) == 1 && len(g.Tiers[0]) == 1 && g.Tiers[0][0].Scheme != Discover {
			g.hedge.warnf("has no effect: the group has one server")
		}
	}
	switch {
	case d.bootstrap.n != nil:
		if len(byName) == 0 && len(d.groups) > 0 && len(d.l.errs) == 0 {
			d.bootstrap.warnf("has no effect: every upstream has an address")
		}
	case len(byName) > 0 && len(byAddress) > 0:
		d.cfg.Bootstrap = byAddress
	case !d.l.mistakeIn("upstreams", "fallback"):
		for _, s := range byName {
			d.errorAt(s.Place, "%s", noBootstrap(s, closed))
		}
	}
}

// noBootstrap says what to write instead of a host name that nobody can look up. closed says that there are upstreams with
// an address, and none that is asked for names.
func noBootstrap(s Server, closed bool) string {
	nobody := "no upstream has an address"
	if closed {
		nobody = "those upstreams that have an address are private, or only discover others"
	}
	if s.Host == "localhost" {
		return `"localhost" is a name that has to be looked up; write 127.0.0.1`
	}
	if s.Scheme == SDNS {
		return "the stamp has no address, and no upstream has one that could find its name; add bootstrap: [9.9.9.9]"
	}
	return fmt.Sprintf("%q has to be looked up, and %s; add bootstrap: [9.9.9.9], "+
		"or write the server's address and the name behind it, as in tls://9.9.9.9#dns.quad9.net", s.Host, nobody)
}

// checkLoop reports a server that is one of our own listeners, which would ask itself until the deadline.
func (d *draft) checkLoop(s Server) {
	addr, ok := s.address()
	if !ok {
		return
	}
	networks := map[Scheme][]string{UDP: {"udp"}, TCP: {"tcp"}, TLS: {"tcp"}, HTTPS: {"tcp"}, H3: {"udp"}, QUIC: {"udp"},
		SDNS: {"udp", "tcp"}, Discover: {"udp", "tcp"}}[s.Scheme]
	for i := range d.listen {
		l := &d.listen[i]
		ip := l.Addr.Addr()
		here := ip == addr.Addr() || ip.IsUnspecified() && addr.Addr().IsLoopback() && (ip.Is6() || addr.Addr().Is4())
		if here && l.Addr.Port() == addr.Port() && slices.ContainsFunc(networks, func(n string) bool {
			return slices.Contains(l.networks(), n)
		}) {
			d.errorAt(s.Place, "%s is our own listener %s at %s; questions would go round in a loop", quote(s.URL), quote(l.URL),
				lineOf(l.Place, s.Place))
			return
		}
	}
}
