package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// listenItem is a Listener while it is being read.
type listenItem struct {
	Listener
	http    value // zero if the key is not there
	name    value // zero if the key is not there
	sockets value // zero if the key is not there
}

var listenKeys = newTable("listen[]",
	entry[listenItem]{"name", func(v value, it *listenItem) {
		if s, ok := v.word("name"); ok {
			it.Name, it.name = s, v
		}
	}},
	entry[listenItem]{"url", func(v value, it *listenItem) { it.readURL(v) }},
	entry[listenItem]{"http", func(v value, it *listenItem) {
		it.http = v
		for _, item := range v.list("version, such as h2") {
			h, ok := item.oneOf("h1", "h2", "h3")
			if ok && slices.Contains(it.HTTP, h) {
				item.errorf("%s is already in the list", h)
			} else if ok {
				it.HTTP = append(it.HTTP, h)
			}
		}
	}},
	entry[listenItem]{"sockets", func(v value, it *listenItem) {
		it.sockets = v
		v.into(&it.Sockets, 1, maxSockets)
	}},
)

// maxSockets is more than any machine has cores that a socket each would keep busy.
const maxSockets = 256

// word reads a name that the user gives to something: letters, digits, '.', '_' and '-', no more than 63.
func (v value) word(what string) (string, bool) {
	s, ok := v.text("a " + what)
	if ok && (s == "" || len(s) > 63 || strings.ContainsFunc(s, func(r rune) bool { return r != '.' && notLDH(r) })) {
		v.errorf("a %s is 1 to 63 letters, digits and -_. only, got %s", what, quote(s))
		return "", false
	}
	return s, ok
}

// readListen reads `listen`.
func readListen(v value, d *draft) {
	d.listen = nil
	for _, item := range v.list("address, such as dns://:8053") {
		it := listenItem{}
		if item.n.kind == mapKind {
			listenKeys.decode(item, &it)
			if _, ok := item.get("url"); !ok {
				item.errorf("the key \"url\" is missing, such as url: dns://:8053")
			}
		} else if !item.bad() {
			it.readURL(item)
		}
		if it.Scheme != "" {
			d.addListener(it)
		}
	}
}

// readURL reads a listen URL into it; it.Scheme stays empty if there is a mistake.
func (it *listenItem) readURL(v value) {
	s, ok := v.text("a URL such as dns://:8053")
	if !ok {
		return
	}
	u, err := splitURL(s, listenSchemes)
	if err == errNoScheme {
		err = noListenScheme(s)
	}
	var addr netip.AddrPort
	if err == nil {
		addr, err = u.listenAddr(s)
	}
	if err != nil {
		v.errorf("%v", err)
		return
	}
	it.Place, it.URL, it.Scheme, it.Addr, it.Path = v.place(), s, u.scheme, addr, u.path
	if u.scheme == HTTPS && (u.path == "" || u.path == "/") {
		it.Path = "/dns-query" // the path of RFC 8484's examples, which every client tries
	}
}

// noListenScheme guesses what an address without a scheme was meant to be.
func noListenScheme(s string) error {
	if s == "" {
		return fmt.Errorf("the address is empty; want a URL such as %q", "dns://:8053")
	}
	scheme := DNS
	switch {
	case strings.HasSuffix(s, "853"):
		scheme = TLS
	case strings.HasSuffix(s, "443") || strings.Contains(s, "/"):
		scheme = HTTPS
	}
	guess := s
	if strings.Trim(s, "0123456789") == "" {
		guess = ":" + s
	} else if addr, err := netip.ParseAddr(s); err == nil && addr.Is6() {
		guess = "[" + s + "]"
	}
	return fmt.Errorf("%s has no scheme; did you mean %s?", quote(s), quote(string(scheme)+"://"+guess))
}

// listenAddr checks the parts of a listen URL and returns its address.
func (u *rawURL) listenAddr(whole string) (addr netip.AddrPort, err error) {
	switch {
	case u.hasFrag:
		return addr, fmt.Errorf("%s has a name behind %q, which only upstreams have", quote(whole), "#")
	case u.path != "" && u.scheme != HTTPS:
		return addr, fmt.Errorf("%s has a path, which only https:// has", quote(whole))
	case u.host == "" && !u.hasPort:
		return addr, fmt.Errorf("%s has no address; %s is every address of this machine", quote(whole),
			quote(fmt.Sprintf("%s://:%d%s", u.scheme, defaultPorts[u.scheme], u.path)))
	}
	if err := checkPath(u.path, false); err != nil {
		return addr, err
	}
	ip := netip.IPv6Unspecified()
	if u.host != "" && u.host != "*" {
		if ip, err = netip.ParseAddr(u.host); err != nil {
			return addr, notAnAddress(u.host)
		}
		ip = ip.Unmap()
	}
	if ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return addr, fmt.Errorf("%s is a multicast or broadcast address; nobody can listen on it", u.host)
	}
	port := u.port
	if !u.hasPort {
		port = defaultPorts[u.scheme]
	}
	return netip.AddrPortFrom(ip, port), nil
}

