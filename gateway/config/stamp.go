package config

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// The protocols of DNS stamps that can be asked; see https://dnscrypt.info/stamps-specifications.
const (
	stampPlain    = 0
	stampDNSCrypt = 1
	stampDoH      = 2
	stampDoT      = 3
	stampDoQ      = 4
)

// stamp is what a DNS stamp says as far as the checks need it.
type stamp struct {
	protocol byte
	addr     netip.AddrPort // the zero value if the stamp has a host name only
}

var stampPorts = map[byte]uint16{stampPlain: 53, stampDNSCrypt: 443, stampDoH: 443, stampDoT: 853, stampDoQ: 853}

var errStampShort = errors.New("the stamp ends too early; is it copied to its end?")

// parseStamp reads an sdns:// URL.
func parseStamp(s string) (*stamp, error) {
	st := new(stamp)
	data, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(s[len("sdns://"):], "="))
	switch {
	case err != nil:
		return st, errors.New("the stamp is not base64url; is it copied whole?")
	case len(data) < 10: // protocol, 8 octets of properties, and an address
		return st, errStampShort
	}
	st.protocol = data[0]
	port, ok := stampPorts[st.protocol]
	if !ok {
		return st, fmt.Errorf("the stamp is for protocol 0x%02x; want plain DNS, DNSCrypt, DoH, DoT or DoQ", st.protocol)
	}
	r := stampReader{data: data[9:]}
	addr := string(r.next())
	switch st.protocol {
	case stampDNSCrypt:
		if key := r.next(); !r.short && len(key) != 32 {
			return st, fmt.Errorf("the stamp has a key of %d octets; want 32", len(key))
		}
		r.next() // the provider's name
	case stampDoH, stampDoT, stampDoQ:
		r.set() // hashes
		r.next()
		if st.protocol == stampDoH {
			r.next()
		}
		if len(r.data) > 0 {
			r.set() // bootstrap addresses
		}
	}
	switch {
	case r.short:
		return st, errStampShort
	case len(r.data) > 0:
		return st, errors.New("the stamp goes on behind its end; is there something pasted to it?")
	}
	return st, st.setAddr(addr, port)
}

// setAddr reads "", "address", "address:port" or ":port".
func (st *stamp) setAddr(s string, port uint16) error {
	host := s
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		n, err := parsePort(s[i+1:])
		if err != nil || n == 0 {
			return fmt.Errorf("the stamp's address %s is none", quote(s))
		}
		host, port = s[:i], n
	}
	host = strings.Trim(host, "[]")
	if host == "" && st.protocol >= stampDoH {
		return nil
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return fmt.Errorf("the stamp's address %s is none", quote(s))
	}
	st.addr = netip.AddrPortFrom(addr.Unmap(), port)
	return nil
}

// stampReader takes length-prefixed fields off data.
type stampReader struct {
	data  []byte
	short bool
}

func (r *stampReader) next() []byte {
	if len(r.data) == 0 || len(r.data) <= int(r.data[0]) {
		r.short = true
		return nil
	}
	n := int(r.data[0])
	field := r.data[1 : 1+n]
	r.data = r.data[1+n:]
	return field
}

// set takes a list of fields; the high bit of a length says that another one follows.
func (r *stampReader) set() {
	for more := true; more && !r.short; {
		if len(r.data) == 0 {
			r.short = true
			return
		}
		more = r.data[0]&0x80 != 0
		n := int(r.data[0] & 0x7f)
		if len(r.data) <= n {
			r.short = true
			return
		}
		r.data = r.data[1+n:]
	}
}
