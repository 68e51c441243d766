// Command failover measures what clients notice when the first upstream breaks. It drives names that were never cached
// through the built gateway over UDP and DoT, breaks the first tier in one way for a while, heals it, and prints a line of a
// table for each fault: was everything answered, how late, and is the first tier in use again soon.
//
//	go run ./integration/failover                  all faults one after the other: 30 s each, some ten minutes
//	go run ./integration/failover -short           the same in brief, several side by side: what CI runs
//	go run ./integration/failover -target both     dnsproxy's own command as the comparison
//
// The upstreams and the load run in this process, the server under test in one of its own. What surprises a newcomer: a
// latency counts from when its question was due, not from when it was sent, so a load that is held up shows in the numbers.
//
// Exit status: 0 when the gateway meets all criteria, 1 when it misses one or a run could not be made, 2 when the command
// line is wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	status := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// options are what the command line says.
type options struct {
	plan     plan
	limits   limits
	faults   []fault // without the fault-free run, which is always made
	targets  []string
	gateway  string // path of a built gateway, or empty
	dnsproxy string
	hedge    string
	settle   time.Duration
	parallel int
	json     bool
	config   bool
}

// plan is the course of one run, in time since its first question.
type plan struct {
	at, until, length time.Duration // the fault begins, the first tier is well again, the last question
	rate              int           // questions in a second, half of them over each transport
}

// again is how long after the recovery the first tier has to be in use again.
const again = 5 * time.Second

const (
	// standstill is how late the load itself may be before a run that misses a criterion is made again, retries times.
	standstill = 50 * time.Millisecond
	retries    = 2
)

// The plans. The short one leaves a second and a half to see whether the first tier is in use again; its rate is what
// two cores carry, several runs side by side.
var (
	full  = plan{at: 10 * time.Second, until: 20 * time.Second, length: 30 * time.Second, rate: 1000}
	short = plan{at: 2 * time.Second, until: 4 * time.Second, length: 10500 * time.Millisecond, rate: 150}
)

func parse(args []string, stderr io.Writer) (*options, error) {
	fs := flag.NewFlagSet("failover", flag.ContinueOnError)
	fs.SetOutput(stderr)
	var o options
	brief := fs.Bool("short", false, "a short run at a lower rate, several faults side by side, with wider limits of latency")
	at := fs.Duration("at", full.at, "when the fault begins")
	until := fs.Duration("until", full.until, "when the first tier is well again")
	length := fs.Duration("for", full.length, "how long each run asks, over 5 s after -until")
	rate := fs.Int("rate", full.rate, "questions in a second, half of them over UDP and half over DoT")
	parallel := fs.Int("parallel", 1, "how many runs side by side")
	p999 := fs.Duration("p999", fullLimits.p999, "how much the 99.9th percentile may exceed that of the fault-free run")
	p99 := fs.Duration("p99", fullLimits.p99, "the same of the 99th, outside the fault's first second")
	names := fs.String("faults", "all", "some of "+strings.Join(faultNames(), ","))
	target := fs.String("target", "dnsgateway", "dnsgateway, dnsproxy or both")
	fs.StringVar(&o.hedge, "hedge", "", "the upstream group's hedge: auto, never or a duration (default: not in the file)")
	fs.StringVar(&o.gateway, "gateway", "", "a built gateway (default: built from this module)")
	fs.StringVar(&o.dnsproxy, "dnsproxy", "", "a built dnsproxy (default: built at the version in go.mod)")
	fs.DurationVar(&o.settle, "settle", 45*time.Second, "how long after a run goroutines and descriptors may take to go")
	fs.BoolVar(&o.json, "json", false, "print JSON instead of the table")
	fs.BoolVar(&o.config, "show-config", false, "print the gateway's file of each run to standard error")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if *brief {
		for name, set := range map[string]func(){
			"at": func() { *at = short.at }, "until": func() { *until = short.until }, "for": func() { *length = short.length },
			"rate": func() { *rate = short.rate }, "parallel": func() { *parallel = 6 },
			"p999": func() { *p999 = shortLimits.p999 }, "p99": func() { *p99 = shortLimits.p99 },
		} {
			if !given[name] {
				set()
			}
		}
	}
	o.plan = plan{at: *at, until: *until, length: *length, rate: *rate}
	o.limits = limits{p999: *p999, p99: *p99}
	o.parallel = *parallel
	var errs []error
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unknown argument %q", fs.Arg(0)))
	}
	if o.plan.at <= 0 || o.plan.until <= o.plan.at || o.plan.length <= o.plan.until+again {
		errs = append(errs, fmt.Errorf("-at %v, -until %v, -for %v: they have to follow each other, -for more than %v after -until",
			o.plan.at, o.plan.until, o.plan.length, again))
	}
	if o.plan.rate < lanes || o.plan.rate > 20000 {
		errs = append(errs, fmt.Errorf("-rate %d: %d to 20000", o.plan.rate, lanes))
	}
	if o.parallel < 1 {
		errs = append(errs, fmt.Errorf("-parallel %d: 1 or more", o.parallel))
	}
	switch *target {
	case "dnsgateway", "dnsproxy":
		o.targets = []string{*target}
	case "both":
		o.targets = []string{"dnsgateway", "dnsproxy"}
	default:
		errs = append(errs, fmt.Errorf("-target %q: dnsgateway, dnsproxy or both", *target))
	}
	var err error
	if o.faults, err = pick(*names); err != nil {
		errs = append(errs, err)
	}
	err = errors.Join(errs...)
	if err != nil {
		fmt.Fprintln(stderr, err)
	}
	return &o, err
}

