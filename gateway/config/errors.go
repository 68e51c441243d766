package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Error is one mistake and its place.
type Error struct {
	Place
	Msg string
	Err error // what At was given; nil for mistakes that Load found
}

// Error shows the mistake as people read it: place, path and message, then the source line with a caret under the column.
//
//	config.yaml:3:5: upstreams.default.deadlin: unknown key; did you mean "deadline"?
//	    3 |     deadlin: 3s
//	      |     ^
func (e *Error) Error() string {
	var b strings.Builder
	if at := e.Place.String(); at != "" {
		b.WriteString(at + ": ")
	}
	if e.Path != "" {
		b.WriteString(e.Path + ": ")
	}
	b.WriteString(e.Msg)
	head := strings.Map(func(r rune) rune { // names of files are the user's, and may hold anything
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return '.'
	}, b.String())
	b.Reset()
	b.WriteString(head)
	if e.Line > 0 && e.Text != "" {
		line, pad := excerpt(e.Text, e.Col)
		fmt.Fprintf(&b, "\n%5d | %s\n      | %s^", e.Line, line, pad)
	}
	return b.String()
}

// Unwrap returns the cause that At was given.
func (e *Error) Unwrap() error { return e.Err }

// Errors are all mistakes of one run of Load, sorted by file, line and column, none twice.
type Errors []*Error

// Error shows all mistakes, one below the other.
func (e Errors) Error() string {
	all := make([]string, len(e))
	for i, one := range e {
		all[i] = one.Error()
	}
	return strings.Join(all, "\n")
}

// Unwrap lets errors.As find a single mistake.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i, one := range e {
		all[i] = one
	}
	return all
}

// At ties err, which came up after Load, to the place in the file that asked for it: an address that cannot be bound, for
// instance. It prints in the form of the mistakes that Load finds.
func At(p Place, err error) *Error { return &Error{Place: p, Msg: err.Error(), Err: err} }

// String returns "file:line:col", or what is known of it.
func (p Place) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Col)
}

// sorted returns e in the order of files, lines and columns. What is said twice about one place (a mistake behind an alias,
// say) stays once.
func (e Errors) sorted() Errors {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	type said struct {
		file      string
		line, col int
		msg       string
	}
	seen := make(map[said]bool, len(e))
	return slices.DeleteFunc(e, func(one *Error) bool {
		k := said{one.File, one.Line, one.Col, one.Msg}
		if seen[k] {
			return true
		}
		seen[k] = true
		return false
	})
}

// excerpt returns what a terminal should show of a source line, and what has to stand before the caret to put it under
// column col. Tabs stay, other control characters become '.', and of a very long line only the part around col is left.
func excerpt(text string, col int) (line, pad string) {
	const width = 120 // about one line of a terminal
	runes := []rune(text)
	for i, r := range runes {
		if r != '\t' && !unicode.IsPrint(r) {
			runes[i] = '.'
		}
	}
	at := min(max(col-1, 0), len(runes))
	if len(runes) > width {
		from := max(0, min(at-width/2, len(runes)-width))
		runes, at = slices.Clone(runes[from:from+width]), at-from
		if from > 0 {
			runes[0] = '…'
		}
		if from+width < len([]rune(text)) {
			runes[width-1] = '…'
		}
	}
	before := slices.Clone(runes[:at])
	for i, r := range before {
		if r != '\t' {
			before[i] = ' '
		}
	}
	return string(runes), string(before)
}
