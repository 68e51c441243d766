//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"dnsgateway/integration/programs"
)

// paths are the files that stay between runs.
type paths struct {
	cache                                      string // the folder of all others
	gateway, dnsproxy, floor, fastup, udpblast string
	ca, cert, key                              string
}

func newPaths(cache string) *paths {
	bin, pki := filepath.Join(cache, "bin"), filepath.Join(cache, "pki")
	return &paths{
		cache: cache, gateway: filepath.Join(bin, "dnsgateway"), dnsproxy: filepath.Join(bin, "dnsproxy"),
		floor: filepath.Join(bin, "floor"), fastup: filepath.Join(bin, "fastup"), udpblast: filepath.Join(bin, "udpblast"),
		ca: filepath.Join(pki, "ca.crt"), cert: filepath.Join(pki, "server.crt"), key: filepath.Join(pki, "server.key"),
	}
}

// tools are what every run needs; "FILE:package" means that the file is there.
var tools = []string{"dnsperf:dnsperf", "h2load:nghttp2-client", "gcc:gcc", "/usr/include/openssl/ssl.h:libssl-dev",
	"/usr/include/stdlib.h:libc6-dev", "ip:iproute2"}

// missing returns those of "command:package" that are not installed.
func missing(wanted []string) (left []string) {
	for _, w := range wanted {
		command, _, _ := strings.Cut(w, ":")
		if _, err := exec.LookPath(command); err == nil {
			continue
		}
		if _, err := os.Stat(command); err == nil && strings.HasPrefix(command, "/") {
			continue
		}
		left = append(left, w)
	}
	return left
}

// install installs what is missing, without starting the servers among it.
func install(ctx context.Context, wanted []string, log io.Writer) (err error) {
	left := missing(wanted)
	if len(left) == 0 {
		return nil
	}
	var names []string
	for _, w := range left {
		_, name, _ := strings.Cut(w, ":")
		names = append(names, name)
	}
	fmt.Fprintln(log, "installing", strings.Join(names, " "))
	// Debian's way to say that a package's service is not to be started; see invoke-rc.d(8).
	const policy = "/usr/sbin/policy-rc.d"
	f, err := os.OpenFile(policy, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	switch {
	case errors.Is(err, fs.ErrExist): // the machine has one of its own
	case err != nil:
		return err
	default:
		defer func() { err = errors.Join(err, os.Remove(policy)) }()
		_, err = f.WriteString("#!/bin/sh\nexit 101\n")
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"update", "-qq"}, append([]string{"install", "-y", "-qq", "--no-install-recommends"}, names...),
	} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	if left := missing(wanted); len(left) > 0 {
		return fmt.Errorf("not there after the installation: %s", strings.Join(left, " "))
	}
	return nil
}

// build builds the programs that the targets need, and makes the keys. The C programs and the gateway are built every
// time: the checkout may have changed.
func build(ctx context.Context, p *paths, root string, picked []*target, log io.Writer) error {
	fmt.Fprintln(log, "building in", p.cache)
	source := filepath.Join(root, "integration", "bench", "src")
	if err := errors.Join(
		programs.Gateway(ctx, p.gateway), // it makes the keys, too
		command(ctx, "go", "build", "-o", p.floor, "./integration/bench/floor"),
		command(ctx, "gcc", "-O2", "-Wall", "-o", p.fastup, filepath.Join(source, "fastup.c"), "-lssl", "-lcrypto"),
		command(ctx, "gcc", "-O2", "-Wall", "-o", p.udpblast, filepath.Join(source, "udpblast.c")),
	); err != nil {
		return err
	}
	if slices.ContainsFunc(picked, func(t *target) bool { return t.name == "dnsproxy" }) {
		if err := programs.Dnsproxy(ctx, p.dnsproxy); err != nil {
			return err
		}
	}
	return command(ctx, p.gateway, "cert", "--dir", filepath.Dir(p.ca), upstreamName, serverName, serverIP, upstreamIP)
}

func command(ctx context.Context, argv ...string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// Kinds of names. Each is asked at one kind of place only, so that what was never asked stays so.
const (
	hits      = "h" // what the cache has
	fill      = "f" // what makes it 100,000 and more
	opening   = "o" // misses that open the connections to the upstream, not measured
	misses    = "m"
	lateMiss  = "l" // misses at the low rate
	hitNames  = 10_000
	fullNames = 100_000
)

func hostName(kind string, i int) string { return fmt.Sprintf("%s%07d.%s", kind, i, zone) }

// names returns a file of n names from number from on, a line each as dnsperf reads them. They are shuffled, so that they
// are not asked in the order in which a cache got them; the same names are always in the same order.
func (p *paths) names(kind string, from, n int, shuffled bool) (string, error) {
	order := "ordered"
	if shuffled {
		order = "shuffled"
	}
	path := filepath.Join(p.cache, "names", fmt.Sprintf("%s-%d-%d-%s", kind, from, n, order))
	return path, writeOnce(path, from, n, shuffled, func(i int) string { return hostName(kind, i) + " A\n" })
}

// dohPaths is names as paths of DoH's GET, for h2load.
func (p *paths) dohPaths(n int) (string, error) {
	path := filepath.Join(p.cache, "names", fmt.Sprintf("doh-%d", n))
	return path, writeOnce(path, 0, n, true, func(i int) string {
		q := new(dns.Msg).SetQuestion(hostName(hits, i)+".", dns.TypeA)
		q.Id = 0
		raw, err := q.Pack()
		if err != nil {
			panic(err) // the name is ours
		}
		return dohPath(raw) + "\n"
	})
}

// writeOnce writes a file of lines, unless it is there.
func writeOnce(path string, from, n int, shuffled bool, line func(i int) string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone by then, if all went well
	w := bufio.NewWriter(f)
	order := func(i int) int { return i }
	if shuffled {
		perm := rand.New(rand.NewPCG(1, 2)).Perm(n)
		order = func(i int) int { return perm[i] }
	}
	for i := range n {
		w.WriteString(line(from + order(i))) // Flush returns its error
	}
	if err := errors.Join(w.Flush(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
