// Package integration drives the built program with the clients that people use: dig, kdig, curl, Unbound, stubby, and
// Go's own for what those cannot do. It knows nothing of the program's inside but the lab.
//
// A client that is not installed leaves its tests out, by name; with INTEGRATION_REQUIRE=1 that is a failure.
package integration
