package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/miekg/dns"
	"github.com/spf13/cobra"
)

// exitNoAnswer is the exit status when no server answered, as dig has it.
const exitNoAnswer = 9

// queryDefaultServer is a gateway with its built-in settings on this machine.
const queryDefaultServer = "dns://127.0.0.1:8053"

// queryUDPSize is the UDP payload that queries offer; 1232 avoids fragmentation, see https://dnsflagday.net/2020/.
const queryUDPSize = 1232

// queryPadBlock is the block that queries over encrypted transports are padded to, RFC 8467, section 4.1.
const queryPadBlock = 128

// queryFlags are the flags of the query command.
type queryFlags struct {
	ca       string
	pins     []string
	insecure bool
	short    bool
	json     bool
	dnssec   bool
	cd       bool
	tcp      bool
	ignore   bool
	reverse  bool
	get      bool
	resume   bool
	timeout  time.Duration
}

func newQueryCommand() *cobra.Command {
	var f queryFlags
	cmd := &cobra.Command{
		Use:   "query [@server] name [type [class]]",
		Short: "Ask a DNS server over any transport and show what came back, and how",
		Long: `Ask a server and show the answer in dig's form, then the time it took, the transport, and for encrypted ones the TLS
version, cipher suite, key exchange group, ALPN and the server's certificate with its pin.

The server is an address or a name, with dig's meaning (@1.1.1.1, @9.9.9.9:53, @::1), or a URL:
  dns:// udp:// tcp://    plain DNS, port 53
  tls://  quic://         DoT and DoQ, port 853
  https:// h3://          DoH over HTTP/1.1 or HTTP/2, and over HTTP/3; port 443, path /dns-query
  sdns://                 a DNS stamp of one of these (not DNSCrypt)
A certificate is checked against the name behind #, else against the host: @tls://1.1.1.1#one.one.one.one
Without a server it asks ` + queryDefaultServer + `.

Exit status: 0 when an answer came, whatever it says; 9 when none came; 2 when the command line is
wrong, 1 when the --ca file is.`,
		Example: `  dnsgateway query example.com
  dnsgateway query @tls://127.0.0.1:8853#dns.lab.test www.lab.test AAAA --ca ca.pem
  dnsgateway query @https://dns.quad9.net/dns-query example.com HTTPS --json
  dnsgateway query -x 192.0.2.1`,
		Args: cobra.ArbitraryArgs, // which argument means what is told apart by queryArguments
		RunE: func(cmd *cobra.Command, args []string) error { return runQuery(cmd, f, args) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.ca, "ca", "", "PEM file of the roots to trust, in place of the system's")
	flags.StringArrayVar(&f.pins, "pin", nil,
		"sha256/BASE64 of a public key; one of them has to match, besides the other checks (with --insecure: instead)")
	flags.BoolVar(&f.insecure, "insecure", false, "accept any certificate, and show it")
	flags.BoolVar(&f.short, "short", false, "print the records' data only")
	flags.BoolVar(&f.json, "json", false, "print one JSON object")
	flags.BoolVar(&f.dnssec, "dnssec", false, "ask for DNSSEC records (the DO bit)")
	flags.BoolVar(&f.cd, "cd", false, "ask for no validation (the CD bit)")
	flags.BoolVar(&f.tcp, "tcp", false, "with a plain server: ask over TCP")
	flags.BoolVar(&f.ignore, "ignore", false, "show a truncated UDP answer, do not ask again over TCP")
	flags.BoolVarP(&f.reverse, "reverse", "x", false, "name is an address: ask for its PTR record")
	flags.BoolVar(&f.get, "get", false, "with https and h3: GET in place of POST")
	flags.BoolVar(&f.resume, "resume", false, "ask twice, over two connections, and show whether TLS resumed the session")
	flags.DurationVar(&f.timeout, "timeout", 5*time.Second, "time for the whole query")
	cmd.MarkFlagsMutuallyExclusive("short", "json")
	return cmd
}

// runQuery is the query command: it reads the command line, asks and prints.
func runQuery(cmd *cobra.Command, f queryFlags, args []string) error {
	serverText, question, err := queryArguments(args, f.reverse)
	if err != nil {
		return exit(exitUsage, err)
	}
	c, err := newQueryClient(serverText, f)
	if err != nil {
		return exit(exitUsage, err)
	}
	if f.ca != "" {
		if c.verifier.roots, err = readRoots(f.ca); err != nil {
			return exit(exitFailure, fmt.Errorf("--ca: %w", err))
		}
	}
	req := newQueryMessage(question, f, c.server.encrypted())
	res, err := c.ask(cmd.Context(), req)
	if err == nil && f.resume {
		res, err = c.ask(cmd.Context(), req)
	}
	w := cmd.OutOrStdout()
	switch {
	case f.json:
		if werr := writeQueryJSON(w, res, err); werr != nil {
			return exit(exitFailure, werr)
		}
	case err != nil:
		writeQueryTLS(cmd.ErrOrStderr(), res)
	case f.short:
		writeQueryShort(w, res)
	default:
		fmt.Fprintf(w, "; <<>> dnsgateway query <<>> @%s %s\n", c.server.text, questionText(question))
		writeQueryDig(w, res)
	}
	if err != nil {
		// The error may quote the server, as QUIC's do.
		return exit(exitNoAnswer, fmt.Errorf(";; no answer from %s: %s", c.server.text, printable(err.Error())))
	}
	return nil
}

// queryArguments reads [@server] name [type [class]]. The server may stand anywhere, and the type before the name, as
// with dig.
func queryArguments(args []string, reverse bool) (server string, q dns.Question, err error) {
	server = queryDefaultServer
	var words []string
	servers := 0
	for _, a := range args {
		if s, ok := strings.CutPrefix(a, "@"); ok {
			server = s
			servers++
			continue
		}
		if strings.Contains(a, "://") {
			return "", q, fmt.Errorf("%q: a server is written with an @ before it: @%s", a, a)
		}
		words = append(words, a)
	}
	switch {
	case servers > 1:
		return "", q, errors.New("only one @server can be asked")
	case len(words) == 0:
		return "", q, errors.New("a name to ask for is missing: dnsgateway query [@server] name [type [class]]")
	case len(words) > 3:
		return "", q, fmt.Errorf("%q is one argument too many: dnsgateway query [@server] name [type [class]]", words[3])
	}
	q.Qtype, q.Qclass = dns.TypeA, dns.ClassINET
	if len(words) > 1 {
		t, ok := parseType(words[1])
		if first, isType := parseType(words[0]); !ok && isType {
			t, ok = first, true
			words[0] = words[1]
		}
		if !ok {
			return "", q, fmt.Errorf("%q is not a record type; write a mnemonic, a number or TYPE65280", words[1])
		}
		q.Qtype = t
	}
	if len(words) > 2 {
		c, ok := parseClass(words[2])
		if !ok {
			return "", q, fmt.Errorf("%q is not a class; write IN, CH, HS or CLASS3", words[2])
		}
		q.Qclass = c
	}
	if reverse {
		name, err := dns.ReverseAddr(words[0])
		if err != nil {
			return "", q, fmt.Errorf("-x %q: not an IP address", words[0])
		}
		words[0] = name
		if len(words) == 1 {
			q.Qtype = dns.TypePTR
		}
	}
	q.Name, err = queryName(words[0])
	return server, q, err
}

func queryName(s string) (string, error) {
	for _, r := range s {
		if r > unicode.MaxASCII {
			return "", fmt.Errorf("name %q is not ASCII; write the labels in their xn-- form", s)
		}
	}
	name := dns.Fqdn(s)
	if _, ok := dns.IsDomainName(name); !ok || s == "" {
		return "", fmt.Errorf("%q is not a domain name", s)
	}
	// IsDomainName does not see all that the packer refuses, such as an escape that is cut off.
	if _, err := dns.PackDomainName(name, make([]byte, 256), 0, nil, false); err != nil {
		return "", fmt.Errorf("%q is not a domain name", s)
	}
	return name, nil
}

// parseType reads a mnemonic, a number or TYPE and a number (RFC 3597, section 5).
func parseType(s string) (uint16, bool) {
	s = strings.ToUpper(s)
	if t, ok := dns.StringToType[s]; ok {
		return t, true
	}
	return parseNumber(strings.TrimPrefix(s, "TYPE"))
}

func parseClass(s string) (uint16, bool) {
	s = strings.ToUpper(s)
	if c, ok := dns.StringToClass[s]; ok {
		return c, true
	}
	return parseNumber(strings.TrimPrefix(s, "CLASS"))
}

func parseNumber(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

// newQueryClient returns a client for the server that text names. Its errors are mistakes in the command line.
func newQueryClient(text string, f queryFlags) (*queryClient, error) {
	server, err := parseQueryServer(text)
	if err != nil {
		return nil, err
	}
	switch {
	case f.timeout <= 0:
		return nil, errors.New("--timeout has to be above 0")
	case f.tcp && server.encrypted():
		return nil, fmt.Errorf("--tcp is for plain servers, not for %s://", server.scheme)
	case f.get && server.scheme != "https" && server.scheme != "h3":
		return nil, fmt.Errorf("--get is for https:// and h3:// servers, not for %s://", server.scheme)
	case (len(f.pins) > 0 || f.ca != "" || f.insecure || f.resume) && !server.encrypted():
		return nil, fmt.Errorf("--ca, --pin, --insecure and --resume are for encrypted servers, not for %s://", server.scheme)
	}
	if f.tcp {
		server.scheme = "tcp"
	}
	pins := make([][32]byte, len(f.pins))
	for i, p := range f.pins {
		if pins[i], err = parsePin(p); err != nil {
			return nil, err
		}
	}
	c := &queryClient{server: server, timeout: f.timeout, get: f.get, ignoreTC: f.ignore}
	c.verifier = &queryVerifier{name: server.verify, pins: pins, chainHashes: server.chainHashes, insecure: f.insecure}
	if f.resume {
		c.sessions = tls.NewLRUClientSessionCache(1)
	}
	return c, nil
}

// parsePin reads sha256/BASE64, as curl, kdig and the configuration file write it.
func parsePin(s string) (pin [32]byte, err error) {
	b64 := strings.TrimPrefix(s, "sha256/")
	if len(b64) > base64.StdEncoding.EncodedLen(len(pin)) {
		b64 = strings.TrimPrefix(b64, "/") // curl writes two; a second one may also be the first character
	}
	raw, err := base64.StdEncoding.DecodeString(b64)
	if err != nil || len(raw) != len(pin) {
		return pin, fmt.Errorf("--pin %q is not sha256/ and 44 characters of base64", s)
	}
	return [32]byte(raw), nil
}

func readRoots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate in PEM", file)
	}
	return roots, nil
}

