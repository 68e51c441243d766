// Command dnsgateway is a DNS gateway: plain DNS, DoT, DoH and DoQ in, encrypted DNS out, one YAML file between them.
//
// Exit status: 0 when all went well, 1 when the configuration or the environment is wrong, 2 when the command line is;
// the query command adds 9 for "no answer came", as dig has it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	exitFailure = 1
	exitUsage   = 2
)

// exitError is an error with the exit status that it ends the program with.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// exit returns err as an error that ends the program with the exit status code. A nil err says nothing on standard
// error.
func exit(code int, err error) error {
	if err == nil {
		err = errSilent
	}
	return &exitError{code: code, err: err}
}

var errSilent = errors.New("")

func main() {
	// quic-go would write to the log package, past our logger, that the kernel gives smaller buffers than it wants.
	_ = os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	// SIGHUP never ends the program, whatever stage it is in; what it does besides is the run command's matter.
	// Nor does a log shipper that goes away and leaves a closed pipe behind.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		// The first signal starts the drain. Before that the defaults are put back, so that a second one, however soon
		// it comes, ends the program at once.
		signal.Stop(signals)
		if len(signals) > 0 {
			os.Exit(exitFailure)
		}
		cancel()
	}()
	os.Exit(execute(ctx, newRootCommand(), os.Args[1:]))
}

// execute runs root with args and returns the exit status.
func execute(ctx context.Context, root *cobra.Command, args []string) int {
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitUsage // what cobra itself finds wrong is the command line
	var e *exitError
	if errors.As(err, &e) {
		code = e.code
	}
	if msg := err.Error(); msg != "" {
		fmt.Fprintln(root.ErrOrStderr(), strings.TrimRight(msg, "\n"))
	}
	if e == nil {
		fmt.Fprintln(root.ErrOrStderr(), "Run 'dnsgateway help' for the commands and their flags.")
	}
	return code
}

func newRootCommand() *cobra.Command {
	run := newRunCommand()
	root := &cobra.Command{
		Use:   "dnsgateway",
		Short: "A DNS gateway: plain DNS, DoT, DoH and DoQ in, encrypted DNS out",
		Long: `dnsgateway answers DNS questions over UDP, TCP, DoT, DoH and DoQ and asks its upstreams
over DoT, then DoH, then DoQ. Without a file it runs with built-in settings on port 8053.`,
		Args:          cobra.NoArgs,
		RunE:          run.RunE,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.Flags().AddFlagSet(run.Flags())
	root.AddCommand(run, newCheckCommand(), newQueryCommand(), newLabCommand(), newCertCommand(), newHealthCommand(),
		newFlushCommand(), newVersionCommand())
	return root
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "dnsgateway", version(), runtime.Version())
			return err
		},
	}
}

// buildVersion is set by the release and Docker builds: -ldflags "-X main.buildVersion=1.2.3".
var buildVersion string

// version returns the program's version. Without one from the build it is that of the module, with the commit.
func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 && !strings.Contains(v, s.Value[:12]) {
			v += " " + s.Value[:12]
		}
	}
	return v
}
