package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// maxFlushBody is more than /cache/flush has to say.
const maxFlushBody = 64 << 10

// flushFlags are the flags of the flush command, and what it flushes.
type flushFlags struct {
	file    string
	name    string // "": everything
	below   bool
	timeout time.Duration
}

func newFlushCommand() *cobra.Command {
	var f flushFlags
	cmd := &cobra.Command{
		Use:   "flush [-c file] [--below] [name]",
		Short: "Make the running gateway forget what it has cached: a name, or everything",
		Long: `Ask the admin endpoint of the gateway that runs on this machine to forget the answers for a name, of every type; with
--below also those for all names under it; without a name all answers. How many they were is printed, and the exit status
is 0; else it is 1.

The address is admin.listen of the file that -c names, or ` + defaultAdmin + `; the token is admin.token of that file.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if f.name = args[0]; f.name == "" {
					return exit(exitUsage, errors.New("the name is empty; the root is written as one dot, and without a name everything is flushed"))
				}
			} else if f.below {
				return exit(exitUsage, errors.New("--below needs a name; without both everything is flushed"))
			}
			return flush(cmd, f)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.file, "config", "c", "", "the configuration file that the gateway runs with")
	flags.BoolVar(&f.below, "below", false, "flush all names under the name as well")
	flags.DurationVar(&f.timeout, "timeout", 10*time.Second, "time for the whole request")
	return cmd
}

func flush(cmd *cobra.Command, f flushFlags) error {
	if f.timeout <= 0 {
		return exit(exitUsage, errors.New("--timeout has to be above 0"))
	}
	addr, token, err := adminOf(cmd, f.file)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
	defer cancel()
	n, err := askFlush(ctx, addr, token, f)
	if err != nil {
		return exit(exitFailure, err)
	}
	what := "all answers"
	switch {
	case f.below:
		what = f.name + " and below"
	case f.name != "":
		what = f.name
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "flushed %s: %s\n", printable(what), count(n, "entry", "entries"))
	return err
}

// adminOf returns where the gateway that runs with a file can be told something, and with which token.
func adminOf(cmd *cobra.Command, file string) (addr netip.AddrPort, token string, err error) {
	switch file {
	case "":
		return netip.MustParseAddrPort(defaultAdmin), "", nil
	case "-":
		return addr, "", exit(exitUsage, errors.New("flush cannot read standard input that another process reads; use a file with its admin section"))
	}
	cfg, err := loadConfig(cmd, file)
	if err != nil {
		return addr, "", err
	}
	if !cfg.Admin.Listen.IsValid() {
		return addr, "", exit(exitFailure, fmt.Errorf("%s turns admin.listen off: there is nobody to tell", file))
	}
	return netip.AddrPortFrom(reachable(cfg.Admin.Listen.Addr()), cfg.Admin.Listen.Port()), cfg.Admin.Token, nil
}

// askFlush has the gateway at addr flush what f names, and returns how many entries went.
func askFlush(ctx context.Context, addr netip.AddrPort, token string, f flushFlags) (int, error) {
	target := url.URL{Scheme: "http", Host: addr.String(), Path: "/cache/flush"}
	if f.name != "" {
		target.RawQuery = url.Values{"name": {f.name}, "below": {fmt.Sprint(f.below)}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), nil)
	if err != nil {
		return 0, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	target.RawQuery = "" // what is left is for messages
	resp, body, err := askAdmin(req, maxFlushBody)
	if err != nil {
		return 0, fmt.Errorf("asking %s: %w", &target, err)
	}
	var says struct {
		Flushed *int   `json:"flushed"`
		Error   string `json:"error"`
	}
	jsonErr := json.Unmarshal(body, &says)
	switch {
	case resp.StatusCode == http.StatusOK && jsonErr == nil && says.Flushed != nil:
		return *says.Flushed, nil
	case jsonErr == nil && says.Error != "":
		return 0, fmt.Errorf("%s says %s: %s", &target, printable(resp.Status), printable(says.Error))
	}
	return 0, fmt.Errorf("%s says %s: %s; is it dnsgateway's admin endpoint?", &target, printable(resp.Status),
		printable(strings.TrimSpace(string(body))))
}
