package config

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Options are what Load needs besides a path. The zero value of a field means its default.
type Options struct {
	Stdin     io.Reader                        // what "-" reads; os.Stdin
	LookupEnv func(name string) (string, bool) // what `env:` reads; os.LookupEnv
	Now       func() time.Time                 // tells which certificates have expired; time.Now
}

// The names that Place.File and Config.Source have for what is no file.
const (
	Stdin   = "<stdin>"
	Builtin = "<default>"
)

//go:embed default.yaml
var builtin []byte

// maxFiles bounds the files of one configuration, includes counted.
const maxFiles = 1000

// sixLines is what the message about an empty file shows.
const sixLines = `
    listen: [dns://:8053, tls://:8853, https://:8443/dns-query]
    tls: {cert: server.crt, key: server.key}
    upstreams: [tls://1.1.1.1#cloudflare-dns.com, tls://9.9.9.9#dns.quad9.net]
    fallback: [https://dns.quad9.net/dns-query, quic://dns.adguard-dns.com]
    cache: 64MB
    log: json`

// Load reads the configuration at path, everything that it includes and every file that it names, fills in the defaults
// and checks the whole. The path "" is the embedded default and "-" is standard input.
//
// An error is *Errors with every mistake of the file and its place. Relative paths in a file are relative to the folder of
// that file; those in standard input to the working directory.
//
// Where a section is missing its default holds. In particular a file without `upstreams` asks those of the embedded
// default, one with `fallback` alone asks the first tier of those before it, and one with `upstreams` alone has no
// fallback. If an upstream has a host name and there is no
// `bootstrap`, the upstreams that the file gives by address also find the host names: no third party learns of them.
func Load(path string, opts Options) (*Config, error) { return load(path, opts, osDisk) }

