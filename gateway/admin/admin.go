// Package admin is the operator's HTTP endpoint: liveness, readiness and metrics, and a flush of the cache.
//
// It shows what it is given through functions and decides nothing itself: what "ready" means is package gateway's
// matter. Whoever reaches it may look: these endpoints answer GET and HEAD. What changes something is a POST, which has to
// show a token or to come from this machine, and not from a browser.
//
// What surprises a newcomer: /livez answers from this package alone unless a Live function is given. A gateway whose
// upstreams are all dead is alive; restarting it would help nobody. That is what /readyz is for.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Readiness is the body of /readyz.
type Readiness struct {
	Ready     bool       `json:"ready"`
	Reasons   []string   `json:"reasons"` // why not, in words; empty when ready
	Listeners []Listener `json:"listeners"`
	Groups    []Group    `json:"groups"`
}

// Listener is one bound socket.
type Listener struct {
	Name  string `json:"name"`
	URL   string `json:"url"`  // as it stands in the file
	Addr  string `json:"addr"` // as it was bound
	Ready bool   `json:"ready"`
}

// Group is one upstream group.
type Group struct {
	Name    string           `json:"name"`
	Ready   bool             `json:"ready"`
	Servers []UpstreamServer `json:"servers"`
}

// UpstreamServer is one server of a group.
type UpstreamServer struct {
	URL   string `json:"url"`
	Tier  int    `json:"tier"`  // counted from 1
	State string `json:"state"` // ok | failing | unknown
	Error string `json:"error,omitempty"`
}

// ErrStopping is what Config.Flush returns when there is no time left for it.
var ErrStopping = errors.New("the gateway is stopping; nothing was flushed")

// Config is what a Server shows. Its functions are called once for each request, perhaps by several requests at once,
// and must not wait for the network.
type Config struct {
	Live    func() error     // nil: alive for as long as it can answer
	Ready   func() Readiness // needed
	Metrics http.Handler     // nil: there is no /metrics
	// Flush forgets the answers for a name in presentation form, with below also those for every name under it, and for "" all
	// answers. It returns how many; its error says what is wrong with the name, or is ErrStopping. ctx ends when the client
	// leaves. nil: there is no cache.
	Flush func(ctx context.Context, name string, below bool) (int, error)
	// Token is what a request has to show that changes something. Without one such requests are only taken while the address
	// that is listened on is a loopback address.
	Token  string
	Logger *slog.Logger // nil: silent
}

// Limits of a request. The endpoint is meant for probes and scrapers, which send small requests at once.
const (
	readTimeout    = 5 * time.Second
	writeTimeout   = 30 * time.Second // a scrape over a slow line
	idleTimeout    = 2 * time.Minute  // longer than the scrape intervals in use, so that scrapers keep their connection
	maxHeaderBytes = 16 << 10
)

// Server is the endpoint. Listen, Serve and Shutdown are called in this order; Shutdown may be called at any time and
// from any goroutine.
type Server struct {
	cfg  Config
	http *http.Server

	mu       sync.Mutex
	listener net.Listener
	stopped  bool
}

// local reports whether only this machine reaches the endpoint.
func (s *Server) local() bool {
	a, ok := s.Addr().(*net.TCPAddr)
	return ok && a.IP.IsLoopback()
}

// New returns an endpoint that is not bound yet.
func New(cfg Config) (*Server, error) {
	if cfg.Ready == nil {
		return nil, errors.New("the admin endpoint needs a Ready function")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg}
	s.http = &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadTimeout:       readTimeout,
		ReadHeaderTimeout: readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// What net/http has to say is about single connections of strangers.
		ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// Listen binds addr; connections wait until Serve is called. Its error is the one of net.ListenConfig.Listen, which
// names the address and wraps the system's.
func (s *Server) Listen(ctx context.Context, addr netip.AddrPort) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopped:
		err = http.ErrServerClosed
	case s.listener != nil:
		err = fmt.Errorf("already listening on %v", s.listener.Addr())
	default:
		s.listener = l
		return nil
	}
	return errors.Join(err, l.Close())
}

