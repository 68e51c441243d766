//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// test is a measurement of the perf mode. Each has 200 queries on their way at once unless it says otherwise.
type test struct {
	name, what string
	miss       bool // asks for names that were never asked
	late       bool // at a fixed low rate, for the latency
	// command returns the generator's command line; file has the names, as paths for DoH.
	command func(g *generator, file string) []string
}

// generator is what the command lines of the load are made of.
type generator struct {
	udpblast string
	seconds  float64
}

// lowRate is the rate in queries per second at which latency is measured: far from the limit of any target.
const lowRate = 1000

var tests = []*test{
	{name: "udp_hit", what: "cached names, 16 sockets (dnsperf)", command: func(g *generator, file string) []string {
		return g.dnsperf("udp", file, "-c", "16", "-q", "200", "-t", "0.5")
	}},
	{name: "udp_max", what: "the same from a cheaper client, 8 sockets (udpblast)", command: func(g *generator, file string) []string {
		return g.blast(file)
	}},
	{name: "tcp_hit", what: "16 connections (dnsperf)", command: func(g *generator, file string) []string {
		return g.dnsperf("tcp", file, "-c", "16", "-q", "200", "-t", "2")
	}},
	{name: "dot_hit", what: "16 connections (dnsperf)", command: func(g *generator, file string) []string {
		return g.dnsperf("dot", file, "-c", "16", "-q", "200", "-t", "2")
	}},
	{name: "dot_one", what: "64 connections, one query at a time on each (dnsperf)", command: func(g *generator, file string) []string {
		return g.dnsperf("dot", file, "-c", "64", "-q", "64", "-t", "2")
	}},
	{name: "doh_hit", what: "GET over HTTP/2, 16 connections, 12 streams each (h2load)", command: func(g *generator, file string) []string {
		return g.h2load(file, "-c", "16", "-m", "12")
	}},
	{name: "doh_one", what: "64 connections, one stream at a time on each (h2load)", command: func(g *generator, file string) []string {
		return g.h2load(file, "-c", "64", "-m", "1")
	}},
	{name: "udp_miss", what: "names never asked before, over UDP, from the upstream over DoT (dnsperf)", miss: true,
		command: func(g *generator, file string) []string {
			return g.dnsperf("udp", file, "-n", "1", "-c", "16", "-q", "200", "-t", "2")
		}},
	{name: "lat_hit", what: "latency of cached names over UDP at 1,000 queries/s (dnsperf)", late: true,
		command: func(g *generator, file string) []string { return g.late("udp", file) }},
	{name: "lat_dot", what: "the same over DoT, 8 connections", late: true,
		command: func(g *generator, file string) []string { return g.late("dot", file) }},
	{name: "lat_miss", what: "the same of names never asked before, over UDP", late: true, miss: true,
		command: func(g *generator, file string) []string { return g.late("udp", file) }},
}

func testNames() []string {
	var names []string
	for _, t := range tests {
		names = append(names, t.name)
	}
	return names
}

// pickTests returns the tests that list names, with commas or spaces between them, in the order of all; none: all.
func pickTests(list string) (picked []*test, err error) {
	names := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	if len(names) == 0 {
		return tests, nil
	}
	for _, name := range names {
		if !slices.Contains(testNames(), name) {
			return nil, fmt.Errorf("-t: unknown test %q; they are %s", name, strings.Join(testNames(), ","))
		}
	}
	for _, t := range tests {
		if slices.Contains(names, t.name) {
			picked = append(picked, t)
		}
	}
	return picked, nil
}

func (g *generator) dnsperf(mode, file string, more ...string) []string {
	port := udpAddr.Port()
	if mode == "dot" {
		port = dotAddr.Port()
	}
	return append([]string{"dnsperf", "-m", mode, "-s", serverIP, "-p", fmt.Sprint(port), "-d", file,
		"-l", fmt.Sprint(g.seconds)}, more...)
}

// late has dnsperf print every query's latency.
func (g *generator) late(mode, file string) []string {
	return g.dnsperf(mode, file, "-Q", fmt.Sprint(lowRate), "-q", "100", "-c", "8", "-v")
}

func (g *generator) h2load(file string, more ...string) []string {
	return append([]string{"h2load", "-B", "https://" + dohAddr.String(), "-i", file, "-t", "1",
		"-H", "accept: application/dns-message", "-D", fmt.Sprintf("%.0fms", g.seconds*1000)}, more...)
}

func (g *generator) blast(file string) []string {
	return []string{g.udpblast, serverIP, fmt.Sprint(udpAddr.Port()), file, fmt.Sprint(g.seconds), "8", "25"}
}

// generated is what a generator says of its load.
type generated struct {
	sent, completed, good int
	rate                  float64   // completed in a second
	latencies             []float64 // microseconds, if it was asked for them; in order of size
}

