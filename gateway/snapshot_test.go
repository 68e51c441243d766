package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/admin"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/forward"
	"dnsgateway/gateway/lab"
	"dnsgateway/gateway/observe"
	"dnsgateway/gateway/pipeline"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// fakeStore is a cache whose file is slow, or does not go well.
type fakeStore struct {
	begin time.Time

	mu    sync.Mutex
	load  error
	save  error
	idle  bool          // nothing has changed since the last save
	takes time.Duration // each call
	stuck bool          // the file is on a disk that does not answer: no context ends a load
	calls []string
}

func (f *fakeStore) call(what string, now int64) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if since := time.Since(f.begin); now != 0 && now != time.Now().UnixNano() {
		what += " at another time"
	} else {
		what = fmt.Sprint(since, " ", what)
	}
	f.calls = append(f.calls, what)
	return f.takes
}

func (f *fakeStore) LoadFile(ctx context.Context, path string, now int64) (int, error) {
	takes := time.After(f.call("load "+path, now))
	if f.stuck {
		<-takes
		return 5, f.load
	}
	select {
	case <-takes:
		return 5, f.load
	case <-ctx.Done():
		return 2, fmt.Errorf("loading: %w", ctx.Err())
	}
}

func (f *fakeStore) SaveFile(path string, now int64, last cache.Saved) (cache.Saved, error) {
	time.Sleep(f.call("save "+path, now))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.save != nil {
		return cache.Saved{}, f.save
	}
	return cache.Saved{Entries: 7, Bytes: last.Bytes + 100, Written: !f.idle}, nil // one that has seen others is longer
}

func (f *fakeStore) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeStore) fail(err error) { f.set(func() { f.save = err }) }

func (f *fakeStore) seen() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// lines are the log's messages with their levels, those at debug level left out.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// inBubble runs f with a gateway that has nothing but a snapshot of store, whose begin it sets, and something to flush.
func inBubble(t *testing.T, store *fakeStore, f func(t *testing.T, g *Gateway, log *lines)) {
	synctest.Test(t, func(t *testing.T) {
		store.begin = time.Now()
		var log lines
		g := &Gateway{log: log.logger()}
		g.snapshot = newSnapshot(store, "c.bin", time.Minute, g.log)
		admit, err := access.New(access.Config{})
		if err != nil {
			t.Fatal(err)
		}
		p, err := pipeline.New(pipeline.Config{Access: admit, Groups: []pipeline.Group{{Upstream: new(forward.Group)}}})
		if err != nil {
			t.Fatal(err)
		}
		g.policy.Store(&policy{pipeline: p})
		f(t, g, &log)
	})
}

func TestSnapshotTimes(t *testing.T) {
	store := &fakeStore{takes: 2 * time.Second}
	inBubble(t, store, func(t *testing.T, g *Gateway, log *lines) {
		end := g.keep(t.Context())
		if took := time.Since(store.begin); took != 0 {
			t.Errorf("the start takes %v", took)
		}
		time.Sleep(time.Second)
		if _, err := g.flush(t.Context(), "A.example", false); err != nil || time.Since(store.begin) != 2*time.Second { // waits for the load
			t.Errorf("flush: got %v after %v", err, time.Since(store.begin))
		}
		time.Sleep(90 * time.Second)
		if _, err := g.flush(t.Context(), "", false); err != nil {
			t.Errorf("flush: got %v", err)
		}
		if _, err := g.flush(t.Context(), "a..b", true); err == nil {
			t.Error("a bad name is flushed")
		}
		time.Sleep(10 * time.Second)
		end()
		want := []string{
			"0s load c.bin", "2s save c.bin", "1m2s save c.bin", "1m32s save c.bin", "1m42s save c.bin",
		}
		if d := cmp.Diff(want, store.seen()); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
		want = []string{
			`level=INFO msg="the saved cache is loaded" file=c.bin entries=5 took=2s`,
			`level=INFO msg="the cache was flushed" entries=0 all=false`,
			`level=INFO msg="the cache was flushed" entries=0 all=true`,
			`level=INFO msg="the cache is saved" file=c.bin entries=7 took=2s`, "",
		}
		if d := cmp.Diff(want, strings.Split(log.String(), "\n")); d != "" {
			t.Errorf("log (-want +got):\n%s", d)
		}
	})
}

