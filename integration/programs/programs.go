// Package programs builds what the programs in integration compare: the gateway from this checkout, and dnsproxy's own
// command. It runs the go command in the working directory, which has to be inside the checkout.
package programs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Gateway builds our program without the race detector, which would be what is measured.
func Gateway(ctx context.Context, path string) error {
	if err := goCommand(ctx, "", "build", "-o", path, "dnsgateway/cmd/dnsgateway"); err != nil {
		return fmt.Errorf("building the gateway: %w", err)
	}
	return nil
}

const dnsproxyModule = "github.com/AdguardTeam/dnsproxy"

// Dnsproxy builds the command at the version in our go.mod, in a module of its own: go.sum lacks what only the command
// needs.
func Dnsproxy(ctx context.Context, path string) error {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}} {{.GoVersion}}", dnsproxyModule).Output()
	if err != nil {
		return fmt.Errorf("asking go.mod for dnsproxy's version: %w", err)
	}
	version, goVersion, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	module, err := os.MkdirTemp("", "dnsproxy-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(module)
	text := fmt.Sprintf("module build\n\ngo %s\n\nrequire %s %s\n", goVersion, dnsproxyModule, version)
	if err := os.WriteFile(filepath.Join(module, "go.mod"), []byte(text), 0o644); err != nil {
		return err
	}
	if err := goCommand(ctx, module, "build", "-mod=mod", "-o", path, dnsproxyModule); err != nil {
		return fmt.Errorf("building dnsproxy: %w", err)
	}
	return nil
}

func goCommand(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
