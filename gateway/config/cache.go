package config

import "time"

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
	if ttl, ok := v.get("ttl"); ok && d.cfg.Cache.Size == 0 {
		ttl.warnf("has no effect: the cache is off")
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
