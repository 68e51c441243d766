package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// pairItem is a KeyPair while it is being read.
type pairItem struct {
	KeyPair
	cert, key value // zero if the key is not there
}

var pairEntries = []entry[pairItem]{
	{"cert", func(v value, p *pairItem) {
		p.cert = v
		p.Cert, p.CertFile, _ = v.secret("certificate")
	}},
	{"key", func(v value, p *pairItem) {
		p.key = v
		p.Key, p.KeyFile, _ = v.secret("key")
	}},
}

var tlsKeys = newTable("tls[]", append(slices.Clone(pairEntries), entry[pairItem]{"names", readNames})...)

var clientCertKeys = newTable("upstreams.*.try[][].client_cert", pairEntries...)

// secret reads what v names: "file:PATH", "env:NAME", or a path. what says what is expected there. from is the file, or
// "env:NAME".
func (v value) secret(what string) (data []byte, from string, ok bool) {
	s, ok := v.text("a file, file:PATH or env:NAME")
	if !ok {
		return nil, "", false
	}
	if strings.Contains(s, "-----BEGIN") {
		v.hidden("the %s itself stands here; write the name of a file that holds it, or env:NAME", what)
		return nil, "", false
	}
	if name, env := strings.CutPrefix(s, "env:"); env {
		text, set := v.l.opts.LookupEnv(name)
		switch {
		case name == "":
			v.errorf("want env:NAME, got %s", quote(s))
		case !set:
			v.errorf("the environment has no %s", name)
		case strings.TrimSpace(text) == "":
			v.errorf("the environment's %s is empty", name)
		default:
			return []byte(text), s, true
		}
		return nil, "", false
	}
	name := strings.TrimPrefix(s, "file:")
	if name == "" {
		v.errorf("the name of the file is empty")
		return nil, "", false
	}
	file := v.resolve(name)
	data, err := v.l.disk.read(file, false)
	if err != nil {
		hint := ""
		if strings.HasPrefix(name, "~") {
			hint = `; "~" means nothing here, write the whole path`
		} else if v.path == "tls.cert" || strings.HasPrefix(v.path, "tls[") {
			hint = "; `dnsgateway cert` makes certificates"
		}
		v.errorf("%s: %s%s", file, reason(err), hint)
		return nil, "", false
	}
	if !slices.Contains(v.l.files, file) {
		v.l.files = append(v.l.files, file)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		v.errorf("%s is empty", file)
		return nil, "", false
	}
	return data, file, true
}

// hidden is errorf for a value that must not be shown.
func (v value) hidden(format string, args ...any) {
	p := v.place()
	p.Text = ""
	v.l.errs = append(v.l.errs, &Error{Place: p, Msg: fmt.Sprintf(format, args...)})
}

// from names where a secret came from.
func (v value) from() string {
	if strings.HasPrefix(v.n.text, "env:") {
		return v.n.text
	}
	return v.resolve(strings.TrimPrefix(v.n.text, "file:"))
}

// readTLS reads `tls`.
func readTLS(v value, d *draft) {
	names := make(map[string]Place)
	for _, item := range v.list("pair of cert and key") {
		p := pairItem{}
		if !tlsKeys.decode(item, &p) || !p.check(item) {
			continue
		}
		for _, name := range p.Names {
			if first, ok := names[name]; ok {
				item.errorf("the name %q already chooses the certificate at %s", name, lineOf(first, p.Place))
			}
			names[name] = p.Place
		}
		d.cfg.TLS = append(d.cfg.TLS, p.KeyPair)
	}
}

