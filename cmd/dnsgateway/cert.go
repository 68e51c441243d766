package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dnsgateway/gateway/certs"
)

// certOptions are the cert command's arguments.
type certOptions struct {
	names         []string // none: certNames
	dir           string
	caCert, caKey string // empty: ca.crt and ca.key in dir
	days          int
	force         bool
}

func newCertCommand() *cobra.Command {
	var o certOptions
	cmd := &cobra.Command{
		Use:   "cert [name or address]...",
		Short: "Make a development CA and a server certificate",
		Long: `Make a development CA and a server certificate from it, and print the YAML to paste and the lines for clients.
Without names the certificate is for localhost, this machine's name, 127.0.0.1 and ::1.

A CA that is in the folder already is used again, so that clients have to trust it once. A server certificate of that
CA is replaced by a new one; anything else that is in the way is left alone unless --force is given. The CA itself is
never overwritten.`,
		Example: `  dnsgateway cert
  dnsgateway cert --dir pki dns.example.org '*.lan' 192.168.1.2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.names = args
			return runCert(cmd.OutOrStdout(), o)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.dir, "dir", ".", "folder for the files; it is made if it is not there")
	flags.StringVar(&o.caCert, "ca-cert", "",
		"certificate of a CA to use (default: ca.crt in the folder, made if it is not there)")
	flags.StringVar(&o.caKey, "ca-key", "", "its private key (default: ca.key in the folder)")
	flags.IntVar(&o.days, "days", int(certs.DefaultValidity/(24*time.Hour)), "validity of the server certificate, at most 397")
	flags.BoolVar(&o.force, "force", false, "overwrite server.crt and server.key, wherever they are from")
	cmd.MarkFlagsRequiredTogether("ca-cert", "ca-key")
	return cmd
}

// certFiles are the paths that runCert works on, and what it made of them.
type certFiles struct {
	caCert, caKey, cert, key string
	newCA, replaced          bool
}

func runCert(w io.Writer, o certOptions) error {
	if limit := int(certs.MaxValidity / (24 * time.Hour)); o.days < 1 || o.days > limit {
		return fmt.Errorf("--days %d is not between 1 and %d", o.days, limit)
	}
	for _, name := range o.names {
		if err := certs.CheckName(name); err != nil {
			return err
		}
	}
	names := o.names
	if len(names) == 0 {
		names = certNames(os.Hostname())
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return exit(exitFailure, err)
	}
	f := certFiles{
		caCert: o.caCert, caKey: o.caKey,
		cert: filepath.Join(o.dir, "server.crt"), key: filepath.Join(o.dir, "server.key"),
	}
	ca, err := f.openCA(o.dir)
	if err != nil {
		return exit(exitFailure, err)
	}
	if err := f.mayWrite(ca, o.force); err != nil {
		return exit(exitFailure, err)
	}
	leaf, err := f.write(ca, names, time.Duration(o.days)*24*time.Hour)
	if err != nil {
		return exit(exitFailure, err)
	}
	f.print(w, names, leaf)
	return nil
}

// certNames returns the names of a certificate for this machine.
func certNames(hostname string, err error) []string {
	names := []string{"localhost"}
	if err == nil && certs.CheckName(hostname) == nil && !strings.EqualFold(hostname, "localhost") {
		names = append(names, hostname)
	}
	return append(names, "127.0.0.1", "::1")
}

// openCA reads the CA that the user named, or the one in dir, or makes a new one without writing it.
func (f *certFiles) openCA(dir string) (*certs.CA, error) {
	mayMake := f.caCert == ""
	if mayMake {
		f.caCert, f.caKey = filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	}
	certPEM, errCert := os.ReadFile(f.caCert)
	keyPEM, errKey := os.ReadFile(f.caKey)
	noCert, noKey := errors.Is(errCert, fs.ErrNotExist), errors.Is(errKey, fs.ErrNotExist)
	switch {
	case mayMake && noCert && noKey:
		f.newCA = true
		return certs.NewCA(certs.CAConfig{})
	case mayMake && noKey && errCert == nil:
		return nil, fmt.Errorf("%s is there and %s is not: nothing can be signed; move the first away to make a new CA",
			f.caCert, f.caKey)
	case mayMake && noCert && errKey == nil:
		return nil, fmt.Errorf("%s is there and %s is not; move the first away to make a new CA", f.caKey, f.caCert)
	}
	if err := errors.Join(errCert, errKey); err != nil {
		return nil, err
	}
	ca, err := certs.LoadCA(certPEM, keyPEM, certs.CAConfig{})
	if err != nil {
		return nil, fmt.Errorf("%s, %s: %w", f.caCert, f.caKey, err)
	}
	return ca, nil
}

// mayWrite reports why the server's certificate and key may not be written: something is there that ca has not made.
func (f *certFiles) mayWrite(ca *certs.CA, force bool) error {
	_, errCert := os.Lstat(f.cert)
	_, errKey := os.Lstat(f.key)
	noCert, noKey := errors.Is(errCert, fs.ErrNotExist), errors.Is(errKey, fs.ErrNotExist)
	if noCert && noKey {
		return nil
	}
	f.replaced = true
	if force {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err == nil && pair.Leaf.CheckSignatureFrom(ca.Certificate()) == nil {
		return nil
	}
	there := f.cert
	if noCert {
		there = f.key
	}
	return fmt.Errorf("%s is there and was not made with this CA; --force overwrites %s and %s", there, f.cert, f.key)
}

// write issues a certificate and writes what is new, keys first: a key without its certificate does no harm.
func (f *certFiles) write(ca *certs.CA, names []string, validity time.Duration) (*x509.Certificate, error) {
	certPEM, keyPEM, err := ca.Issue(names, validity)
	if err != nil {
		return nil, err
	}
	store, err := certs.NewStore([]certs.Pair{{CertPEM: certPEM, KeyPEM: keyPEM}})
	if err != nil {
		return nil, err
	}
	if f.newCA {
		caKey, err := ca.KeyPEM()
		if err != nil {
			return nil, err
		}
		if err := certs.WriteFile(f.caKey, caKey, 0o600); err != nil {
			return nil, err
		}
		if err := certs.WriteFile(f.caCert, ca.CertPEM(), 0o644); err != nil {
			return nil, err
		}
	}
	if err := certs.WriteFile(f.key, keyPEM, 0o600); err != nil {
		return nil, err
	}
	return store.Leaves()[0], certs.WriteFile(f.cert, certPEM, 0o644)
}

// print says what was written, what to put into the file, and what to type on a client.
func (f *certFiles) print(w io.Writer, names []string, leaf *x509.Certificate) {
	made, issued := "used again", "new"
	if f.newCA {
		made = "new"
	}
	if f.replaced {
		issued = "replaced"
	}
	name, addr := clientTarget(names)
	url := "https://" + net.JoinHostPort(name, "8443") + "/dns-query"
	ca, pin := shellWord(f.caCert), certs.Pin(leaf)
	fmt.Fprintf(w, `The CA (%s):
  %s  clients have to trust it
  %s  its private key: who has it can speak for any name to those clients
The server's certificate (%s), for %s, until %s:
  %s
  %s

For config.yaml in this folder:

listen: ["dns://:8053", "tls://:8853", "https://:8443/dns-query", "quic://:8853"]
tls: {cert: %s, key: %s}

For clients that have %s:

  kdig @%s -p 8853 +tls-ca=%s +tls-hostname=%s example.com
  curl --cacert %s -H 'accept: application/dns-json' %s
  dnsgateway query --ca %s @tls://%s example.com

For clients that know the server's key instead (it changes with each new certificate), %s:

  kdig @%s -p 8853 +tls-pin=%s example.com
`,
		made, f.caCert, f.caKey, issued, strings.Join(names, ", "), leaf.NotAfter.UTC().Format(time.DateOnly), f.cert, f.key,
		yamlWord(f.cert), yamlWord(f.key), f.caCert,
		addr, ca, name, ca, shellWord(url+"?name=example.com&type=A"), ca, net.JoinHostPort(name, "8853"),
		pin, addr, strings.TrimPrefix(pin, "sha256/"))
}

// clientTarget chooses from the names of a certificate the one to verify and the address to connect to.
func clientTarget(names []string) (name, addr string) {
	for _, n := range names {
		_, err := netip.ParseAddr(n)
		switch {
		case err == nil && addr == "":
			addr = n
		case err != nil && name == "" && !strings.HasPrefix(n, "*."):
			name = strings.TrimSuffix(n, ".")
		}
	}
	switch {
	case name == "" && addr == "": // wildcards only
		name = "dns" + strings.TrimPrefix(names[0], "*")
		return name, name
	case name == "":
		return addr, addr
	case addr == "":
		return name, name
	}
	return name, addr
}

// shellWord returns s as one word of a POSIX shell.
func shellWord(s string) string {
	if s != "" && strings.IndexFunc(s, notPlain) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// yamlWord returns s as one scalar of a YAML flow mapping.
func yamlWord(s string) string {
	if s != "" && strings.IndexFunc(s, notPlain) < 0 {
		return s
	}
	return strconv.Quote(s)
}

// notPlain accepts what means nothing to a shell or in YAML, inside a path or a URL.
func notPlain(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune("/._-+", r):
		return false
	}
	return true
}
