package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"
)

// TestBench makes the shortest run of the benchmark against rivals, of the gateway alone, so that it still works when
// somebody wants to know. Its figures mean nothing; that hits were hits and answers were right does.
func TestBench(t *testing.T) {
	needRoot(t)
	need(t, "dnsperf", "h2load", "gcc", "/usr/include/openssl/ssl.h", "/usr/include/stdlib.h", "ip", "unshare", "taskset")
	newNetns(t) // it makes one itself; this leaves the test out where the machine makes none
	if runtime.NumCPU() < 2 {
		t.Skip("left out: needs two cores")
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bench/run", "-r", "1", "-s", "0.3", "-tries", "1", "-t", "udp_hit,doh_hit",
		"-o", filepath.Join(dir, "results"), "dnsgateway")
	cmd.Env = append(os.Environ(), "DNSGATEWAY_BENCH="+filepath.Join(dir, "cache"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	// A figure may have marks behind it: the machine of a test is seldom quiet.
	if !regexp.MustCompile(`(?m)^target +udp_hit +doh_hit\ndnsgateway +[\d.,]+( [~!]+)? +[\d.,]+( [~!]+)?$`).Match(out) {
		t.Errorf("no table of the CPU for a query:\n%s", out)
	}
	text, err := os.ReadFile(filepath.Join(dir, "results", "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Records []struct {
			Target, Test string
			Values       map[string]float64
		}
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Records) != 2 {
		t.Errorf("got %d measurements, want 2:\n%s", len(got.Records), text)
	}
	for _, r := range got.Records {
		v := r.Values
		// A machine that stands still for half a second loses queries, and no gateway can help it.
		if v["qps"] <= 0 || v["cpu"] <= 0 || v["up"] != 0 || v["bad"] != 0 || v["lost"] > 1 {
			t.Errorf("%s, %s: got %v, want hits only, all of them NOERROR", r.Target, r.Test, v)
		}
	}
}
