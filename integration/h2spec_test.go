package integration

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// h2specModule is the conformance test for HTTP/2 and HPACK, at the version that is run. It is built in a module of its own,
// so that ours does not have it.
const h2specModule = "github.com/summerwind/h2spec@v2.2.1+incompatible"

// TestH2spec has the DoH listener pass all of h2spec, the cases that only a strict server passes too. It tests RFC 7540;
// nothing of it is wrong by RFC 9113 for a server.
func TestH2spec(t *testing.T) {
	h2spec := buildH2spec(t)
	s := newSetup(t, yaml{})
	host, port, err := net.SplitHostPort(s.doh)
	if err != nil {
		t.Fatal(err)
	}
	// -o is how many seconds a case waits for what it expects.
	out, err := exec.Command(h2spec, "-t", "-k", "-S", "-h", host, "-p", port, "-P", "/dns-query", "-o", "5").CombinedOutput()
	summary := regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`).FindStringSubmatch(string(out))
	if err != nil || summary == nil || summary[1] != summary[2] || len(summary[1]) < 3 {
		t.Errorf("%v\n%s", err, out)
	}
	noErrors(t, s.gateway)
}

// buildH2spec builds it from the module proxy. Without one the test is left out, or fails when the run requires all.
func buildH2spec(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	const tool = "package tools\n\nimport _ \"github.com/summerwind/h2spec/cmd/h2spec\"\n"
	if err := os.WriteFile(filepath.Join(dir, "tools.go"), []byte("//go:build tools\n\n"+tool), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"mod init h2spectest", "mod edit -require=" + h2specModule, "mod tidy",
		"build -o h2spec github.com/summerwind/h2spec/cmd/h2spec",
	} {
		cmd := exec.Command("go", strings.Fields(args)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			if os.Getenv("INTEGRATION_REQUIRE") == "1" {
				t.Fatalf("go %s: %v\n%s", args, err, out)
			}
			t.Skipf("left out: h2spec cannot be built: go %s: %v\n%s", args, err, tail(string(out), 500))
		}
	}
	return filepath.Join(dir, "h2spec")
}
