package gateway

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"dnsgateway/gateway/admin"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/observe"
	"dnsgateway/gateway/wire"
)

// saveGrace is how long a stop waits for the cache to be saved: a full one of 256 MB, 840,000 answers, took 1.1 s on a busy
// machine. A disk that does not answer is no reason to be killed by whoever waits for the stop; Docker does that after 10 s.
const saveGrace = 5 * time.Second

// store is what a snapshot needs of a cache.
type store interface {
	LoadFile(ctx context.Context, path string, now int64) (entries int, err error)
	SaveFile(path string, now int64, last cache.Saved) (cache.Saved, error)
}

// snapshot keeps the cache in a file while the program does not run.
type snapshot struct {
	cache store
	file  string
	every time.Duration
	log   *slog.Logger

	loaded  chan struct{} // closed when nothing more is read from the file
	partly  bool          // the file may hold more than the cache, as a stop has ended the load; written before loaded is closed
	flushed chan struct{} // has room for one: the file holds what was flushed
	failing bool          // the last save went wrong
	last    cache.Saved   // zero if it did

	mu    sync.Mutex
	stats observe.SnapshotStats
}

func newSnapshot(cache store, file string, every time.Duration, log *slog.Logger) *snapshot {
	return &snapshot{
		cache: cache, file: file, every: every, log: log.With("file", file),
		loaded: make(chan struct{}), flushed: make(chan struct{}, 1),
	}
}

// run loads the file until loading ends, and then saves the cache to it every so often, after a flush, and when ctx ends. A
// file that was not read to its end it leaves as it is.
func (s *snapshot) run(ctx, loading context.Context) {
	s.partly = !s.load(loading)
	close(s.loaded)
	if s.partly {
		return
	}
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.save(slog.LevelInfo)
			return
		case <-tick.C:
		case <-s.flushed:
		}
		s.save(slog.LevelDebug)
	}
}

// load takes in what the last run has left, and reports whether it came to the end before ctx. Whatever is wrong with the
// file, there is an empty cache without it.
func (s *snapshot) load(ctx context.Context) (done bool) {
	begin := time.Now()
	n, err := s.cache.LoadFile(ctx, s.file, begin.UnixNano())
	switch {
	case errors.Is(err, context.Canceled):
		s.log.Info("the saved cache was not loaded to its end; it stays as it is")
		return false
	case errors.Is(err, fs.ErrNotExist):
		s.log.Debug("no cache was saved yet")
	case err != nil:
		s.log.Warn("the saved cache is ignored; the next save replaces it", "err", err)
	default:
		s.log.Info("the saved cache is loaded", "entries", n, "took", time.Since(begin).Round(time.Millisecond).String())
	}
	return true
}

// save writes the file anew if the cache has changed, and says so at level. What goes wrong is said once, until it goes well
// again.
func (s *snapshot) save(level slog.Level) {
	begin := time.Now()
	saved, err := s.cache.SaveFile(s.file, begin.UnixNano(), s.last)
	took := time.Since(begin)
	switch {
	case err != nil && !s.failing:
		s.log.Warn("the cache cannot be saved", "err", err)
	case err == nil && s.failing:
		level = slog.LevelInfo
		fallthrough
	case err == nil:
		s.log.Log(context.Background(), level, "the cache is saved", "entries", saved.Entries, "took", took.Round(time.Millisecond).String())
	}
	s.failing, s.last = err != nil, saved
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.stats.Failures++
		return
	}
	s.stats.Saved = begin.Add(took)
	if saved.Written {
		s.stats.Took, s.stats.Entries, s.stats.Bytes = took, saved.Entries, saved.Bytes
	}
}

// Stats returns what became of the saves so far.
func (s *snapshot) Stats() observe.SnapshotStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// flush has forget forget answers, and the file as well: nothing comes back with the next start. It waits for the file to be
// read, as what is still in there would come back at once. When ctx ends before, or a stop has ended the load,
// it forgets nothing and returns admin.ErrStopping.
func (s *snapshot) flush(ctx context.Context, forget func() int) (int, error) {
	select {
	case <-s.loaded:
	case <-ctx.Done(): // the client has left, or was cut off by a stop
		return 0, admin.ErrStopping
	}
	if s.partly {
		return 0, admin.ErrStopping
	}
	n := forget()
	select {
	case s.flushed <- struct{}{}:
	default: // a save is to come already
	}
	return n, nil
}

// keep runs the snapshot, if there is one, until the function that it returns is called, which saves the cache a last time. The
// end of ctx ends a load that is under way, and no more than that: what the admin endpoint flushes after it has to be saved as
// well.
func (g *Gateway) keep(ctx context.Context) (end func()) {
	if g.snapshot == nil {
		return func() {}
	}
	saving, stop := context.WithCancel(context.WithoutCancel(ctx))
	loading, stopLoading := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.snapshot.run(saving, loading)
	}()
	return func() {
		stopLoading()
		stop()
		limit := time.NewTimer(saveGrace)
		defer limit.Stop()
		select {
		case <-done:
		case <-limit.C:
			// No call ends a read or a write that a disk does not answer. The program ends, and the file of the save before stays.
			g.log.Warn("the cache could not be saved in time", "file", g.snapshot.file, "limit", saveGrace.String())
		}
	}
}

// flush is what the admin endpoint does with the cache: it forgets the answers for a name in presentation form, with below
// also those under it, and for "" all of them. What is asked after it has an answer from after it.
func (g *Gateway) flush(ctx context.Context, name string, below bool) (n int, err error) {
	root := []byte{0}
	wireName, under := root, true
	if name != "" {
		if wireName, err = wire.ParseName(name); err != nil {
			return 0, err
		}
		under = below
	}
	forget := func() int { return g.policy.Load().pipeline.Flush(wireName, under) }
	if g.snapshot != nil {
		if n, err = g.snapshot.flush(ctx, forget); err != nil {
			return 0, err
		}
	} else {
		n = forget()
	}
	g.log.Info("the cache was flushed", "entries", n, "all", name == "")
	g.log.Debug("flushed", "name", name, "below", under)
	return n, nil
}
