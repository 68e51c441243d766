package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// SaveFile saves to the file with that path, as [Cache.Save] does. The file is replaced at once or not at all, whenever the
// program or the machine stops: what is written to is another one beside it, with ".tmp" at the end of its name, which a
// later SaveFile removes if it was left behind. Only its owner may read the file: it tells what was asked for. Two calls
// for the same path must not run at the same time.
func (c *Cache) SaveFile(path string, now int64) (entries int, err error) {
	temp := path + ".tmp"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("saving the cache: %w", err)
	}
	// O_EXCL: whatever somebody puts there now is not followed.
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, fmt.Errorf("saving the cache: %w", err)
	}
	entries, err = c.Save(f, now)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return 0, fmt.Errorf("saving the cache: %w", err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return entries, fmt.Errorf("saving the cache to %s: %w", path, err)
	}
	return entries, nil
}

// syncDir makes a rename in dir last. Windows has no such thing.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// LoadFile loads the file with that path, as [Cache.Load] does. The error says what is wrong with which file; it is an
// [fs.ErrNotExist] where there is none.
func (c *Cache) LoadFile(path string, now int64) (entries int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("loading the cache: %w", err)
	}
	defer f.Close()
	if entries, err = c.Load(f, now); err != nil {
		return entries, fmt.Errorf("loading the cache from %s: %w", path, err)
	}
	return entries, nil
}
