package forward

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// tlsConfig returns the TLS configuration for s. It is made once for each client, so that sessions are resumed.
func (s *Server) tlsConfig(alpn ...string) *tls.Config {
	cfg := &tls.Config{
		ServerName:         s.VerifyName,
		RootCAs:            s.Roots,
		NextProtos:         alpn,
		MinVersion:         tls.VersionTLS12, // RFC 8310, section 9
		ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}
	if s.ClientCert != nil {
		cfg.Certificates = []tls.Certificate{*s.ClientCert}
	}
	if len(s.Pins) > 0 || len(s.tbsHashes) > 0 {
		pins, hashes := s.Pins, s.tbsHashes
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return verifyPins(cs, pins, hashes) }
	}
	return cfg
}

// pinError says that the certificate is sound and still not the one that was pinned.
type pinError struct{ seen string }

func (e *pinError) Error() string { return "no pin matches; the server's is " + e.seen }

// verifyPins looks for a pin among the certificates of the verified chains: the server's own or an authority's. It comes
// after the usual verification, on resumed sessions too. What the server merely sent along counts for nothing.
func verifyPins(cs tls.ConnectionState, pins [][32]byte, tbsHashes [][]byte) error {
	for _, chain := range cs.VerifiedChains {
		for _, cert := range chain {
			tbs := sha256.Sum256(cert.RawTBSCertificate)
			if slices.Contains(pins, sha256.Sum256(cert.RawSubjectPublicKeyInfo)) ||
				slices.ContainsFunc(tbsHashes, func(h []byte) bool { return bytes.Equal(h, tbs[:]) }) {
				return nil
			}
		}
	}
	if len(cs.PeerCertificates) == 0 {
		return &pinError{seen: "none"}
	}
	return &pinError{seen: pinOf(cs.PeerCertificates[0])}
}

// pinOf returns the pin of cert as the file spells it: "sha256/" and the base64 of its SubjectPublicKeyInfo's SHA-256.
func pinOf(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return "sha256/" + base64.StdEncoding.EncodeToString(sum[:])
}

// explainTLS turns the error of a handshake into one that says what is wrong with the certificate, and which pin the
// server showed.
func explainTLS(err error) error {
	var pin *pinError
	if errors.As(err, &pin) {
		return pin
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		return errors.New("the server does not speak TLS")
	}
	var verify *tls.CertificateVerificationError
	if !errors.As(err, &verify) || len(verify.UnverifiedCertificates) == 0 {
		return err
	}
	leaf := verify.UnverifiedCertificates[0]
	var (
		name    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		text    string
	)
	switch {
	case errors.As(err, &name):
		text = fmt.Sprintf("certificate is for %s, not for %q", namesOf(leaf), name.Host)
	case errors.As(err, &unknown):
		text = fmt.Sprintf("certificate is signed by an unknown authority (%q)", leaf.Issuer.String())
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		cert := leaf
		if invalid.Cert != nil {
			cert = invalid.Cert
		}
		text = "certificate expired on " + cert.NotAfter.UTC().Format(time.RFC3339)
		if time.Now().Before(cert.NotBefore) {
			text = "certificate is not valid before " + cert.NotBefore.UTC().Format(time.RFC3339)
		}
	default:
		text = verify.Err.Error()
	}
	return &certError{text: text + "; its pin is " + pinOf(leaf), err: err}
}

// certError is a readable text for err.
type certError struct {
	text string
	err  error
}

func (e *certError) Error() string { return e.text }
func (e *certError) Unwrap() error { return e.err }

// namesOf lists what a certificate is for; at most four, because it is the other side that says how many there are.
func namesOf(cert *x509.Certificate) string {
	var names []string
	for _, n := range cert.DNSNames {
		names = append(names, fmt.Sprintf("%q", n))
	}
	for _, a := range cert.IPAddresses {
		names = append(names, a.String())
	}
	switch {
	case len(names) == 0:
		return "no name"
	case len(names) > 4:
		names = append(names[:4], fmt.Sprintf("%d more", len(names)-4))
	}
	return strings.Join(names, ", ")
}
