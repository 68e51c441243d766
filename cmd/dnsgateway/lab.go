package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/miekg/dns"
	"github.com/spf13/cobra"

	"dnsgateway/gateway"
	"dnsgateway/gateway/certs"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/lab"
)

// labOptions are the lab command's arguments.
type labOptions struct {
	faults []string
	dir    string // "": a temporary folder
	ports  int
}

// The ports of the gateway in a lab, above --ports.
const (
	labDNS    = 53
	labAdmin  = 81
	labHTTPS  = 443
	labTLS    = 853 // and DoQ on UDP
	labPorts  = 8000
	lastPorts = 65535 - labTLS
)

func newLabCommand() *cobra.Command {
	var o labOptions
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Run a gateway with its own upstreams on loopback; no internet is needed",
		Long: `Run upstream servers on loopback (tier1 speaks DoT, tier2 DoH, tier3 DoQ) with a zone lab.test, and a
gateway in front of them, and print lines to try with dig, kdig and curl. An upstream is broken from the start by
--fault, or while the lab runs by typing the same on standard input, a line each: tier1=dead. tier1=ok heals it.

Faults: ` + strings.Join(lab.FaultNames(), ", ") + ".",
		Example: `  dnsgateway lab
  dnsgateway lab --fault tier1=slow:2s --fault tier2=badcert --ports 18000`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runLab(cmd, o) },
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&o.faults, "fault", nil, "break an upstream: tier1=dead (may be repeated)")
	flags.StringVar(&o.dir, "dir", "",
		"folder for the certificates and gateway.yaml; it is kept (default: a temporary one, removed at the end)")
	flags.IntVar(&o.ports, "ports", labPorts,
		"base of the gateway's ports: DNS is base+53, DoT and DoQ base+853, DoH base+443, admin base+81")
	return cmd
}

func runLab(cmd *cobra.Command, o labOptions) (err error) {
	if o.ports < 0 || o.ports > lastPorts {
		return fmt.Errorf("--ports %d is not between 0 and %d", o.ports, lastPorts)
	}
	ctx := cmd.Context()
	// The upstreams outlive ctx: the gateway still asks them while it drains.
	l, err := lab.Start(context.WithoutCancel(ctx), lab.Config{})
	if err != nil {
		return exit(exitFailure, fmt.Errorf("starting the upstreams: %w", err))
	}
	defer l.Close()
	for _, f := range o.faults {
		if err := setFault(l, f); err != nil {
			return err
		}
	}
	dir, remove, err := labDir(o.dir)
	if err != nil {
		return exit(exitFailure, err)
	}
	defer remove()
	files, file, err := writeLab(l, dir, o.ports)
	if err != nil {
		return exit(exitFailure, err)
	}
	g, err := startLabGateway(ctx, cmd.ErrOrStderr(), file)
	if err != nil {
		return exit(exitFailure, fmt.Errorf("%w\nother ports: dnsgateway lab --ports 18000", err))
	}
	if err := printLab(cmd.OutOrStdout(), l, files, file, o.ports); err != nil {
		return exit(exitFailure, errors.Join(err, g.Close()))
	}
	ignoreTTIN()
	// Nobody waits for this goroutine: a read from a terminal cannot be ended. It touches nothing but the lab and the
	// output, and faults of a closed lab are refused.
	go readFaults(cmd.InOrStdin(), cmd.OutOrStdout(), l)
	if err := g.Run(ctx); err != nil {
		return exit(exitFailure, err)
	}
	return nil
}

// startLabGateway binds a gateway with the settings in file; it answers once it is Run.
func startLabGateway(ctx context.Context, log io.Writer, file string) (*gateway.Gateway, error) {
	cfg, err := config.Load(file, config.Options{})
	if err != nil {
		return nil, err
	}
	logger := slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	g, err := gateway.New(cfg, gateway.Options{Logger: logger, Version: version()})
	if err != nil {
		return nil, err
	}
	if err := g.Start(ctx); err != nil {
		return nil, err
	}
	return g, nil
}

// labDir returns the folder for the lab's files and what to call at the end.
func labDir(dir string) (_ string, remove func(), err error) {
	if dir != "" {
		dir, err = filepath.Abs(dir)
		if err == nil {
			err = os.MkdirAll(dir, 0o755)
		}
		return dir, func() {}, err
	}
	dir, err = os.MkdirTemp("", "dnsgateway-lab-")
	return dir, func() { os.RemoveAll(dir) }, err
}

// writeLab writes the gateway's certificate and its settings into dir.
func writeLab(l *lab.Lab, dir string, ports int) (lab.Files, string, error) {
	files, err := l.WriteFiles(dir)
	if err != nil {
		return files, "", err
	}
	yaml, err := l.ConfigYAML(lab.Front{
		DNS: ports + labDNS, TLS: ports + labTLS, HTTPS: ports + labHTTPS, QUIC: ports + labTLS,
		HTTP: []string{"h1", "h2", "h3"}, Files: files,
		More: fmt.Sprintf("cache: 64MB\nadmin: 127.0.0.1:%d\n", ports+labAdmin),
	})
	if err != nil {
		return files, "", err
	}
	file := filepath.Join(dir, "gateway.yaml")
	return files, file, certs.WriteFile(file, []byte(yaml), 0o644)
}

