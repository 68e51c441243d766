package config

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

const minCache = 1 << 20 // below, the bookkeeping is more than the answers

var cacheKeys = newTable("cache",
	entry[Cache]{"size", readCacheSize},
	entry[Cache]{"ttl", func(v value, c *Cache) {
		t := ttlItem{Cache: c}
		if !ttlKeys.decode(v, &t) {
			return
		}
		switch {
		case v.l.mistakeIn(v.path + "."):
		case c.MinTTL > c.MaxTTL:
			v.errorf("min (%s) is larger than max (%s)", formatDuration(c.MinTTL), formatDuration(c.MaxTTL))
		case t.negative && c.NegativeMax > c.MaxTTL:
			v.errorf("negative_max (%s) is larger than max (%s)", formatDuration(c.NegativeMax), formatDuration(c.MaxTTL))
		case c.MinTTL > c.NegativeMax:
			v.errorf("min (%s) is larger than negative_max (%s)", formatDuration(c.MinTTL), formatDuration(c.NegativeMax))
		}
	}},
	entry[Cache]{"stale", readStale},
	entry[Cache]{"prefetch", readPrefetch},
	entry[Cache]{"save", readSave},
)

type ttlItem struct {
	*Cache
	negative bool // negative_max is there
}

var ttlKeys = newTable("cache.ttl",
	entry[ttlItem]{"min", func(v value, t *ttlItem) { v.ttl(0, &t.MinTTL) }},
	entry[ttlItem]{"max", func(v value, t *ttlItem) {
		v.ttl(time.Second, &t.MaxTTL)
		if !t.negative {
			t.NegativeMax = min(t.NegativeMax, t.MaxTTL)
		}
	}},
	entry[ttlItem]{"negative_max", func(v value, t *ttlItem) {
		t.negative = true
		v.ttl(time.Second, &t.NegativeMax)
	}},
)

// ttl reads a TTL of at least least into d. TTLs are whole seconds, RFC 1035, section 3.2.1.
func (v value) ttl(least time.Duration, d *time.Duration) {
	got, ok := v.duration(0, maxDuration)
	switch {
	case !ok:
	case got < least:
		v.errorf("%s would keep nothing; cache: off says so", quote(v.n.text))
	case got%time.Second != 0:
		v.errorf("%s is not a whole number of seconds, as TTLs are", quote(v.n.text))
	default:
		*d = got
	}
}

// readCache reads `cache`: a mapping, or the size.
func readCache(v value, d *draft) {
	if v.n.kind != mapKind {
		readCacheSize(v, &d.cfg.Cache)
		return
	}
	cacheKeys.decode(v, &d.cfg.Cache)
	if stale, ok := v.get("stale"); ok {
		d.staleAfter, _ = stale.get("after")
	}
	for _, key := range []string{"ttl", "stale", "prefetch", "save"} {
		if of, ok := v.get(key); ok && !of.off() && d.cfg.Cache.Size == 0 {
			of.warnf("has no effect: the cache is off")
		}
	}
}

func readCacheSize(v value, c *Cache) {
	s, ok := v.text(wantSize)
	if !ok {
		return
	}
	if s == "off" {
		s = "0"
	}
	size, err := parseSize(s)
	switch {
	case err != nil:
		v.errorf("%v", err)
	case size != 0 && size < minCache:
		v.errorf("%s is too small; want 1MB or more, or off", quote(s))
	default:
		c.Size = size
	}
}

// off reports whether the value is the word that turns a thing off.
func (v value) off() bool { return v.n.kind == scalarKind && v.n.text == "off" }

// offOr reports whether v is the mapping that t has the keys of. If it is not, it is off, or it says that it should be.
func offOr[T any](v value, t *table[T]) bool {
	if v.n.kind != mapKind && !v.off() && !v.bad() {
		v.errorf("want a mapping with %s, or off, got %s", enumerateAnd(tables[t.name]), v.n)
	}
	return v.n.kind == mapKind
}

// Bounds of `stale`.
const (
	maxStaleAfter = time.Minute         // the longest deadline of a group: nobody waits longer
	maxStaleFor   = 30 * 24 * time.Hour // RFC 8767, section 5 has one to three days
	maxStaleTTL   = 5 * time.Minute     // each client comes back by then, and may get what is true again
)

var staleKeys = newTable("cache.stale",
	entry[Stale]{"after", func(v value, s *Stale) {
		if d, ok := v.duration(0, maxStaleAfter); ok {
			s.After = d
		}
	}},
	entry[Stale]{"for", func(v value, s *Stale) {
		if v.off() {
			s.For = 0
		} else if d, ok := v.duration(time.Second, maxStaleFor); ok {
			s.For = d
		}
	}},
	entry[Stale]{"ttl", func(v value, s *Stale) {
		switch d, ok := v.duration(time.Second, maxStaleTTL); {
		case !ok:
		case d%time.Second != 0:
			v.errorf("%s is not a whole number of seconds, as TTLs are", quote(v.n.text))
		default:
			s.TTL = d
		}
	}},
)

