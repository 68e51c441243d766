//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench is a run: the machine's cores, the upstream, and what has been measured.
type bench struct {
	*options
	paths    *paths
	cores    []int
	files    int    // how many a process may have open
	counters string // the upstream's file
	upstream *server
	log      io.Writer
	results  results
}

func newBench(ctx context.Context, o *options, log io.Writer) (*bench, error) {
	b := &bench{options: o, paths: newPaths(o.cache), log: log}
	for c := range strings.SplitSeq(os.Getenv(coresEnv), ",") {
		core, err := strconv.Atoi(c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", coresEnv, err)
		}
		b.cores = append(b.cores, core)
	}
	b.results = results{When: time.Now().UTC().Truncate(time.Second), Command: o.given, Machine: description(), Cores: b.cores,
		Versions: map[string]string{}}
	if b.out == "" {
		b.out = filepath.Join(o.cache, "results", time.Now().Format("2006-01-02T150405"))
	}
	var err error
	if b.out, err = filepath.Abs(b.out); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(b.out, "raw"), 0o755); err != nil {
		return nil, err
	}
	if err := command(ctx, "ip", "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	// For 10,000 connections at both ends, and targets that reserve more. Setting it hands it down to the children, too.
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	if limit.Cur = min(limit.Max, 1<<17); syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return nil, errors.New("raising the limit of open files")
	}
	b.files = int(limit.Cur)
	b.counters = filepath.Join(b.out, "raw", "upstream.counters")
	b.upstream, err = startServer(b.out, "upstream", []int{b.loadCore()}, nil,
		b.paths.fastup, upstreamIP, upstreamUDP, upstreamDoT, b.paths.cert, b.paths.key, b.counters)
	return b, err
}

func (b *bench) close() error { return b.upstream.stop() }

// loadCore is the core of the load, the upstream and this program.
func (b *bench) loadCore() int { return b.cores[len(b.cores)-1] }

// server returns the n cores of the server: those of the load are among them only if there are no others.
func (b *bench) server(n int) []int { return b.cores[:n] }

// server is a running process.
type server struct {
	cmd   *exec.Cmd
	log   string // its output
	done  chan struct{}
	first time.Duration // from the start to the first answer
	shm   string        // to remove, or empty
}

// startServer starts argv on some cores; its output goes to a file in out/raw.
func startServer(out, name string, cores []int, env []string, argv ...string) (*server, error) {
	s := &server{log: filepath.Join(out, "raw", name+".log"), done: make(chan struct{})}
	f, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s.cmd = exec.Command("taskset", append([]string{"-c", cpuList(cores)}, argv...)...)
	s.cmd.Env = append(os.Environ(), env...)
	s.cmd.Stdout, s.cmd.Stderr = f, f
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it does not outlive us, whatever ends us
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait() // that it ended is all that counts; its log says why
	}()
	return s, nil
}

// start starts a target, waits for its first answer and checks its answers over every transport.
func (b *bench) start(ctx context.Context, t *target, l load) (s *server, err error) {
	dir := filepath.Join(b.out, "raw", t.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	shm, err := os.MkdirTemp("/dev/shm", "dnsgateway-bench-")
	if err != nil {
		return nil, err
	}
	site := newSite(b.paths, l, dir, shm)
	file, err := t.write(site)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(shm))
	}
	var env []string
	if t.env != nil {
		env = t.env(b.paths)
	}
	begin := time.Now()
	if s, err = startServer(b.out, t.name, l.cores, env, t.command(b.paths, site, file)...); err != nil {
		return nil, errors.Join(err, os.RemoveAll(shm))
	}
	s.shm = shm
	ready, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	go func() {
		select {
		case <-s.done:
			cancel()
		case <-ready.Done():
		}
	}()
	if err = firstAnswer(ready); err != nil {
		err = fmt.Errorf("%s gives no answer: %w", t.name, err)
	} else {
		s.first = time.Since(begin)
		err = check(ctx, t, b.paths.ca)
	}
	if err != nil {
		said := s.tail()
		return nil, errors.Join(err, s.stop(), fmt.Errorf("it said:\n%s", said))
	}
	return s, nil
}

func (s *server) tail() string {
	text, _ := os.ReadFile(s.log)
	const most = 4000
	return string(bytes.TrimSpace(text[max(0, len(text)-most):]))
}

// pids are the processes of the server.
func (s *server) pids() []int { return family(s.cmd.Process.Pid) }

// stop ends the server. That it had ended before, by itself, is an error.
func (s *server) stop() (err error) {
	select {
	case <-s.done:
		err = fmt.Errorf("%s ended by itself: %v\n%s", s.cmd.Args[3], s.cmd.ProcessState, s.tail())
	default:
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.done:
		case <-time.After(10 * time.Second): // not every target is quick at it, and nothing is measured there
			_ = s.cmd.Process.Kill()
			<-s.done
		}
	}
	if s.shm != "" {
		err = errors.Join(err, os.RemoveAll(s.shm))
	}
	return err
}
