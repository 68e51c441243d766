package lab

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"

	"github.com/quic-go/quic-go"
)

const (
	dohPath  = "/dns-query"
	dohMedia = "application/dns-message"
	// maxMessage is the longest DNS message.
	maxMessage = 65535
)

// httpsFront serves DoH over HTTP/1.1 and HTTP/2.
type httpsFront struct {
	server *http.Server
	cancel context.CancelFunc
	conns  sync.WaitGroup
	doh    dohHandler
}

// connKey is the context key of the connection under a request: a *tls.Conn or a *quic.Conn.
type connKey struct{}

func (s *Server) openHTTPS(addr netip.AddrPort, m mode) (front, error) {
	if m == hole {
		return s.openStream(addr, m)
	}
	ln, err := net.Listen("tcp", addr.String())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &httpsFront{cancel: cancel, doh: dohHandler{s: s, via: HTTPS}}
	var numbers sync.Map // of connections: net.Conn to uint64
	f.server = &http.Server{
		Handler:     &f.doh,
		TLSConfig:   s.tlsConfig(m, "h2", "http/1.1"),
		ErrorLog:    slog.NewLogLogger(s.lab.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			number := s.conns.enter(c.(*tls.Conn).NetConn()) // called once, before StateNew
			numbers.Store(c, number)
			return withNumber(context.WithValue(ctx, connKey{}, c), number)
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				f.conns.Add(1)
			case http.StateClosed:
				number, _ := numbers.LoadAndDelete(c)
				s.conns.leave(number.(uint64))
				f.conns.Done()
			}
		},
		// A silent server holds many requests of one client.
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: pipeline},
	}
	f.conns.Add(1)
	go func() {
		defer f.conns.Done()
		f.server.ServeTLS(ln, "", "") // returns when the server is closed, which closes ln
	}()
	return f, nil
}

func (f *httpsFront) close() {
	f.cancel()
	f.server.Close()
	f.conns.Wait()
	f.doh.running.Wait()
}

// dohHandler answers DoH requests, RFC 8484, and says hello on "/".
type dohHandler struct {
	s       *Server
	via     Scheme
	running sync.WaitGroup // requests of HTTP/2 outlive their connection
}

func (h *dohHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.running.Add(1)
	defer h.running.Done()
	switch r.URL.Path {
	case dohPath:
	case "/":
		fmt.Fprintf(w, "This is %s.\n", h.s.HostName())
		return
	default:
		http.NotFound(w, r)
		return
	}
	raw, status := readDoH(w, r)
	if status != 0 {
		http.Error(w, http.StatusText(status), status)
		return
	}
	msg, act := h.s.respond(r.Context(), h.via, raw)
	if act == drop {
		<-r.Context().Done() // the client gives up, or the server is closed
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Content-Type", dohMedia)
	w.Header().Set("Content-Length", strconv.Itoa(len(msg)))
	if act == send {
		w.Write(msg)
		return
	}
	w.Write(msg[:len(msg)/2]) // and the body ends below the announced length
	if act == reset {
		http.NewResponseController(w).Flush()
		resetConn(r.Context().Value(connKey{}))
		panic(http.ErrAbortHandler)
	}
}

// readDoH returns the message in r, or the status that the request earns.
func readDoH(w http.ResponseWriter, r *http.Request) (raw []byte, status int) {
	switch r.Method {
	case http.MethodGet:
		raw, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
		if err != nil || len(raw) == 0 {
			return nil, http.StatusBadRequest
		}
		return raw, 0
	case http.MethodPost:
		if r.Header.Get("Content-Type") != dohMedia {
			return nil, http.StatusUnsupportedMediaType
		}
		raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessage))
		if err != nil {
			return nil, http.StatusRequestEntityTooLarge
		}
		return raw, 0
	}
	return nil, http.StatusMethodNotAllowed
}

// resetConn ends conn without order: RST on TCP, an error on QUIC.
func resetConn(conn any) {
	switch c := conn.(type) {
	case *tls.Conn:
		if tcp, ok := c.NetConn().(*net.TCPConn); ok {
			tcp.SetLinger(0)
			tcp.Close()
		}
	case *quic.Conn:
		c.CloseWithError(h3InternalError, "")
	}
}
