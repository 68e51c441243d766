package gateway

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"time"

	"dnsgateway/gateway/wire"
)

// saveGrace is how long a stop waits for the cache to be saved: a full one of 256 MB, 840,000 answers, took 1.1 s on a busy
// machine. A disk that does not answer is no reason to be killed by whoever waits for the stop; Docker does that after 10 s.
const saveGrace = 5 * time.Second

// store is what a snapshot needs of a cache.
type store interface {
	LoadFile(path string, now int64) (entries int, err error)
	SaveFile(path string, now int64) (entries int, err error)
}

// snapshot keeps the cache in a file while the program does not run.
type snapshot struct {
	cache store
	file  string
	every time.Duration
	log   *slog.Logger

	loaded  chan struct{} // closed when the file has been read
	flushed chan struct{} // has room for one: the file holds what was flushed
	failing bool          // the last save went wrong
}

func newSnapshot(cache store, file string, every time.Duration, log *slog.Logger) *snapshot {
	return &snapshot{
		cache: cache, file: file, every: every, log: log.With("file", file),
		loaded: make(chan struct{}), flushed: make(chan struct{}, 1),
	}
}

// run loads the file, and then saves the cache to it every so often, after a flush, and when ctx ends.
func (s *snapshot) run(ctx context.Context) {
	s.load()
	close(s.loaded)
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

// load takes in what the last run has left. Whatever is wrong with the file, there is an empty cache without it.
func (s *snapshot) load() {
	begin := time.Now()
	n, err := s.cache.LoadFile(s.file, begin.UnixNano())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.log.Debug("no cache was saved yet")
	case err != nil:
		s.log.Warn("the saved cache is ignored; the next save replaces it", "err", err)
	default:
		s.log.Info("the saved cache is loaded", "entries", n, "took", time.Since(begin).Round(time.Millisecond).String())
	}
}

// save writes the file anew, and says so at level. What goes wrong is said once, until it goes well again.
func (s *snapshot) save(level slog.Level) {
	begin := time.Now()
	n, err := s.cache.SaveFile(s.file, begin.UnixNano())
	switch {
	case err != nil && !s.failing:
		s.log.Warn("the cache cannot be saved", "err", err)
	case err == nil && s.failing:
		level = slog.LevelInfo
		fallthrough
	case err == nil:
		s.log.Log(context.Background(), level, "the cache is saved", "entries", n, "took", time.Since(begin).Round(time.Millisecond).String())
	}
	s.failing = err != nil
}

// flush has forget forget answers, and the file as well: nothing comes back with the next start. It waits for the file to be
// read, as what is still in there would come back at once.
func (s *snapshot) flush(forget func() int) int {
	<-s.loaded
	n := forget()
	select {
	case s.flushed <- struct{}{}:
	default: // a save is to come already
	}
	return n
}

// keep runs the snapshot, if there is one, until the function that it returns is called, which saves the cache a last time. The
// end of ctx is not that of the snapshot: what the admin endpoint flushes after it has to be saved as well.
func (g *Gateway) keep(ctx context.Context) (end func()) {
	if g.snapshot == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.snapshot.run(ctx)
	}()
	return func() {
		cancel()
		limit := time.NewTimer(saveGrace)
		defer limit.Stop()
		select {
		case <-done:
		case <-limit.C:
			// No call ends a write to a disk that does not answer. The program ends, and the file of the save before stays.
			g.log.Warn("the cache could not be saved in time", "file", g.snapshot.file, "limit", saveGrace.String())
		}
	}
}

// flush is what the admin endpoint does with the cache: it forgets the answers for a name in presentation form, with below
// also those under it, and for "" all of them. What is asked after it has an answer from after it.
func (g *Gateway) flush(name string, below bool) (int, error) {
	root := []byte{0}
	wireName, under := root, true
	if name != "" {
		var err error
		if wireName, err = wire.ParseName(name); err != nil {
			return 0, err
		}
		under = below
	}
	forget := func() int { return g.policy.Load().pipeline.Flush(wireName, under) }
	var n int
	if g.snapshot != nil {
		n = g.snapshot.flush(forget)
	} else {
		n = forget()
	}
	g.log.Info("the cache was flushed", "entries", n, "all", name == "")
	g.log.Debug("flushed", "name", name, "below", under)
	return n, nil
}
