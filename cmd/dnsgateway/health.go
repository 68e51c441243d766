package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dnsgateway/gateway/config"
)

// defaultAdmin is where the built-in settings put the admin endpoint.
const defaultAdmin = "127.0.0.1:8081"

// maxHealthBody is more than /readyz has to say about hundreds of servers.
const maxHealthBody = 1 << 20

// healthFlags are the flags of the health command.
type healthFlags struct {
	file    string
	url     string
	live    bool
	timeout time.Duration
}

func newHealthCommand() *cobra.Command {
	var f healthFlags
	cmd := &cobra.Command{
		Use:   "health [-c file | --url url]",
		Short: "Ask the running gateway whether it is ready (for Docker's HEALTHCHECK)",
		Long: `Ask the admin endpoint of the gateway that runs on this machine whether it is ready, or with --live only whether it
serves. The exit status is 0 if so; else it is 1 and the reasons are printed on standard error.

The address is the one of --url, or admin.listen of the file that -c names, or ` + defaultAdmin + `. A file that
cannot be read does not make a running gateway unhealthy: the default address is then asked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return health(cmd, f) },
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.file, "config", "c", "", "the configuration file that the gateway runs with")
	flags.StringVar(&f.url, "url", "", "URL to ask, such as http://"+defaultAdmin+"/readyz")
	flags.BoolVar(&f.live, "live", false, "ask only whether it serves (/livez), not whether it can answer (/readyz)")
	flags.DurationVar(&f.timeout, "timeout", 2*time.Second, "time for the whole check")
	cmd.MarkFlagsMutuallyExclusive("config", "url")
	return cmd
}

func health(cmd *cobra.Command, f healthFlags) error {
	if f.timeout <= 0 {
		return exit(exitUsage, errors.New("--timeout has to be above 0"))
	}
	target, err := healthURL(cmd.ErrOrStderr(), f)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
	defer cancel()
	if err := askHealth(ctx, target); err != nil {
		return exit(exitFailure, err)
	}
	return nil
}

// healthURL returns what to ask. A note about a file that was not used goes to w.
func healthURL(w io.Writer, f healthFlags) (string, error) {
	path := "/readyz"
	if f.live {
		path = "/livez"
	}
	if f.url != "" {
		u, err := url.Parse(f.url)
		if err != nil || u.Scheme != "http" || u.Host == "" {
			return "", exit(exitUsage, fmt.Errorf("--url %q is not of the form http://ADDRESS:PORT/readyz", f.url))
		}
		if u.Path == "" || u.Path == "/" {
			u.Path = path
		}
		return u.String(), nil
	}
	addr := netip.MustParseAddrPort(defaultAdmin)
	switch f.file {
	case "":
	case "-":
		return "", exit(exitUsage, errors.New("health cannot read standard input that another process reads; use --url"))
	default:
		cfg, err := config.Load(f.file, config.Options{})
		switch {
		case err != nil:
			fmt.Fprintf(w, "asking %v: %v\n", addr, err)
		case !cfg.Admin.Listen.IsValid():
			return "", exit(exitFailure, fmt.Errorf("%s turns admin.listen off: there is nothing to ask", f.file))
		default:
			addr = netip.AddrPortFrom(reachable(cfg.Admin.Listen.Addr()), cfg.Admin.Listen.Port())
		}
	}
	return "http://" + addr.String() + path, nil
}

// askHealth returns nil if target says 200, else what it says instead.
func askHealth(ctx context.Context, target string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	resp, body, err := askAdmin(req, maxHealthBody)
	if err != nil {
		return fmt.Errorf("asking %s: %w", target, err)
	}
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return fmt.Errorf("%s says %s%s", target, printable(resp.Status), healthReasons(body))
}

// askAdmin sends req to the admin endpoint of a running gateway and returns what it says, at most so many octets of the body,
// which is closed then.
func askAdmin(req *http.Request, most int64) (resp *http.Response, body []byte, err error) {
	transport := &http.Transport{DisableKeepAlives: true} // and no proxy, whatever the environment says
	if resp, err = transport.RoundTrip(req); err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, most))
	return resp, body, err
}

// healthReasons returns the reasons in the body of /readyz, a line each, or the body itself if it is something else.
func healthReasons(body []byte) string {
	var ready struct {
		Reasons []string `json:"reasons"`
		Groups  []struct {
			Name    string `json:"name"`
			Servers []struct {
				URL   string `json:"url"`
				State string `json:"state"`
				Error string `json:"error"`
			} `json:"servers"`
		} `json:"groups"`
	}
	var b strings.Builder
	if err := json.Unmarshal(body, &ready); err != nil {
		if text := strings.TrimSpace(string(body)); text != "" {
			b.WriteString(": " + printable(text))
		}
		return b.String()
	}
	for _, r := range ready.Reasons {
		b.WriteString("\n  " + printable(r))
	}
	for _, g := range ready.Groups {
		for _, s := range g.Servers {
			if s.State == "failing" {
				fmt.Fprintf(&b, "\n  %s: %s: %s", printable(g.Name), printable(s.URL), printable(s.Error))
			}
		}
	}
	return b.String()
}
