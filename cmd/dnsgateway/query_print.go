package main

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// writeQueryDig prints an answer in dig's form, and how it came.
func writeQueryDig(w io.Writer, res *queryResult) {
	m := res.resp
	for _, n := range res.notes {
		fmt.Fprintf(w, ";; %s\n", n)
	}
	fmt.Fprintln(w, ";; Got answer:")
	fmt.Fprintf(w, ";; ->>HEADER<<- opcode: %s, status: %s, id: %d\n", opcodeText(m.Opcode), rcodeText(m.Rcode), m.Id)
	fmt.Fprintf(w, ";; flags: %s; QUERY: %d, ANSWER: %d, AUTHORITY: %d, ADDITIONAL: %d\n",
		strings.Join(flagNames(m), " "), len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra))
	if m.RecursionDesired && !m.RecursionAvailable {
		fmt.Fprintln(w, ";; WARNING: recursion requested but not available")
	}
	fmt.Fprintln(w)
	if opt := m.IsEdns0(); opt != nil {
		writeOPT(w, opt)
	}
	if len(m.Question) > 0 {
		fmt.Fprintln(w, ";; QUESTION SECTION:")
		for _, q := range m.Question {
			fmt.Fprintf(w, ";%s\t\t%s\t%s\n", q.Name, dns.Class(q.Qclass), dns.Type(q.Qtype))
		}
		fmt.Fprintln(w)
	}
	for _, s := range []struct {
		name string
		rrs  []dns.RR
	}{{"ANSWER", m.Answer}, {"AUTHORITY", m.Ns}, {"ADDITIONAL", withoutOPT(m.Extra)}} {
		if len(s.rrs) == 0 {
			continue
		}
		fmt.Fprintf(w, ";; %s SECTION:\n", s.name)
		for _, rr := range s.rrs {
			h := rr.Header()
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\n", printable(h.Name), h.Ttl, dns.Class(h.Class), dns.Type(h.Rrtype), recordData(rr))
		}
		fmt.Fprintln(w)
	}
	writeQueryHow(w, res)
}

// writeQueryHow prints what lies behind the answer.
func writeQueryHow(w io.Writer, res *queryResult) {
	connect := ""
	if res.connect > 0 {
		connect = fmt.Sprintf(" (after %s to connect)", msec(res.connect))
	}
	fmt.Fprintf(w, ";; Query time: %s%s\n", msec(res.elapsed), connect)
	fmt.Fprintf(w, ";; SERVER: %s#%d(%s) (%s)\n", res.addr.Addr(), res.addr.Port(), res.server.text, res.transport)
	fmt.Fprintf(w, ";; WHEN: %s\n", res.when.Format("Mon Jan _2 15:04:05 MST 2006"))
	fmt.Fprintf(w, ";; MSG SIZE  rcvd: %d\n", res.size)
	if h := res.http; h != nil {
		line := fmt.Sprintf("%s status %d", h.Proto, h.Status)
		if h.CacheControl != "" {
			line += ", cache-control " + h.CacheControl
		}
		if h.Age != "" {
			line += ", age " + h.Age
		}
		fmt.Fprintf(w, ";; HTTP: %s\n", printable(line))
	}
	writeQueryTLS(w, res)
}

// writeQueryTLS prints what is known of the connection's TLS, which is nothing if the handshake did not come so far.
func writeQueryTLS(w io.Writer, res *queryResult) {
	t := res.tls
	if t == nil {
		return
	}
	session := "new session"
	if t.Resumed {
		session = "resumed session"
	}
	alpn := "no ALPN"
	if t.ALPN != "" {
		alpn = "ALPN " + printable(t.ALPN)
	}
	group := "no key exchange group"
	if t.Group != "" {
		group = t.Group
	}
	fmt.Fprintf(w, ";; TLS: %s, %s, %s, %s, %s\n", t.Version, t.Cipher, group, alpn, session)
	c := &t.Certificate
	fmt.Fprintf(w, ";; CERTIFICATE: subject: %s\n", orNone(c.Subject))
	fmt.Fprintf(w, ";;   issuer: %s\n", orNone(c.Issuer))
	fmt.Fprintf(w, ";;   names: %s\n", orNone(strings.Join(c.Names, ", ")))
	fmt.Fprintf(w, ";;   valid: %s to %s (%s)\n", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339),
		daysLeft(c.NotAfter.Sub(res.when)))
	fmt.Fprintf(w, ";;   pin: %s\n", c.Pin)
	if t.Verified {
		fmt.Fprintf(w, ";;   verified for %s", t.VerifyName)
		if t.PinMatched {
			fmt.Fprint(w, ", pin matched")
		}
		fmt.Fprintln(w)
		return
	}
	if t.PinMatched {
		fmt.Fprintln(w, ";;   pin matched")
	}
	for _, p := range t.Problems {
		fmt.Fprintf(w, ";;   NOT VERIFIED: %s\n", p)
	}
}