// Addr returns the bound address, nil before Listen.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Serve answers until Shutdown, and then returns nil. It needs a Listen before it.
func (s *Server) Serve() error {
	s.mu.Lock()
	l, stopped := s.listener, s.stopped
	s.mu.Unlock()
	if stopped {
		return nil
	}
	if l == nil {
		return errors.New("serving before listening")
	}
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown stops accepting, finishes the requests in flight within ctx and closes all connections.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	l := s.listener
	s.stopped = true
	s.mu.Unlock()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	if l != nil {
		// The HTTP server only knows the listener when Serve was called, and then has closed it.
		if cerr := l.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
			err = errors.Join(err, cerr)
		}
	}
	return err
}

// Handler returns what the server serves.
func (s *Server) Handler() http.Handler { return s.http.Handler }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	var endpoint http.HandlerFunc
	change := false
	switch r.URL.Path {
	case "/":
		endpoint = s.index
	case "/livez":
		endpoint = s.livez
	case "/readyz":
		endpoint = s.readyz
	case "/metrics":
		if s.cfg.Metrics != nil {
			endpoint = s.cfg.Metrics.ServeHTTP
		}
	case "/cache/flush":
		endpoint, change = s.flush, true
	}
	if endpoint == nil {
		reply(w, http.StatusNotFound, textType, "not found; the endpoints are listed at /\n")
		return
	}
	if change && r.Method != http.MethodPost {
		h.Set("Allow", "POST")
		reply(w, http.StatusMethodNotAllowed, textType, "only POST\n")
		return
	}
	if !change && r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		reply(w, http.StatusMethodNotAllowed, textType, "only GET and HEAD\n")
		return
	}
	endpoint(w, r)
}

const (
	textType = "text/plain; charset=utf-8"
	jsonType = "application/json"
)

// reply sends a whole response. A write that fails has nobody left to be told.
func reply(w http.ResponseWriter, status int, contentType, body string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body)
}

func (s *Server) index(w http.ResponseWriter, _ *http.Request) {
	text := "dnsgateway\n\n" +
		"/livez    200 while the process serves\n" +
		"/readyz   200 when queries can be answered, 503 with the reasons when not (JSON)\n"
	if s.cfg.Metrics != nil {
		text += "/metrics  Prometheus metrics\n"
	}
	text += "\nPOST /cache/flush?name=example.com&below=true  forgets the answers for that name and all below it;\n" +
		"                                               without below for that name, without name for all\n"
	reply(w, http.StatusOK, textType, text)
}

func (s *Server) livez(w http.ResponseWriter, _ *http.Request) {
	if s.cfg.Live != nil {
		if err := s.cfg.Live(); err != nil {
			reply(w, http.StatusServiceUnavailable, textType, err.Error()+"\n")
			return
		}
	}
	reply(w, http.StatusOK, textType, "ok\n")
}

func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	ready := s.cfg.Ready()
	body, err := json.MarshalIndent(ready.filled(), "", "  ")
	if err != nil {
		panic(fmt.Sprintf("admin: Readiness cannot be JSON: %v", err)) // it is strings and numbers only
	}
	status := http.StatusOK
	if !ready.Ready {
		status = http.StatusServiceUnavailable
	}
	reply(w, status, jsonType, string(body)+"\n")
}

// filled returns r with empty lists in place of nil ones, so that a program that reads the JSON never meets a null.
func (r Readiness) filled() Readiness {
	if r.Reasons == nil {
		r.Reasons = []string{}
	}
	if r.Listeners == nil {
		r.Listeners = []Listener{}
	}
	groups := make([]Group, len(r.Groups))
	for i, g := range r.Groups {
		if g.Servers == nil {
			g.Servers = []UpstreamServer{}
		}
		groups[i] = g
	}
	r.Groups = groups
	return r
}
