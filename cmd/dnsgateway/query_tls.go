package main

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"dnsgateway/gateway/certs"
)

// queryTLS is what is to be told about a TLS connection.
type queryTLS struct {
	Version     string   `json:"version"`
	Cipher      string   `json:"cipher"`
	Group       string   `json:"group"`
	ALPN        string   `json:"alpn"`
	Resumed     bool     `json:"resumed"`
	VerifyName  string   `json:"verify_name"`
	Verified    bool     `json:"verified"`           // the certificate is good for VerifyName, and so are the pins
	Problems    []string `json:"problems,omitempty"` // why it is not
	PinMatched  bool     `json:"pin_matched,omitempty"`
	Certificate struct {
		Subject   string    `json:"subject"`
		Issuer    string    `json:"issuer"`
		Names     []string  `json:"names"`
		NotBefore time.Time `json:"not_before"`
		NotAfter  time.Time `json:"not_after"`
		Pin       string    `json:"pin"` // sha256/BASE64 of its SubjectPublicKeyInfo
	} `json:"certificate"`
}

// queryVerifier checks a server's certificate in place of crypto/tls, so that all that is wrong with it can be told, and
// what it says can be shown even if it is not accepted. It is called from the goroutines that shake hands.
type queryVerifier struct {
	name        string         // what the certificate has to have
	roots       *x509.CertPool // nil means the system's
	pins        [][32]byte     // any one has to match; nil means no pinning
	chainHashes [][]byte       // SHA-256 of TBS certificates, any one of which the chain has to hold; nil means any chain
	insecure    bool           // only the pins count

	mu   sync.Mutex
	seen *queryTLS
	err  error
}

// reset forgets the connection before.
func (v *queryVerifier) reset() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.seen, v.err = nil, nil
}

// result returns what was seen of the last connection, nil if no certificate came, and why it was not accepted.
func (v *queryVerifier) result() (*queryTLS, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.seen, v.err
}

// tlsConfig returns the configuration for one connection, with what ALPN offers; none leaves it to the HTTP transport.
func (c *queryClient) tlsConfig(alpn ...string) *tls.Config {
	return &tls.Config{
		ServerName:         c.verifier.name,
		NextProtos:         alpn,
		MinVersion:         tls.VersionTLS12,
		ClientSessionCache: c.sessions,
		InsecureSkipVerify: true, // VerifyConnection does it, also for sessions that are resumed
		VerifyConnection:   c.verifier.verify,
	}
}

// verify implements tls.Config.VerifyConnection.
func (v *queryVerifier) verify(cs tls.ConnectionState) error {
	leaf := cs.PeerCertificates[0] // crypto/tls does not let a server do without
	seen := &queryTLS{
		Version: tls.VersionName(cs.Version), Cipher: tls.CipherSuiteName(cs.CipherSuite), ALPN: cs.NegotiatedProtocol,
		Resumed: cs.DidResume, VerifyName: v.name,
	}
	if cs.CurveID != 0 { // TLS 1.2 with RSA key exchange has none
		seen.Group = cs.CurveID.String()
	}
	seen.Certificate.Subject = printable(leaf.Subject.String())
	seen.Certificate.Issuer = printable(leaf.Issuer.String())
	seen.Certificate.Names = certificateNames(leaf)
	seen.Certificate.NotBefore, seen.Certificate.NotAfter = leaf.NotBefore, leaf.NotAfter
	seen.Certificate.Pin = certs.Pin(leaf)

	chains, problems := v.check(cs.PeerCertificates, time.Now())
	var err error
	if len(v.pins) > 0 {
		if seen.PinMatched = v.pinned(leaf, chains); !seen.PinMatched {
			err = fmt.Errorf("no --pin matches: the server's key is %s", seen.Certificate.Pin)
			problems = append(problems, err.Error())
		}
	}
	seen.Problems, seen.Verified = problems, len(problems) == 0
	if !v.insecure && !seen.Verified {
		err = errors.New(strings.Join(problems, "; "))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.seen, v.err = seen, err
	return err
}

// check returns the chains that lead from certs[0] to a root, and all that is wrong with it.
func (v *queryVerifier) check(certs []*x509.Certificate, now time.Time) (chains [][]*x509.Certificate, problems []string) {
	leaf := certs[0]
	if leaf.VerifyHostname(v.name) != nil {
		names := "has no names at all"
		if n := certificateNames(leaf); len(n) > 0 {
			names = "is for " + strings.Join(n, ", ")
		}
		problems = append(problems, fmt.Sprintf("wrong name: the certificate %s, not for %s", names, v.name))
	}
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: v.roots, Intermediates: intermediates, CurrentTime: now})
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case err == nil:
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		problems = append(problems, validityProblem(invalid.Cert, now))
	case errors.As(err, &unknown):
		problems = append(problems, fmt.Sprintf("unknown CA: no trusted root signed the certificate of %s (--ca names your own)",
			printable(leaf.Issuer.String())))
	default:
		problems = append(problems, printable(err.Error()))
	}
	if err == nil && len(v.chainHashes) > 0 && !slices.ContainsFunc(chains, v.hashed) {
		problems = append(problems, "no certificate of the chain is one that the DNS stamp names")
	}
	return chains, problems
}

func validityProblem(c *x509.Certificate, now time.Time) string {
	who := printable(c.Subject.String())
	if now.Before(c.NotBefore) {
		return fmt.Sprintf("not yet valid: the certificate of %s begins on %s", who, c.NotBefore.UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("expired: the certificate of %s ended on %s", who, c.NotAfter.UTC().Format(time.RFC3339))
}

// hashed reports whether chain holds a certificate that the stamp names.
func (v *queryVerifier) hashed(chain []*x509.Certificate) bool {
	return slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
		sum := sha256.Sum256(c.RawTBSCertificate)
		return slices.ContainsFunc(v.chainHashes, func(h []byte) bool { return string(h) == string(sum[:]) })
	})
}

// pinned reports whether a pin is that of the leaf's key or of a key on a verified chain. What the server merely sent
// along proves nothing: anyone can send anyone's certificate.
func (v *queryVerifier) pinned(leaf *x509.Certificate, chains [][]*x509.Certificate) bool {
	for _, chain := range append([][]*x509.Certificate{{leaf}}, chains...) {
		for _, c := range chain {
			if slices.Contains(v.pins, sha256.Sum256(c.RawSubjectPublicKeyInfo)) {
				return true
			}
		}
	}
	return false
}

// certificateNames returns the DNS names and addresses that a certificate is for.
func certificateNames(c *x509.Certificate) []string {
	names := make([]string, 0, len(c.DNSNames)+len(c.IPAddresses))
	for _, n := range c.DNSNames {
		names = append(names, printable(n))
	}
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return names
}
