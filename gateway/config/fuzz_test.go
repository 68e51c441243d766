package config

import (
	"errors"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"
)

// mapDisk is a disk that holds files and nothing else.
func mapDisk(files map[string][]byte) disk {
	clean := func(name string) string { return path.Clean(filepath.ToSlash(name)) }
	return disk{
		read: func(name string, _ bool) ([]byte, error) {
			if data, ok := files[clean(name)]; ok {
				return data, nil
			}
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		},
		glob: func(pattern string) (names []string, err error) {
			for name := range files {
				ok, err := path.Match(clean(pattern), name)
				if err != nil {
					return nil, err
				}
				if ok {
					names = append(names, name)
				}
			}
			return names, nil
		},
		stat: func(name string) (fs.FileInfo, error) {
			return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
		},
		real: clean,
	}
}

// FuzzLoad proves that no text makes Load panic, that every mistake has a place inside of the file and can be shown, that
// the mistakes are sorted, and that what was loaded keeps what the rest of the program relies on.
func FuzzLoad(f *testing.F) {
	names, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil || len(names) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, name := range names {
		ar, err := txtar.ParseFile(name)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			if file.Name != "want" {
				f.Add(file.Data)
			}
		}
	}
	f.Add(builtin)
	f.Add([]byte(sixLines))
	f.Add([]byte("local:\r\n  chaos:\u2028    {id.server: \"\\x00\"}\u0085cache: 1\r"))
	files := map[string][]byte{
		"conf.d/a.yaml": []byte("listen: [tcp://:9053]\n"), "a.yaml": []byte("include: b.yaml"), "b.yaml": []byte("include: a.yaml"),
		"bad.yaml": []byte("a: [\n"),
	}
	for name, data := range pki() {
		files[name] = data
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := load("-", testOptions(string(data)), mapDisk(files))
		if err == nil {
			checkConfig(t, cfg)
			checkErrors(t, data, cfg.Warnings)
			return
		}
		var errs *Errors
		if !errors.As(err, &errs) || len(*errs) == 0 || cfg != nil {
			t.Fatalf("got %v, %v, want *Errors", cfg, err)
		}
		checkErrors(t, data, *errs)
	})
}

// checkErrors holds the places of errs against the file that they are in.
func checkErrors(t *testing.T, data []byte, errs []*Error) {
	src := newSource(Stdin, "", data)
	for i, e := range errs {
		if e.Msg == "" || !utf8.ValidString(e.Error()) || strings.ContainsAny(e.Error(), "\x00\x1b\r") {
			t.Errorf("%q cannot be shown", e.Error())
		}
		if i > 0 && errs[i-1].File == e.File && errs[i-1].Line > e.Line {
			t.Errorf("%v stands behind %v", e, errs[i-1])
		}
		if e.File != Stdin || e.Line == 0 && strings.HasPrefix(e.Msg, "the file is empty") {
			continue
		}
		if e.Line < 1 || e.Line > len(src.lines) || e.Text != src.lines[e.Line-1] && e.Text != "" {
			t.Errorf("%v: no such line", e)
		} else if e.Col < 1 || e.Col > utf8.RuneCountInString(src.lines[e.Line-1])+1 {
			t.Errorf("%v: no such column", e)
		}
	}
}

// checkConfig holds cfg against what its fields promise.
func checkConfig(t *testing.T, cfg *Config) {
	for _, l := range cfg.Listen {
		https := l.Scheme == HTTPS
		if !l.Addr.IsValid() || l.Name == "" || https != (len(l.HTTP) > 0) || https != strings.HasPrefix(l.Path, "/") {
			t.Errorf("listener %+v", l)
		}
		if (https || l.Scheme == TLS || l.Scheme == QUIC) && len(cfg.TLS) == 0 {
			t.Errorf("listener %+v without a certificate", l)
		}
	}
	i := slices.IndexFunc(cfg.Upstreams, func(g Group) bool { return g.Name == DefaultGroup })
	if len(cfg.Listen) == 0 || i < 0 {
		t.Fatalf("got %d listeners, groups %+v", len(cfg.Listen), cfg.Upstreams)
	}
	for _, g := range cfg.Upstreams {
		if len(g.Tiers) == 0 || g.Deadline < minDeadline || g.Deadline > maxDeadline || g.NextOn == (NextOn{}) || g.Pick == "" {
			t.Errorf("group %+v", g)
		}
		for _, tier := range g.Tiers {
			if len(tier) == 0 {
				t.Errorf("group %+v has an empty tier", g)
			}
			for _, s := range tier {
				_, known := s.address()
				if !known && len(cfg.Bootstrap) == 0 || s.Scheme != SDNS && (s.Host == "" || s.Port == 0 || s.VerifyName == "") {
					t.Errorf("server %+v", s)
				}
			}
		}
	}
	for _, s := range cfg.Bootstrap {
		if _, ok := s.address(); !ok {
			t.Errorf("bootstrap server %+v has no address", s)
		}
	}
	l := cfg.Limits
	if l.PerClient < 0 || l.PrefixV4 < 1 || l.PrefixV4 > 32 || l.PrefixV6 < 1 || l.PrefixV6 > 128 || l.Inflight < 1 ||
		l.TCPPerClient < 1 || l.TCPPipeline < 1 || l.TCPIdle <= 0 || l.UDPSize < 512 || l.UDPSize > 4096 {
		t.Errorf("limits %+v", l)
	}
	if c := cfg.Cache; c.Size < 0 || c.MinTTL < 0 || c.MinTTL > c.NegativeMax || c.NegativeMax > c.MaxTTL || c.MaxTTL == 0 {
		t.Errorf("cache %+v", c)
	}
	if len(cfg.Access.Allow) == 0 {
		t.Error("nobody may ask")
	}
}

func FuzzURL(f *testing.F) {
	for _, s := range []string{"tls://9.9.9.9#dns.quad9.net", "https://[::1]:8443/dns-query", "dns://*:53",
		"sdns://AAAAAAAAAAAABzkuOS45Ljk", "::1:53", "tls://[", "tls://:", "#", "://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		up := serverItem{}
		if err := up.parse(s); err == nil && up.Scheme != SDNS {
			if up.Host == "" || up.Port == 0 || up.VerifyName == "" || strings.ContainsAny(up.Host, "[]#/@ ") {
				t.Errorf("%q: got %+v", s, up.Server)
			}
		}
		if u, err := splitURL(s, listenSchemes); err == nil {
			if addr, err := u.listenAddr(s); err == nil && (!addr.IsValid() || addr.Addr().Is4In6()) {
				t.Errorf("%q: got %v", s, addr)
			}
		}
	})
}