// check finds out whether the certificate and the key are there and belong together. v is the mapping they stand in.
func (p *pairItem) check(v value) bool {
	p.Place = v.place()
	for _, k := range []struct {
		name string
		at   value
	}{{"cert", p.cert}, {"key", p.key}} {
		if f := v.n.field(k.name); f == nil {
			v.errorf("the key %q is missing; a certificate takes both cert and key", k.name)
		}
	}
	if p.Cert == nil || p.Key == nil {
		return false
	}
	switch certs, keys := pemBlocks(p.Cert), pemBlocks(p.Key); {
	case certs["CERTIFICATE"] == 0 && certs["key"] > 0:
		p.cert.errorf("%s holds a key and no certificate; are cert and key swapped?", p.cert.from())
		return false
	case certs["CERTIFICATE"] == 0:
		p.cert.errorf("%s holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)", p.cert.from())
		return false
	case keys["encrypted"] > 0:
		p.key.errorf("%s holds an encrypted key; nobody is there to type its password", p.key.from())
		return false
	case keys["key"] == 0:
		p.key.errorf("%s holds no key in PEM form (-----BEGIN PRIVATE KEY-----)", p.key.from())
		return false
	}
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		p.problem(strings.TrimPrefix(err.Error(), "tls: "))
		return false
	}
	for i, der := range pair.Certificate[1:] {
		if _, err := x509.ParseCertificate(der); err != nil {
			p.cert.errorf("%s: certificate %d of the chain cannot be read: %s", p.cert.from(), i+2, strings.TrimPrefix(err.Error(), "x509: "))
			return false
		}
	}
	now, day := v.l.opts.Now(), "2006-01-02"
	switch leaf := pair.Leaf; {
	case now.After(leaf.NotAfter):
		p.cert.warnf("%s: the certificate has expired on %s", p.cert.from(), leaf.NotAfter.UTC().Format(day))
	case now.Before(leaf.NotBefore):
		p.cert.warnf("%s: the certificate is not valid before %s", p.cert.from(), leaf.NotBefore.UTC().Format(day))
	}
	return true
}

// problem reports in our words what crypto/tls has against the pair.
func (p *pairItem) problem(msg string) {
	switch {
	case strings.Contains(msg, "does not match"):
		p.key.errorf("%s is not the key of the certificate in %s", p.key.from(), p.cert.from())
	case strings.Contains(msg, "private key"):
		p.key.errorf("%s: %s", p.key.from(), msg)
	default:
		p.cert.errorf("%s: the certificate cannot be read: %s", p.cert.from(), msg)
	}
}

// pemBlocks counts the PEM blocks of data: "CERTIFICATE", and "key" or "encrypted" for keys.
func pemBlocks(data []byte) map[string]int {
	count := make(map[string]int)
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return count
		}
		switch {
		case strings.HasPrefix(b.Type, "ENCRYPTED") || b.Headers["DEK-Info"] != "":
			count["encrypted"]++
		case strings.HasSuffix(b.Type, "PRIVATE KEY"):
			count["key"]++
		default:
			count[b.Type]++
		}
	}
}

// readNames reads the names that choose a certificate.
func readNames(v value, p *pairItem) {
	for _, item := range v.list("name") {
		s, ok := item.text("a host name or an address")
		if !ok {
			continue
		}
		name := strings.ToLower(strings.TrimSuffix(s, "."))
		if addr, err := netip.ParseAddr(s); err == nil {
			name = addr.Unmap().String()
		} else if err := checkHostName(strings.TrimPrefix(name, "*.")); err != nil {
			item.errorf("%v", err)
			continue
		}
		if slices.Contains(p.Names, name) {
			item.errorf("%s is already in the list", quote(s))
			continue
		}
		p.Names = append(p.Names, name)
	}
}

// roots reads the certificates of the only authorities that an upstream may have.
func (v value) roots() (data []byte, file string, ok bool) {
	data, file, ok = v.secret("certificate")
	if !ok {
		return nil, "", false
	}
	n := 0
	for b, rest := pem.Decode(data); b != nil; b, rest = pem.Decode(rest) {
		if b.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(b.Bytes); err != nil {
			v.errorf("%s: a certificate cannot be read: %v", v.from(), err)
			return nil, "", false
		}
		n++
	}
	if n == 0 {
		v.errorf("%s holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)", v.from())
		return nil, "", false
	}
	return data, file, true
}

// parsePin reads "sha256/BASE64", the form of RFC 7469 that curl, kdig and `dnsgateway query` print.
func parsePin(s string) (pin [32]byte, err error) {
	text, prefix := strings.CutPrefix(s, "sha256/")
	sum, err := base64.StdEncoding.DecodeString(text)
	if err == nil && len(sum) == len(pin) {
		copy(pin[:], sum)
		if !prefix {
			err = fmt.Errorf("a pin starts with its hash; did you mean %q?", "sha256/"+s)
		}
		return pin, err
	}
	if sum, err := hex.DecodeString(strings.ReplaceAll(text, ":", "")); err == nil && len(sum) == len(pin) {
		guess := "sha256/" + base64.StdEncoding.EncodeToString(sum)
		return pin, fmt.Errorf("a pin is in base64, not hexadecimal; did you mean %q?", guess)
	}
	if err != nil || !prefix {
		return pin, errors.New("want a pin such as \"sha256/\" and 44 letters of base64; `dnsgateway query` shows a server's")
	}
	return pin, fmt.Errorf("the hash of a pin has 32 octets, not %d", len(sum))
}
