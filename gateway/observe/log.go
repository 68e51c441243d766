package observe

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/term"
)

// LogConfig says what is logged and where.
type LogConfig struct {
	Level  string // debug | info | warn | error; "" is info
	Format string // text | json; "" is text on a terminal, else json
	Output string // stdout | stderr | a file's path; "" is stdout

	// IsTerminal reports whether a person reads the output. Nil asks the operating system; it is not asked about files.
	IsTerminal func(fd uintptr) bool
	// Stdout and Stderr stand for the process's own when they are nil.
	Stdout, Stderr io.Writer
}

// LogOutput is where a logger writes. Its methods may be called at once.
type LogOutput struct {
	path string // empty for stdout and stderr

	mu   sync.Mutex
	w    io.Writer
	file *os.File // what Close closes; nil for stdout and stderr, and after Close
}

// NewLogger returns a logger for cfg and its output, which the caller closes when the last line has been written. Its
// errors name the field of cfg that is wrong.
func NewLogger(cfg LogConfig) (*slog.Logger, *LogOutput, error) {
	level, err := logLevel(cfg.Level)
	if err != nil {
		return nil, nil, err
	}
	if f := cfg.Format; f != "" && f != "text" && f != "json" {
		return nil, nil, fmt.Errorf(`format %q is neither "text" nor "json"`, f)
	}
	out, err := openLog(cfg)
	if err != nil {
		return nil, nil, err
	}
	opts := &slog.HandlerOptions{Level: level}
	if cfg.Format == "text" || cfg.Format == "" && out.terminal(cfg.IsTerminal) {
		return slog.New(slog.NewTextHandler(out, opts)), out, nil
	}
	return slog.New(slog.NewJSONHandler(out, opts)), out, nil
}

func logLevel(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf(`level %q is none of "debug", "info", "warn", "error"`, s)
}

func openLog(cfg LogConfig) (*LogOutput, error) {
	std := func(w io.Writer, f *os.File) *LogOutput {
		if w == nil {
			w = f
		}
		return &LogOutput{w: w}
	}
	switch cfg.Output {
	case "", "stdout":
		return std(cfg.Stdout, os.Stdout), nil
	case "stderr":
		return std(cfg.Stderr, os.Stderr), nil
	}
	f, err := openLogFile(cfg.Output)
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return &LogOutput{path: cfg.Output, w: f, file: f}, nil
}

// openLogFile opens a log for appending. Mode 0640: a log may hold clients' addresses and names, which are not for
// every user of the machine, but a group of log readers is common.
func openLogFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
}

// terminal reports whether a person reads the output.
func (o *LogOutput) terminal(isTerminal func(uintptr) bool) bool {
	if o.path != "" {
		return false
	}
	f, ok := o.w.(interface{ Fd() uintptr })
	if !ok {
		return false
	}
	if isTerminal == nil {
		return term.IsTerminal(int(f.Fd()))
	}
	return isTerminal(f.Fd())
}

// Write implements io.Writer. A line is never split between two files.
func (o *LogOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.path != "" && o.file == nil {
		return 0, os.ErrClosed
	}
	return o.w.Write(p)
}

// Reopen opens the file's path again, so that a log that was renamed is let go and a new one begins. If that is not
// possible the old file stays in use. It does nothing for stdout and stderr.
func (o *LogOutput) Reopen() error {
	if o.path == "" {
		return nil
	}
	f, err := openLogFile(o.path)
	if err != nil {
		return err
	}
	o.mu.Lock()
	old := o.file
	if old == nil {
		o.mu.Unlock()
		return errors.Join(os.ErrClosed, f.Close())
	}
	o.w, o.file = f, f
	o.mu.Unlock()
	return old.Close()
}

// Close closes the file; later lines are lost. It does nothing for stdout and stderr, and nothing the second time.
func (o *LogOutput) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.file == nil {
		return nil
	}
	f := o.file
	o.file = nil
	return f.Close()
}