// readStale reads `cache.stale`: a mapping, or off.
func readStale(v value, c *Cache) {
	if offOr(v, staleKeys) {
		staleKeys.decode(v, &c.Stale)
	}
	if v.off() || c.Stale.For == 0 {
		c.Stale = Stale{}
	}
}

// checkStale finds groups that give up before the time comes that the file has for stale answers.
func (d *draft) checkStale() {
	c, v := d.cfg.Cache, d.staleAfter
	if v.n == nil || c.Size == 0 || d.l.mistakeIn("cache", "upstreams") {
		return
	}
	var groups []string
	for _, g := range d.groups {
		if g.Deadline <= c.Stale.After {
			groups = append(groups, fmt.Sprintf("%q (%s)", g.Name, formatDuration(g.Deadline)))
		}
	}
	if len(groups) > 0 {
		v.warnf("%s is not shorter than the deadline of group %s, whose stale answers go out then", quote(v.n.text), enumerateAnd(groups))
	}
}

var prefetchKeys = newTable("cache.prefetch",
	entry[Prefetch]{"hits", func(v value, p *Prefetch) { v.into(&p.Hits, 1, 255) }}, // the cache counts in one octet
	entry[Prefetch]{"remaining", func(v value, p *Prefetch) {
		// Below 1 % there may be no second left to ask in; above 50 % most questions would go out twice as often as they need to.
		if part, ok := v.percent(1, 50); ok {
			p.Remaining = part
		}
	}},
)

// readPrefetch reads `cache.prefetch`: a mapping, or off.
func readPrefetch(v value, c *Cache) {
	if offOr(v, prefetchKeys) {
		prefetchKeys.decode(v, &c.Prefetch)
	}
	if v.off() {
		c.Prefetch = Prefetch{}
	}
}

// Bounds of `save.every`.
const (
	minSaveEvery = time.Second    // for small caches and tests: each time the whole cache is written
	maxSaveEvery = 24 * time.Hour // a crash costs what was learnt since
)

var saveKeys = newTable("cache.save",
	entry[Save]{"file", readSaveFile},
	entry[Save]{"every", func(v value, s *Save) {
		if d, ok := v.duration(minSaveEvery, maxSaveEvery); ok {
			s.Every = d
		}
	}},
)

// readSave reads `cache.save`: a mapping, the file, or off.
func readSave(v value, c *Cache) {
	if v.n.kind != mapKind {
		readSaveFile(v, &c.Save)
		return
	}
	saveKeys.decode(v, &c.Save)
	file, ok := v.get("file")
	if !ok {
		v.errorf("the key \"file\" is missing; say where, such as file: /var/lib/dnsgateway/cache.bin")
		return
	}
	if every, ok := v.get("every"); ok && file.off() {
		every.warnf("has no effect: the cache is not saved")
	}
}

// readSaveFile reads the name of the file that the cache is kept in, or of a symbolic link to it. The file is replaced by a
// new one each time, so that what has to be writable is its folder.
func readSaveFile(v value, s *Save) {
	const want = "a file such as /var/lib/dnsgateway/cache.bin, or off"
	name, ok := v.text(want)
	if !ok {
		return
	}
	s.Place = v.place()
	if name == "off" {
		s.File = ""
		return
	}
	switch strings.ToLower(name) { // who has such a file writes file:no
	case "off", "false", "no", "none", "never", "0":
		v.errorf("want %s, got %s; did you mean off?", want, quote(name))
		return
	case "on", "true", "yes":
		v.errorf("want %s, got %s; say where", want, quote(name))
		return
	}
	if name = strings.TrimPrefix(name, "file:"); name == "" {
		v.errorf("the name of the file is empty")
		return
	}
	path, ok := v.output(name)
	if !ok {
		return
	}
	switch info, err := v.l.disk.stat(path); {
	case err == nil && !info.Mode().IsRegular():
		v.errorf("%s is not a regular file", path)
		return
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		v.errorf("%s: %s", path, reason(err))
		return
	}
	if err := v.l.disk.writable(path); err != nil {
		v.errorf("%v", err)
		return
	}
	s.File = path
}

// checkSave finds a file that is there for something else, and would be overwritten.
func (d *draft) checkSave() {
	s := d.cfg.Cache.Save
	if s.File == "" {
		return
	}
	real := d.l.disk.real(s.File)
	same := func(name string) bool { return d.l.disk.real(name) == real }
	switch {
	case slices.ContainsFunc(d.l.files, same):
		d.errorAt(s.Place, "%s is read as part of this configuration; saving the cache would overwrite it", s.File)
	case d.cfg.Log.Output != "stdout" && d.cfg.Log.Output != "stderr" && same(d.cfg.Log.Output):
		d.errorAt(s.Place, "%s is the log; the cache needs a file of its own", s.File)
	}
}
