package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

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
place; the exit status is then 1. A sound file is answered with the listeners, the upstream servers in the order in which
they are asked, and the rules.`,
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

// printLadder prints every group's tiers in the order in which they are asked, and the rules that choose the group.
func printLadder(w io.Writer, cfg *config.Config) {
	private := make(map[string]bool)
	for _, g := range cfg.Upstreams {
		private[g.Name] = g.Private
		fmt.Fprintf(w, "\nasking group %s (pick %s, hedge %s, within %v)\n", quoted(g.Name, g.Private), g.Pick, hedge(g.Hedge), short(g.Deadline))
		for i, tier := range g.Tiers {
			for j, s := range tier {
				head := fmt.Sprintf("%d.", i+1)
				if j > 0 {
					head = ""
				}
				fmt.Fprintf(w, "  %-3s %s\n", head, s.URL)
			}
		}
		fmt.Fprintf(w, "  breaker: open after %d failures, probes every %v to %v\n", g.Breaker.OpenAfter,
			short(g.Breaker.Probe), short(g.Breaker.MaxProbe))
	}
	printRules(w, cfg, private)
}

// quoted returns a group's name in quotes, and that it is private if it is.
func quoted(name string, private bool) string {
	if private {
		return fmt.Sprintf("%q, private", name)
	}
	return fmt.Sprintf("%q", name)
}

func hedge(h config.Hedge) string {
	switch {
	case h.Never:
		return "never"
	case h.After == 0:
		return "auto"
	}
	return short(h.After)
}

// short returns d as the file has it: 1m, where String says 1m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// maxRuleNames is how many names of one rule are printed: lists may have thousands.
const maxRuleNames = 10

// printRules prints which names go to which group, in the order in which the rules are tried. Without rules it prints
// nothing: everything goes to the one group.
func printRules(w io.Writer, cfg *config.Config, private map[string]bool) {
	if len(cfg.Rules) == 0 {
		return
	}
	to := func(what, group string) {
		if private[group] {
			group += " (private)"
		}
		fmt.Fprintf(w, "  %s → %s\n", what, group)
	}
	fmt.Fprintln(w, "\nrules, of which the first that matches decides")
	for _, r := range cfg.Rules {
		for i, n := range r.Names {
			if i == maxRuleNames {
				to(fmt.Sprintf("%d more names", len(r.Names)-i), r.Use)
				break
			}
			to(matches(n), r.Use)
		}
	}
	to("everything else", config.DefaultGroup)
}

// matches says in words what n matches.
func matches(n config.Name) string {
	zones := make([]string, len(n.Values))
	for i, v := range n.Values {
		zones[i] = v
		if v == "" {
			zones[i] = "."
		}
	}
	switch {
	case n.Match == config.Regexp:
		return n.Text
	case n.Match == config.Exact:
		return zones[0] + " alone"
	case len(zones) > 1:
		return fmt.Sprintf("%s: %s to %s, each and below", n.Text, zones[0], zones[len(zones)-1])
	case n.Values[0] == "":
		return "every name"
	case !strings.EqualFold(strings.TrimSuffix(n.Text, "."), zones[0]):
		return fmt.Sprintf("%s: %s and below", n.Text, zones[0])
	}
	return zones[0] + " and below"
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
