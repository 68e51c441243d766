package observe

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// fdBuffer is a buffer that says it is a file.
type fdBuffer struct{ bytes.Buffer }

func (*fdBuffer) Fd() uintptr { return 99 }

func TestLoggerFormat(t *testing.T) {
	for _, c := range []struct {
		name     string
		format   string
		terminal bool
		json     bool
	}{
		{"auto on a terminal", "", true, false},
		{"auto elsewhere", "", false, true},
		{"json on a terminal", "json", true, true},
		{"text elsewhere", "text", false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out fdBuffer
			logger, output, err := NewLogger(LogConfig{Format: c.format, Stdout: &out, IsTerminal: func(fd uintptr) bool {
				if fd != 99 {
					t.Errorf("asked about fd %d", fd)
				}
				return c.terminal
			}})
			if err != nil {
				t.Fatal(err)
			}
			logger.Info("hello", "n", 1)
			logger.Debug("too much")
			line := out.String()
			if got := json.Valid([]byte(line)); got != c.json {
				t.Errorf("JSON: %v, want %v: %q", got, c.json, line)
			}
			if strings.Count(line, "\n") != 1 || !strings.Contains(line, "hello") {
				t.Errorf("got %q, want the one line", line)
			}
			if err := errors.Join(output.Reopen(), output.Close(), output.Close()); err != nil {
				t.Errorf("reopening and closing stdout: %v", err)
			}
			logger.Info("still there")
			if !strings.Contains(out.String(), "still there") {
				t.Error("stdout was closed")
			}
		})
	}
}

func TestLoggerWithoutDescriptorIsJSON(t *testing.T) {
	var out bytes.Buffer
	logger, _, err := NewLogger(LogConfig{Output: "stderr", Stderr: &out, IsTerminal: func(uintptr) bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("x")
	if !json.Valid(out.Bytes()) {
		t.Errorf("got %q, want JSON", out.String())
	}
}

func TestLoggerLevel(t *testing.T) {
	all := []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}
	for _, c := range []struct {
		level string
		want  int // lines
	}{{"debug", 4}, {"", 3}, {"info", 3}, {"warn", 2}, {"error", 1}} {
		var out bytes.Buffer
		logger, _, err := NewLogger(LogConfig{Level: c.level, Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range all {
			logger.Log(t.Context(), l, "x")
		}
		if got := strings.Count(out.String(), "\n"); got != c.want {
			t.Errorf("level %q: %d lines, want %d", c.level, got, c.want)
		}
	}
}

func TestLoggerMistakes(t *testing.T) {
	for _, c := range []struct {
		cfg  LogConfig
		want string
	}{
		{LogConfig{Level: "loud"}, `level "loud" is none of`},
		{LogConfig{Format: "xml"}, `format "xml" is neither`},
		{LogConfig{Output: filepath.Join(t.TempDir(), "no", "such", "log")}, "output: open "},
		{LogConfig{Output: t.TempDir()}, "output: open "},
	} {
		logger, out, err := NewLogger(c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) || logger != nil || out != nil {
			t.Errorf("%+v: %v, want an error with %q and nothing else", c.cfg, err, c.want)
		}
	}
}

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gateway.log")
	if err := os.WriteFile(path, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	logger, out, err := NewLogger(LogConfig{Output: path, Format: "text", IsTerminal: func(uintptr) bool {
		t.Error("asked whether a file is a terminal")
		return true
	}})
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("one")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	logger.Info("two")
	if err := out.Reopen(); err != nil {
		t.Fatal(err)
	}
	logger.Info("three")
	if err := errors.Join(out.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
	logger.Info("four")
	if err := out.Reopen(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("reopening what is closed: %v, want %v", err, os.ErrClosed)
	}
	holds(t, path+".1", "old", "one", "two")
	holds(t, path, "three")
	if info, err := os.Stat(path); err != nil {
		t.Error(err)
	} else if got := info.Mode().Perm(); runtime.GOOS != "windows" && got&^0o640 != 0 {
		t.Errorf("mode %o, want at most 640", got)
	}
}

// holds checks that the file has exactly one line with each of words, in this order.
func holds(t *testing.T, path string, words ...string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(lines) != len(words) {
		t.Fatalf("%s has %d lines, want %d:\n%s", path, len(lines), len(words), text)
	}
	for i, w := range words {
		if !strings.Contains(lines[i], w) {
			t.Errorf("%s line %d: %q, want %q in it", path, i+1, lines[i], w)
		}
	}
}

func TestReopenKeepsOld(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "gateway.log")
	logger, out, err := NewLogger(LogConfig{Output: path})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := os.Rename(dir, dir+".moved"); err != nil {
		t.Skip("an open file's folder cannot be moved here:", err)
	}
	if err := out.Reopen(); err == nil {
		t.Fatal("reopening in a folder that is gone: no error")
	}
	logger.Info("kept")
	holds(t, filepath.Join(dir+".moved", "gateway.log"), "kept")
}

func TestReopenWhileWriting(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gateway.log")
	logger, out, err := NewLogger(LogConfig{Output: path})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				logger.Info("line")
			}
		})
	}
	for range 50 {
		if err := out.Reopen(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(text, []byte("\n")); got != 800 {
		t.Errorf("%d lines, want 800", got)
	}
}