// TestSnapshotStopWhileLoading ends while the file is read: nobody waits for that, least of all who wants something flushed,
// and the file is not replaced by a part of itself.
func TestSnapshotStopWhileLoading(t *testing.T) {
	store := &fakeStore{takes: time.Minute}
	inBubble(t, store, func(t *testing.T, g *Gateway, log *lines) {
		background, stop := context.WithCancel(t.Context())
		end := g.keep(background)
		flushed := make(chan error, 2)
		flush := func(ctx context.Context) {
			_, err := g.flush(ctx, "a.example", false)
			flushed <- err
		}
		client, leave := context.WithTimeout(t.Context(), 2*time.Second)
		defer leave()
		go flush(client)
		go flush(t.Context())
		time.Sleep(3 * time.Second)
		if len(flushed) != 1 {
			t.Errorf("%d flushes have ended, want that of the client who left", len(flushed))
		}
		stop()
		synctest.Wait()
		if len(flushed) != 2 {
			t.Error("a flush holds up the stop")
		}
		go flush(t.Context()) // the admin endpoint is still there
		end()
		if took := time.Since(store.begin); took != 3*time.Second {
			t.Errorf("the stop took %v", took-3*time.Second)
		}
		for range 3 {
			if err := <-flushed; !errors.Is(err, admin.ErrStopping) {
				t.Errorf("flush: got %v, want %v", err, admin.ErrStopping)
			}
		}
		if d := cmp.Diff([]string{"0s load c.bin"}, store.seen()); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
		want := "level=INFO msg=\"the saved cache was not loaded to its end; it stays as it is\" file=c.bin\n"
		if log.String() != want {
			t.Errorf("got log %q, want %q", log, want)
		}
	})
}

// TestSnapshotFlushWhileStopping flushes when everything but the admin endpoint has ended: the file is saved after that.
func TestSnapshotFlushWhileStopping(t *testing.T) {
	store := &fakeStore{takes: time.Second}
	inBubble(t, store, func(t *testing.T, g *Gateway, _ *lines) {
		background, stop := context.WithCancel(t.Context())
		end := g.keep(background)
		time.Sleep(10 * time.Second)
		stop()
		time.Sleep(5 * time.Second)
		if _, err := g.flush(t.Context(), "a.example", false); err != nil {
			t.Errorf("flush: got %v", err)
		}
		end()
		want := []string{"0s load c.bin", "15s save c.bin"}
		got := store.seen()
		if len(got) < len(want) || cmp.Diff(want, got[:len(want)]) != "" {
			t.Errorf("calls: got %q, want %q", got, want)
		}
	})
}

// TestSnapshotSlowDisk has a disk that does not come back: the stop does.
func TestSnapshotSlowDisk(t *testing.T) {
	store := &fakeStore{takes: time.Hour, stuck: true}
	inBubble(t, store, func(t *testing.T, g *Gateway, log *lines) {
		end := g.keep(t.Context())
		end()
		if took := time.Since(store.begin); took != saveGrace {
			t.Errorf("the stop took %v, want %v", took, saveGrace)
		}
		if want := `level=WARN msg="the cache could not be saved in time" file=c.bin`; !strings.Contains(log.String(), want) {
			t.Errorf("got log %q, want %q", log, want)
		}
		time.Sleep(3 * time.Hour) // lets the goroutine end, as the bubble wants it
	})
}

// TestSnapshotWarnsOnce has a full disk for an hour: one warning, and one line when it is over.
func TestSnapshotWarnsOnce(t *testing.T) {
	store := &fakeStore{load: fmt.Errorf("opening: %w", fs.ErrNotExist)}
	inBubble(t, store, func(t *testing.T, g *Gateway, log *lines) {
		end := g.keep(t.Context())
		time.Sleep(90 * time.Second)
		if log.String() != "" {
			t.Errorf("got log %q while all is well, want none", log)
		}
		store.fail(errors.New("no space"))
		time.Sleep(time.Hour)
		store.fail(nil)
		time.Sleep(time.Hour)
		end()
		want := []string{
			`level=WARN msg="the cache cannot be saved" file=c.bin err="no space"`,
			`level=INFO msg="the cache is saved" file=c.bin entries=7 took=0s`, // it goes well again
			`level=INFO msg="the cache is saved" file=c.bin entries=7 took=0s`, // the stop
			"",
		}
		if d := cmp.Diff(want, strings.Split(log.String(), "\n")); d != "" {
			t.Errorf("log (-want +got):\n%s", d)
		}
	})
}