// setFault carries out "tier1=dead".
func setFault(l *lab.Lab, s string) error {
	name, text, ok := strings.Cut(s, "=")
	if !ok {
		return fmt.Errorf("fault %q is not of the form tier1=dead", s)
	}
	server := l.Server(strings.TrimSpace(name))
	if server == nil {
		var names []string
		for _, s := range l.Servers() {
			names = append(names, s.Name())
		}
		return fmt.Errorf("there is no server %q; the servers are %s", name, strings.Join(names, ", "))
	}
	fault, err := lab.ParseFault(text)
	if err != nil {
		return err
	}
	return server.SetFault(fault)
}

// readFaults carries out the lines of in until its end, which does not end the lab.
func readFaults(in io.Reader, out io.Writer, l *lab.Lab) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" {
			if err := setFault(l, line); err != nil {
				fmt.Fprintln(out, err)
			}
		}
		for _, s := range l.Servers() {
			fmt.Fprintf(out, "%s %s, %d queries\n", s.Name(), s.Fault(), s.Queries())
		}
	}
}

// labPage is the page for people. Every line behind two blanks, from "Plain DNS" on, works when it is pasted into a shell.
// kdig takes +quic only behind the TLS options: they choose TCP.
var labPage = template.Must(template.New("lab").Parse(`A gateway, and the upstreams that it asks in this order:
{{range .Servers}}  {{printf "%-6s %-52s %s" .Name .URL .Fault}}
{{end}}Its settings are in {{.File}}, its CA in {{.CA}}.

Plain DNS
  dig @127.0.0.1 -p {{.DNS}} www.lab.test
  dig @127.0.0.1 -p {{.DNS}} +tcp big.lab.test TXT
  dig @127.0.0.1 -p {{.DNS}} svc.lab.test HTTPS
  dig @127.0.0.1 -p {{.DNS}} any.wild.lab.test
  dig @127.0.0.1 -p {{.DNS}} nxdomain.lab.test
  dig @127.0.0.1 -p {{.DNS}} slow.lab.test
  dig @127.0.0.1 -p {{.DNS}} ede.lab.test

DoT
  kdig @127.0.0.1 -p {{.TLS}} +tls-ca={{.ShellCA}} +tls-hostname=localhost www.lab.test

DoH
  kdig @127.0.0.1 -p {{.HTTPS}} +https +tls-ca={{.ShellCA}} +tls-hostname=localhost www.lab.test
  curl -s --cacert {{.ShellCA}} -H 'accept: application/dns-message' '{{.URL}}?dns={{.GET}}' | od -c
  echo {{.POST}} | base64 -d | curl -s --cacert {{.ShellCA}} -H 'content-type: application/dns-message' --data-binary @- {{.URL}} | od -c
  curl -s --cacert {{.ShellCA}} -H 'accept: application/dns-json' '{{.URL}}?name=www.lab.test&type=A'
  curl -s --cacert {{.ShellCA}} --doh-url {{.URL}} https://tier2.lab.test:{{.HelloPort}}/

DoQ (not every kdig has it)
  kdig @127.0.0.1 -p {{.TLS}} +tls-ca={{.ShellCA}} +tls-hostname=localhost +quic www.lab.test
  {{.Program}} query --ca {{.ShellCA}} @quic://localhost:{{.TLS}} www.lab.test

Health and metrics
  curl -s http://127.0.0.1:{{.Admin}}/readyz
  curl -s http://127.0.0.1:{{.Admin}}/metrics

To break an upstream type tier1=dead and Enter; tier1=ok heals it. An empty line shows how they are.
Faults: {{.Faults}}
Stop: Ctrl-C
`))

func printLab(w io.Writer, l *lab.Lab, files lab.Files, file string, ports int) error {
	m := new(dns.Msg).SetQuestion("www.lab.test.", dns.TypeA)
	m.Id = 0 // RFC 8484, section 4.1
	raw, err := m.Pack()
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		program = "dnsgateway"
	}
	return labPage.Execute(w, map[string]any{
		"Servers": l.Servers(), "File": file, "CA": files.CA, "ShellCA": shellWord(files.CA),
		"DNS": ports + labDNS, "TLS": ports + labTLS, "HTTPS": ports + labHTTPS, "Admin": ports + labAdmin,
		"URL": fmt.Sprintf("https://localhost:%d/dns-query", ports+labHTTPS),
		"GET": base64.RawURLEncoding.EncodeToString(raw), "POST": base64.StdEncoding.EncodeToString(raw),
		"HelloPort": l.Server("tier2").Addr().Port(), "Program": shellWord(program),
		"Faults": strings.Join(lab.FaultNames(), ", "),
	})
}
