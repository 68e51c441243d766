package config

import (
	"fmt"
	"strings"

	"gopkg.in/yaml.v3"
)

const (
	// maxNodes bounds the values of one file after its aliases were followed: no "billion laughs".
	maxNodes = 100_000
	// maxDepth bounds how deep values may be nested; the grammar needs seven levels.
	maxDepth = 50
)

type kind uint8

const (
	badKind kind = iota // was reported when it was read: decoders pass over it in silence
	nullKind
	scalarKind
	listKind
	mapKind
)

// node is a value of the file with its aliases and merge keys resolved. Nodes are trees: no two share a child, so that
// merging included files may change them in place.
type node struct {
	place  Place
	src    *source
	kind   kind
	text   string
	items  []*node
	fields []*field
}

// field is one key of a mapping.
type field struct {
	name  string
	place Place // of the key
	value *node
}

func (n *node) field(name string) *field {
	for _, f := range n.fields {
		if f.name == name {
			return f
		}
	}
	return nil
}

// String says what n is, for messages.
func (n *node) String() string {
	switch n.kind {
	case scalarKind:
		return quote(n.text)
	case listKind:
		return "a list"
	case mapKind:
		return "a mapping"
	}
	return "nothing"
}

// quote puts s in quotes and cuts it to what fits in a message.
func quote(s string) string {
	const most = 60
	if r := []rune(s); len(r) > most {
		s = string(r[:most-1]) + "…"
	}
	return fmt.Sprintf("%q", s)
}

// resolver turns the nodes of yaml.v3 into nodes.
type resolver struct {
	src   *source
	errs  *Errors
	nodes int
	open  map[*yaml.Node]bool // anchors that are being resolved
	full  bool                // maxNodes was reported
}

// resolve reads a whole document.
func (s *source) resolve(doc *yaml.Node, errs *Errors) *node {
	r := &resolver{src: s, errs: errs, open: make(map[*yaml.Node]bool)}
	return r.node(doc, "", 0)
}

func (r *resolver) errorf(y *yaml.Node, path, format string, args ...any) {
	*r.errs = append(*r.errs, &Error{Place: r.src.place(y.Line, y.Column, path), Msg: fmt.Sprintf(format, args...)})
}

func (r *resolver) node(y *yaml.Node, path string, depth int) *node {
	n := &node{place: r.src.place(y.Line, y.Column, path), src: r.src}
	if r.nodes++; r.nodes > maxNodes {
		if !r.full {
			r.errorf(y, path, "more than %d values, aliases followed", maxNodes)
		}
		r.full = true
		return n
	}
	if depth > maxDepth {
		r.errorf(y, path[:min(len(path), 60)]+"…", "nested deeper than %d levels", maxDepth)
		return n
	}
	if y.Style&yaml.TaggedStyle != 0 {
		r.errorf(y, path, "a tag such as %s has no use here; leave it out", strings.Trim(quote(y.Tag), `"`))
		return n
	}
	switch y.Kind {
	case yaml.AliasNode:
		if r.open[y.Alias] {
			r.errorf(y, path, `"*%s" stands inside of "&%s"`, y.Value, y.Value)
			return n
		}
		return r.node(y.Alias, path, depth+1)
	case yaml.ScalarNode:
		n.kind, n.text = scalarKind, y.Value
		if y.Tag == "!!null" {
			n.kind = nullKind
		}
	case yaml.SequenceNode:
		r.open[y] = true
		n.kind = listKind
		for i, c := range y.Content {
			n.items = append(n.items, r.node(c, fmt.Sprintf("%s[%d]", path, i), depth+1))
		}
		delete(r.open, y)
	case yaml.MappingNode:
		r.open[y] = true
		n.kind = mapKind
		r.mapping(n, y, path, depth)
		delete(r.open, y)
	}
	return n
}

// mapping reads the keys of y into n: first its own, then those of its merge keys that are not there yet.
func (r *resolver) mapping(n *node, y *yaml.Node, path string, depth int) {
	var merges []*yaml.Node
	lines := make(map[string]int, len(y.Content)/2)
	for i := 0; i+1 < len(y.Content); i += 2 {
		k, v := y.Content[i], y.Content[i+1]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode {
			r.errorf(y.Content[i], path, "a key has to be a word")
			continue
		}
		if first, ok := lines[k.Value]; ok {
			r.errorf(y.Content[i], join(path, k.Value), "duplicate key; it is already set at line %d", first)
			continue
		}
		lines[k.Value] = k.Line
		if k.Tag == "!!merge" {
			merges = append(merges, v)
			continue
		}
		at := join(path, k.Value)
		f := &field{name: k.Value, place: r.src.place(y.Content[i].Line, y.Content[i].Column, at)}
		f.value = r.node(v, at, depth+1)
		n.fields = append(n.fields, f)
	}
	for _, m := range merges {
		r.merge(n, m, path, depth)
	}
}

// merge adds the keys of the mapping m (or of the mappings in the list m) that n does not have.
func (r *resolver) merge(n *node, m *yaml.Node, path string, depth int) {
	got := r.node(m, path, depth+1)
	from := []*node{got}
	if got.kind == listKind {
		from = got.items
	}
	for _, g := range from {
		if g.kind != mapKind {
			if g.kind != badKind {
				r.errorf(m, join(path, "<<"), `"<<" takes a mapping, or a list of mappings, got %s`, g)
			}
			continue
		}
		for _, f := range g.fields {
			if n.field(f.name) == nil {
				n.fields = append(n.fields, f)
			}
		}
	}
}

// join returns the path of a key in path. A key that is not a plain word is quoted.
func join(path, key string) string {
	if strings.ContainsFunc(key, func(r rune) bool {
		return r != '_' && r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) || key == "" {
		key = quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// add merges the mapping from, of an included file, into n: maps merge, lists append, anything else is set twice.
func (n *node) add(from *node, errs *Errors) {
	for _, f := range from.fields {
		have := n.field(f.name)
		switch {
		case have == nil:
			n.fields = append(n.fields, f)
		case have.value.kind == badKind || f.value.kind == badKind:
		case have.value.kind == mapKind && f.value.kind == mapKind:
			have.value.add(f.value, errs)
		case have.value.kind == listKind && f.value.kind == listKind:
			have.value.items = append(have.value.items, f.value.items...)
		default:
			*errs = append(*errs, &Error{Place: f.place, Msg: fmt.Sprintf(
				"already set at %s: %s there, and %s here; only lists append and mappings merge", have.place, have.value, f.value)})
		}
	}
}
