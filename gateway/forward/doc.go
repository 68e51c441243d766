// Package forward asks upstream servers: groups of them in tiers, with one deadline for each question, a memory of who
// is failing, and a client for every transport.
//
// A [Group] owns its servers' connections, their health, and the order in which they are asked. It decides nothing
// about names: which group serves which question is the caller's business. Groups share nothing, so a question given
// to one group can never reach another.
//
// What surprises a newcomer: a server that has not answered in the usual time is not given up. The next one is asked
// beside it, and the first good answer wins; so a name that is slow at every server still gets its answer, and a server
// that is silent costs a client the time that nearly all its answers stay within, once.
//
// Questions and answers are bytes here: package wire reads what came, and *dns.Msg is only what the framework's interface
// wants.
//
// The layers, from the top:
//
//	Group    tiers, picks, hedges, the deadline (search.go, hedge.go)
//	server   what its answers have taught: latency, health, probes (health.go, latency.go)
//	client   one server over one transport: ask(ctx, query); each is also a framework upstream.Upstream
//	         a discoverClient asks those that an unencrypted resolver designates (discover.go)
//	pool     a client's few connections: dialling, back-off, replacing what went silent, asking again what broke
//	link     one connection: DoT and TCP (stream.go), DoH over HTTP/1.1, 2 and 3 (https.go), DoQ (quic.go)
//
// # The states of a server
//
//	unknown  nobody has asked it
//	ok       closed, as circuit breakers call it
//	suspect  half open: three questions in a row went without any answer, or too many were late, lost or broken. It gets
//	         no questions until a probe has told, which begins at once
//	failing  open: failures in a row, a probe in vain, or answers that other servers refuted. Probed every few seconds
//
// A server that has failed a question to which nobody had an answer is probed as well, though it stays in use: that tells
// whether it was the server, and when it is back ([Group.Recovered]).
//
// A failing server comes back when probes are answered as promptly as before. One that lost or broke questions has to
// answer a row of them. Suspect and failing servers are the last resort: asked when no other has an answer.
//
// # What is ours and what is the framework's
//
// github.com/AdguardTeam/dnsproxy v0.84.1 gives the vocabulary ([upstream.Upstream], which every client here satisfies)
// and the DNSCrypt client (framework.go). The clients for DoT, TCP, UDP, DoH and DoQ are ours, because of what was
// measured and read in that version:
//
//   - Exchange takes no context, and Options.Timeout covers only the TCP connect of DoT: a silent server costs 10 s;
//   - its DoT client sends one query at a time over a connection: 50 queries at once opened 50 TLS connections;
//   - a DoQ dial holds a mutex: 8 queries to a dead server took 1, 2, ... 8 s; one stream's error closes the connection
//     that all others use;
//   - a client certificate cannot be given in upstream.Options, for any transport;
//   - host names are resolved again for every connection without regard to TTL, and by the system's resolver when the
//     bootstrap is left out;
//   - Exchange may write to the request while it runs (the ID in DoQ), so requests cannot be shared between attempts.
package forward
