package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// rawURL is a listen or upstream URL in its parts. It is read by hand and not by net/url, whose messages say what is wrong
// with a URL but not what to write.
type rawURL struct {
	scheme   Scheme
	host     string // without brackets
	port     uint16 // only if hasPort
	hasPort  bool
	path     string // with its leading slash, or empty
	fragment string // only if hasFragment
	hasFrag  bool
}

// The schemes of each list, in the order in which messages name them.
var (
	listenSchemes   = []string{"dns", "udp", "tcp", "tls", "https", "quic"}
	upstreamSchemes = []string{"tls", "https", "h3", "quic", "udp", "tcp", "sdns"}
)

// otherSchemes are what people write for a scheme that has another name here.
var otherSchemes = map[string]Scheme{
	"dot": TLS, "doh": HTTPS, "http": HTTPS, "doq": QUIC, "doh3": H3, "http3": H3, "h2": HTTPS, "plain": UDP, "dns": UDP,
}

// defaultPorts are the ports of RFC 1035, RFC 7858, RFC 8484 and RFC 9250.
var defaultPorts = map[Scheme]uint16{DNS: 53, UDP: 53, TCP: 53, TLS: 853, HTTPS: 443, H3: 443, QUIC: 853,
	Discover: 53}

var errNoScheme = errors.New("no scheme")

// splitURL cuts s into its parts. schemes are those that may stand in front.
func splitURL(s string, schemes []string) (u rawURL, err error) {
	if i := strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0xa0 || r == '\\' }); i >= 0 {
		return u, fmt.Errorf("%s holds a character that no URL has: %q", quote(s), s[i:i+1])
	}
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return u, errNoScheme
	}
	if u.scheme, err = parseScheme(scheme, s, schemes); err != nil {
		return u, err
	}
	rest, u.fragment, u.hasFrag = strings.Cut(rest, "#")
	if strings.Contains(rest, "{") {
		return u, fmt.Errorf("%s is a template; leave the part in braces out", quote(s))
	}
	if strings.Contains(rest, "?") {
		return u, fmt.Errorf("%s has a query; leave the %q and what follows out", quote(s), "?")
	}
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		rest, u.path = rest[:i], rest[i:]
	}
	if strings.Contains(rest, "@") {
		return u, errors.New("a user or password stands before the host; no server here asks for one")
	}
	return u, u.splitHost(rest, s)
}

// splitHost reads "host", "host:port", "[v6]" or "[v6]:port".
func (u *rawURL) splitHost(hostport, whole string) error {
	host, port, brackets := hostport, "", false
	switch {
	case strings.HasPrefix(hostport, "["):
		end := strings.IndexByte(hostport, ']')
		if end < 0 || end+1 < len(hostport) && hostport[end+1] != ':' {
			return fmt.Errorf("%s has brackets that do not close around an address", quote(whole))
		}
		host, port, u.hasPort = hostport[1:end], strings.TrimPrefix(hostport[end+1:], ":"), end+1 < len(hostport)
		brackets = true
	case strings.Count(hostport, ":") > 1:
		if _, err := netip.ParseAddr(hostport); err == nil {
			return fmt.Errorf("an IPv6 address goes into brackets; did you mean %s?",
				quote(strings.Replace(whole, hostport, bracket(hostport), 1)))
		}
		return fmt.Errorf("%s has more than one %q behind the host", quote(whole), ":")
	default:
		host, port, u.hasPort = strings.Cut(hostport, ":")
	}
	if addr, err := netip.ParseAddr(host); brackets && (err != nil || !addr.Is6()) {
		return fmt.Errorf("%s: only an IPv6 address goes into brackets", quote(whole))
	}
	u.host = host
	if !u.hasPort {
		return nil
	}
	n, err := parsePort(port)
	u.port = n
	return err
}

// bracket puts an IPv6 address into brackets. Where its end looks like a port that servers have, it is taken for one.
func bracket(s string) string {
	i := strings.LastIndexByte(s, ':')
	ports := []string{"53", "853", "443", "8053", "8853", "8443"}
	if _, err := netip.ParseAddr(s[:i]); err == nil && slices.Contains(ports, s[i+1:]) {
		return "[" + s[:i] + "]" + s[i:]
	}
	return "[" + s + "]"
}