// parseGenerated reads the report of dnsperf, udpblast or h2load.
func parseGenerated(text []byte) (g generated, err error) {
	number := func(s string) int {
		n, _ := strconv.Atoi(strings.TrimSuffix(s, ","))
		return n
	}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		switch is := func(words ...string) bool { return len(f) > len(words) && slices.Equal(f[:len(words)], words) }; {
		case is("Queries", "sent:"):
			g.sent = number(f[2])
		case is("Queries", "completed:"):
			g.completed = number(f[2])
		case is("Queries", "per", "second:"):
			g.rate, _ = strconv.ParseFloat(f[3], 64)
		case is("Response", "codes:"):
			if i := slices.Index(f, "NOERROR"); i >= 0 && i+1 < len(f) {
				g.good = number(f[i+1])
			}
		case is(">") && len(f) >= 5: // "> NOERROR h0000001.bench.perfzone.net A 0.000123"
			if seconds, err := strconv.ParseFloat(f[len(f)-1], 64); err == nil && f[1] == "NOERROR" {
				g.latencies = append(g.latencies, seconds*1e6)
			}
		case is("finished", "in") && len(f) >= 5: // "finished in 5.00s, 1234.5 req/s, 1.0MB/s"
			g.rate, _ = strconv.ParseFloat(f[3], 64)
		case is("requests:"): // "requests: 9 total, 9 started, 9 done, 9 succeeded, 0 failed, 0 errored, 0 timeout"
			for i := 1; i+1 < len(f); i += 2 {
				switch strings.TrimSuffix(f[i+1], ",") {
				case "done":
					g.completed = number(f[i])
				case "failed", "errored", "timeout":
					g.sent += number(f[i])
				}
			}
			g.sent += g.completed
		case is("status", "codes:"): // "status codes: 9 2xx, 0 3xx, 0 4xx, 0 5xx"
			g.good = number(f[2])
		}
	}
	slices.Sort(g.latencies)
	if g.completed == 0 {
		return g, errors.New("no query was answered")
	}
	return g, nil
}

// percentile returns the smallest of sorted values that p of them do not exceed.
func percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, max(0, int(p*float64(len(sorted))+0.999999)-1))]
}

// reading is what the machine has used up to a moment.
type reading struct {
	at                                   time.Time
	server, upstream, own, total, stolen time.Duration
	counters
}

func (b *bench) read(s *server) (r reading, err error) {
	r = reading{at: time.Now(), server: cpuOf(s.pids()...), upstream: cpuOf(b.upstream.pids()...), own: cpuOf(os.Getpid()),
		total: cpuOfAll(), stolen: stolen()}
	r.counters, err = readCounters(b.counters)
	return r, err
}

// The bounds of a sound measurement, in percent of a core.
const (
	maxForeign = 8
	maxStolen  = 8
)

// spoilt says whether strangers had so much of the machine that the values say little.
func spoilt(values map[string]float64) bool {
	return values["foreign"] > maxForeign || values["stolen"] > maxStolen
}

// values are the figures of one measurement: what the generator says, and what the machine used between two readings.
func values(g generated, from, to reading) map[string]float64 {
	wall, done := to.at.Sub(from.at), float64(g.completed)
	percent := func(d time.Duration) float64 { return 100 * d.Seconds() / wall.Seconds() }
	server, upstream, own := to.server-from.server, to.upstream-from.upstream, to.own-from.own
	v := map[string]float64{
		"qps":     g.rate,
		"cpu":     float64(server.Microseconds()) / done, // of a query
		"util":    percent(server),
		"load":    percent(upstream + own), // own has the generator, which has ended
		"lost":    100 * float64(g.sent-g.completed) / float64(max(g.sent, 1)),
		"bad":     100 * float64(max(0, g.completed-g.good)) / done, // h2load counts a good one before it is done
		"up":      float64(to.responses-from.responses) / done,
		"shakes":  float64(to.handshakes-from.handshakes) / done,
		"foreign": max(0, percent(to.total-from.total-server-upstream-own)), // ticks are coarse
		"stolen":  percent(to.stolen - from.stolen),
	}
	if len(g.latencies) > 0 {
		v["p50"], v["p99"] = percentile(g.latencies, 0.5), percentile(g.latencies, 0.99)
	}
	return v
}

// quiet waits until strangers leave the machine alone, for at most the time of two measurements.
func (b *bench) quiet(ctx context.Context, s *server) error {
	const span = 400 * time.Millisecond
	for end := time.Now().Add(time.Duration(2 * b.seconds * float64(time.Second))); ; {
		from, err := b.read(s)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(span):
		}
		to, err := b.read(s)
		if err != nil {
			return err
		}
		if !spoilt(values(generated{completed: 1}, from, to)) || time.Now().After(end) {
			return nil
		}
	}
}

