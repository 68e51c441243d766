package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// maxFile bounds every file that is read, in bytes: a configuration of this size is a mistake (-c /dev/zero, a core file).
const maxFile = 4 << 20

// disk is how Load reaches files; tests replace it.
type disk struct {
	read func(name string, special bool) ([]byte, error) // special: pipes and devices are allowed
	glob func(pattern string) ([]string, error)
	stat func(name string) (fs.FileInfo, error)
	real func(name string) string // one spelling for each file, be it there or not

	writable func(path string) error // whether a file can be put there and read, or where a link at path leads to
}

var osDisk = disk{read: readFile, glob: filepath.Glob, stat: os.Stat, real: realName, writable: writable}

var (
	errDirectory  = errors.New("is a directory, not a file")
	errNotRegular = errors.New("is not a regular file")
	errTooLarge   = fmt.Errorf("is larger than %d MB", maxFile>>20)
)

// readFile reads a file of at most maxFile bytes. Opening a pipe may wait for its writer, so only the main file may be one.
func readFile(name string, special bool) ([]byte, error) {
	info, err := os.Stat(name)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, errDirectory
	case !special && !info.Mode().IsRegular():
		return nil, errNotRegular
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f)
}

func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = errTooLarge
	}
	return data, err
}

func realName(name string) string {
	if abs, err := filepath.Abs(name); err == nil {
		name = abs
	}
	const links = 40 // no more of them lead anywhere, path_resolution(7)
	for range links {
		if sym, err := filepath.EvalSymlinks(name); err == nil {
			return sym
		}
		// It is not there, but its folder may be, and it may be a link to what is not there.
		dir, file := filepath.Split(name)
		dir, err := filepath.EvalSymlinks(dir)
		if err != nil {
			break
		}
		name = filepath.Join(dir, file)
		link, err := os.Readlink(name)
		if err != nil {
			break
		}
		if name = link; !filepath.IsAbs(name) {
			name = dir + string(os.PathSeparator) + name
		}
	}
	return name
}