// TestSnapshotStats has two saves that go well, one with nothing to do, and a disk that is full for two.
func TestSnapshotStats(t *testing.T) {
	store := &fakeStore{takes: 2 * time.Second}
	inBubble(t, store, func(t *testing.T, g *Gateway, _ *lines) {
		end := g.keep(t.Context())
		at := func(after time.Duration, want observe.SnapshotStats) {
			t.Helper()
			time.Sleep(after - time.Since(store.begin))
			if got := g.snapshot.Stats(); got != want {
				t.Errorf("after %v: got %+v, want %+v", after, got, want)
			}
		}
		at(63*time.Second, observe.SnapshotStats{}) // being saved for the first time
		want := observe.SnapshotStats{Saved: store.begin.Add(64 * time.Second), Took: 2 * time.Second, Entries: 7, Bytes: 100}
		at(65*time.Second, want)
		want.Saved, want.Bytes = store.begin.Add(124*time.Second), 200
		at(125*time.Second, want)
		store.set(func() { store.idle, store.takes = true, time.Second })
		want.Saved = store.begin.Add(183 * time.Second) // of the file that is there
		at(185*time.Second, want)
		store.set(func() { store.idle, store.save = false, errors.New("no space") })
		want.Failures = 2
		at(310*time.Second, want)
		store.fail(nil)
		end()
		want.Saved, want.Took, want.Bytes = time.Now(), time.Second, 100
		at(320*time.Second, want)
	})
}

func TestSnapshotDamaged(t *testing.T) {
	store := &fakeStore{load: errors.New("checksum")}
	inBubble(t, store, func(t *testing.T, g *Gateway, log *lines) {
		end := g.keep(t.Context())
		synctest.Wait()
		end()
		if want := `level=WARN msg="the saved cache is ignored; the next save replaces it" file=c.bin err=checksum`; !strings.HasPrefix(log.String(), want) {
			t.Errorf("got log %q, want %q", log, want)
		}
		if d := cmp.Diff([]string{"0s load c.bin", "0s save c.bin"}, store.seen()); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
	})
}

