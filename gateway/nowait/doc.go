// Package nowait reads and writes stream sockets without a word to the scheduler. It owns the two system calls; what waits for
// a socket to be ready is its user's, or for [Conn] the runtime's poller.
//
// What surprises a newcomer: an ordinary call of package net on an idle machine costs more than the call. Before it the
// scheduler wakes its monitor, a thread that then looks every 20 µs, and later less often, whether the call hangs. With a
// thousand questions a second it is always awake, on the core that is to answer them: measured on one core, a cache miss took
// 4.3 changes of threads with such calls and 2.0 without, and two thirds of the CPU. A call that cannot block needs no monitor.
// Elsewhere than on Linux these calls are net's.
package nowait
