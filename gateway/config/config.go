// Package config is the YAML file as plain data: its grammar, its defaults, its checks, and the places of its mistakes.
//
// It builds nothing and opens nothing but files that the configuration names (includes, secrets, lists). Only package
// gateway and the commands import it; every other package takes its own Config, which gateway translates.
//
// What surprises a newcomer: Load never stops at the first mistake. It returns all of them, each with its place.
package config

import (
	"net/netip"
	"time"
)

// Place is where something stands: a file (as the user named it, "<stdin>" or "<default>"), a line and a column, both
// counted from 1, the column in characters. The zero Place means "nowhere"; one without a line is the whole file.
type Place struct {
	File      string
	Line, Col int
	Path      string // what stands there, such as "upstreams.default.deadline" or "listen[2].url"; may be empty
	Text      string // the whole source line, kept so that a mistake found later can still show it
}

// Config is one whole, checked configuration with every default filled in.
type Config struct {
	Source    string   // the file it came from, "<stdin>", or "<default>" for the embedded one
	Files     []string // every file that was read: the main one first, then includes and secrets
	Listen    []Listener
	TLS       []KeyPair
	Bootstrap []Server // empty if no upstream has a host name; see Load for what it is when the file names none
	Upstreams []Group  // in the file's order; always one named "default"
	Rules     []Rule   // in the file's order: the first that matches a question says whom to ask
	Access    Access
	Cache     Cache
	Limits    Limits
	Local     Local
	Log       Log
	Admin     Admin
	Warnings  []*Error // what works but is probably not meant, sorted by place
}

// Scheme is the scheme of a listen or upstream URL.
type Scheme string

// The schemes. DNS (udp and tcp on one port) is for listeners only; H3, SDNS and Discover are for upstreams only. Discover
// stands in no URL that is written: it is a server that is asked where its encrypted ones are (RFC 9462), and never a
// client's question.
const (
	DNS   Scheme = "dns"
	UDP   Scheme = "udp"
	TCP   Scheme = "tcp"
	TLS   Scheme = "tls"
	HTTPS Scheme = "https"
	H3    Scheme = "h3"
	QUIC  Scheme = "quic"
	SDNS  Scheme = "sdns"

	Discover Scheme = "discover"
)

// Listener is one entry of `listen`.
type Listener struct {
	Place  Place
	Name   string // the entry's name, or its URL
	URL    string // as written
	Scheme Scheme
	Addr   netip.AddrPort // an empty host or "*" is the unspecified IPv6 address: both families; port 0: any free one
	Path   string         // HTTPS only; "/dns-query" by default
	// Sockets is how many UDP sockets share the port, DNS and UDP only; 0: as many as the program has cores.
	Sockets int
	HTTP    []string // HTTPS only: of "h1", "h2", "h3"; h1 and h2 by default
}

// KeyPair is one certificate chain with its key, in PEM.
type KeyPair struct {
	Place    Place
	CertFile string // as the program opens it, or "env:NAME"
	Cert     []byte
	KeyFile  string // as the program opens it, or "env:NAME"
	Key      []byte
	Names    []string // lower-case SNI names and addresses that choose it besides those in the certificate
}

// Server is one upstream server or bootstrap server.
type Server struct {
	Place      Place
	URL        string // as written; "discover://" and the address for Discover
	Scheme     Scheme
	Host       string // a host name or an IP address without brackets; empty for SDNS; always an address for Discover
	Port       uint16 // filled in from the scheme when the URL has none
	Path       string // HTTPS and H3; "/dns-query" by default
	VerifyName string // the name behind '#', else Host: what the certificate has to say
	CA         []byte // PEM of the only trusted roots; nil means the system's
	CAFile     string
	Pins       [][32]byte // SHA-256 of SubjectPublicKeyInfo; any one has to match; nil means no pinning
	ClientCert *KeyPair
}

// Pick is how a server is chosen inside a tier.
type Pick string

// The picks.
const (
	Fastest Pick = "fastest"
	Random  Pick = "random"
	InOrder Pick = "in-order"
	Race    Pick = "race"
	Sticky  Pick = "sticky"
)

// NextOn is the set of outcomes that move a query on to the next server.
type NextOn struct{ Timeout, Connect, ServFail, Refused bool }