// measure runs a generator against s, again if strangers have spoilt it, and returns the quietest try. Argv is told the try,
// from 0, because a name can be missed once only.
func (b *bench) measure(ctx context.Context, s *server, name string, argv func(try int) ([]string, error)) (best record, err error) {
	for try := range b.tries {
		if err := b.quiet(ctx, s); err != nil {
			return best, err
		}
		args, err := argv(try)
		if err != nil {
			return best, err
		}
		from, err := b.read(s)
		if err != nil {
			return best, err
		}
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput() // on our core
		raw := filepath.Join(b.out, "raw", fmt.Sprintf("%s.%d.out", name, try))
		if err := errors.Join(err, os.WriteFile(raw, out, 0o644)); err != nil {
			return best, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out[max(0, len(out)-2000):])
		}
		to, err := b.read(s)
		if err != nil {
			return best, err
		}
		g, err := parseGenerated(out)
		if err != nil {
			return best, fmt.Errorf("%s: %w; it said, in %s:\n%s", strings.Join(args, " "), err, raw, out[max(0, len(out)-2000):])
		}
		v := values(g, from, to)
		noise := func(v map[string]float64) float64 { return max(v["foreign"], v["stolen"]) }
		if best.Values == nil || noise(v) < noise(best.Values) {
			best.Values, best.Spoilt = v, spoilt(v)
		}
		best.Values["tries"] = float64(try + 1)
		if !best.Spoilt {
			break
		}
	}
	return best, nil
}

// run runs a generator without measuring.
func (b *bench) run(ctx context.Context, argv []string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// ask asks for all names of a file over UDP, so many times.
func (b *bench) ask(ctx context.Context, file string, times int) error {
	return b.run(ctx, []string{"dnsperf", "-s", serverIP, "-p", fmt.Sprint(udpAddr.Port()), "-d", file, "-n", fmt.Sprint(times),
		"-c", "8", "-q", "100", "-t", "2"})
}

// perf makes the measurements of one target in one round, all with one process.
func (b *bench) perf(ctx context.Context, t *target, round int) (err error) {
	s, err := b.start(ctx, t, load{cores: b.server(1), entries: fullNames})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	cached, err := b.paths.names(hits, 0, hitNames, true)
	if err != nil {
		return err
	}
	paths, err := b.paths.dohPaths(hitNames)
	if err != nil {
		return err
	}
	// Twice, here and below: what was lost is asked again.
	if err := b.ask(ctx, cached, 2); err != nil {
		return err
	}
	// A target may have a cache for each listener, and has pools to fill.
	for _, warm := range [][]string{
		{"dnsperf", "-m", "tcp", "-s", serverIP, "-p", fmt.Sprint(udpAddr.Port()), "-d", cached, "-n", "1", "-c", "4", "-q", "50"},
		{"dnsperf", "-m", "dot", "-s", serverIP, "-p", fmt.Sprint(dotAddr.Port()), "-d", cached, "-n", "1", "-c", "4", "-q", "50"},
		{"h2load", "-B", "https://" + dohAddr.String(), "-i", paths, "-t", "1", "-n", fmt.Sprint(hitNames), "-c", "1", "-m", "10"},
	} {
		if err := b.run(ctx, warm); err != nil {
			return err
		}
	}
	g := &generator{b.paths.udpblast, b.seconds}
	opened := false
	for _, test := range b.tests {
		if test.miss && !opened {
			opened = true
			file, err := b.paths.names(opening, 0, 5000, false)
			if err == nil {
				err = b.ask(ctx, file, 1)
			}
			if err != nil {
				return err
			}
		}
		r, err := b.measure(ctx, s, fmt.Sprintf("%s.%d.%s", t.name, round, test.name), func(try int) ([]string, error) {
			file := cached
			switch n := 0; {
			case test.miss && test.late:
				n = int(lowRate*b.seconds) + lowRate
				file, err = b.paths.names(lateMiss, try*n, n, false)
			case test.miss:
				n = int(150_000 * b.seconds) // more than any target answers in that time
				file, err = b.paths.names(misses, try*n, n, false)
			case strings.HasPrefix(test.name, "doh"):
				file = paths
			}
			return test.command(g, file), err
		})
		if err != nil {
			return err
		}
		r.Target, r.Round, r.Test = t.name, round, test.name
		b.record(r)
	}
	return nil
}

// record keeps r and says it.
func (b *bench) record(r record) {
	b.results.Records = append(b.results.Records, r)
	var names []string
	for name := range r.Values {
		names = append(names, name)
	}
	slices.Sort(names)
	var line strings.Builder
	for _, name := range names {
		fmt.Fprintf(&line, " %s=%s", name, number(r.Values[name]))
	}
	if r.Spoilt {
		line.WriteString(" (spoilt)")
	}
	fmt.Fprintf(b.log, "  %-8s%s\n", r.Test, line.String())
}
