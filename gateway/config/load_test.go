package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "rewrite the golden files under testdata")

// today is when the tests take place: the certificates of pki are made around it.
var today = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

// pki returns the files that every test folder has, by name. They are made once, as making keys takes time.
var pki = sync.OnceValue(func() map[string][]byte {
	files := make(map[string][]byte)
	pair := func(name string, from, to time.Time) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: to,
			DNSNames: []string{name + ".test"}}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		if err != nil {
			panic(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			panic(err)
		}
		files["pki/"+name+".crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		files["pki/"+name+".key"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	}
	year := 365 * 24 * time.Hour
	pair("server", today.Add(-year), today.Add(year))
	pair("other", today.Add(-year), today.Add(year))
	pair("expired", today.Add(-2*year), today.Add(-year))
	pair("early", today.Add(year), today.Add(2*year))
	files["pki/both.pem"] = append(slices.Clone(files["pki/server.crt"]), files["pki/server.key"]...)
	files["pki/empty.crt"] = []byte("\n")
	files["pki/text.crt"] = []byte("not a certificate\n")
	files["pki/broken.crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("not DER")})
	files["pki/chain.crt"] = append(slices.Clone(files["pki/server.crt"]), files["pki/broken.crt"]...)
	files["pki/broken.key"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("not DER")})
	files["pki/encrypted.key"] = pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("secret")})
	return files
})

// write puts files into dir.
func write(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		name = filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// testOptions has an environment with a certificate and its key.
func testOptions(stdin string) Options {
	env := map[string]string{"TLS_CERT": string(pki()["pki/server.crt"]), "TLS_KEY": string(pki()["pki/server.key"]), "EMPTY": " ",
		"TOKEN": " 0123456789abcdef01234567\n", "WORD": "hush", "WORDS": "0123456789abcdef 0123456789abcdef"}
	return Options{
		Stdin:     strings.NewReader(stdin),
		LookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		Now:       func() time.Time { return today },
	}
}

// parse loads text as standard input, in a folder with the files of pki.
func parse(t testing.TB, text string) (*Config, error) {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, pki())
	if tt, ok := t.(interface{ Chdir(string) }); ok {
		tt.Chdir(dir)
	}
	return Load("-", testOptions(text))
}

// golden runs every testdata/kind/*.txtar: it loads the archive's config.yaml and holds what print makes of the outcome
// against the archive's file "want".
func golden(t *testing.T, kind string, least int, print func(t *testing.T, cfg *Config, err error) string) {
	names, err := filepath.Glob(filepath.Join("testdata", kind, "*.txtar"))
	if err != nil || len(names) < least {
		t.Fatalf("got %d files in testdata/%s (%v), want %d or more", len(names), kind, err, least)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			name := filepath.Join(here, name)
			ar, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			write(t, dir, pki())
			var want *txtar.File
			for i := range ar.Files {
				f := &ar.Files[i]
				if f.Name == "want" {
					want = f
					continue
				}
				write(t, dir, map[string][]byte{f.Name: f.Data})
			}
			t.Chdir(dir)
			cfg, err := Load("config.yaml", testOptions(""))
			got := print(t, cfg, err)
			if *update {
				if want == nil {
					ar.Files = append(ar.Files, txtar.File{Name: "want"})
					want = &ar.Files[len(ar.Files)-1]
				}
				want.Data = []byte(got)
				if err := os.WriteFile(name, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want == nil {
				t.Fatal("the archive has no file \"want\"; run the test with -update and read what it writes")
			}
			if got != string(want.Data) {
				t.Errorf("got:\n%s\nwant:\n%s", got, want.Data)
			}
		})
	}
}

// TestBroken holds broken files against their exact messages.
func TestBroken(t *testing.T) {
	golden(t, "broken", 155, func(t *testing.T, cfg *Config, err error) string {
		var errs *Errors
		if !errors.As(err, &errs) {
			t.Fatalf("got %v, %v, want *Errors", cfg, err)
		}
		for _, e := range *errs {
			if e.Line == 0 || e.Col == 0 {
				t.Errorf("%v: has no place", e)
			}
		}
		return err.Error() + "\n"
	})
}

// TestWarnings holds files that work against the exact warnings.
func TestWarnings(t *testing.T) {
	golden(t, "warn", 14, func(t *testing.T, cfg *Config, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		return Errors(cfg.Warnings).Error() + "\n"
	})
}