func load(path string, opts Options, d disk) (*Config, error) {
	if opts.Stdin == nil {
		opts.Stdin = os.Stdin
	}
	if opts.LookupEnv == nil {
		opts.LookupEnv = os.LookupEnv
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	l := &loader{opts: opts, disk: d, included: make(map[string]Place)}
	cfg := l.load(path)
	if len(l.errs) > 0 {
		errs := l.errs.sorted()
		return nil, &errs
	}
	cfg.Files, cfg.Warnings = l.files, l.warns.sorted()
	return cfg, nil
}

// loader is one run of Load.
type loader struct {
	opts     Options
	disk     disk
	errs     Errors
	warns    Errors
	files    []string
	included map[string]Place        // every YAML file by its real name, and where it was included
	open     []string                // the real names of the files that are being included, outermost first
	names    []string                // the same as the user knows them
	used     func(table, key string) // tells a test which keys of which table the file has; may be nil
}

func (l *loader) note(table, key string) {
	if l.used != nil {
		l.used(table, key)
	}
}

// load reads the main file. It returns nil if l.errs says why.
func (l *loader) load(path string) *Config {
	src, err := l.main(path)
	if err != nil {
		name := path
		if path == "-" {
			name = Stdin
		}
		l.errs = append(l.errs, &Error{Place: Place{File: name}, Msg: reason(err), Err: err})
		return nil
	}
	root := l.file(src, path)
	if root == nil {
		if len(l.errs) == 0 {
			l.errs = append(l.errs, &Error{Place: Place{File: src.name},
				Msg: "the file is empty; six lines are a whole gateway:" + sixLines})
		}
		return nil
	}
	return l.config(src.name, root)
}

func (l *loader) main(path string) (*source, error) {
	switch path {
	case "":
		return newSource(Builtin, "", builtin), nil
	case "-":
		data, err := readAll(l.opts.Stdin)
		if err != nil {
			return nil, err
		}
		return newSource(Stdin, "", data), nil
	}
	data, err := l.disk.read(path, true)
	if err != nil {
		return nil, err
	}
	l.files = append(l.files, path)
	return newSource(path, filepath.Dir(path), data), nil
}

// file reads src and what it includes into one mapping. It returns nil if src holds nothing, or nothing that can be used.
func (l *loader) file(src *source, path string) *node {
	real := src.name
	if path != "" && path != "-" {
		real = l.disk.real(path)
	}
	l.included[real] = Place{File: src.name}
	l.open, l.names = append(l.open, real), append(l.names, src.name)
	defer func() { l.open, l.names = l.open[:len(l.open)-1], l.names[:len(l.names)-1] }()

	doc, err := src.parse()
	if err != nil {
		l.errs = append(l.errs, err)
		return nil
	}
	if doc == nil {
		return nil
	}
	root := src.resolve(doc, &l.errs)
	switch root.kind {
	case nullKind, badKind:
		return nil
	case mapKind:
	default:
		value{l: l, n: root}.errorf("want a mapping such as `listen: [dns://:8053]`, got %s", root)
		return nil
	}
	if i := slices.IndexFunc(root.fields, func(f *field) bool { return f.name == "include" }); i >= 0 {
		f := root.fields[i]
		root.fields = slices.Delete(root.fields, i, i+1)
		l.include(root, value{l: l, n: f.value, path: "include", key: f.place})
	}
	return root
}

// include merges the files that v names into root.
func (l *loader) include(root *node, v value) {
	if v.n.kind == nullKind {
		v.errorf("has no value")
		return
	}
	l.note("", "include")
	for _, item := range v.items() {
		pattern, ok := item.text("a file or a pattern such as conf.d/*.yaml")
		if !ok {
			continue
		}
		for _, name := range l.matches(item, pattern) {
			l.includeOne(root, item, name)
		}
	}
}

// matches returns the files that pattern stands for, in the order of their names.
func (l *loader) matches(item value, pattern string) []string {
	if pattern == "" {
		item.errorf("the name is empty")
		return nil
	}
	full := item.resolve(pattern)
	if !strings.ContainsAny(pattern, `*?[`) {
		return []string{full}
	}
	names, err := l.disk.glob(full)
	if err != nil {
		item.errorf("%s is not a pattern: a %q is not closed", quote(pattern), "[")
		return nil
	}
	hidden := strings.HasPrefix(filepath.Base(pattern), ".")
	names = slices.DeleteFunc(names, func(name string) bool {
		return !hidden && strings.HasPrefix(filepath.Base(name), ".") // editors leave such files; shells skip them, too
	})
	if len(names) == 0 {
		item.warnf("no file matches %s", quote(pattern))
	}
	slices.Sort(names)
	return names
}

// includeOne merges the file name into root.
func (l *loader) includeOne(root *node, item value, name string) {
	real := l.disk.real(name)
	if i := slices.Index(l.open, real); i >= 0 {
		item.errorf("a cycle of includes: %s includes %s", strings.Join(l.names[i:], " includes "), name)
		return
	}
	if first, ok := l.included[real]; ok {
		item.errorf("%s is already included at %s", name, first)
		return
	}
	if len(l.included) >= maxFiles {
		item.errorf("more than %d files", maxFiles)
		return
	}
	data, err := l.disk.read(name, false)
	switch {
	case errors.Is(err, errDirectory):
		item.errorf("%s is a directory; did you mean %s?", name, quote(filepath.ToSlash(filepath.Join(name, "*.yaml"))))
		return
	case err != nil:
		item.errorf("%s: %s", name, reason(err))
		return
	}
	l.files = append(l.files, name)
	from := l.file(newSource(name, filepath.Dir(name), data), name)
	l.included[real] = item.n.place
	if from != nil {
		root.add(from, &l.errs)
	}
}

// value is a node with its path; the decoders read the file through it.
type value struct {
	l    *loader
	n    *node
	path string
	key  Place // of the key, if the value has one
}

// place returns where the value stands: its key's place if it is empty.
func (v value) place() Place {
	p := v.n.place
	if v.n.kind == nullKind && v.key.Line > 0 {
		p = v.key
	}
	p.Path = v.path
	return p
}

func (v value) errorf(format string, args ...any) {
	v.l.errs = append(v.l.errs, &Error{Place: v.place(), Msg: fmt.Sprintf(format, args...)})
}

func (v value) warnf(format string, args ...any) {
	v.l.warns = append(v.l.warns, &Error{Place: v.place(), Msg: fmt.Sprintf(format, args...)})
}

// bad reports whether the value was reported when it was read.
func (v value) bad() bool { return v.n.kind == badKind }

// resolve returns the file name that name means in the file where v stands.
func (v value) resolve(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(v.n.src.dir, name)
}

// text returns a scalar; want says what it should be.
func (v value) text(want string) (string, bool) {
	switch v.n.kind {
	case scalarKind:
		return v.n.text, true
	case badKind:
	default:
		v.errorf("want %s, got %s", want, v.n)
	}
	return "", false
}

// items returns the values of a list. A value that is no list is a list of one. Empty items are reported and left out.
func (v value) items() []value {
	if v.n.kind != listKind {
		return []value{v}
	}
	var all []value
	for i, n := range v.n.items {
		item := value{l: v.l, n: n, path: fmt.Sprintf("%s[%d]", v.path, i)}
		if n.kind == nullKind {
			item.errorf("is empty")
			continue
		}
		all = append(all, item)
	}
	return all
}

// list is items for a value that has to name at least one thing; what says of which kind.
func (v value) list(what string) []value {
	if v.n.kind == listKind && len(v.n.items) == 0 {
		v.errorf("the list is empty; name at least one %s", what)
	}
	return v.items()
}

// oneOf returns the word of words that the value is.
func (v value) oneOf(words ...string) (string, bool) {
	s, ok := v.text(enumerate(words))
	if !ok {
		return "", false
	}
	if !slices.Contains(words, s) {
		v.errorf("want %s, got %s%s", enumerate(words), quote(s), didYouMean(s, words))
		return "", false
	}
	return s, true
}

// entry is one known key of a mapping, with how it is decoded.
type entry[T any] struct {
	name   string
	decode func(v value, into *T)
}

// table is every key that one kind of mapping knows.
type table[T any] struct {
	name    string // the path of such mappings, with * for what the user names
	entries []entry[T]
}

// tables lists the known keys of every table by the table's name. A test holds config.example.yaml against it.
var tables = make(map[string][]string)

func newTable[T any](name string, entries ...entry[T]) *table[T] {
	for _, e := range entries {
		tables[name] = append(tables[name], e.name)
	}
	return &table[T]{name, entries}
}

// decode reads the mapping v into the struct. It reports whether v is a mapping at all.
func (t *table[T]) decode(v value, into *T) bool {
	names := tables[t.name]
	if v.n.kind != mapKind {
		if !v.bad() {
			v.errorf("want a mapping with %s, got %s", enumerateAnd(names), v.n)
		}
		return false
	}
	for _, f := range v.n.fields {
		child := v.child(f)
		i := slices.Index(names, f.name)
		switch {
		case i < 0:
			child.atKey().errorf("unknown key%s", didYouMean(f.name, names))
		case f.value.kind == nullKind:
			child.errorf("has no value")
		default:
			v.l.note(t.name, f.name)
			t.entries[i].decode(child, into)
		}
	}
	return true
}

func (v value) child(f *field) value {
	return value{l: v.l, n: f.value, path: join(v.path, f.name), key: f.place}
}

// atKey returns a value that stands where the key of v does, for mistakes of the key itself.
func (v value) atKey() value { return value{l: v.l, n: &node{place: v.key}, path: v.path} }

// get returns the value of a key of the mapping v, if it is there.
func (v value) get(name string) (value, bool) {
	if f := v.n.field(name); f != nil {
		return v.child(f), true
	}
	return value{}, false
}

// enumerate joins words as people do: "a, b or c".
func enumerate(words []string) string { return enumerateWith(words, " or ") }

func enumerateAnd(words []string) string { return enumerateWith(words, " and ") }

func enumerateWith(words []string, last string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + last + words[len(words)-1]
}

// didYouMean returns a suggestion if one of known is close to word, else "".
func didYouMean(word string, known []string) string {
	best, least := "", 0
	for _, k := range known {
		low := strings.ToLower(word)
		d := distance(low, k)
		short, long := min(len(k), len(low)), max(len(k), len(low))
		if short >= 3 && short*2 >= long && (strings.HasPrefix(k, low) || strings.HasPrefix(low, k)) {
			d = min(d, 1) // "warning" for "warn"
		}
		if d <= short/3 && (best == "" || d < least) {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance counts the letters to insert, delete, replace or swap to get from a to b (optimal string alignment). Words that
// are much longer than any key are far from all of them.
func distance(a, b string) int {
	const longest = 64
	if len(a) > longest || len(b) > longest {
		return longest
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