// reason says in a few words why a file could not be read, without its name.
func reason(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "no such file"
	case errors.Is(err, fs.ErrPermission):
		return "permission denied: the file is not readable by this user"
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// source is the text of one YAML file.
type source struct {
	name  string // as in Place.File
	dir   string // what relative paths in it are relative to; "" is the working directory
	data  []byte
	lines []string // without their line breaks
	ends  []int    // offset in data behind the break of each line
}

func newSource(name, dir string, data []byte) *source {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	s := &source{name: name, dir: dir, data: data}
	for off := 0; off < len(data); {
		n, brk := lineLen(data[off:])
		s.lines = append(s.lines, strings.ToValidUTF8(string(data[off:off+n]), "\ufffd"))
		off += n + brk
		s.ends = append(s.ends, off)
	}
	if len(s.lines) == 0 {
		s.lines, s.ends = []string{""}, []int{0}
	}
	return s
}

// lineLen returns the lengths of b's first line and of the break behind it. The breaks are those of YAML 1.1, which
// yaml.v3 counts: LF, CR, CRLF, NEL, LS and PS.
func lineLen(b []byte) (n, brk int) {
	for n < len(b) {
		switch {
		case b[n] == '\n':
			return n, 1
		case b[n] == '\r':
			if n+1 < len(b) && b[n+1] == '\n' {
				return n, 2
			}
			return n, 1
		case bytes.HasPrefix(b[n:], []byte("\u0085")):
			return n, 2
		case bytes.HasPrefix(b[n:], []byte("\u2028")), bytes.HasPrefix(b[n:], []byte("\u2029")):
			return n, 3
		}
		n++
	}
	return n, 0
}

// place returns the Place of a line and column, moved into the file if they are outside of it.
func (s *source) place(line, col int, path string) Place {
	line = min(max(line, 1), len(s.lines))
	text := s.lines[line-1]
	col = min(max(col, 1), utf8.RuneCountInString(text)+1)
	return Place{File: s.name, Line: line, Col: col, Path: path, Text: text}
}

func (s *source) errorf(line, col int, format string, args ...any) *Error {
	return &Error{Place: s.place(line, col, ""), Msg: fmt.Sprintf(format, args...)}
}

// parse reads the text as exactly one YAML document. A file of nothing but comments gives nil, nil.
func (s *source) parse() (*yaml.Node, *Error) {
	if err := s.checkText(); err != nil {
		return nil, err
	}
	dec := yaml.NewDecoder(bytes.NewReader(s.data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case err == io.EOF:
		return nil, nil
	case err != nil:
		return nil, s.syntaxError(err)
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		return nil, s.secondDocument(&doc, &more)
	case err != io.EOF:
		return nil, s.syntaxError(err)
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return nil, nil
	}
	return doc.Content[0], nil
}

// secondDocument reports the separator between two documents.
func (s *source) secondDocument(first, second *yaml.Node) *Error {
	line := second.Line
	for l := min(second.Line, len(s.lines)); l > first.Line; l-- {
		if strings.HasPrefix(s.lines[l-1], "---") {
			line = l
			break
		}
	}
	return s.errorf(line, 1, "a second YAML document starts here; a configuration is one document")
}

// checkText finds bytes that YAML does not take, which yaml.v3 would report without a place.
func (s *source) checkText() *Error {
	if bytes.HasPrefix(s.data, []byte("\xff\xfe")) || bytes.HasPrefix(s.data, []byte("\xfe\xff")) {
		return s.errorf(1, 1, "the file is in UTF-16; save it as UTF-8")
	}
	line, col := 1, 1
	for off := 0; off < len(s.data); {
		r, n := utf8.DecodeRune(s.data[off:])
		switch {
		case r == utf8.RuneError && n == 1:
			return s.errorf(line, col, "the byte 0x%02X is not UTF-8; save the file as UTF-8", s.data[off])
		case r < ' ' && r != '\t' && r != '\n' && r != '\r', r >= 0x7f && r < 0xa0 && r != 0x85,
			r == 0xfeff, r == 0xfffe, r == 0xffff:
			return s.errorf(line, col, "the control character U+%04X must not stand here", r)
		}
		off += n
		col++
		for line < len(s.ends) && off >= s.ends[line-1] {
			line, col = line+1, 1
		}
	}
	return nil
}

var yamlLine = regexp.MustCompile(`^(?:line \d+: )`)

// syntaxError turns an error of yaml.v3 into one with a place. yaml.v3 knows no column, and often names the line where the
// broken block began. The line where reading breaks is the last one of the shortest beginning of the file that gives the
// same error.
func (s *source) syntaxError(err error) *Error {
	n := sort.Search(len(s.ends)-1, func(i int) bool {
		dec := yaml.NewDecoder(bytes.NewReader(s.data[:s.ends[i]]))
		var got error
		for got == nil {
			got = dec.Decode(new(yaml.Node))
		}
		return got.Error() == err.Error()
	})
	msg := yamlLine.ReplaceAllString(strings.TrimPrefix(err.Error(), "yaml: "), "")
	col, say := explain(msg, s.lines[n])
	return s.errorf(n+1, col, "not YAML: %s", say)
}

// explain says what a message of yaml.v3 about line means, and at which column to look.
func explain(msg, line string) (col int, say string) {
	blank := len(line) - len(strings.TrimLeft(line, " \t"))
	at := func(i int) int { return utf8.RuneCountInString(line[:max(i, 0)]) + 1 }
	switch {
	case strings.Contains(line[:blank], "\t"):
		return at(strings.Index(line, "\t")), "a tab cannot indent a line; use spaces"
	case strings.HasPrefix(msg, "unknown anchor"):
		name := strings.Trim(strings.TrimSuffix(strings.TrimPrefix(msg, "unknown anchor "), " referenced"), "'")
		return at(strings.Index(line, "*"+name)), fmt.Sprintf(`"*%s" has no "&%s" before it`, name, name)
	case strings.HasPrefix(msg, "mapping values are not allowed"):
		colon := strings.Index(line, ": ")
		if i := strings.Index(line[colon+1:]+" ", ": "); colon >= 0 && i >= 0 {
			colon += 1 + i
		}
		return at(max(colon, blank)), `this ":" cannot start a value here; put the value in quotes, or check the indentation`
	case strings.HasPrefix(msg, "did not find expected node content"):
		return at(len(line)), "a value is missing, or the end of a list or mapping"
	case strings.HasPrefix(msg, "found unknown escape character"):
		return at(max(strings.Index(line, `\`), blank)), `in double quotes a backslash has a meaning; use single quotes`
	case strings.HasPrefix(msg, "did not find expected key"):
		return at(blank), "this line does not fit the ones above it; check its indentation and its quotes"
	case strings.HasPrefix(msg, "did not find expected '-' indicator"):
		return at(blank), "this line does not fit the list above it; check its indentation"
	case strings.HasPrefix(msg, "did not find expected ',' or ']'"):
		return at(strings.LastIndex(line, "[")), `"[" has no "]", or a comma is missing`
	case strings.HasPrefix(msg, "did not find expected ',' or '}'"):
		return at(strings.LastIndex(line, "{")), `"{" has no "}", or a comma is missing`
	case strings.HasPrefix(msg, "found unexpected end of stream"):
		return at(max(strings.LastIndexAny(line, `"'`), blank)), "a quote is never closed"
	case strings.HasPrefix(msg, "could not find expected ':'"):
		return at(blank), `a key without ": " behind it`
	case strings.HasPrefix(msg, "found character that cannot start any token"):
		return at(max(strings.IndexAny(line, "@`%"), blank)), "a value cannot start with this character; put it in quotes"
	case strings.HasPrefix(msg, "did not find expected alphabetic or numeric character"):
		return at(max(strings.IndexAny(line, "*&"), blank)), `"*" and "&" have a meaning in YAML; put the value in quotes`
	}
	return at(blank), msg
}