// TestLoadFiles has the mistakes that are not in the text of a file.
func TestLoadFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string][]byte{
		"latin1.yaml":  []byte("cache: 64MB\nlocal: {chaos: {id.server: \"caf\xe9\"}}\n"),
		"utf16.yaml":   []byte("\xff\xfec\x00a\x00"),
		"control.yaml": []byte("cache: 64MB\nlog: \x1bjson\n"),
		"bom.yaml":     []byte("\xef\xbb\xbfcach: 64MB\n"),
		"crlf.yaml":    []byte("cache: 64MB\r\n\r\ncach: 64MB\r\n"),
		"empty.yaml":   nil,
		"large.yaml":   bytes.Repeat([]byte("#\n"), maxFile/2+1),
		"dir/x":        nil,
	})
	t.Chdir(dir)
	six := "the file is empty; six lines are a whole gateway:" + sixLines
	tests := []struct{ name, want string }{
		{"missing.yaml", "missing.yaml: no such file"},
		{"dir", "dir: is a directory, not a file"},
		{"latin1.yaml", "latin1.yaml:2:32: the byte 0xE9 is not UTF-8; save the file as UTF-8\n" +
			"    2 | local: {chaos: {id.server: \"caf\ufffd\"}}\n      |                                ^"},
		{"utf16.yaml", "utf16.yaml:1:1: the file is in UTF-16; save it as UTF-8\n    1 | \ufffdc.a.\n      | ^"},
		{"control.yaml", "control.yaml:2:6: the control character U+001B must not stand here\n    2 | log: .json\n      |      ^"},
		{"bom.yaml", "bom.yaml:1:1: cach: unknown key; did you mean \"cache\"?\n    1 | cach: 64MB\n      | ^"},
		{"crlf.yaml", "crlf.yaml:3:1: cach: unknown key; did you mean \"cache\"?\n    3 | cach: 64MB\n      | ^"},
		{"empty.yaml", "empty.yaml: " + six},
		{"large.yaml", "large.yaml: is larger than 4 MB"},
		{"-", "<stdin>: " + six},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := Load(tt.name, testOptions("# nothing\n"))
			var errs *Errors
			if !errors.As(err, &errs) || cfg != nil {
				t.Fatalf("got %v, %v, want *Errors", cfg, err)
			}
			if got := err.Error(); got != tt.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, tt.want)
			}
		})
	}
}

// TestUnreadable replaces the disk, as the user who runs the tests may be root and read everything.
func TestUnreadable(t *testing.T) {
	d := osDisk
	d.read = func(name string, _ bool) ([]byte, error) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	_, err := load("config.yaml", testOptions(""), d)
	if got, want := err.Error(), "config.yaml: permission denied: the file is not readable by this user"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(err, fs.ErrPermission) {
		t.Error("the cause is lost")
	}
}

// TestStaleAfterIsQuiet has files in which the time for stale answers comes first, or is not one that somebody has written.
func TestStaleAfterIsQuiet(t *testing.T) {
	short := "upstreams: {default: {try: tls://192.0.2.1#one.test, deadline: 1s}}\n"
	for _, text := range []string{
		"cache: {stale: {after: 2999ms}}", short, short + "cache: {stale: off}", short + "cache: {stale: {for: 2d}}",
		short + "cache: {stale: {after: 2s, for: off}}",
	} {
		cfg, err := parse(t, text+"\n")
		if err != nil || len(cfg.Warnings) > 0 {
			t.Errorf("%s: got %v, %v, want no warning", text, cfg.Warnings, err)
		}
	}
}

// TestSaveFolder has folders that this user may not write to; the user who runs the tests may be root and write everywhere.
func TestSaveFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	d := osDisk
	d.writable = func(path string) error { return errors.New("no room for " + path) }
	_, err := load("-", testOptions("cache: {save: cache.bin}"), d)
	if want := "cache.save: no room for cache.bin"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	if os.Getuid() <= 0 {
		return
	}
	if err := os.Mkdir("closed", 0o500); err != nil {
		t.Fatal(err)
	}
	_, err = Load("-", testOptions("cache: {save: closed/cache.bin}"))
	if want := "cache.save: the directory closed: permission denied"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	if err := os.WriteFile("unreadable", nil, 0o200); err != nil {
		t.Fatal(err)
	}
	_, err = Load("-", testOptions("cache: {save: unreadable}"))
	if want := "cache.save: unreadable: permission denied: this user may not read it"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// TestSaveLinks has links in the place of the cache's file: what counts is what they lead to, be it there or not.
func TestSaveLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.MkdirAll("data/deep", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{
		"good": "data/cache.bin", "nowhere": "none/cache.bin", "loop": "loop", "folder": "data",
		"log": "data/log2", "data/log2": "gateway.log", "deep": "data/deep", "data/up": "../deep/../gateway.log",
	} {
		if err := os.Symlink(to, name); err != nil {
			t.Skip(err)
		}
	}
	for _, tt := range []struct{ file, want string }{
		{"good", ""}, {"nowhere", "none: no such file or directory"}, {"loop", "cache.save: loop: too many levels of symbolic links"},
		{"folder", "folder is a directory"}, {"log", "cache.save: log is the log"}, {"data/up", "cache.save: data/up is the log"},
		{"deep/../gateway.log", ""}, {"deep/log", ""},
	} {
		_, err := Load("-", testOptions("cache: {save: "+tt.file+"}\nlog: {output: file:data/gateway.log}\n"))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.file, err, tt.want)
		}
	}
}

