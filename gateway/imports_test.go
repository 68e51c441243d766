package gateway_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	module   = "dnsgateway/"
	miekg    = "github.com/miekg/dns"
	dnsproxy = "github.com/AdguardTeam/dnsproxy"
	promauto = "github.com/prometheus/client_golang/prometheus/promauto"
)

// goPackage is what `go list -json` says of a package, as far as the rules ask.
type goPackage struct {
	ImportPath  string
	Standard    bool
	Imports     []string // direct
	Deps        []string // direct and indirect
	TestImports []string // of the package's own tests, internal and external
}

// rule says what some packages of ours must not import. A path stands for itself and for everything below it.
type rule struct {
	name   string
	who    []string // of ours; none means all
	except []string // of ours, not held to the rule
	never  []string // what is forbidden
	reach  bool     // forbidden over any number of steps, not only as a direct import
}

// The rules are those of the README's "Architecture" and of gateway/pipeline/doc.go. Test files may import
// what they need: they are not in the program.
var rules = []rule{
	{
		name:  "the fast packages stay bytes: no miekg/dns, no dnsproxy, at any depth",
		who:   ours("gateway/wire", "gateway/access", "gateway/cache", "gateway/route"),
		never: []string{miekg, dnsproxy},
		reach: true,
	},
	{
		name:  "wire stands on the standard library alone",
		who:   ours("gateway/wire"),
		never: []string{"nonstandard"},
	},
	{
		name:   "only gateway and cmd import config",
		except: ours("gateway", "gateway/config", "cmd"),
		never:  ours("gateway/config"),
	},
	{
		name:   "only forward imports dnsproxy",
		except: ours("gateway/forward"),
		never:  []string{dnsproxy},
	},
	{
		name:  "listen never reaches pipeline",
		who:   ours("gateway/listen"),
		never: ours("gateway/pipeline"),
		reach: true,
	},
	{
		name:  "pipeline never reaches the rooms that use it or stand beside it",
		who:   ours("gateway/pipeline"),
		never: ours("gateway/forward", "gateway/listen", "gateway/admin", "gateway/config", "gateway/observe"),
		reach: true,
	},
	{
		name:  "dnssec never reaches forward",
		who:   ours("gateway/dnssec"),
		never: ours("gateway/forward"),
		reach: true,
	},
	{
		name:  "nothing registers metrics behind one's back",
		never: []string{promauto},
	},
}

// uses is the import table: which packages of ours a package may import. A package that stands in no row (the wiring in
// gateway, the lab) is held to the rules above only.
var uses = map[string][]string{
	// Beyond the design: certs for `cert`, observe because the logger is made before there is a gateway; and nowait, so that
	// forward and listen have the same system calls.
	"cmd/dnsgateway":   {"gateway", "gateway/config", "gateway/lab", "gateway/certs", "gateway/observe"},
	"gateway/config":   {},
	"gateway/wire":     {},
	"gateway/access":   {},
	"gateway/cache":    {"gateway/wire"},
	"gateway/route":    {},
	"gateway/local":    {"gateway/wire"},
	"gateway/forward":  {"gateway/wire", "gateway/nowait"},
	"gateway/dnssec":   {},
	"gateway/pipeline": {"gateway/wire", "gateway/access", "gateway/cache", "gateway/route", "gateway/local", "gateway/dnssec"},
	"gateway/listen":   {"gateway/wire", "gateway/nowait"},
	"gateway/nowait":   {},
	"gateway/certs":    {},
	"gateway/observe":  {},
	"gateway/admin":    {},
}

func ours(paths ...string) []string {
	var full []string
	for _, p := range paths {
		full = append(full, module+p)
	}
	return full
}

// TestImports holds every package that exists to the rules. Packages that are still to come are not in the listing.
func TestImports(t *testing.T) {
	pkgs := list(t, "./...")
	for _, path := range ours("gateway/wire", "gateway/access", "gateway/pipeline") {
		if !slices.ContainsFunc(pkgs, func(p goPackage) bool { return p.ImportPath == path }) {
			t.Errorf("go list does not know %s: is this test still looking at the right module?", path)
		}
	}
	standard := map[string]bool{}
	for _, p := range list(t, "-deps", "./...") {
		standard[p.ImportPath] = p.Standard
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, v := range violations(r, pkgs, standard) {
				t.Error(v)
			}
		})
	}
	for _, p := range pkgs {
		row, ok := uses[strings.TrimPrefix(p.ImportPath, module)]
		if !ok {
			continue
		}
		for _, imp := range p.Imports {
			if strings.HasPrefix(imp, module) && !slices.Contains(ours(row...), imp) {
				t.Errorf("%s imports %s; the design's table allows it %v", p.ImportPath, imp, row)
			}
		}
	}
	for _, p := range pkgs {
		if !under(p.ImportPath, module+"integration") {
			continue
		}
		for _, imp := range slices.Concat(p.Imports, p.TestImports) {
			if strings.HasPrefix(imp, module) && imp != module+"gateway/lab" && !under(imp, module+"integration") {
				t.Errorf("%s imports %s; integration drives the built program and may use the lab only", p.ImportPath, imp)
			}
		}
	}
}

