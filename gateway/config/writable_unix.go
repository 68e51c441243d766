//go:build unix

package config

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// writable returns nil if this user may put a file at path, or where it leads to if it is a symbolic link, in the folder, and
// may read the one that is there: else it is somebody else's, and not to be replaced.
func writable(path string) error {
	if _, err := os.Readlink(path); err == nil {
		path = realName(path)
	}
	if err := unix.Access(path, unix.R_OK); err == unix.EACCES || err == unix.EPERM {
		return fmt.Errorf("%s: permission denied: this user may not read it", path)
	}
	dir := filepath.Dir(path)
	switch err := unix.Access(dir, unix.W_OK|unix.X_OK); err {
	case nil:
		return nil
	case unix.EACCES, unix.EPERM:
		return fmt.Errorf("the directory %s: permission denied: this user may not write there", dir)
	default:
		return fmt.Errorf("the directory %s: %w", dir, err)
	}
}
