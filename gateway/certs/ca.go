package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"strings"
	"time"
)

const (
	// DefaultCAValidity is how long a development CA lasts: longer than the machine that it was made for.
	DefaultCAValidity = 10 * 365 * 24 * time.Hour
	// DefaultValidity is how long a certificate lasts unless the caller says otherwise.
	DefaultValidity = 90 * 24 * time.Hour
	// MaxValidity is what browsers take from any CA: 398 days less one, CA/Browser Forum Baseline Requirements,
	// section 6.3.2.
	MaxValidity = 397 * 24 * time.Hour

	// backdate lets a certificate serve at once those whose clocks are behind.
	backdate = time.Hour
)

// CAConfig says how a development CA is made. The zero value is ready to use.
type CAConfig struct {
	Name     string           // subject CN; "dnsgateway development CA" by default
	Validity time.Duration    // DefaultCAValidity by default
	Now      func() time.Time // time.Now by default; certificates begin an hour before it
}

// CA is a development CA: one self-signed ECDSA P-256 root that signs leaves directly. Its methods may be called at
// once.
type CA struct {
	cert    *x509.Certificate
	key     crypto.Signer
	certPEM []byte
	now     func() time.Time
}

// NewCA makes a new root with a new key. Nothing is written anywhere.
func NewCA(c CAConfig) (*CA, error) {
	if c.Name == "" {
		c.Name = "dnsgateway development CA"
	}
	if c.Validity == 0 {
		c.Validity = DefaultCAValidity
	}
	if c.Validity < 0 {
		return nil, fmt.Errorf("validity %v is negative", c.Validity)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the CA's key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := c.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: c.Name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(c.Validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true, // it signs leaves only
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making the CA's certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading the CA's certificate: %w", err)
	}
	return &CA{cert: cert, key: key, certPEM: encodeCert(der), now: c.Now}, nil
}

// LoadCA returns the CA that certPEM and keyPEM hold. Of c only Now is used. It is an error if the certificate may not
// sign others or has expired.
func LoadCA(certPEM, keyPEM []byte, c CAConfig) (*CA, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	p := Pair{CertPEM: certPEM, KeyPEM: keyPEM, Source: "CA certificate", KeySource: "CA key"}
	pair, err := p.parse()
	if err != nil {
		return nil, err
	}
	cert := pair.Leaf
	switch {
	case !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fmt.Errorf("CA certificate: %s is not a CA: it may not sign certificates", cert.Subject)
	case c.Now().After(cert.NotAfter):
		return nil, fmt.Errorf("CA certificate: %s expired on %s", cert.Subject, cert.NotAfter.UTC().Format(time.DateOnly))
	}
	return &CA{cert: cert, key: pair.PrivateKey.(crypto.Signer), certPEM: encodeCert(cert.Raw), now: c.Now}, nil
}

// Certificate returns the root. The caller must not modify it.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// CertPEM returns the root in PEM: what clients have to trust. The caller must not modify it.
func (ca *CA) CertPEM() []byte { return ca.certPEM }

// KeyPEM returns the root's private key in PKCS #8 PEM.
func (ca *CA) KeyPEM() ([]byte, error) { return encodeKey(ca.key) }

// Pool returns a new pool that holds the root alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Issue makes a server certificate with a new ECDSA P-256 key for names, which are host names, wildcards and IP
// addresses; at least one. The first name is the subject. validity is optional and is DefaultValidity; it may be at most
// MaxValidity, and no certificate outlives the CA.
func (ca *CA) Issue(names []string, validity ...time.Duration) (certPEM, keyPEM []byte, err error) {
	lasts := DefaultValidity
	if len(validity) > 0 && validity[0] != 0 {
		lasts = validity[0]
	}
	template, err := ca.template(names, lasts)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("signing the certificate: %w", err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, err
	}
	return encodeCert(der), keyPEM, nil
}

// template is the leaf for names that Issue signs.
func (ca *CA) template(names []string, lasts time.Duration) (*x509.Certificate, error) {
	if len(names) == 0 {
		return nil, errors.New("a certificate needs a name")
	}
	if lasts <= 0 || lasts > MaxValidity {
		return nil, fmt.Errorf("validity %v is not between 0 and %d days", lasts, MaxValidity/(24*time.Hour))
	}
	now := ca.now()
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lasts),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if t.NotBefore.Before(ca.cert.NotBefore) {
		t.NotBefore = ca.cert.NotBefore
	}
	if t.NotAfter.After(ca.cert.NotAfter) {
		t.NotAfter = ca.cert.NotAfter
	}
	seen := make(map[string]bool)
	for _, name := range names {
		if err := CheckName(name); err != nil {
			return nil, err
		}
		if addr, err := netip.ParseAddr(name); err == nil {
			addr = addr.Unmap().WithZone("")
			if !seen[addr.String()] {
				t.IPAddresses = append(t.IPAddresses, addr.AsSlice())
			}
			seen[addr.String()] = true
			continue
		}
		name = normal(name)
		if !seen[name] {
			t.DNSNames = append(t.DNSNames, name)
		}
		seen[name] = true
	}
	if cn := strings.TrimSuffix(names[0], "."); len(cn) <= 64 { // ub-common-name, RFC 5280, appendix A.1
		t.Subject.CommonName = cn
	}
	return t, nil
}

// newSerial returns a positive random number of at most 20 octets, RFC 5280, section 4.1.2.2.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 158))
	if err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
