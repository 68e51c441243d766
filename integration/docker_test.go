package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// imageLimit is the largest image that we ship, in octets.
const imageLimit = 30 << 20

// buildah builds and runs images without an engine and without a registry.
type buildah struct {
	t     *testing.T
	store string
}

func (b buildah) argv(command string, args ...string) []string {
	return append([]string{"buildah", "--storage-driver", "vfs", "--root", filepath.Join(b.store, "root"),
		"--runroot", filepath.Join(b.store, "run"), command}, args...)
}

// do runs one command, however long it takes, and returns what it says on standard output.
func (b buildah) do(command string, args ...string) string {
	b.t.Helper()
	argv := b.argv(command, args...)
	cmd := exec.CommandContext(b.t.Context(), argv[0], argv[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		b.t.Fatalf("buildah %s: %v\n%s%s", command, err, tail(stdout.String(), 2000), tail(stderr.String(), 4000))
	}
	return strings.TrimSpace(stdout.String())
}

// TestDocker builds the Dockerfile on a local base, runs the image as Docker would in a network namespace, and asks it.
func TestDocker(t *testing.T) {
	ns := newNetns(t)
	need(t, "buildah", "busybox", "dig")
	b := buildah{t, t.TempDir()}
	b.do("bud", "--isolation", "chroot", "-t", "localhost/go", baseImage(t))
	b.do("bud", "--isolation", "chroot", "--format", "docker", "--build-arg", "GO_IMAGE=localhost/go", "--build-arg", "VERSION=1.2.3",
		"-v", goEnv(t, "GOMODCACHE")+":/root/go/pkg/mod", "-v", goEnv(t, "GOCACHE")+":/root/.cache/go-build",
		"-t", "localhost/dnsgateway", "..")
	checkImage(t, b)

	logs := t.TempDir()
	if err := os.Chown(logs, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(logs, "config.yaml"), `
upstreams: [tls://192.0.2.1]
log: {output: file:/app/log/dnsgateway.log, format: json}
local: {chaos: {version.bind: in-a-container}}
cache: {save: /app/cache/cache.bin}
`)
	if err := os.Chmod(filepath.Join(logs, "config.yaml"), 0o644); err != nil {
		t.Fatal(err)
	}
	container := b.do("from", "localhost/dnsgateway")
	inside := func(args ...string) []string {
		return ns.argv(b.argv("run", append([]string{"--isolation", "chroot", "-v", logs + ":/app/log", container, "--",
			"/usr/local/bin/dnsgateway"}, args...)...)...)
	}
	if out, status := run(t, inside("version")...); status != 0 || !strings.Contains(out, "dnsgateway 1.2.3 ") {
		t.Errorf("version: got status %d, %q", status, out)
	}
	p := start(t, nil, inside("run", "-c", "/app/log/config.yaml")...)
	logFile := filepath.Join(logs, "dnsgateway.log")
	awaitCount(t, func() uint64 {
		data, err := os.ReadFile(logFile)
		if err != nil {
			return 0
		}
		return uint64(strings.Count(string(data), `"msg":"serving"`))
	}, 1)
	for _, tcp := range []string{"+notcp", "+tcp"} {
		out, _ := run(t, ns.argv("dig", tcp, "+short", "+tries=1", "@127.0.0.1", "-p", "8053", "version.bind", "CH", "TXT")...)
		if strings.TrimSpace(out) != `"in-a-container"` {
			t.Errorf("dig %s: got %q", tcp, out)
		}
	}
	if out, status := run(t, inside("health")...); status != 0 {
		t.Errorf("health: got status %d: %s", status, out)
	}
	if out, status := run(t, inside("flush", "-c", "/app/log/config.yaml")...); status != 0 || out != "flushed all answers: 0 entries\n" {
		t.Errorf("flush: got status %d: %s", status, out)
	}
	info, err := os.Stat(logFile)
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 65532 {
		t.Errorf("the log file belongs to user %d, want 65532", uid)
	}
	// Docker sends SIGTERM to the program itself; buildah stands between us and it.
	pid := childOf(t, p.cmd.Process.Pid, "dnsgateway")
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.done
	if status := p.cmd.ProcessState.ExitCode(); status != 0 {
		t.Errorf("exit status after SIGTERM: got %d, want 0", status)
	}
	if data, _ := os.ReadFile(logFile); !strings.Contains(string(data), `"msg":"stopped"`) {
		t.Errorf("the log does not end with a stop:\n%s", data)
	} else if !strings.Contains(string(data), `"msg":"the cache is saved"`) {
		t.Errorf("the cache was not saved:\n%s", data)
	}
}

// checkImage looks at what the image says of itself.
func checkImage(t *testing.T, b buildah) {
	t.Helper()
	var images []struct{ Size string }
	if err := json.Unmarshal([]byte(b.do("images", "--json", "localhost/dnsgateway")), &images); err != nil || len(images) != 1 {
		t.Fatalf("listing images: %v, %d images", err, len(images))
	}
	var config struct {
		Docker struct {
			Config struct {
				User        string
				Volumes     map[string]any
				Healthcheck struct{ Test []string }
			} `json:"config"`
		}
		FromImage string
	}
	text := b.do("inspect", "--type", "image", "localhost/dnsgateway")
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		t.Fatal(err)
	}
	c := config.Docker.Config
	if c.User != "65532:65532" {
		t.Errorf("user: got %q", c.User)
	}
	for _, volume := range []string{"/app/log", "/app/cache"} {
		if _, ok := c.Volumes[volume]; !ok {
			t.Errorf("volumes: got %v, want %s", c.Volumes, volume)
		}
	}
	if want := "CMD /usr/local/bin/dnsgateway health"; strings.Join(c.Healthcheck.Test, " ") != want {
		t.Errorf("health check: got %q, want %q", c.Healthcheck.Test, want)
	}
	mount := b.do("mount", b.do("from", "localhost/dnsgateway"))
	var size int64
	err := filepath.Walk(mount, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("image: %s, files of %.1f MB", images[0].Size, float64(size)/(1<<20))
	if size > imageLimit {
		t.Errorf("the image holds %d octets, want at most %d", size, imageLimit)
	}
	if _, err := os.Stat(filepath.Join(mount, "etc/ssl/certs/ca-certificates.crt")); err != nil {
		t.Errorf("CA roots: %v", err)
	}
}

// baseImage makes the build folder of an image with Go, a shell and the CA roots of this machine, and returns it.
func baseImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "tmp", "certs"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	must := func(argv ...string) {
		t.Helper()
		if out, status := run(t, argv...); status != 0 {
			t.Fatalf("%v: %s", argv, out)
		}
	}
	busybox, _ := exec.LookPath("busybox")
	must("cp", busybox, filepath.Join(dir, "bin/busybox"))
	for _, applet := range []string{"sh", "mkdir", "cp", "chown", "printf"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	must("cp", "-L", "/etc/ssl/certs/ca-certificates.crt", filepath.Join(dir, "certs"))
	must("cp", "-a", goEnv(t, "GOROOT"), filepath.Join(dir, "go"))
	write(t, filepath.Join(dir, "Dockerfile"), `FROM scratch
COPY bin /bin
COPY tmp /tmp
COPY certs /etc/ssl/certs
COPY go /usr/local/go
ENV PATH=/usr/local/go/bin:/bin GOTOOLCHAIN=local GOPROXY=`+goEnv(t, "GOPROXY")+"\n")
	return dir
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatalf("go env %s on %s: %v", name, runtime.GOOS, err)
	}
	return strings.TrimSpace(string(out))
}

// childOf returns the process called name below pid.
func childOf(t *testing.T, pid int, name string) int {
	t.Helper()
	todo := []int{pid}
	for len(todo) > 0 {
		p := todo[0]
		todo = todo[1:]
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); err == nil && strings.TrimSpace(string(comm)) == name {
			return p
		}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p))
		for _, task := range tasks {
			data, _ := os.ReadFile(task)
			for _, word := range strings.Fields(string(data)) {
				if child, err := strconv.Atoi(word); err == nil {
					todo = append(todo, child)
				}
			}
		}
	}
	t.Fatalf("no process %s below %d", name, pid)
	return 0
}
