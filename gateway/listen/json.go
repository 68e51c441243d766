package listen

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// The JSON form of DoH, application/dns-json, as the big public resolvers serve it; RFC 8427 is another one. A request
// is a GET with these parameters:
//
//	name  the domain name in presentation form, ASCII; required
//	type  a mnemonic in any case, TYPE123 or 123; A by default
//	cd    1 or true sets the CD bit; 0, false or nothing does not
//	do    the same for the DO bit; DNSSEC records are in the answer only with it
//
// Others (ct, edns_client_subnet, random_padding, ...) mean nothing here. A request becomes a query in wire form and
// goes the way of all queries, so that JSON has no policy of its own.

var (
	errJSONName   = &refusal{http.StatusBadRequest, "name is missing or not a domain name"}
	errJSONTwice  = &refusal{http.StatusBadRequest, "a parameter is there more than once"}
	errJSONType   = &refusal{http.StatusBadRequest, "type is not a record type"}
	errJSONSwitch = &refusal{http.StatusBadRequest, "do and cd are 0, 1, false or true"}
)

// jsonUDPSize is what our queries offer; over HTTP it means nothing, but the field has to have a value.
const jsonUDPSize = 1232

// acceptsJSON reports whether the client asked for JSON by name in one of its Accept fields.
func acceptsJSON(accept []string) bool {
	for _, line := range accept {
		for part := range strings.SplitSeq(line, ",") {
			media, _, _ := mime.ParseMediaType(part)
			if media == mediaJSON {
				return true
			}
		}
	}
	return false
}

// jsonQuery appends the query that params ask for to dst.
func jsonQuery(dst []byte, params url.Values) ([]byte, *refusal) {
	for _, key := range [...]string{"name", "type", "do", "cd"} {
		if len(params[key]) > 1 {
			return dst, errJSONTwice
		}
	}
	name, err := jsonName(params.Get("name"))
	if err != nil {
		return dst, err
	}
	qtype, err := jsonType(params.Get("type"))
	if err != nil {
		return dst, err
	}
	do, err := jsonSwitch(params.Get("do"))
	if err != nil {
		return dst, err
	}
	cd, err := jsonSwitch(params.Get("cd"))
	if err != nil {
		return dst, err
	}
	// AD asks to be told whether the answer is secure (RFC 6840, section 5.7): JSON has a field for it.
	m := &dns.Msg{MsgHdr: dns.MsgHdr{RecursionDesired: true, AuthenticatedData: true, CheckingDisabled: cd}}
	m.Question = []dns.Question{{Name: name, Qtype: qtype, Qclass: dns.ClassINET}}
	m.SetEdns0(jsonUDPSize, do) // also without DO, for the extended errors
	packed, perr := m.Pack()
	if perr != nil {
		return dst, errJSONName
	}
	return append(dst, packed...), nil
}

func jsonName(s string) (string, *refusal) {
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return "", errJSONName
		}
	}
	if s == "" {
		return "", errJSONName
	}
	if _, ok := dns.IsDomainName(s); !ok {
		return "", errJSONName
	}
	return dns.Fqdn(s), nil
}

func jsonType(s string) (uint16, *refusal) {
	if s == "" {
		return dns.TypeA, nil
	}
	s = strings.ToUpper(s)
	if t, ok := dns.StringToType[s]; ok && t != dns.TypeNone {
		return t, nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "TYPE"), 10, 16)
	if err != nil || n == 0 {
		return 0, errJSONType
	}
	return uint16(n), nil
}

func jsonSwitch(s string) (bool, *refusal) {
	switch strings.ToLower(s) {
	case "", "0", "false":
		return false, nil
	case "1", "true":
		return true, nil
	}
	return false, errJSONSwitch
}

// jsonMessage is a response. Comment is Cloudflare's form of extended errors and extended_dns_errors is Google's.
type jsonMessage struct {
	Status    int // the extended RCODE
	TC        bool
	RD        bool
	RA        bool
	AD        bool
	CD        bool
	Question  []jsonQuestion
	Answer    []jsonRecord `json:",omitempty"`
	Authority []jsonRecord `json:",omitempty"`
	Comment   []string     `json:",omitempty"`
	Errors    []jsonEDE    `json:"extended_dns_errors,omitempty"`
}

type jsonQuestion struct {
	Name string `json:"name"`
	Type uint16 `json:"type"`
}

type jsonRecord struct {
	Name string `json:"name"`
	Type uint16 `json:"type"`
	TTL  uint32
	Data string `json:"data"` // RDATA in presentation form
}

type jsonEDE struct {
	Code uint16 `json:"info_code"`
	Text string `json:"extra_text,omitempty"`
}

// jsonResponse renders a response of the Handler. An error means that it was none.
func jsonResponse(msg []byte) ([]byte, error) {
	var m dns.Msg
	if err := m.Unpack(msg); err != nil {
		return nil, fmt.Errorf("unpacking a response: %w", err)
	}
	j := jsonMessage{
		Status: m.Rcode, TC: m.Truncated, RD: m.RecursionDesired, RA: m.RecursionAvailable, AD: m.AuthenticatedData,
		CD: m.CheckingDisabled, Answer: jsonRecords(m.Answer), Authority: jsonRecords(m.Ns),
	}
	for _, q := range m.Question {
		j.Question = append(j.Question, jsonQuestion{Name: q.Name, Type: q.Qtype})
	}
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				j.Errors = append(j.Errors, jsonEDE{Code: e.InfoCode, Text: e.ExtraText})
				j.Comment = append(j.Comment, jsonComment(e))
			}
		}
	}
	return json.Marshal(j)
}

func jsonComment(e *dns.EDNS0_EDE) string {
	s := fmt.Sprintf("EDE(%d)", e.InfoCode)
	if known, ok := dns.ExtendedErrorCodeToString[e.InfoCode]; ok {
		s += ": " + known
	}
	if e.ExtraText != "" {
		s += " (" + e.ExtraText + ")"
	}
	return s
}

func jsonRecords(rrs []dns.RR) []jsonRecord {
	var records []jsonRecord
	for _, rr := range rrs {
		h := rr.Header()
		records = append(records, jsonRecord{Name: h.Name, Type: h.Rrtype, TTL: h.Ttl, Data: rdata(rr)})
	}
	return records
}

// rdata returns the record's data in presentation form: what String puts behind the four fields of its header.
func rdata(rr dns.RR) string {
	if u, ok := rr.(*dns.RFC3597); ok {
		b, _ := hex.DecodeString(u.Rdata)
		return strings.TrimSpace(fmt.Sprintf(`\# %d %X`, len(b), b)) // RFC 3597, section 5
	}
	fields := strings.SplitN(rr.String(), "\t", 5)
	if len(fields) < 5 {
		return ""
	}
	return fields[4]
}

// jsonError is the body of an HTTP error.
func jsonError(e *refusal) []byte {
	body, _ := json.Marshal(struct {
		Error string `json:"error"`
	}{e.text})
	return body
}