// TestSpecialFiles proves that nothing but the main file may be a device: opening a pipe could wait for ever.
func TestSpecialFiles(t *testing.T) {
	if _, err := os.Stat("/dev/null"); err != nil {
		t.Skip("no /dev/null")
	}
	_, err := Load("/dev/null", testOptions(""))
	if err == nil || !strings.Contains(err.Error(), "the file is empty") {
		t.Errorf("got %v, want an empty file", err)
	}
	_, err = parse(t, "include: /dev/null")
	if want := "include: /dev/null: is not a regular file"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// TestAt shows a mistake that came up after Load.
func TestAt(t *testing.T) {
	cfg, err := parse(t, "cache: off\nlisten:\n  - dns://:8053\n  - {name: web, url: \"tcp://127.0.0.1:80\"}\n")
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("address already in use; who has it shows: ss -ltnp 'sport = :80'")
	got := At(cfg.Listen[1].Place, cause)
	want := "<stdin>:4:22: listen[1].url: address already in use; who has it shows: ss -ltnp 'sport = :80'\n" +
		"    4 |   - {name: web, url: \"tcp://127.0.0.1:80\"}\n" +
		"      |                      ^"
	if got.Error() != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if !errors.Is(got, cause) {
		t.Error("the cause is lost")
	}
}

func TestExcerpt(t *testing.T) {
	long := strings.Repeat("x", 200) + "HERE" + strings.Repeat("y", 200)
	tests := []struct {
		name, text string
		col        int
		line, pad  string
	}{
		{"tab", "\ta: b", 2, "\ta: b", "\t"},
		{"wide", "é: ü", 4, "é: ü", "   "},
		{"control", "a\x1b[31mb", 2, "a.[31mb", " "},
		{"end", "ab", 3, "ab", "  "},
		{"outside", "ab", 99, "ab", "  "},
		{"long", long, 201, "…" + strings.Repeat("x", 59) + "HERE" + strings.Repeat("y", 55) + "…", strings.Repeat(" ", 60)},
		{"long, start", long, 1, strings.Repeat("x", 119) + "…", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			line, pad := excerpt(tt.text, tt.col)
			if line != tt.line || pad != tt.pad {
				t.Errorf("got %q, %q, want %q, %q", line, pad, tt.line, tt.pad)
			}
		})
	}
}

func TestDidYouMean(t *testing.T) {
	tests := []struct{ table, word, want string }{
		{"upstreams.*", "deadlin", "deadline"}, {"upstreams.*", "tyr", "try"}, {"upstreams.*", "nexton", "next_on"},
		{"", "upstream", "upstreams"}, {"", "Listen", "listen"}, {"", "listne", "listen"}, {"", "fallbacks", "fallback"},
		{"listen[]", "https", "http"}, {"limits", "tcp_per_clients", "tcp_per_client"},
		// The keys of later issues must not be taken for misspelled ones.
		{"", "rule", "rules"}, {"rules[]", "uses", "use"}, {"rules[].if", "names", "name"}, {"upstreams.*.breaker", "max_prob", "max_probe"},
		{"", "clients", ""}, {"", "dnssec", ""}, {"", "privacy", ""}, {"", "query_log", ""}, {"", "metrics", ""},
		{"", "process", ""}, {"", "tests", ""}, {"upstreams.*", "dnssec", ""},
		{"rules[]", "answer", ""}, {"rules[].if", "client", ""}, {"rules[].if", "type", ""}, {"rules[].if", "listener", ""},
		{"rules[].if", "time", ""}, {"rules[].if", "not", ""}, {"cache", "stael", "stale"}, {"cache", "pre-fetch", "prefetch"},
		{"cache", "saves", "save"}, {"listen[]", "socket", "sockets"}, {"admin", "tokens", "token"}, {"listen[]", "require", ""}, {"listen[]", "client_ca", ""}, {"listen[]", "proxy_protocol", ""},
		{"listen[]", "trust_forwarded", ""}, {"local", "hosts", ""}, {"local", "records", ""},
	}
	for _, tt := range tests {
		if tt.want != "" {
			tt.want = "; did you mean \"" + tt.want + "\"?"
		}
		if got := didYouMean(tt.word, tables[tt.table]); got != tt.want {
			t.Errorf("%s in %q: got %q, want %q", tt.word, tt.table, got, tt.want)
		}
	}
}
