package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// Saved is what [Cache.SaveFile] has saved.
type Saved struct {
	Entries int
	Bytes   int64
	Written bool // false: the file had it already

	sum  uint64      // of the collection
	file fs.FileInfo // nil: no file
}

// SaveFile saves to the file with that path, as [Cache.Save] does. last is what the last SaveFile of this cache for that path
// has returned, or zero: when the file is still that one, and what is in the cache has not changed but in age, nothing is
// written, because the file says when answers were stored, and not how old they are.
//
// The file is replaced at once or not at all, whenever the program or the machine stops: what is written to is another one
// beside it, with ".tmp" at the end of its name, which a later SaveFile removes if it was left behind. Where path is a
// symbolic link, the file is the one that it leads to, be that there already or not, and the link stays. Only its owner may
// read the file: it tells what was asked for. Two calls for the same file must not run at the same time.
func (c *Cache) SaveFile(path string, now int64, last Saved) (Saved, error) {
	path, err := follow(path)
	if err != nil {
		return Saved{}, fmt.Errorf("saving the cache: %w", err)
	}
	all := c.collect()
	if all.sum == last.sum && last.isAt(path) {
		last.Written = false
		return last, nil
	}
	temp := path + ".tmp"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Saved{}, fmt.Errorf("saving the cache: %w", err)
	}
	saved, err := c.saveNew(temp, all, now)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return Saved{}, fmt.Errorf("saving the cache: %w", err)
	}
	dir, _ := filepath.Split(path) // not filepath.Dir, for the reason that follow has
	if err := syncDir(dir); err != nil {
		return Saved{}, fmt.Errorf("saving the cache to %s: %w", path, err)
	}
	return saved, nil
}

// isAt reports whether the file that was written is still the one with that path, and nobody else has written to it.
func (s *Saved) isAt(path string) bool {
	info, err := os.Stat(path)
	return err == nil && s.file != nil && os.SameFile(info, s.file) && info.Size() == s.Bytes && info.ModTime().Equal(s.file.ModTime())
}

// saveNew saves to a file that is not there yet, and returns when the disk has it.
func (c *Cache) saveNew(path string, all *collection, now int64) (saved Saved, err error) {
	saved.Written, saved.sum = true, all.sum
	// O_EXCL: whatever somebody puts there now is not followed.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Saved{}, err
	}
	saved.Entries, err = c.save(f, all, now)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		saved.file, err = f.Stat()
	}
	if err == nil {
		saved.Bytes = saved.file.Size()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return saved, err
}

// maxLinks is how many symbolic links Linux follows for one path, path_resolution(7).
const maxLinks = 40

// follow returns the file that path leads to, which need not be there, by way of symbolic links. A rename would replace the
// first of them.
func follow(path string) (string, error) {
	// What must not be followed the system knows: a loop, or what somebody else has put into a folder that all may write to.
	if _, err := os.Stat(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for range maxLinks {
		link, err := os.Readlink(path)
		if err != nil {
			return path, nil // the end. If it is no file, opening one beside it or the rename says so.
		}
		if !filepath.IsAbs(link) {
			// Joined as they are: what lies above a folder that is itself a link, the system knows, and no text does.
			dir, _ := filepath.Split(path)
			link = dir + link
		}
		path = link
	}
	return "", fmt.Errorf("%s: more than %d symbolic links", path, maxLinks)
}

// syncDir makes a rename in dir last, "" being the working directory. Windows has no such thing.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(cmp.Or(dir, "."))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// LoadFile loads the file with that path, as [Cache.Load] does. The error says what is wrong with which file; it is an
// [fs.ErrNotExist] where there is none.
func (c *Cache) LoadFile(ctx context.Context, path string, now int64) (entries int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("loading the cache: %w", err)
	}
	defer f.Close()
	if entries, err = c.Load(ctx, f, now); err != nil {
		return entries, fmt.Errorf("loading the cache from %s: %w", path, err)
	}
	return entries, nil
}
