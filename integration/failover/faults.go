package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"dnsgateway/gateway/lab"
)

// none is the name of the run without a fault.
const none = "none"

// fault is a way in which the first tier breaks.
type fault struct {
	name  string    // in the table and on the command line
	lab   lab.Fault // what its server does
	holed bool      // instead: packets to and from it are lost
}

// faults are all that are measured, in the order of the table.
var faults = []fault{
	{name: "dead", lab: lab.Fault{Kind: lab.Dead}}, // the port is refused
	{name: "blackhole", holed: true},
	{name: "silent", lab: lab.Fault{Kind: lab.Silent}},
	{name: "stuck", lab: lab.Fault{Kind: lab.Stuck}}, // silent on the connections that exist
	{name: "tlshang", lab: lab.Fault{Kind: lab.TLSHang}},
	{name: "badcert", lab: lab.Fault{Kind: lab.BadCert}},
	{name: "rst", lab: lab.Fault{Kind: lab.RST}},
	{name: "truncated", lab: lab.Fault{Kind: lab.Truncated}},
	{name: "wrong-id", lab: lab.Fault{Kind: lab.WrongID}},
	{name: "wrong-question", lab: lab.Fault{Kind: lab.WrongQuestion}},
	{name: "garbage", lab: lab.Fault{Kind: lab.Garbage}},
	{name: "servfail", lab: lab.Fault{Kind: lab.ServFail}},
	{name: "refused", lab: lab.Fault{Kind: lab.Refused}},
	{name: "slow", lab: mustParse("slow:2s")},
	{name: "loss", lab: mustParse("loss:30%")},
	{name: "flap", lab: mustParse("flap:1s")},
}

func mustParse(text string) lab.Fault {
	f, err := lab.ParseFault(text)
	if err != nil {
		panic(err)
	}
	return f
}

func faultNames() []string {
	var names []string
	for _, f := range faults {
		names = append(names, f.name)
	}
	return names
}

// feasible returns the faults that this machine can make, and says which it leaves out. With INTEGRATION_REQUIRE=1 leaving
// out is an error.
func feasible(all []fault, stderr io.Writer) ([]fault, error) {
	if !slices.ContainsFunc(all, func(f fault) bool { return f.holed }) {
		return all, nil
	}
	s, err := newHoleSite()
	if err == nil {
		return all, s.close()
	}
	if os.Getenv("INTEGRATION_REQUIRE") == "1" {
		return nil, fmt.Errorf("making a black hole: %w", err)
	}
	fmt.Fprintf(stderr, "left out: this machine makes no black hole: %v\n", err)
	able := slices.DeleteFunc(slices.Clone(all), func(f fault) bool { return f.holed })
	if len(able) == 0 {
		return nil, errors.New("no fault is left")
	}
	return able, nil
}