// notAnAddress says that a name stands where only an address can.
func notAnAddress(host string) error {
	if strings.EqualFold(host, "localhost") {
		return fmt.Errorf("%s is a name; to listen there takes an address: 127.0.0.1 or [::1]", quote(host))
	}
	if err := checkHostName(host); err != nil {
		return err
	}
	return fmt.Errorf("%s is a name; to listen there takes an address of this machine, or none for all of them", quote(host))
}

// addListener checks what only a whole entry can tell and puts it into the list.
func (d *draft) addListener(it listenItem) {
	if it.http.n != nil && it.Scheme != HTTPS {
		it.http.errorf("only https:// has HTTP versions, not %s", it.URL)
	}
	if it.sockets.n != nil && it.Scheme != DNS && it.Scheme != UDP {
		it.sockets.errorf("only dns:// and udp:// have several sockets on one port, not %s: a connection, TCP's or QUIC's, is served "+
			"by any core", it.URL)
	}
	if it.Scheme == HTTPS && it.HTTP == nil {
		it.HTTP = []string{"h1", "h2"}
	}
	for _, other := range d.listen {
		if it.name.n != nil && it.Name == other.Name {
			it.name.errorf("the name %q is already given at %s", it.Name, lineOf(other.Place, it.Place))
			break
		}
	}
	if it.Name == "" {
		it.Name = it.URL
	}
	d.listen = append(d.listen, it.Listener)
}

// lineOf names the line of p for a message that stands at from: without the file if it is the same.
func lineOf(p, from Place) string {
	if p.File == from.File {
		return fmt.Sprintf("line %d", p.Line)
	}
	return p.String()
}

// networks returns the networks that a listener binds.
func (l *Listener) networks() []string {
	switch l.Scheme {
	case DNS:
		return []string{"udp", "tcp"}
	case UDP, QUIC:
		return []string{"udp"}
	case HTTPS:
		if !slices.Contains(l.HTTP, "h3") {
			return []string{"tcp"}
		}
		if len(l.HTTP) == 1 {
			return []string{"udp"}
		}
		return []string{"tcp", "udp"}
	}
	return []string{"tcp"}
}

// overlap reports whether the kernel refuses to bind both addresses for one network. It does if they are equal, or if one
// is the unspecified address of a family that the other belongs to; [::] stands for both families.
func overlap(a, b netip.AddrPort) bool {
	if a.Port() != b.Port() || a.Port() == 0 {
		return false
	}
	covers := func(x, y netip.Addr) bool {
		return x == y || x == netip.IPv6Unspecified() || x == netip.IPv4Unspecified() && y.Is4()
	}
	return covers(a.Addr(), b.Addr()) || covers(b.Addr(), a.Addr())
}

// checkListeners finds listeners that cannot be bound together, or that need a certificate and have none.
func (d *draft) checkListeners() {
	for i := range d.listen {
		it := &d.listen[i]
		for j := range i {
			if msg := it.conflict(&d.listen[j]); msg != "" {
				d.errorAt(it.Place, "%s", msg)
				break
			}
		}
		needs := it.Scheme == TLS || it.Scheme == HTTPS || it.Scheme == QUIC
		if needs && !d.has["tls"] {
			d.errorAt(it.Place, "a listener on %s:// needs a certificate: make one with `dnsgateway cert`, "+
				"or name yours: tls: {cert: server.crt, key: server.key}", it.Scheme)
		}
		if needs {
			d.encrypted = true
		}
	}
}

// conflict says why it and other, which stands before it, cannot both be bound. It returns "" if they can.
func (l *Listener) conflict(other *Listener) string {
	if !overlap(l.Addr, other.Addr) {
		return ""
	}
	line := lineOf(other.Place, l.Place)
	if l.Scheme == other.Scheme && l.Addr == other.Addr && l.Path == other.Path {
		return fmt.Sprintf("%s is already in the list at %s", quote(l.URL), line)
	}
	for _, n := range l.networks() {
		if slices.Contains(other.networks(), n) {
			return fmt.Sprintf("%s needs the %s port %d, which %s at %s already has", quote(l.URL), strings.ToUpper(n),
				l.Addr.Port(), quote(other.URL), line)
		}
	}
	return ""
}