// list runs go list in the module's root.
func list(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-e", "-json=ImportPath,Standard,Imports,Deps,TestImports,XTestImports"},
		args...)...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%v: %v\n%s", cmd, err, exit.Stderr)
		}
		t.Fatalf("%v: %v", cmd, err)
	}
	var pkgs []goPackage
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p struct {
			goPackage
			XTestImports []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("reading the output of %v: %v", cmd, err)
		}
		p.TestImports = append(p.TestImports, p.XTestImports...)
		pkgs = append(pkgs, p.goPackage)
	}
}

// violations returns a line for every import of pkgs that r forbids.
func violations(r rule, pkgs []goPackage, standard map[string]bool) []string {
	var found []string
	for _, p := range pkgs {
		if len(r.who) > 0 && !anyUnder(p.ImportPath, r.who) || excepted(p.ImportPath, r.except) {
			continue
		}
		imports := p.Imports
		if r.reach {
			imports = p.Deps
		}
		for _, imp := range imports {
			nonstandard := slices.Contains(r.never, "nonstandard") && !standard[imp]
			if nonstandard || anyUnder(imp, r.never) {
				found = append(found, fmt.Sprintf("%s imports %s", p.ImportPath, imp))
			}
		}
	}
	return found
}

// excepted is like anyUnder, but gateway stands for itself alone: everything is below it.
func excepted(path string, except []string) bool {
	for _, e := range except {
		if path == e || e != module+"gateway" && under(path, e) {
			return true
		}
	}
	return false
}

func anyUnder(path string, roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool { return under(path, root) })
}

func under(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

// TestViolations shows that the rules find what they are there to find.
func TestViolations(t *testing.T) {
	standard := map[string]bool{"net": true}
	for _, tt := range []struct {
		name string
		pkg  goPackage
		want []string // the names of the rules that it breaks
	}{
		{"sound", goPackage{ImportPath: module + "gateway/wire", Imports: []string{"net"}, Deps: []string{"net"}}, nil},
		{"wire reaches miekg", goPackage{ImportPath: module + "gateway/wire", Deps: []string{"net", miekg}},
			[]string{rules[0].name}},
		{"wire imports x/net", goPackage{ImportPath: module + "gateway/wire", Imports: []string{"golang.org/x/net/idna"}},
			[]string{rules[1].name}},
		{"listen imports config", goPackage{ImportPath: module + "gateway/listen", Imports: ours("gateway/config")},
			[]string{rules[2].name}},
		{"gateway imports config", goPackage{ImportPath: module + "gateway", Imports: ours("gateway/config")}, nil},
		{"cmd imports config", goPackage{ImportPath: module + "cmd/dnsgateway", Imports: ours("gateway/config")}, nil},
		{"lab imports dnsproxy", goPackage{ImportPath: module + "gateway/lab", Imports: []string{dnsproxy + "/proxy"}},
			[]string{rules[3].name}},
		{"listen imports dnsproxy", goPackage{ImportPath: module + "gateway/listen", Imports: []string{dnsproxy + "/proxy"}},
			[]string{rules[3].name}},
		{"forward imports dnsproxy", goPackage{ImportPath: module + "gateway/forward",
			Imports: []string{dnsproxy + "/upstream"}}, nil},
		{"listen reaches pipeline", goPackage{ImportPath: module + "gateway/listen", Deps: ours("gateway/pipeline")},
			[]string{rules[4].name}},
		{"pipeline reaches forward", goPackage{ImportPath: module + "gateway/pipeline", Deps: ours("gateway/forward")},
			[]string{rules[5].name}},
		{"dnssec reaches forward", goPackage{ImportPath: module + "gateway/dnssec", Deps: ours("gateway/forward")},
			[]string{rules[6].name}},
		{"observe uses promauto", goPackage{ImportPath: module + "gateway/observe", Imports: []string{promauto}},
			[]string{rules[7].name}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, r := range rules {
				if len(violations(r, []goPackage{tt.pkg}, standard)) > 0 {
					got = append(got, r.name)
				}
			}
			if diff := cmp.Diff(got, tt.want); diff != "" {
				t.Errorf("got -, want +:\n%s", diff)
			}
		})
	}
}
