// Package certs owns the gateway's certificates: which one a client is shown, and a development CA that makes them.
//
// It reads PEM that others have loaded and never opens a configured file; [WriteFile] is its only way to the disk. Names
// of clients, client certificates and upstream certificates are not its matter.
//
// What surprises a newcomer: an expired certificate is not an error here. A gateway whose certificate ran out over night
// has to start all the same; to warn of it is for those who read the configuration.
package certs

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
)

// Pair is one certificate chain with its private key.
type Pair struct {
	CertPEM   []byte   // the leaf first, then the intermediates
	KeyPEM    []byte   // PKCS #8, PKCS #1 or SEC 1; not encrypted
	Source    string   // the certificate's file as the user named it, for messages
	KeySource string   // the key's file, for messages; Source when empty
	Names     []string // names, wildcards and addresses that choose this pair besides those in the certificate
}

// Store chooses a certificate by the name that a client asks for. All its methods may be called at once; the whole
// content is one immutable value behind one atomic pointer, so a handshake sees the old pairs or the new ones and never
// a mixture.
type Store struct {
	current atomic.Pointer[content]
}

// content is never written after newContent.
type content struct {
	certs  []*tls.Certificate
	byName map[string][]*tls.Certificate // exact names and "*.parent", lower case, without the root's dot
	byAddr map[netip.Addr][]*tls.Certificate
}

// NewStore checks pairs and returns a store of them. The first pair is the default. All mistakes are reported at once,
// joined; each error names the file that it is about.
func NewStore(pairs []Pair) (*Store, error) {
	s := new(Store)
	if err := s.Replace(pairs); err != nil {
		return nil, err
	}
	return s, nil
}

// Replace checks pairs and puts them in the place of those that s holds. After an error s is as it was.
func (s *Store) Replace(pairs []Pair) error {
	c, err := newContent(pairs)
	if err != nil {
		return err
	}
	s.current.Store(c)
	return nil
}

// Leaves returns the leaf certificates in the order of the pairs. The caller must not modify them.
func (s *Store) Leaves() []*x509.Certificate {
	c := s.current.Load()
	leaves := make([]*x509.Certificate, len(c.certs))
	for i, cert := range c.certs {
		leaves[i] = cert.Leaf
	}
	return leaves
}

// Get returns the certificate for a handshake; it fits tls.Config.GetCertificate and never returns an error. An exact
// name goes before a wildcard, whose star stands for one label (RFC 9525, section 6.3). A client that sends no name
// (RFC 6066, section 3 has no address literals) is shown the certificate for the address that it connected to. Where
// several pairs carry a name, the first one that the client's algorithms allow is taken. Everyone else gets the first
// pair.
func (s *Store) Get(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	c := s.current.Load()
	if h == nil {
		return c.certs[0], nil
	}
	name := normal(h.ServerName)
	if name == "" {
		if h.Conn != nil {
			return choose(h, c.byAddr[localAddr(h.Conn)], c.certs[0]), nil
		}
		return c.certs[0], nil
	}
	found := c.byName[name]
	if found == nil {
		if _, parent, ok := strings.Cut(name, "."); ok {
			found = c.byName["*."+parent]
		}
	}
	if found == nil { // an address is against the RFC, but some clients send it
		if addr, err := netip.ParseAddr(name); err == nil {
			found = c.byAddr[addr.Unmap().WithZone("")]
		}
	}
	return choose(h, found, c.certs[0]), nil
}

// choose returns the first of found that the client can use, the first of found when there is none, or otherwise.
func choose(h *tls.ClientHelloInfo, found []*tls.Certificate, otherwise *tls.Certificate) *tls.Certificate {
	switch len(found) {
	case 0:
		return otherwise
	case 1:
		return found[0]
	}
	for _, cert := range found {
		if h.SupportsCertificate(cert) == nil {
			return cert
		}
	}
	return found[0]
}

