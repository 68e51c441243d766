// Package pipeline is the one door: every query of every transport enters by [Pipeline.ServeWire], and by
// [Pipeline.Resolve] when that says Miss. It owns the order of the stages and what goes into the cache; what the stages
// do is in the packages that it calls.
//
// # The order of stages
//
//	parse      wire      done by the listener: Query.Parse. What is no query (QR=1, too short) is dropped here.
//	expect     cache     queries that came in together: what lookup will read is fetched from memory, for all at once
//	admit      access    before every answer, errors and cache hits included, or they would amplify:
//	                     not allowed: REFUSED or silence; over its rate: TC=1 or silence over UDP, else REFUSED
//	fault      wire      the RCODE that the message itself earned: FORMERR, NOTIMP, BADVERS
//	lookup     cache     a Plain query's answer: copied, aged and shaped for the client. Its type's, or else the denial of its name
//	                     or of one above it (RFC 8020); a stale one (RFC 8767) where upstreams have just failed; see find.go
//	-- Miss: from here on allocations and waiting are allowed --
//	own        pipeline  what never leaves: class CH, AXFR, IXFR, ANY, meta types, signed queries; see own.go
//	lookup     cache     again, for Odd queries, whose Plain form may be known, for what has come since, and for a stale answer
//	coalesce   pipeline  all who ask the same wait for one exchange, and each until its own time is over; see flight.go
//	bound      pipeline  beyond Config.Inflight exchanges the oldest is given up for the newest; none is queued
//	match      route     the upstream group, by QNAME alone: whatever the type or class, private names stay with theirs
//	exchange   Exchanger a fresh query with nothing of the client's but the question, DO and CD
//	check      pipeline  may this be passed on? What can be wrong with bytes its upstream has looked for; see upstream.go
//	store      cache     lifetimes decide (RFC 2308); SERVFAIL for 5 s, no answer for 1 s and more, neither over a good answer;
//	                     truncated ones never; nor what was asked before a Flush
//	stale      pipeline  what was known before, after Config.Stale.After or when upstreams fail; the exchange goes on for the cache
//	shape      wire      the same last step as in a cache hit, so that both are equal byte by byte
//
// What Run asks to renew an answer in the cache takes the same way from join to store.
//
// ServeWire and Resolve recover from a panic: the client gets SERVFAIL or nothing, the log gets the stack, the program goes on.
//
// # Who may import what
//
// A test in package gateway holds the house to this table with go list.
//
//	package           may import of ours                          never
//	cmd/dnsgateway    gateway, config, lab, certs, observe
//	gateway           all below
//	config            none                                        only gateway and cmd import it
//	wire              none, and nothing but the standard library  miekg/dns, dnsproxy
//	access            none                                        miekg/dns, dnsproxy
//	cache             wire                                        miekg/dns, dnsproxy
//	route             none                                        miekg/dns, dnsproxy
//	local             wire
//	forward           wire, nowait                                only it imports dnsproxy
//	dnssec            none                                        forward
//	pipeline          wire access cache route local dnssec        forward, listen, admin, config, observe
//	listen            wire, nowait                                pipeline
//	nowait            none
//	certs             none
//	observe, admin    none
//	integration       lab
//
// What surprises a newcomer: a query that the pipeline refuses is [wire.Answered], and Resolve returns no error for
// SERVFAIL. An answer is not an error. And the query that leads an exchange asks on its own goroutine for all who follow: when
// its client leaves, it stays as long as they do.
package pipeline