// pick returns the faults that names lists, "all" or some with commas between them.
func pick(names string) (picked []fault, err error) {
	if names == "all" {
		return faults, nil
	}
	var errs []error
	for name := range strings.SplitSeq(names, ",") {
		is := func(f fault) bool { return f.name == name }
		i := slices.IndexFunc(faults, is)
		switch {
		case i < 0:
			errs = append(errs, fmt.Errorf("-faults: unknown fault %q; they are %s", name, strings.Join(faultNames(), ", ")))
		case slices.ContainsFunc(picked, is):
			errs = append(errs, fmt.Errorf("-faults: %q is there twice", name))
		default:
			picked = append(picked, faults[i])
		}
	}
	return picked, errors.Join(errs...)
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
	good, err := measure(ctx, o, stdout, stderr)
	if err != nil {
		fmt.Fprintln(stderr, err)
	}
	if err != nil || !good {
		return 1
	}
	return 0
}

// measure makes all runs of all targets and prints a table of each; good is false if the gateway misses a criterion.
func measure(ctx context.Context, o *options, stdout, stderr io.Writer) (good bool, err error) {
	dir, err := os.MkdirTemp("", "dnsgateway-failover-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	all, err := feasible(o.faults, stderr)
	if err != nil {
		return false, err
	}
	all = append([]fault{{name: none}}, all...)
	good = true
	for _, name := range o.targets {
		t, err := newTarget(ctx, name, o, dir)
		if err != nil {
			return false, err
		}
		results, err := runAll(ctx, o, t, all, dir, stderr)
		if err != nil {
			return false, err
		}
		for range retries {
			var doubtful []int
			for i := range results {
				r := &results[i]
				if r.Reasons = o.limits.judge(r, &results[0]); len(r.Reasons) > 0 && time.Duration(r.Late) > standstill {
					doubtful = append(doubtful, i)
				}
			}
			if !t.judged() || len(doubtful) == 0 {
				break
			}
			// The machine itself stood still: what such a run misses says nothing. The last one counts.
			var faults []fault
			for _, i := range doubtful {
				fmt.Fprintf(stderr, "%s, fault %s: again, the load itself was %v ms late\n", t.name(), all[i].name, results[i].Late)
				faults = append(faults, all[i])
			}
			repeated, err := runAll(ctx, o, t, faults, dir, stderr)
			if err != nil {
				return false, err
			}
			for n, i := range doubtful {
				results[i] = repeated[n]
			}
		}
		for i := range results {
			results[i].Reasons = o.limits.judge(&results[i], &results[0])
			good = good && (len(results[i].Reasons) == 0 || !t.judged())
		}
		if o.json {
			err = printJSON(stdout, name, o.plan, results)
		} else {
			err = printTable(stdout, name, o.plan, o.limits, results)
		}
		if err != nil {
			return false, err
		}
	}
	return good, nil
}

// runAll makes a run of each fault, at most o.parallel of them at once, and returns their results in the order of all.
// What a run takes to come to rest is not waited for by the next one.
func runAll(ctx context.Context, o *options, t target, all []fault, dir string, stderr io.Writer) ([]result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results, errs := make([]result, len(all)), make([]error, len(all))
	slots := make(chan struct{}, o.parallel)
	var running sync.WaitGroup
	for i, f := range all {
		slots <- struct{}{}
		running.Go(func() {
			release := sync.OnceFunc(func() { <-slots })
			defer release()
			begin := time.Now()
			r := run{options: o, target: t, fault: f, dir: dir, log: stderr, measured: release}
			results[i], errs[i] = r.do(ctx)
			if errs[i] != nil {
				errs[i] = fmt.Errorf("%s, fault %s: %w", t.name(), f.name, errs[i])
				cancel() // the other runs have no use without this one
				return
			}
			fmt.Fprintf(stderr, "%s, fault %s: done after %v\n", t.name(), f.name, time.Since(begin).Round(time.Second))
		})
	}
	running.Wait()
	// A cancelled run has nothing to say but that; the error that cancelled it comes first.
	slices.SortStableFunc(errs, func(a, b error) int {
		return btoi(errors.Is(a, context.Canceled)) - btoi(errors.Is(b, context.Canceled))
	})
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return results, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
