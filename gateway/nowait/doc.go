// Package nowait reads and writes stream sockets without a word to the scheduler. It owns the two system calls; what waits for
// a socket to be ready is its user's, or for [Conn] the runtime's poller.
//
// What surprises a newcomer: an ordinary call of package net on an idle machine costs more than the call. Before it the
// scheduler wakes its monitor, a thread that looks whether the call hangs, every 20 µs for as long as there is work. At a
// thousand questions a second each of them wakes it, on the core that is to answer them: measured on one core, a cache miss
// took 4.5 changes of threads and 129 µs of CPU with such calls, and 2.0 and 71 µs with these.
//
// Its price: the monitor also ends the turn of a goroutine that computes for more than 10 ms, and it may sleep on while
// nothing but these calls is made. Who computes for so long makes an ordinary call first, as all do who begin with a file or
// with net/http, or yields. And nobody else gets the core meanwhile, so it is for messages, not for megabytes. The race
// detector sees the buffers, but not that what is written on one end comes before what is read on the other.
// Elsewhere than on Linux these calls are net's.
package nowait