// newQueryMessage returns the query for q. Over encrypted transports it is padded, RFC 7830, so that its length says
// little about the name.
func newQueryMessage(q dns.Question, f queryFlags, encrypted bool) *dns.Msg {
	m := new(dns.Msg)
	m.Id = dns.Id()
	m.RecursionDesired = true
	m.AuthenticatedData = true // "tell me whether it is secure", RFC 6840, section 5.7
	m.CheckingDisabled = f.cd
	m.Question = []dns.Question{q}
	m.SetEdns0(queryUDPSize, f.dnssec)
	if encrypted {
		opt := m.IsEdns0()
		pad := &dns.EDNS0_PADDING{}
		opt.Option = append(opt.Option, pad)
		if over := m.Len() % queryPadBlock; over != 0 {
			pad.Padding = make([]byte, queryPadBlock-over)
		}
	}
	return m
}

// printable returns s with everything replaced that could move a terminal's cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r), r == '\t':
			return r
		case unicode.IsSpace(r):
			return ' '
		}
		return unicode.ReplacementChar
	}, s)
}

// queryResult is what came of one query. The fields up to err are set even if no answer came, as far as it went.
type queryResult struct {
	server    queryServer
	question  dns.Question
	transport string         // UDP TCP DoT DoH DoH3 DoQ
	addr      netip.AddrPort // who was asked
	tls       *queryTLS      // nil for plain transports
	notes     []string       // what happened on the way

	resp    *dns.Msg
	size    int           // of the response, octets
	connect time.Duration // until the connection, with its TLS, stood; 0 for UDP
	elapsed time.Duration // from sending the query until the response
	when    time.Time
	http    *queryHTTP // nil for all but DoH
}
