package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dnsgateway/gateway"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/observe"
)

func newRunCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "run [-c file]",
		Short: "Run the gateway (the default command)",
		Long: `Run the gateway until SIGINT or SIGTERM. It then takes no new queries, finishes those in flight and
exits with status 0. SIGHUP reopens the log file and never ends the program.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runGateway(cmd, file) },
	}
	configFlag(cmd, &file)
	return cmd
}

// configFlag adds the flag that names the configuration file, with the same words in every command.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "", `configuration file; "-" reads standard input; none uses the built-in settings`)
}

// loadConfig reads file. Its error is ready for the user.
func loadConfig(cmd *cobra.Command, file string) (*config.Config, error) {
	cfg, err := config.Load(file, config.Options{Stdin: cmd.InOrStdin()})
	if err != nil {
		return nil, exit(exitFailure, err)
	}
	return cfg, nil
}

func runGateway(cmd *cobra.Command, file string) error {
	cfg, err := loadConfig(cmd, file)
	if err != nil {
		return err
	}
	people := cfg.Log.Format != "json" && term.IsTerminal(int(os.Stdout.Fd()))
	logger, logOutput, err := observe.NewLogger(observe.LogConfig{
		Level: cfg.Log.Level, Format: cfg.Log.Format, Output: cfg.Log.Output,
	})
	if err != nil {
		return exit(exitFailure, fmt.Errorf("log: %w", err))
	}
	defer logOutput.Close()
	for _, w := range cfg.Warnings {
		logger.Warn("configuration", "place", w.Place.String(), "key", w.Path, "warning", w.Msg)
	}
	tuneGarbage()
	g, err := gateway.New(cfg, gateway.Options{Logger: logger, Version: version()})
	if err != nil {
		return exit(exitFailure, err)
	}
	ctx := cmd.Context()
	if err := g.Start(ctx); err != nil {
		return exit(exitFailure, err)
	}
	if people {
		printStart(cmd.OutOrStdout(), cfg, g)
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	stopHUP := make(chan struct{})
	hupDone := make(chan struct{})
	go func() {
		defer close(hupDone)
		reopenOn(hup, stopHUP, logOutput, logger)
	}()
	err = g.Run(ctx)
	close(stopHUP)
	<-hupDone
	if err != nil {
		return exit(exitFailure, err)
	}
	return nil
}

// reopenOn opens the log file again at each signal, so that it can be rotated by renaming.
func reopenOn(hup <-chan os.Signal, stop <-chan struct{}, output *observe.LogOutput, logger *slog.Logger) {
	for {
		select {
		case <-stop:
			return
		case <-hup:
		}
		if err := output.Reopen(); err != nil {
			logger.Error("reopening the log file", "err", err)
			continue
		}
		logger.Info("SIGHUP: the log goes on, in a new file if it is one")
	}
}

// printStart prints the page for people: what is listened on, who is asked in which order, and what to try.
func printStart(w io.Writer, cfg *config.Config, g *gateway.Gateway) {
	fmt.Fprintf(w, "dnsgateway %s, settings from %s\n\n", version(), sourceName(cfg))
	printListeners(w, cfg, g.Addrs(), g.AdminAddr())
	printCache(w, cfg.Cache)
	printLadder(w, cfg)
	if line := tryLine(g.Addrs()); line != "" {
		fmt.Fprintf(w, "\nTry:  %s\nStop: Ctrl-C\n\n", line)
	}
}
