//go:build linux

// Command bench compares the gateway with its rivals: CPU for each query, latency, memory, and how they scale. ./run builds
// and starts it; the README's "Performance" says how to read what it prints.
//
// It installs and builds what the targets need, then starts itself again in a network namespace of its own, on the core of
// the load: nothing leaves the machine, every port is free, and the server under test has its core for itself. What
// surprises a newcomer: the load cannot press every server to its limit, and shared machines are slower at one time than at
// another. So not the queries in a second are the measure, but the server's CPU for a query, as a ratio to that of a rival in
// the same run.
//
// Exit status: 0, 1 when a run could not be made or a target answers wrongly, 2 when the command line is wrong.
package main

import (
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	status := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// options are what the command line says.
type options struct {
	targets     []*target
	modes       []string
	tests       []*test
	rounds      int
	seconds     float64
	tries       int
	conns       int
	names       int // the largest cache of the scale mode
	root, cache string
	out         string
	markdown    bool
	report      string
	given       string // the command line, without what ./run adds
}

var modes = []string{"perf", "mem", "scale"}

func parse(args []string, stderr io.Writer) (*options, error) {
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	fs.SetOutput(stderr)
	var o options
	fs.Usage = func() {
		fmt.Fprintf(stderr, "usage: integration/bench/run [options] [target...]\n\ntargets: %s (default: all)\n\n",
			strings.Join(targetNames(), " "))
		fs.PrintDefaults()
	}
	mode := fs.String("m", "perf", "what to measure: some of "+strings.Join(modes, ",")+", or all")
	testList := fs.String("t", "", "some of "+strings.Join(testNames(), ",")+" (default: all)")
	fs.IntVar(&o.rounds, "r", 3, "rounds; the targets take turns in each")
	fs.Float64Var(&o.seconds, "s", 6, "seconds of each measurement")
	fs.IntVar(&o.tries, "tries", 4, "how often to measure when others use the machine; the quietest counts")
	fs.IntVar(&o.conns, "conns", 10_000, "idle connections of the memory mode")
	fs.IntVar(&o.names, "names", 1_000_000, "names in the largest cache of the scale mode")
	fs.StringVar(&o.out, "o", "", "folder for the results (default: a new one in the cache folder)")
	fs.BoolVar(&o.markdown, "markdown", false, "print the tables in Markdown")
	fs.StringVar(&o.report, "report", "", "measure nothing, print the results of this folder")
	fs.StringVar(&o.root, "root", ".", "the checkout; set by ./run")
	fs.StringVar(&o.cache, "cache", "", "folder for programs, keys and results; set by ./run")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	given := []string{"integration/bench/run"}
	fs.Visit(func(f *flag.Flag) {
		switch f.Name {
		case "root", "cache", "o", "markdown":
		default:
			given = append(given, "-"+f.Name, f.Value.String())
		}
	})
	o.given = strings.Join(append(given, fs.Args()...), " ")
	var errs []error
	var err error
	if o.targets, err = pickTargets(fs.Args()); err != nil {
		errs = append(errs, err)
	}
	if o.tests, err = pickTests(*testList); err != nil {
		errs = append(errs, err)
	}
	if o.modes = strings.Split(*mode, ","); *mode == "all" {
		o.modes = modes
	}
	for _, m := range o.modes {
		if !slices.Contains(modes, m) {
			errs = append(errs, fmt.Errorf("-m: unknown mode %q; they are %s, or all", m, strings.Join(modes, ",")))
		}
	}
	if o.rounds < 1 || o.tries < 1 || o.conns < 1 || o.names < 1000 {
		errs = append(errs, errors.New("-r, -tries and -conns are 1 or more, -names is 1000 or more"))
	}
	if o.seconds < 0.1 || o.seconds > 60 {
		errs = append(errs, fmt.Errorf("-s %v: 0.1 to 60", o.seconds))
	}
	if o.cache == "" && o.report == "" {
		errs = append(errs, errors.New("-cache is not given: start it by integration/bench/run"))
	}
	if err = errors.Join(errs...); err != nil {
		fmt.Fprintln(stderr, err)
	}
	return &o, err
}

// execute runs the program and returns its exit status.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	switch {
	case o.report != "":
		var r results
		if r, err = readResults(o.report); err == nil {
			err = r.print(stdout, o.markdown)
		}
	case os.Getenv(coresEnv) == "":
		err = prepare(ctx, o, args, stderr)
	default:
		err = measureAll(ctx, o, stdout, stderr)
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// coresEnv holds the machine's cores for the program's second start, which is on one of them.
const coresEnv = "DNSGATEWAY_BENCH_CORES"

// prepare installs and builds, then replaces the process by itself inside: in a network namespace, on the load's core.
func prepare(ctx context.Context, o *options, args []string, stderr io.Writer) error {
	if os.Getuid() != 0 {
		return errors.New("needs root, for a network namespace of its own")
	}
	cores, err := allowedCores()
	if err != nil {
		return err
	}
	if len(cores) < 2 {
		return errors.New("needs two cores, one for the server and one for the load")
	}
	wanted := slices.Clone(tools)
	for _, t := range o.targets {
		wanted = append(wanted, t.packages...)
	}
	if err := install(ctx, wanted, stderr); err != nil {
		return err
	}
	for _, dir := range []*string{&o.root, &o.cache} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	here, err := os.Getwd() // the results' folder is relative to it
	if err != nil {
		return err
	}
	if err := os.Chdir(o.root); err != nil {
		return err
	}
	if err := build(ctx, newPaths(o.cache), o.root, o.targets, stderr); err != nil {
		return err
	}
	if err := os.Chdir(here); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	argv := append([]string{"unshare", "-n", "--", "taskset", "-c", strconv.Itoa(cores[len(cores)-1]), self}, args...)
	return unix.Exec(unshare, argv, append(os.Environ(), coresEnv+"="+cpuList(cores)))
}

func allowedCores() (cores []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	for i := range 8 * len(set) * 8 {
		if set.IsSet(i) {
			cores = append(cores, i)
		}
	}
	return cores, nil
}

// results are what a run leaves in its folder.
type results struct {
	When     time.Time
	Command  string
	Machine  string
	Cores    []int
	Targets  []string
	Versions map[string]string
	Records  []record
}

// record is what was measured of one target in one round: a test of the perf mode, or all of another mode.
type record struct {
	Target string
	Round  int
	Test   string
	Values map[string]float64
	Spoilt bool // others used the machine, in every try
}

const resultsFile = "results.json"

func readResults(dir string) (r results, err error) {
	text, err := os.ReadFile(filepath.Join(dir, resultsFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("reading %s: %w", filepath.Join(dir, resultsFile), err)
	}
	return r, nil
}

func (r *results) write(dir string) error {
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, resultsFile), append(text, '\n'), 0o644)
}

