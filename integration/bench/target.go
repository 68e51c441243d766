//go:build linux

package main

import (
	"embed"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

// target is a server under test. All of them cache, log no queries, validate nothing and forward to one DoT upstream.
type target struct {
	name     string
	packages []string // "command:package", Debian's names
	config   string   // a file of targets/, or empty
	// command returns the command line; file is the configuration's path.
	command func(p *paths, s *site, file string) []string
	env     func(p *paths) []string // or nil
	version []string                // asks for it, for ours without the program's name
	floor   bool                    // gives fixed answers and has no cache: no memory, no scale
	oneCore bool                    // one process uses one core, whatever it has
	files   int                     // descriptors that it reserves for each connection it is told to hold; 0: none
}

// targets are all that there are; without names on the command line all of them are measured. CoreDNS and routedns are
// not in Debian and are left out.
var targets = []*target{
	{
		name: "dnsgateway", config: "dnsgateway.yaml",
		command: func(p *paths, _ *site, file string) []string { return []string{p.gateway, "run", "-c", file} },
		version: []string{"version"},
	},
	{
		name: "dnsdist", packages: []string{"dnsdist:dnsdist"}, config: "dnsdist.conf",
		command: func(_ *paths, _ *site, file string) []string {
			return []string{"dnsdist", "-C", file, "--supervised", "--disable-syslog"}
		},
		version: []string{"dnsdist", "--version"},
	},
	{
		name: "unbound", packages: []string{"unbound:unbound"}, config: "unbound.conf",
		command: func(_ *paths, _ *site, file string) []string { return []string{"unbound", "-d", "-c", file} },
		version: []string{"unbound", "-V"},
		files:   6, // its bound is for each of three listeners, and has to be twice of what comes: see the file
	},
	{
		name: "kresd", packages: []string{"kresd:knot-resolver"}, config: "kresd.conf",
		command: func(_ *paths, s *site, file string) []string { return []string{"kresd", "-n", "-c", file, s.Dir} },
		version: []string{"kresd", "--version"},
		oneCore: true,
	},
	{
		name: "dnsproxy",
		command: func(p *paths, s *site, _ string) []string {
			return []string{p.dnsproxy, "-l", s.IP, "-p", s.Port(s.UDP), "-t", s.Port(s.DoT), "-s", s.Port(s.DoH),
				"-c", s.Cert, "-k", s.Key, "-u", "tls://" + s.Upstream, "--cache", "--ratelimit=0", "--udp-buf-size=4194304",
				fmt.Sprintf("--cache-size=%d", s.Megabytes(64)<<20)}
		},
		env: func(p *paths) []string { return []string{"SSL_CERT_FILE=" + p.ca} },
	},
	{
		name: "floor",
		command: func(p *paths, s *site, _ string) []string {
			return []string{p.floor, s.UDP, s.DoT, s.DoH, s.Cert, s.Key, s.Upstream, s.UpstreamName, s.CA}
		},
		floor: true,
	},
}

func targetNames() []string {
	var names []string
	for _, t := range targets {
		names = append(names, t.name)
	}
	return names
}

// Addresses of the private network namespace, where every port is free.
const (
	serverIP     = "127.2.2.1"
	upstreamIP   = "127.2.2.53"
	upstreamName = "up.bench.test"
	serverName   = "gw.bench.test"
	upstreamUDP  = "5353"
	upstreamDoT  = "8853"
	zone         = "bench.perfzone.net"
)

var (
	udpAddr = netip.MustParseAddrPort(serverIP + ":5301")
	dotAddr = netip.MustParseAddrPort(serverIP + ":8530")
	dohAddr = netip.MustParseAddrPort(serverIP + ":4430")
)

// site is what a target is told: it fills in the templates of targets/.
type site struct {
	IP, UDP, DoT, DoH, Upstream string // all but IP with a port
	UpstreamName, Zone          string
	CA, Cert, Key               string // files
	Dir                         string // of this start, for configurations and logs
	Shm                         string // the same on tmpfs
	Threads                     []int  // one entry for each core of the server
	Entries                     int    // names that the cache has to hold
	conns                       int    // connections that it has to hold, if they are many
}

// load is what a start has to be made for.
type load struct {
	cores   []int // of the server
	entries int
	conns   int
}

func newSite(p *paths, l load, dir, shm string) *site {
	return &site{
		IP: serverIP, UDP: udpAddr.String(), DoT: dotAddr.String(), DoH: dohAddr.String(),
		Upstream: upstreamIP + ":" + upstreamDoT, UpstreamName: upstreamName, Zone: zone,
		CA: p.ca, Cert: p.cert, Key: p.key, Dir: dir, Shm: shm, Threads: l.cores,
		// A cache that holds just the names would be one that evicts: shards are not filled evenly.
		Entries: max(l.entries, fullNames) * 6 / 5, conns: l.conns,
	}
}

// Megabytes is the size of a cache: what the target gets for 100,000 names, and more in proportion.
func (s *site) Megabytes(for100k int) int { return for100k * s.Entries / (fullNames * 6 / 5) }

// Connections is a bound of connections that the target does not come near.
func (s *site) Connections(atLeast int) int { return max(atLeast, 2*s.conns) }

// Port returns the port of an address.
func (s *site) Port(addr string) string {
	_, port, _ := strings.Cut(addr, ":")
	return port
}

// At returns an address as Unbound and Knot Resolver write it.
func (s *site) At(addr string) string { return strings.Replace(addr, ":", "@", 1) }

//go:embed targets
var configs embed.FS

var configTemplates = template.Must(template.New("").ParseFS(configs, "targets/*"))

// write writes the target's configuration, if it has one, and returns its path.
func (t *target) write(s *site) (string, error) {
	if t.config == "" {
		return "", nil
	}
	path := filepath.Join(s.Dir, t.config)
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return path, configTemplates.ExecuteTemplate(f, t.config, s)
}

// pickTargets returns the targets called names, or all.
func pickTargets(names []string) (picked []*target, err error) {
	if len(names) == 0 {
		return targets, nil
	}
	for _, name := range names {
		i := slices.IndexFunc(targets, func(t *target) bool { return t.name == name })
		if i < 0 {
			return nil, fmt.Errorf("unknown target %q; they are %s", name, strings.Join(targetNames(), " "))
		}
		if slices.Contains(picked, targets[i]) {
			return nil, fmt.Errorf("target %q is there twice", name)
		}
		picked = append(picked, targets[i])
	}
	return picked, nil
}

// cpuList is a list of cores as taskset reads it.
func cpuList(cores []int) string {
	var s []string
	for _, c := range cores {
		s = append(s, strconv.Itoa(c))
	}
	return strings.Join(s, ",")
}