func daysLeft(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < 0:
		return "EXPIRED"
	case d < 2*day:
		return fmt.Sprintf("%d hours left", d/time.Hour)
	}
	return fmt.Sprintf("%d days left", d/day)
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}

// msec prints a duration in dig's unit, but fine enough to tell two cached answers apart.
func msec(d time.Duration) string { return fmt.Sprintf("%.2f msec", d.Seconds()*1000) }

// jsonMsec returns d in milliseconds, to the microsecond.
func jsonMsec(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// writeOPT prints the OPT pseudosection.
func writeOPT(w io.Writer, opt *dns.OPT) {
	flags := ""
	if opt.Do() {
		flags = " do"
	}
	fmt.Fprintf(w, ";; OPT PSEUDOSECTION:\n; EDNS: version: %d, flags:%s; udp: %d\n", opt.Version(), flags, opt.UDPSize())
	for _, o := range opt.Option {
		fmt.Fprintf(w, "; %s\n", optionText(o))
	}
}

// optionText returns an EDNS option as dig prints it.
func optionText(o dns.EDNS0) string {
	switch o := o.(type) {
	case *dns.EDNS0_EDE:
		return "EDE: " + edeText(o)
	case *dns.EDNS0_PADDING:
		return fmt.Sprintf("PAD: (%d bytes)", len(o.Padding))
	case *dns.EDNS0_TCP_KEEPALIVE:
		return fmt.Sprintf("TCP-KEEPALIVE: %.1f secs", float64(o.Timeout)/10) // RFC 7828, section 3.1
	case *dns.EDNS0_COOKIE:
		return "COOKIE: " + o.Cookie
	case *dns.EDNS0_SUBNET:
		return fmt.Sprintf("CLIENT-SUBNET: %s/%d/%d", o.Address, o.SourceNetmask, o.SourceScope)
	case *dns.EDNS0_NSID:
		raw, err := hex.DecodeString(o.Nsid)
		if err != nil {
			return "NSID: " + o.Nsid
		}
		return fmt.Sprintf("NSID: %s (%q)", o.Nsid, printable(string(raw)))
	case *dns.EDNS0_LOCAL:
		return fmt.Sprintf("OPT=%d: %x", o.Code, o.Data)
	}
	return fmt.Sprintf("OPT=%d: %s", o.Option(), printable(o.String()))
}

// edeText returns an extended DNS error as dig prints it, RFC 8914.
func edeText(e *dns.EDNS0_EDE) string {
	text := fmt.Sprint(e.InfoCode)
	if name := edeName(e.InfoCode); name != "" {
		text += " (" + name + ")"
	}
	if e.ExtraText != "" {
		text += ": (" + printable(e.ExtraText) + ")"
	}
	return text
}

func edeName(code uint16) string { return dns.ExtendedErrorCodeToString[code] }

func withoutOPT(rrs []dns.RR) []dns.RR {
	var out []dns.RR
	for _, rr := range rrs {
		if rr.Header().Rrtype != dns.TypeOPT {
			out = append(out, rr)
		}
	}
	return out
}

func flagNames(m *dns.Msg) []string {
	var names []string
	for _, f := range []struct {
		set  bool
		name string
	}{{m.Response, "qr"}, {m.Authoritative, "aa"}, {m.Truncated, "tc"}, {m.RecursionDesired, "rd"},
		{m.RecursionAvailable, "ra"}, {m.AuthenticatedData, "ad"}, {m.CheckingDisabled, "cd"}} {
		if f.set {
			names = append(names, f.name)
		}
	}
	return names
}

func rcodeText(rcode int) string {
	if rcode == dns.RcodeBadVers {
		return "BADVERS" // the library has the number's other name, TSIG's BADSIG
	}
	if s, ok := dns.RcodeToString[rcode]; ok {
		return s
	}
	return fmt.Sprintf("RESERVED%d", rcode)
}

func opcodeText(opcode int) string {
	if s, ok := dns.OpcodeToString[opcode]; ok {
		return s
	}
	return fmt.Sprintf("RESERVED%d", opcode)
}

func questionText(q dns.Question) string {
	if q.Qclass == dns.ClassINET {
		return q.Name + " " + dns.Type(q.Qtype).String()
	}
	return q.Name + " " + dns.Type(q.Qtype).String() + " " + dns.Class(q.Qclass).String()
}

// recordData returns the data of rr in presentation form: what stands behind name, TTL, class and type.
func recordData(rr dns.RR) string {
	if parts := strings.SplitN(rr.String(), "\t", 5); len(parts) == 5 {
		return printable(parts[4])
	}
	return ""
}

// writeQueryShort prints the answer section's data, a record each line.
func writeQueryShort(w io.Writer, res *queryResult) {
	for _, rr := range res.resp.Answer {
		fmt.Fprintln(w, recordData(rr))
	}
}

// The JSON form: one object for one query.
type (
	queryJSON struct {
		Server    string         `json:"server"`
		Address   string         `json:"address,omitempty"`
		Transport string         `json:"transport"`
		Question  questionJSON   `json:"question"`
		Time      string         `json:"time"`
		Error     string         `json:"error,omitempty"`
		ConnectMS float64        `json:"connect_ms,omitempty"`
		QueryMS   float64        `json:"query_ms,omitempty"`
		Size      int            `json:"size,omitempty"`
		Notes     []string       `json:"notes,omitempty"`
		Response  *queryRespJSON `json:"response,omitempty"`
		HTTP      *queryHTTP     `json:"http,omitempty"`
		TLS       *queryTLS      `json:"tls,omitempty"`
	}
	questionJSON struct {
		Name  string `json:"name"`
		Type  string `json:"type"`
		Class string `json:"class"`
	}
	queryRespJSON struct {
		ID         uint16       `json:"id"`
		Opcode     string       `json:"opcode"`
		Rcode      string       `json:"rcode"`
		Flags      []string     `json:"flags"`
		EDNS       *ednsJSON    `json:"edns,omitempty"`
		Answer     []recordJSON `json:"answer"`
		Authority  []recordJSON `json:"authority"`
		Additional []recordJSON `json:"additional"`
	}
	ednsJSON struct {
		Version uint8     `json:"version"`
		UDPSize uint16    `json:"udp_size"`
		DO      bool      `json:"do"`
		EDE     []edeJSON `json:"ede,omitempty"`
		Options []string  `json:"options,omitempty"` // the other ones, as dig prints them
	}
	edeJSON struct {
		Code uint16 `json:"code"`
		Name string `json:"name,omitempty"`
		Text string `json:"text,omitempty"`
	}
	recordJSON struct {
		Name  string `json:"name"`
		TTL   uint32 `json:"ttl"`
		Class string `json:"class"`
		Type  string `json:"type"`
		Data  string `json:"data"`
	}
)

// writeQueryJSON prints one JSON object with everything; err is why no answer came.
func writeQueryJSON(w io.Writer, res *queryResult, err error) error {
	out := queryJSON{
		Server: res.server.text, Transport: res.transport, Time: res.when.Format(time.RFC3339),
		Question: questionJSON{res.question.Name, dns.Type(res.question.Qtype).String(), dns.Class(res.question.Qclass).String()},
		Notes:    res.notes, HTTP: res.http, TLS: res.tls,
		ConnectMS: jsonMsec(res.connect), QueryMS: jsonMsec(res.elapsed), Size: res.size,
	}
	if res.addr != (netip.AddrPort{}) {
		out.Address = res.addr.String()
	}
	if err != nil {
		out.Error = err.Error()
	}
	if m := res.resp; m != nil {
		out.Response = &queryRespJSON{
			ID: m.Id, Opcode: opcodeText(m.Opcode), Rcode: rcodeText(m.Rcode), Flags: flagNames(m), EDNS: ednsOf(m.IsEdns0()),
			Answer: recordsJSON(m.Answer), Authority: recordsJSON(m.Ns), Additional: recordsJSON(withoutOPT(m.Extra)),
		}
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(out)
}

func ednsOf(opt *dns.OPT) *ednsJSON {
	if opt == nil {
		return nil
	}
	e := &ednsJSON{Version: opt.Version(), UDPSize: opt.UDPSize(), DO: opt.Do()}
	for _, o := range opt.Option {
		if ede, ok := o.(*dns.EDNS0_EDE); ok {
			e.EDE = append(e.EDE, edeJSON{ede.InfoCode, edeName(ede.InfoCode), ede.ExtraText})
			continue
		}
		e.Options = append(e.Options, optionText(o))
	}
	return e
}

func recordsJSON(rrs []dns.RR) []recordJSON {
	out := make([]recordJSON, len(rrs))
	for i, rr := range rrs {
		h := rr.Header()
		out[i] = recordJSON{h.Name, h.Ttl, dns.Class(h.Class).String(), dns.Type(h.Rrtype).String(), recordData(rr)}
	}
	return out
}