func localAddr(conn net.Conn) netip.Addr {
	switch a := conn.LocalAddr().(type) {
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// normal returns name in lower case without the root's dot.
func normal(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

func newContent(pairs []Pair) (*content, error) {
	if len(pairs) == 0 {
		return nil, errors.New("no certificate")
	}
	c := &content{byName: make(map[string][]*tls.Certificate), byAddr: make(map[netip.Addr][]*tls.Certificate)}
	var errs []error
	for i := range pairs {
		cert, err := pairs[i].parse()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c.certs = append(c.certs, cert)
		for _, name := range cert.Leaf.DNSNames {
			c.add(cert, name)
		}
		for _, ip := range cert.Leaf.IPAddresses {
			c.add(cert, ip.String())
		}
		for _, name := range pairs[i].Names {
			if err := CheckName(name); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", pairs[i].certSource(), err))
				continue
			}
			c.add(cert, name)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return c, nil
}

// add lets name, which may be an address, choose cert.
func (c *content) add(cert *tls.Certificate, name string) {
	if addr, err := netip.ParseAddr(name); err == nil {
		addr = addr.Unmap().WithZone("")
		if !contains(c.byAddr[addr], cert) {
			c.byAddr[addr] = append(c.byAddr[addr], cert)
		}
		return
	}
	name = normal(name)
	if !contains(c.byName[name], cert) {
		c.byName[name] = append(c.byName[name], cert)
	}
}

func contains(certs []*tls.Certificate, cert *tls.Certificate) bool {
	return len(certs) > 0 && certs[len(certs)-1] == cert // pairs are added one after the other
}

// CheckName reports whether name can stand in a certificate: an IP address, a host name, or a host name whose first
// label is a star.
func CheckName(name string) error {
	if _, err := netip.ParseAddr(name); err == nil {
		return nil
	}
	rest := strings.TrimPrefix(strings.TrimSuffix(name, "."), "*.")
	if rest == "" || len(rest) > 253 {
		return fmt.Errorf("%q is neither a host name nor an IP address", name)
	}
	for label := range strings.SplitSeq(rest, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.IndexFunc(label, notHost) >= 0 {
			return fmt.Errorf("%q is neither a host name nor an IP address", name)
		}
	}
	return nil
}

// notHost accepts what host names hold in practice: RFC 1123, section 2.1, and the underscore.
func notHost(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '-', r == '_':
		return false
	}
	return true
}

func (p *Pair) certSource() string {
	if p.Source == "" {
		return "certificate"
	}
	return p.Source
}

func (p *Pair) keySource() string {
	switch {
	case p.KeySource != "":
		return p.KeySource
	case p.Source != "":
		return "key of " + p.Source
	}
	return "key"
}

// parse reads both halves and checks that they belong together. Its errors name the file that has to be mended.
func (p *Pair) parse() (*tls.Certificate, error) {
	chain, err := parseChain(p.CertPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.certSource(), err)
	}
	key, err := ParseKey(p.KeyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.keySource(), err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return nil, fmt.Errorf("%s: a %T cannot be used in TLS", p.keySource(), key)
	}
	for i, cert := range chain {
		if !public.Equal(cert.PublicKey) {
			continue
		}
		if i > 0 {
			return nil, fmt.Errorf("%s: the key belongs to certificate %d (%s); the server's own certificate has to come first",
				p.certSource(), i+1, cert.Subject)
		}
		raw := make([][]byte, len(chain))
		for j := range chain {
			raw[j] = chain[j].Raw
		}
		return &tls.Certificate{Certificate: raw, PrivateKey: key, Leaf: chain[0]}, nil
	}
	return nil, fmt.Errorf("%s: the key does not belong to the certificate in %s (%s)", p.keySource(), p.certSource(),
		chain[0].Subject)
}

// parseChain returns all certificates in data, at least one.
func parseChain(data []byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	var other string
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			other = block.Type
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading certificate %d: %w", len(chain)+1, err)
		}
		chain = append(chain, cert)
	}
	switch {
	case len(chain) > 0:
		return chain, nil
	case strings.HasSuffix(other, "PRIVATE KEY"):
		return nil, errors.New("it holds a private key and no certificate; are cert and key swapped?")
	case other != "":
		return nil, fmt.Errorf("it holds a %s block and no certificate", other)
	case len(bytes.TrimSpace(data)) == 0:
		return nil, errors.New("it is empty")
	}
	return nil, errors.New("it holds no certificate in PEM form")
}

// ParseKey returns the first private key in data, which is PEM of PKCS #8, PKCS #1 or SEC 1.
func ParseKey(data []byte) (crypto.Signer, error) {
	var other string
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
			if strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
				return nil, errEncrypted
			}
			return parseKeyBlock(block)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errEncrypted
		}
		other = block.Type // "EC PARAMETERS" stands before a key of openssl ecparam
	}
	switch {
	case other == "CERTIFICATE":
		return nil, errors.New("it holds a certificate and no private key; are cert and key swapped?")
	case other != "":
		return nil, fmt.Errorf("it holds a %s block and no private key", other)
	case len(bytes.TrimSpace(data)) == 0:
		return nil, errors.New("it is empty")
	}
	return nil, errors.New("it holds no private key in PEM form")
}

var errEncrypted = errors.New(
	"the private key is encrypted; decrypt it with openssl pkey, the gateway cannot ask for a password")

func parseKeyBlock(block *pem.Block) (crypto.Signer, error) {
	var key any
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("reading private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", key)
	}
	return signer, nil
}

// Pin returns the SPKI pin of cert as the file's `pin` and kdig's +tls-pin (behind the prefix) have it: "sha256/" and
// the base64 SHA-256 of SubjectPublicKeyInfo, RFC 7858, section 4.2.
func Pin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return "sha256/" + base64.StdEncoding.EncodeToString(sum[:])
}