// TestSnapshot stops a gateway and starts it again with upstreams that are gone: what it knew it still knows, until it is
// told to forget.
func TestSnapshot(t *testing.T) {
	l := startLab(t)
	file := filepath.Join(t.TempDir(), "cache.bin")
	text := everything(l) + "cache: {save: " + file + "}\n"
	ask := func(g *Gateway, name string) *dns.Msg {
		c := dns.Client{Timeout: 5 * time.Second}
		resp, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), g.Addrs()[0].Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	flush := func(g *Gateway, query string) string {
		resp, err := http.Post("http://"+g.AdminAddr().String()+"/cache/flush"+query, "", nil)
		return body(t, resp, err)
	}
	cfg := load(t, l, text)
	run := func(f func(g *Gateway)) string {
		var log lines
		g, err := New(cfg, Options{Logger: log.logger()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if err := g.Start(ctx); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		<-g.snapshot.loaded
		f(g)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return log.String()
	}
	metrics := func(g *Gateway) bool {
		resp, err := http.Get("http://" + g.AdminAddr().String() + "/metrics")
		return strings.Contains(body(t, resp, err), "\ndnsgateway_snapshot_failures_total 0\n")
	}
	run(func(g *Gateway) {
		if !metrics(g) {
			t.Error("no metrics of the snapshot")
		}
		for _, name := range []string{"a.load.lab.test.", "b.load.lab.test.", "b.lab.test."} {
			if resp := ask(g, name); len(resp.Answer) == 0 {
				t.Fatalf("got no answer for %s:\n%v", name, resp)
			}
		}
	})
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("got %v, %v, want a file for its owner alone", info, err)
	}
	before := l.Server("tier1").Queries() + l.Server("tier2").Queries()
	log := run(func(g *Gateway) {
		for _, name := range []string{"A.load.lab.test.", "b.load.lab.test.", "b.lab.test."} {
			if resp := ask(g, name); len(resp.Answer) == 0 {
				t.Errorf("got no answer for %s:\n%v", name, resp)
			}
		}
		if n := l.Server("tier1").Queries() + l.Server("tier2").Queries() - before; n != 0 {
			t.Errorf("%d questions went upstream, want none", n)
		}
		for _, f := range []struct{ query, want string }{
			{"?name=a.lab.test", "{\"flushed\": 0}\n"}, {"?name=load.lab.test", "{\"flushed\": 0}\n"},
			{"?name=LOAD.lab.test.&below=true", "{\"flushed\": 2}\n"}, {"?name=a..b", "{\"error\":\"name: a label is empty: two dots follow each other, or one stands in front\"}\n"},
			{"", "{\"flushed\": 1}\n"}, {"", "{\"flushed\": 0}\n"},
		} {
			if got := flush(g, f.query); got != f.want {
				t.Errorf("flush %s: got %q, want %q", f.query, got, f.want)
			}
		}
	})
	if want := `msg="the saved cache is loaded" file=` + file + " entries=3 "; !strings.Contains(log, want) {
		t.Errorf("got log %q, want %q in it", log, want)
	}
	if log := run(func(*Gateway) {}); !strings.Contains(log, "entries=0 ") {
		t.Errorf("what was flushed came back: %s", log)
	}
	if err := os.WriteFile(file, []byte("not a cache"), 0o600); err != nil {
		t.Fatal(err)
	}
	log = run(func(g *Gateway) {
		if resp := ask(g, "b.lab.test."); len(resp.Answer) == 0 {
			t.Errorf("got no answer:\n%v", resp)
		}
	})
	if metrics(runGateway(t, load(t, l, everything(l)))) {
		t.Error("metrics of a snapshot that there is not")
	}
	if strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "the saved cache is ignored") {
		t.Errorf("got log %q, want one warning", log)
	}
}

// TestFlushUnderWay flushes a name while its upstream thinks: that answer is for who waits for it and nobody else.
func TestFlushUnderWay(t *testing.T) {
	l := startLab(t)
	g := runGateway(t, load(t, l, everything(l)))
	slow, err := lab.ParseFault("slow:300ms")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Server("tier1").SetFault(slow); err != nil {
		t.Fatal(err)
	}
	if err := l.Server("tier2").SetFault(slow); err != nil {
		t.Fatal(err)
	}
	ask := func() {
		c := dns.Client{Timeout: 5 * time.Second}
		resp, _, err := c.Exchange(new(dns.Msg).SetQuestion("b.lab.test.", dns.TypeA), g.Addrs()[0].Addr.String())
		if err != nil || len(resp.Answer) == 0 {
			t.Errorf("got no answer: %v\n%v", err, resp)
		}
	}
	var wg sync.WaitGroup
	wg.Go(ask)
	for g.policy.Load().pipeline.Inflight() == 0 {
		runtime.Gosched()
	}
	if n, err := g.flush(t.Context(), "b.lab.test", false); n != 0 || err != nil {
		t.Errorf("flush: got %d, %v, want nothing to go yet", n, err)
	}
	wg.Wait()
	if n := g.cache.Stats().Entries; n != 0 {
		t.Errorf("%d answers in the cache, want none", n)
	}
	ask()
	if n := g.cache.Stats().Entries; n != 1 {
		t.Errorf("%d answers in the cache, want one", n)
	}
}

// TestFlushWithoutCache asks for a flush where there is nothing.
func TestFlushWithoutCache(t *testing.T) {
	l := startLab(t)
	g := runGateway(t, load(t, l, everything(l)+"cache: off\n"))
	resp, err := http.Post("http://"+g.AdminAddr().String()+"/cache/flush", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusConflict {
		t.Errorf("got %s, want %d", resp.Status, http.StatusConflict)
	}
}

// body returns what an HTTP server has answered.
func body(t *testing.T, resp *http.Response, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