// measureAll is the program inside.
func measureAll(ctx context.Context, o *options, stdout, stderr io.Writer) (err error) {
	b, err := newBench(ctx, o, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	r := &b.results
	for _, t := range o.targets {
		r.Targets = append(r.Targets, t.name)
		if !t.floor {
			r.Versions[t.name] = t.versionLine(ctx, b.paths)
		}
	}
	for _, t := range o.targets { // nobody wants to learn it after half an hour
		fmt.Fprintf(stderr, "checking %s\n", t.name)
		s, err := b.start(ctx, t, load{cores: b.server(1), entries: fullNames})
		if err != nil {
			return err
		}
		if err := s.stop(); err != nil {
			return err
		}
	}
	for round := range o.rounds {
		for _, t := range o.targets {
			fmt.Fprintf(stderr, "round %d, %s\n", round+1, t.name)
			for _, m := range []struct {
				mode    string
				measure func(ctx context.Context, t *target, round int) error
			}{{"perf", b.perf}, {"mem", b.memory}, {"scale", b.scale}} {
				if !slices.Contains(o.modes, m.mode) || t.floor && m.mode != "perf" {
					continue
				}
				if err := m.measure(ctx, t, round+1); err != nil {
					return fmt.Errorf("%s: %w", t.name, err)
				}
			}
			if err := r.write(b.out); err != nil { // -report reads what an interrupted run has got
				return err
			}
		}
	}
	fmt.Fprintln(stderr, "results in", b.out)
	return r.print(stdout, o.markdown)
}

// versionLine returns the first line of what the target says of its version. The framework's command knows its own only
// when its makefile builds it; Go knows it anyhow.
func (t *target) versionLine(ctx context.Context, p *paths) string {
	if t.name == "dnsproxy" {
		info, err := buildinfo.ReadFile(p.dnsproxy)
		if err != nil {
			return "unknown"
		}
		return info.Main.Version + " " + info.GoVersion
	}
	argv := t.version
	if t.name == ours {
		argv = append([]string{p.gateway}, argv...)
	}
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}