// Hedge says when the next server is asked although the one before it has neither answered nor failed.
type Hedge struct {
	Never bool
	After time.Duration // 0: auto, by how long the server usually takes
}

// Breaker says when a server that fails is left alone, and when it is tried again.
type Breaker struct {
	OpenAfter int           // failures in a row
	Probe     time.Duration // the first pause; each is longer than the one before
	MaxProbe  time.Duration // the longest pause
}

// DefaultGroup is the name of the group that every question goes to for which no rule has another one.
const DefaultGroup = "default"

// Group is one upstream group.
type Group struct {
	Place    Place
	Name     string
	Tiers    [][]Server // top to bottom; none is empty
	Pick     Pick
	NextOn   NextOn
	Deadline time.Duration
	Hedge    Hedge
	Breaker  Breaker
	Private  bool // what its rules name never goes to a group that is not private
}

// Rule sends the questions that it matches to a group, whatever their type and class.
type Rule struct {
	Place Place
	Names []Name // any one has to match; never empty
	Use   string // the name of a group of Config.Upstreams
}

// Match is how a Name is compared with the name of a question, letter case aside.
type Match string

// The ways to match.
const (
	Below  Match = "below"  // the name itself and every name below it
	Exact  Match = "exact"  // the name alone
	Regexp Match = "regexp" // a Go regular expression, held against the lower-case name without the dot at its end
)

// Name is one item of the list of names in a rule.
type Name struct {
	Place Place
	Text  string // as written
	Match Match
	// Values are lower-case names without the dot at the end ("" is the root), or the one expression. There is one, but for
	// a network, which may stand for several reverse zones.
	Values []string
}

// Otherwise is what happens to clients that are not allowed.
type Otherwise string

// What may happen to a client that is not allowed.
const (
	Refuse Otherwise = "refuse"
	Drop   Otherwise = "drop"
)

// Access says who may ask.
type Access struct {
	Set       bool           // the file has an `access` section: Allow then holds for every listener
	Allow     []netip.Prefix // without a section: loopback and private networks, for plain listeners only
	Otherwise Otherwise
}

// Cache sizes the cache, bounds lifetimes, and says what happens to answers at the end of theirs.
type Cache struct {
	Size        int64 // bytes; 0 turns the cache off, whatever the rest says
	MinTTL      time.Duration
	MaxTTL      time.Duration
	NegativeMax time.Duration
	Stale       Stale
	Prefetch    Prefetch
	Save        Save
}

// Stale says when an answer goes out whose time is over, RFC 8767. Its zero value is never.
type Stale struct {
	After time.Duration // how long a client waits for upstreams first
	For   time.Duration // how long after its time an answer is kept; 0: not at all
	TTL   time.Duration // what clients are told; whole seconds
}

// Prefetch says which answers are asked for anew before their time is over. Its zero value is none.
type Prefetch struct {
	Hits      int     // how often an answer has to have been used; 0: off
	Remaining float64 // the part of its life that is left by then, above 0 and at most 0.5
}

// Save says where the cache is kept while the program does not run. Its zero value is nowhere.
type Save struct {
	Place Place
	File  string // "": nowhere
	Every time.Duration
}

// Limits bound what the network can make the gateway do.
type Limits struct {
	PerClient    float64 // queries per second for one client prefix; 0 means no limit
	PrefixV4     int     // bits that make one IPv4 client
	PrefixV6     int     // bits that make one IPv6 client
	Inflight     int     // cache misses being resolved at once, over all listeners
	TCPPerClient int     // stream connections of one client prefix
	TCPPipeline  int     // unanswered queries on one stream connection
	TCPIdle      time.Duration
	UDPSize      int // largest UDP answer, octets
}

// Local holds answers that the gateway has itself.
type Local struct {
	// Chaos maps lower-case CH TXT names ("version.bind", "id.server", ...) to their text; names that are not there are
	// refused.
	Chaos map[string]string
}

// Log says what is logged and where.
type Log struct {
	Level  string // debug | info | warn | error
	Format string // text | json | "" (text on a terminal, else json)
	Output string // stdout | stderr | a file's path
}

// Admin is the operator's HTTP endpoint.
type Admin struct {
	Place  Place
	Listen netip.AddrPort // the zero value turns it off
	Token  string         // what requests that change something have to show; "" if there is none
}