func parsePort(s string) (uint16, error) {
	if s == "" {
		return 0, errors.New("there is no port behind the colon")
	}
	if strings.Trim(strings.TrimPrefix(s, "-"), "0123456789") != "" {
		return 0, fmt.Errorf("the port %s is not a number", quote(s))
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %s is out of range; want 1 to 65535", s)
	}
	return uint16(n), nil
}

func parseScheme(scheme, whole string, schemes []string) (Scheme, error) {
	low := strings.ToLower(scheme)
	if slices.Contains(schemes, low) {
		return Scheme(low), nil
	}
	rest := whole[len(scheme):]
	switch other, ok := otherSchemes[low]; {
	case low == string(Discover) && slices.Contains(schemes, string(SDNS)):
		return "", fmt.Errorf("a server that says where its encrypted ones are is written as {discover: %s}",
			strings.TrimPrefix(rest, "://"))
	case low == "h3" || ok && other == H3 && !slices.Contains(schemes, "h3"):
		return "", fmt.Errorf(`HTTP/3 belongs to an https:// listener: {url: %s, http: [h1, h2, h3]}`, quote("https"+rest))
	case ok && slices.Contains(schemes, string(other)):
		return "", fmt.Errorf("unknown scheme %s; did you mean %s?", quote(scheme), quote(string(other)+rest))
	case low == "sdns":
		return "", errors.New("a DNS stamp names a server to ask; it cannot be listened on")
	}
	for _, near := range schemes {
		if didYouMean(scheme, []string{near}) != "" {
			return "", fmt.Errorf("unknown scheme %s; did you mean %s?", quote(scheme), quote(near+rest))
		}
	}
	return "", fmt.Errorf("unknown scheme %s; want %s", quote(scheme), enumerate(schemes))
}

// checkHostName says what is wrong with a host name, RFC 1123, section 2.1; underscores are allowed, as resolvers do.
func checkHostName(s string) error {
	name := strings.TrimSuffix(s, ".")
	labels := strings.Split(name, ".")
	last := labels[len(labels)-1]
	switch {
	case name == "":
		return errors.New("the host name is empty")
	case len(name) > 253:
		return fmt.Errorf("%s is longer than a host name can be", quote(s))
	case strings.Trim(last, "0123456789") == "" && last != "":
		return fmt.Errorf("%s is not an IPv4 address", quote(s))
	}
	for _, label := range labels {
		switch {
		case label == "" || len(label) > 63:
			return fmt.Errorf("%s is not a host name: a label has 1 to 63 letters", quote(s))
		case strings.ContainsFunc(label, func(r rune) bool { return r >= 0x80 }):
			return fmt.Errorf("%s is not ASCII; write the name in its xn-- form", quote(s))
		case label[0] == '-' || label[len(label)-1] == '-' || strings.ContainsFunc(label, notLDH):
			return fmt.Errorf("%s is not a host name", quote(s))
		}
	}
	return nil
}

func notLDH(r rune) bool {
	return r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
}

// checkPath says what is wrong with the path of an HTTPS URL. Only upstreams may need percent-encoding.
func checkPath(path string, percent bool) error {
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '%' && percent:
			if i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]) {
				return fmt.Errorf("the path %s has a %q that is not followed by two hexadecimal digits", quote(path), "%")
			}
		case c < 0x80 && notLDH(rune(c)) && !strings.ContainsRune("/.~!$&'()*+,;=:@", rune(c)) || c >= 0x80 || c == '%':
			return fmt.Errorf("the path %s may hold letters, digits and -._~/ only", quote(path))
		}
	}
	parts := strings.Split(path, "/")
	if strings.Contains(path, "//") || slices.Contains(parts, "..") || slices.Contains(parts, ".") {
		return fmt.Errorf("the path %s holds an empty part or dots", quote(path))
	}
	return nil
}

func isHex(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F' }
