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
place; the exit status is then 1. A sound file is answered with the listeners, the cache, the upstream servers in the order
in which they are asked, and the rules.`,
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
	printCache(w, cfg.Cache)
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
			printListener(w, l, l.Addr)
		}
	}
	for _, b := range bound {
		printListener(w, b.Listener, b.Addr)
	}
	fmt.Fprintf(w, "  answers %s\n", answersWhom(cfg))
	if admin.IsValid() {
		flush := "flush with the token"
		switch {
		case cfg.Admin.Token != "":
		case admin.Addr().IsLoopback():
			flush = "flush by anyone on this machine"
		default:
			flush = "no flush, as there is no admin.token"
		}
		fmt.Fprintf(w, "  health and metrics on http://%s, %s\n", admin, flush)
	}
}

// transportName says in words what the scheme of a listener stands for.
var transportName = map[config.Scheme]string{config.DNS: "UDP and TCP", config.UDP: "UDP", config.TCP: "TCP", config.TLS: "DoT",
	config.HTTPS: "DoH", config.QUIC: "DoQ"}

// printListener prints a listener that is bound to addr.
func printListener(w io.Writer, l config.Listener, addr netip.AddrPort) {
	url := fmt.Sprintf("%s://%s%s", l.Scheme, addr, l.Path)
	note := transportName[l.Scheme]
	if l.Scheme == config.HTTPS {
		note += ", " + strings.Join(l.HTTP, " ")
	}
	if l.Sockets > 0 {
		note += ", " + count(l.Sockets, "UDP socket", "UDP sockets")
	}
	if !strings.Contains(l.Name, "://") {
		note += ", " + l.Name
	}
	fmt.Fprintf(w, "  %-44s %s\n", url, note)
}

// count returns n with the word for one or for more.
func count(n int, one, more string) string {
	if n == 1 {
		more = one
	}
	return fmt.Sprintf("%d %s", n, more)
}

// printCache prints what is kept, for how long, and what happens then.
func printCache(w io.Writer, c config.Cache) {
	if c.Size == 0 {
		fmt.Fprintln(w, "\ncaching nothing")
		return
	}
	fmt.Fprintf(w, "\ncaching up to %s, TTLs from %s to %s, of negative answers to %s\n", size(c.Size), short(c.MinTTL), short(c.MaxTTL),
		short(c.NegativeMax))
	if c.Stale.For == 0 {
		fmt.Fprintln(w, "  no stale answers")
	} else {
		fmt.Fprintf(w, "  stale answers after %s without a fresh one, up to %s after their time, with a TTL of %s\n", short(c.Stale.After),
			short(c.Stale.For), short(c.Stale.TTL))
	}
	if c.Prefetch.Hits == 0 {
		fmt.Fprintln(w, "  no prefetch")
	} else {
		fmt.Fprintf(w, "  prefetch of what has %s when %.3g%% of its life remain\n", count(c.Prefetch.Hits, "hit", "hits"), 100*c.Prefetch.Remaining)
	}
	if c.Save.File == "" {
		fmt.Fprintln(w, "  not saved")
	} else {
		fmt.Fprintf(w, "  saved to %s every %s\n", c.Save.File, short(c.Save.Every))
	}
}

// size returns n octets as the file has them: in the largest unit of which they are a whole number, 64MB for one.
func size(n int64) string {
	units := []string{"B", "KB", "MB", "GB"}
	for n%1024 == 0 && n > 0 && len(units) > 1 {
		n, units = n/1024, units[1:]
	}
	return fmt.Sprintf("%d%s", n, units[0])
}

// answersWhom says in words who gets answers. Without an `access` section that depends on the transport; named are those that
// there are listeners for.
func answersWhom(cfg *config.Config) string {
	otherwise := "; others are refused"
	if cfg.Access.Otherwise == config.Drop {
		otherwise = "; others get no answer"
	}
	if cfg.Access.Set {
		words := make([]string, len(cfg.Access.Allow))
		for i, p := range cfg.Access.Allow {
			words[i] = p.String()
		}
		return strings.Join(words, ", ") + otherwise
	}
	there := make(map[config.Scheme]bool)
	for _, l := range cfg.Listen {
		there[l.Scheme] = true
	}
	var encrypted []string
	for _, scheme := range []config.Scheme{config.TLS, config.HTTPS, config.QUIC} {
		if there[scheme] {
			encrypted = append(encrypted, transportName[scheme])
		}
	}
	anyone := "anyone over " + and(encrypted)
	if !there[config.DNS] && !there[config.UDP] && !there[config.TCP] {
		return anyone
	}
	some := "loopback and private networks over plain DNS"
	if len(encrypted) > 0 {
		some += ", " + anyone
	}
	return some + otherwise
}

// and joins words as people do: "a, b and c".
func and(words []string) string {
	if last := len(words) - 1; last > 0 {
		return strings.Join(words[:last], ", ") + " and " + words[last]
	}
	return strings.Join(words, "")
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
