package pipeline

import (
	"hash/maphash"

	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/wire"
)

// maxCuts bounds how many names above a question's are looked up after a miss: those nearest to the root, where a name that
// does not exist has most below it. Few names have more labels. The root is not among them: a server that denies it is wrong, and
// must not have denied everything.
const maxCuts = 8

// seed is for keys when there is no cache.
var seed = maphash.MakeSeed()

func hashKey(key []byte) uint64 { return maphash.Bytes(seed, key) }

// hit is what the cache has for a query.
type hit struct {
	cache.Found
	denial bool // it is the denial of the query's name, or of the one without its first skip octets, which are whole labels
	skip   int
}

// failure reports whether h is a SERVFAIL, which the cache keeps for some seconds and has never stale.
func (h *hit) failure() bool { return h.Answer.Rcode == wire.RcodeServFail }

// usable reports whether h, which was found for q, is an answer that goes out before upstreams are asked, or without it.
func (p *Pipeline) usable(q *wire.Query, h *hit) bool {
	return !h.Stale || p.stale.After <= 0 || p.held(q, h)
}

// held reports whether asking for h, which was found for q, has failed so lately that it is left alone: within the failure
// recheck timer of RFC 8767, section 5, unless upstreams have come back since. That timer is there to spare those that do not
// answer, and they do.
func (p *Pipeline) held(q *wire.Query, h *hit) bool {
	return h.Failed != 0 && !p.over(q.Name, h.Failed)
}

// over reports whether the group of name has come back after the time failed.
func (p *Pipeline) over(name []byte, failed int64) bool {
	g := &p.groups[p.groupOf(name)]
	return g.Recovered != nil && g.Recovered() > failed
}

// key returns the cache key of q, which has a sound IN question, and its hash.
func (p *Pipeline) key(q *wire.Query) ([]byte, uint64) {
	key := q.Key(p.view)
	return key, q.Hash(p.hash)
}

// find looks for an answer to q, which has a sound IN question, at the time now: the one for its type, then the denial of its
// name, and then, if above is true, of the names above it. Of the first two a fresh one is better than a stale one, and a newer
// than an older; names above count only as long as they are fresh (RFC 8020, section 2). A failure is what there is instead of
// all of these, and the failure of upstreams that have come back is none.
//
// A denial of a name above is taken only where q would be asked of the same group: another group may have names that this one
// knows nothing of.
func (p *Pipeline) find(q *wire.Query, now int64, above bool) (h hit, ok bool) {
	key, hash := p.key(q)
	h.Found, ok = p.cache.Get(key, hash, now)
	failure := ok && h.failure()
	if ok && !h.Stale && !failure {
		return h, true
	}
	if failure && h.Failed != 0 && p.over(q.Name, h.Failed) {
		h, ok, failure = hit{}, false, false
	}
	key = q.NameKey(p.view, 0)
	if d, found := p.cache.Get(key, p.hash(key), now); found && d.Answer.Denial() && (!ok || failure || !d.Stale || d.Age < h.Age) {
		h, ok, failure = hit{Found: d, denial: true}, true, false
	}
	if ok && !h.Stale && !failure || !above {
		return h, ok
	}
	labels := 0
	for off := 0; q.Name[off] != 0; off += 1 + int(q.Name[off]) {
		labels++
	}
	for off := 0; labels > 1; labels-- {
		off += 1 + int(q.Name[off])
		if labels-1 > maxCuts {
			continue
		}
		key = q.NameKey(p.view, off)
		if d, found := p.cache.Get(key, p.hash(key), now); found && !d.Stale && d.Answer.Denial() &&
			p.groupOf(q.Name) == p.groupOf(q.Name[off:]) {
			return hit{Found: d, denial: true, skip: off}, true
		}
	}
	return h, ok
}

// appendHit appends the response to q that h gives, and sees to it that h is renewed when it is time.
func (p *Pipeline) appendHit(dst []byte, q *wire.Query, h *hit) []byte {
	if h.Stale {
		dst = p.shape.AppendStale(dst, q, h.Answer, p.stale.TTL)
		p.observe(q, h.Answer.Rcode, Stale)
		if p.stale.After <= 0 && !p.held(q, h) {
			p.renew(q, h)
		}
		return dst
	}
	dst = p.shape.AppendAnswer(dst, q, h.Answer, h.Age)
	p.observe(q, h.Answer.Rcode, Hit)
	if h.Prefetch && !p.held(q, h) && p.claim(q, h) {
		p.renew(q, h)
	}
	return dst
}

// claim reports whether q is the one by which h is to be prefetched.
func (p *Pipeline) claim(q *wire.Query, h *hit) bool {
	key := q.Key(p.view)
	if h.denial {
		key = q.NameKey(p.view, h.skip)
	}
	return p.cache.Claim(key, p.hash(key), q.Received)
}
