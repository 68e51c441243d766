package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"dnsgateway/gateway"
	"dnsgateway/gateway/config"
)

func newCheckCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "check [-c file]",
		Short: "Check a configuration file and print what would run",
		Long: `Check the file as the run command would, without opening a socket. Every mistake is reported at once with its
place; the exit status is then 1. A sound file is answered with the listeners and the upstream servers in order.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if file != "" {
					return fmt.Errorf("check takes one file: -c %s or %s", file, args[0])
				}
				file = args[0]
			}
			return check(cmd, file)
		},
	}
	configFlag(cmd, &file)
	return cmd
}

func check(cmd *cobra.Command, file string) error {
	cfg, err := loadConfig(cmd, file)
	if err != nil {
		return err
	}
	g, err := gateway.New(cfg, gateway.Options{})
	if err != nil {
		return exit(exitFailure, err)
	}
	if err := g.Close(); err != nil {
		return exit(exitFailure, err)
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "%s is sound\n\n", sourceName(cfg))
	printListeners(w, cfg, nil, cfg.Admin.Listen)
	printLadder(w, cfg)
	for _, warning := range cfg.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %v\n", warning)
	}
	return nil
}

// sourceName says in words where the settings came from.
func sourceName(cfg *config.Config) string {
	switch cfg.Source {
	case config.Builtin:
		return "the built-in default (give your own with -c FILE)"
	case config.Stdin:
		return "standard input"
	}
	return cfg.Source
}

// printListeners prints the listeners in the file's order. Bound addresses replace those of the file when the gateway
// runs: they differ where the file leaves the port to the system.
func printListeners(w io.Writer, cfg *config.Config, bound []gateway.Listening, admin netip.AddrPort) {
	fmt.Fprintln(w, "listening on")
	if bound == nil {
		for _, l := range cfg.Listen {
			printListener(w, l.Scheme, l.Addr, l.Path, l.HTTP, l.Name)
		}
	}
	for _, b := range bound {
		printListener(w, b.Listener.Scheme, b.Addr, b.Listener.Path, b.Listener.HTTP, b.Listener.Name)
	}
	fmt.Fprintf(w, "  answers %s\n", answersWhom(cfg))
	if admin.IsValid() {
		fmt.Fprintf(w, "  health and metrics on http://%s\n", admin)
	}
}

func printListener(w io.Writer, scheme config.Scheme, addr netip.AddrPort, path string, versions []string, name string) {
	url := fmt.Sprintf("%s://%s%s", scheme, addr, path)
	note := map[config.Scheme]string{config.DNS: "UDP and TCP", config.UDP: "UDP", config.TCP: "TCP", config.TLS: "DoT",
		config.QUIC: "DoQ"}[scheme]
	if scheme == config.HTTPS {
		note = "DoH, " + strings.Join(versions, " ")
	}
	if !strings.Contains(name, "://") {
		note += ", " + name
	}
	fmt.Fprintf(w, "  %-44s %s\n", url, note)
}

func answersWhom(cfg *config.Config) string {
	otherwise := "; others are refused"
	if cfg.Access.Otherwise == config.Drop {
		otherwise = "; others get no answer"
	}
	if !cfg.Access.Set {
		return "loopback and private networks over plain DNS, anyone over DoT, DoH and DoQ" + otherwise
	}
	words := make([]string, len(cfg.Access.Allow))
	for i, p := range cfg.Access.Allow {
		words[i] = p.String()
	}
	return strings.Join(words, ", ") + otherwise
}

// printLadder prints every group's tiers in the order in which they are asked.
func printLadder(w io.Writer, cfg *config.Config) {
	for _, g := range cfg.Upstreams {
		fmt.Fprintf(w, "\nasking group %q (pick %s, within %v)\n", g.Name, g.Pick, g.Deadline)
		for i, tier := range g.Tiers {
			for j, s := range tier {
				head := fmt.Sprintf("%d.", i+1)
				if j > 0 {
					head = ""
				}
				fmt.Fprintf(w, "  %-3s %s\n", head, s.URL)
			}
		}
	}
}

// tryLine returns a dig line for the first plain listener, or a query line for the first other one.
func tryLine(bound []gateway.Listening) string {
	for _, b := range bound {
		switch b.Listener.Scheme {
		case config.DNS, config.UDP:
			return fmt.Sprintf("dig @%s -p %d example.com", reachable(b.Addr.Addr()), b.Addr.Port())
		case config.TCP:
			return fmt.Sprintf("dig +tcp @%s -p %d example.com", reachable(b.Addr.Addr()), b.Addr.Port())
		}
	}
	for _, b := range bound {
		return fmt.Sprintf("dnsgateway query --insecure @%s://%s%s example.com", b.Listener.Scheme,
			netip.AddrPortFrom(reachable(b.Addr.Addr()), b.Addr.Port()), b.Listener.Path)
	}
	return ""
}

// reachable returns the address to ask from this machine for a listener bound to a.
func reachable(a netip.Addr) netip.Addr {
	if !a.IsUnspecified() {
		return a
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}
