package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
)

// keyOf returns the key of a name in presentation form.
func keyOf(name string, qtype uint16, bits byte, view uint32) []byte {
	var key []byte
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if label != "" {
			key = append(append(key, byte(len(label))), label...)
		}
	}
	key = binary.BigEndian.AppendUint16(append(key, 0), qtype)
	return binary.BigEndian.AppendUint32(append(key, bits), view)
}

func save(t testing.TB, c *Cache, now int64) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := c.Save(&b, now)
	if err != nil {
		t.Fatal(err)
	}
	if int64(n) > c.Stats().Entries {
		t.Fatalf("%d entries saved, %d are there", n, c.Stats().Entries)
	}
	return b.Bytes()
}

func load(t testing.TB, c *Cache, snapshot []byte, now int64) int {
	t.Helper()
	n, err := c.Load(t.Context(), bytes.NewReader(snapshot), now)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSnapshot saves answers of every kind and finds them again in another cache, as they were.
func TestSnapshot(t *testing.T) {
	config := Config{MaxBytes: 8 << 20, MinTTL: 5 * time.Second, MaxTTL: time.Hour, StaleFor: time.Hour}
	c := newCache(t, config)
	rnd := rand.New(rand.NewPCG(1, 2))
	const n = 1500
	key := func(i int) []byte {
		return keyOf(fmt.Sprintf("host%d.example", i), uint16(i%7), byte(i%4), uint32(i%3))
	}
	for i := range n {
		records, rcode := fmt.Sprintf("a.example. %d A 192.0.2.1", 1+rnd.IntN(7200)), 0
		switch i % 5 {
		case 1:
			records, rcode = "--\nexample. 900 SOA ns.example. root.example. 1 2 3 4 60", 3
		case 2:
			records = "--\nexample. 900 SOA ns.example. root.example. 1 2 3 4 1"
		case 3: // with places to truncate
			records += strings.Repeat("\na.example. 300 TXT "+strings.Repeat("x", 200), 1+i%9) + "\n--\n--\nb.example. 60 A 192.0.2.1"
		}
		a := answer(t, response(t, rcode, records))
		a.Secure = i%3 == 0
		for j := range i % 11 / 4 {
			a.EDE = append(a.EDE, wire.EDE{Code: uint16(j), Text: strings.Repeat("é", j*7)})
		}
		put(c, key(i), a, start+int64(i)*second/30)
		for range i % 3 {
			get(c, key(i), start)
		}
	}
	put(c, []byte("big"), answer(t, response(t, 0, "a.example. 300 A 192.0.2.1\n"+strings.Repeat("a.example. 300 TXT "+strings.Repeat("x", 255)+"\n", 200))), start)
	c.Fail([]byte("failure"), c.Hash([]byte("failure")), answer(t, response(t, 2, "")), start+n*second/30)

	now := start + 100*second
	restored := newCache(t, config)
	// Somebody has asked already.
	young := put(restored, key(7), address(t, 600), now)
	if got, want := load(t, restored, save(t, c, now), now), n; got != want { // n + 1 without key(7)
		t.Errorf("%d entries loaded, want %d", got, want)
	}
	check(t, restored)
	if f, _ := restored.Get(key(7), restored.Hash(key(7)), now); f.Answer != young {
		t.Error("a younger answer was replaced")
	}
	if _, ok := restored.Get([]byte("failure"), restored.Hash([]byte("failure")), start+n*second/30); ok {
		t.Error("a failure was restored")
	}
	stale := 0
	compare := func(key []byte) {
		want, wantOK := c.Get(key, c.Hash(key), now)
		got, ok := restored.Get(key, restored.Hash(key), now)
		diff := cmp.Diff(got, want, cmp.Exporter(func(reflect.Type) bool { return true }))
		if !ok || !wantOK || diff != "" {
			t.Fatalf("%q: %v, %v (-got +want)\n%s", key, ok, wantOK, diff)
		}
		if got.Stale {
			stale++
		}
	}
	compare([]byte("big"))
	for i := range n {
		if i != 7 {
			compare(key(i))
		}
	}
	if stale < n/5 {
		t.Errorf("%d stale answers, want more", stale)
	}

	// A clock that was set back knows no ages; one that went on too far finds nothing alive.
	for _, at := range []int64{start - 3600*second, start + 86400*second} {
		empty := newCache(t, config)
		if n := load(t, empty, save(t, c, now), at); n != 0 {
			t.Errorf("%d entries loaded %d s later", n, (at-start)/second)
		}
	}
}

// TestLoadAllocations loads many entries: it makes the two objects of each that stay, see TestEntry, and no others to read them.
func TestLoadAllocations(t *testing.T) {
	const n = 5000
	config := Config{MaxBytes: 8 << 20}
	c := newCache(t, config)
	for i := range n {
		put(c, keyOf(fmt.Sprint("host", i), 1, 0, 0), address(t, 3600), start)
	}
	snapshot := save(t, c, start)
	allocs := testing.AllocsPerRun(1, func() {
		if got := load(t, newCache(t, config), snapshot, start); got != n {
			t.Errorf("%d entries loaded, want %d", got, n)
		}
	})
	if want := float64(n*(2+btoi(race)) + 100); allocs > want {
		t.Errorf("a load of %d entries makes %v objects, want at most %v", n, allocs, want)
	}
}

// TestSnapshotOrder loads into a smaller cache: what was asked for is there.
func TestSnapshotOrder(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 16 << 20})
	a := address(t, 3600)
	key := func(i int) []byte { return fmt.Appendf(nil, "\x08host%04x\x07example\x03org\x00aabcccc", i) }
	const n, hot = 30000, 1000
	for i := range n {
		put(c, key(i), a, start)
	}
	for i := 0; i < n; i += n / hot {
		get(c, key(i), start)
	}
	small := newCache(t, Config{MaxBytes: 2 << 20})
	loaded := load(t, small, save(t, c, start), start)
	found := 0
	for i := 0; i < n; i += n / hot {
		if has(small, key(i)) {
			found++
		}
	}
	if s := small.Stats(); found != hot || loaded < hot || loaded >= n || int64(loaded) != s.Entries || s.Bytes > s.MaxBytes || s.Evictions != 0 {
		t.Errorf("%d of %d popular entries among the %d that were loaded; %+v", found, hot, loaded, s)
	}
	check(t, small)
	// What was loaded is what room is made with first.
	put(small, []byte("new"), a, start)
	if s := small.Stats(); s.Evictions == 0 || !has(small, []byte("new")) {
		t.Errorf("a new answer has no place: %+v", s)
	}
}

// TestDamage changes a snapshot in every way and loads it: nothing of it is taken.
func TestDamage(t *testing.T) {
	c := newCache(t, Config{})
	for i := range 20 {
		put(c, keyOf(fmt.Sprint("host", i), 1, 0, 0), address(t, 3600), start)
	}
	sound := save(t, c, start)
	refused := func(what string, snapshot []byte) {
		t.Helper()
		empty := newCache(t, Config{MaxBytes: MinBytes})
		n, err := empty.Load(t.Context(), bytes.NewReader(snapshot), start)
		if err == nil || n != 0 || empty.Stats().Entries != 0 {
			t.Errorf("%s: %d entries, %v", what, n, err)
		}
	}
	empty := newCache(t, Config{MaxBytes: MinBytes})
	for i := range sound {
		damaged := bytes.Clone(sound)
		damaged[i] ^= 1 << (i % 8)
		if n, err := empty.Load(t.Context(), bytes.NewReader(damaged), start); err == nil || n != 0 || empty.Stats().Entries != 0 {
			t.Fatalf("a bit of octet %d: %d entries, %v", i, n, err)
		}
		if n, err := empty.Load(t.Context(), bytes.NewReader(sound[:i]), start); err == nil || n != 0 || empty.Stats().Entries != 0 {
			t.Fatalf("cut at %d: %d entries, %v", i, n, err)
		}
	}
	refused("empty", nil)
	refused("garbage", bytes.Repeat([]byte("garbage "), 1000))
	refused("something behind", append(bytes.Clone(sound), 0))
	for _, tt := range []struct {
		name    string
		count   uint32
		payload []byte
	}{
		{"a count too large", 2, savedBytes(0, 0, "key", nil)},
		{"a count too small", 1, append(savedBytes(0, 0, "key", nil), savedBytes(0, 0, "key", nil)...)},
		{"an entry cut short", 1, savedBytes(0, 0, "key", make([]byte, 30))[:40]},
		{"unknown flags", 1, savedBytes(0, 0x80, "key", nil)},
		{"a final block without a number", 0, []byte{1}},
	} {
		refused(tt.name, snapshotOf(block(tt.count, tt.payload), final(uint64(tt.count))))
	}
	refused("a wrong number of entries", snapshotOf(block(1, savedBytes(0, 0, "key", nil)), final(2)))
	refused("a huge block", snapshotOf(make([]byte, 4), []byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}))
	if n, err := empty.Load(t.Context(), bytes.NewReader(snapshotOf(final(0))), start); n != 0 || err != nil {
		t.Errorf("the snapshot of nothing: %d, %v", n, err)
	}

	_, err := empty.Load(t.Context(), bytes.NewReader(bytes.Replace(sound, []byte{snapshotVersion, 0, 0, 0}, []byte{9, 0, 0, 0}, 1)), start)
	if err == nil || err.Error() != "its version is 9, want 1" {
		t.Errorf("another version: %v", err)
	}
	_, err = empty.Load(t.Context(), bytes.NewReader(sound[:len(sound)-1]), start)
	if want := fmt.Sprintf("the block at octet %d: unexpected EOF", len(sound)-20); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestDamagedMeanwhile loads from a file that changes after it was found sound.
func TestDamagedMeanwhile(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 8 << 20})
	for i := range 5000 { // several blocks
		put(c, keyOf(fmt.Sprint("host", i), 1, 0, 0), address(t, 3600), start)
	}
	sound := save(t, c, start)
	r := &changing{Reader: bytes.NewReader(sound), again: func() { sound[len(sound)/2] ^= 1 }}
	empty := newCache(t, Config{MaxBytes: 8 << 20})
	n, err := empty.Load(t.Context(), r, start)
	if !errors.Is(err, errChecksum) || n == 0 || n > 2500 || empty.Stats().Entries != int64(n) {
		t.Errorf("%d entries, %v", n, err)
	}
}

// TestLoadEnds ends a load before it begins, while it looks whether the snapshot is sound, and while it takes it in.
func TestLoadEnds(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 8 << 20})
	for i := range 5000 { // several blocks
		put(c, keyOf(fmt.Sprint("host", i), 1, 0, 0), address(t, 3600), start)
	}
	sound := save(t, c, start)
	for _, tt := range []struct {
		name   string
		second bool
		reads  int // of the reading, before the end
		some   bool
	}{{"before", false, 0, false}, {"first reading", false, 3, false}, {"between", true, 0, false}, {"second reading", true, 3, true}} {
		ctx, cancel := context.WithCancel(t.Context())
		second := false
		end := func() {
			if second == tt.second && tt.reads <= 0 {
				cancel()
			}
		}
		r := &changing{Reader: bytes.NewReader(sound)}
		r.again = func() { second = true; end() }
		r.read = func() {
			if second == tt.second {
				tt.reads--
			}
			end()
		}
		end()
		empty := newCache(t, Config{MaxBytes: 8 << 20})
		n, err := empty.Load(ctx, r, start)
		if !errors.Is(err, context.Canceled) || (n > 0) != tt.some || n > 4000 || empty.Stats().Entries != int64(n) {
			t.Errorf("%s: %d of %d entries, %v", tt.name, n, c.Stats().Entries, err)
		}
		cancel()
	}
}

// changing is a snapshot that something happens to when it is read, or read again; read may be nil.
type changing struct {
	*bytes.Reader
	again, read func()
}

func (c *changing) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		c.again()
	}
	return c.Reader.Seek(offset, whence)
}

func (c *changing) Read(b []byte) (int, error) {
	if c.read != nil {
		c.read()
	}
	return c.Reader.Read(b)
}

func savedBytes(stored int64, flags byte, key string, answer []byte) []byte {
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(stored)), flags)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(key)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(answer)))
	return append(append(b, key...), answer...)
}

func block(count uint32, payload []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, count)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, checksum(b, payload))
	return append(b, payload...)
}

func final(entries uint64) []byte { return block(0, binary.LittleEndian.AppendUint64(nil, entries)) }

func snapshotOf(blocks ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint32([]byte(snapshotMagic), snapshotVersion)
	return append(b, bytes.Join(blocks, nil)...)
}

// FuzzLoad loads foreign bytes, as they are and as the payload of a sound block. What is taken obeys all bounds, and what
// was taken is saved and loaded again as it is.
func FuzzLoad(f *testing.F) {
	c, err := New(Config{MaxBytes: MinBytes})
	if err != nil {
		f.Fatal(err)
	}
	for i, records := range []string{"a.example. 300 A 192.0.2.1", "--\nexample. 300 SOA ns.example. root.example. 1 2 3 4 60"} {
		a := answer(f, response(f, 0, records))
		a.Secure, a.EDE = true, []wire.EDE{{Code: 3, Text: "text"}}
		key := keyOf("a.example", uint16(i), 0, 0)
		c.Put(key, c.Hash(key), a, start)
	}
	sound := save(f, c, start)
	f.Add(sound, uint32(0))
	f.Add(sound[headerLen+blockHeaderLen:len(sound)-blockHeaderLen-8], uint32(2))
	f.Fuzz(func(t *testing.T, data []byte, count uint32) {
		config := Config{MaxBytes: MinBytes, MinTTL: 2 * time.Second, StaleFor: time.Hour}
		now := start + 100*second
		for _, snapshot := range [][]byte{data, snapshotOf(block(count, data), final(uint64(count)))} {
			c := newCache(t, config)
			n, err := c.Load(t.Context(), bytes.NewReader(snapshot), now)
			if s := c.Stats(); s.Entries != int64(n) || err != nil && n > 0 {
				t.Fatalf("%d loaded, %d entries, %v", n, s.Entries, err)
			}
			check(t, c)
			for i := range c.table.slots {
				for e := c.table.slots[i].Load(); e != nil; e = e.chain.Load() {
					if age, state := e.age(now, c.staleFor); state == dead || e.life == 0 || e.life > c.maxTTL || len(e.answer.TTLs) == 0 ||
						state == fresh && len(e.answer.TTLs) > 0 && age >= minTTL(&e.answer) {
						t.Fatalf("%q: age %d, state %d, life %d, TTLs %v", e.keyBytes(), age, state, e.life, ttls(&e.answer))
					}
				}
			}
			again := newCache(t, config)
			saved := save(t, c, now)
			if m := load(t, again, saved, now); m != n {
				t.Fatalf("%d entries, %d when loaded again", n, m)
			}
			if len(save(t, again, now)) != len(saved) {
				t.Fatal("another snapshot")
			}
		}
	})
}

func minTTL(a *wire.Answer) uint32 {
	low := ^uint32(0)
	for _, ttl := range ttls(a) {
		low = min(low, ttl)
	}
	return low
}

func TestFile(t *testing.T) {
	c := newCache(t, Config{})
	key := keyOf("a.example", 1, 0, 0)
	put(c, key, address(t, 300), start)
	dir := t.TempDir()
	path := filepath.Join(dir, "cache.bin")
	if _, err := c.LoadFile(t.Context(), path, start); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	// What a kill left behind is in nobody's way.
	if err := os.WriteFile(path+".tmp", []byte("half a snapshot"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		saved, err := c.SaveFile(path, start, Saved{})
		if saved.Entries != 1 || saved.Bytes != int64(len(save(t, c, start))) || !saved.Written || err != nil {
			t.Fatalf("saved %+v, %v", saved, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want one file", entries, err)
	}
	if info, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && info.Mode() != 0o600 {
		t.Errorf("got %v, %v", info.Mode(), err)
	}
	restored := newCache(t, Config{})
	if n, err := restored.LoadFile(t.Context(), path, start+10*second); n != 1 || err != nil {
		t.Fatalf("loaded %d, %v", n, err)
	}
	if _, age, ok := get(restored, key, start+10*second); !ok || age != 10 {
		t.Errorf("age %d, %v, want 10", age, ok)
	}

	if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = c.LoadFile(t.Context(), path, start)
	if want := "loading the cache from " + path + ": it is not a cache snapshot"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = c.SaveFile(filepath.Join(dir, "none", "cache.bin"), start, Saved{})
	if want := "saving the cache: open " + filepath.Join(dir, "none", "cache.bin.tmp") + ": "; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want %s...", err, want)
	}
	// A file that cannot be replaced stays, and so does nothing else.
	if err := os.Mkdir(filepath.Join(dir, "taken"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err = c.SaveFile(filepath.Join(dir, "taken"), start, Saved{}); err == nil {
		t.Error("a directory was replaced")
	}
	if _, err := os.Stat(filepath.Join(dir, "taken.tmp")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
}

// TestFileLinks saves to symbolic links: what they lead to is the file, before and after it is there, and they stay.
func TestFileLinks(t *testing.T) {
	c := newCache(t, Config{})
	put(c, keyOf("a.example", 1, 0, 0), address(t, 300), start)
	dir := t.TempDir()
	t.Chdir(dir)
	for _, d := range []string{"data/deep", "etc"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []struct{ name, to string }{
		{"etc/absolute", filepath.Join(dir, "data", "1.bin")},
		{"etc/relative", "../data/2.bin"},
		{"etc/chain", "relative2"}, {"etc/relative2", "../data/3.bin"},
		{"here", "data/4.bin"},
		{"deep", "data/deep"}, {"etc/up", "../deep/../5.bin"}, // above the folder that is meant, data/deep
		{"loop", "loop2"}, {"loop2", "loop"}, {"etc/nowhere", "../none/6.bin"},
	} {
		if err := os.Symlink(l.to, l.name); err != nil {
			t.Skip(err) // Windows has a privilege for it
		}
	}
	for _, tt := range []struct{ path, file string }{
		{"etc/absolute", "data/1.bin"}, {"etc/relative", "data/2.bin"}, {filepath.Join(dir, "etc/chain"), "data/3.bin"},
		{"here", "data/4.bin"}, {"etc/up", "data/5.bin"}, {"deep/file", "data/deep/file"},
	} {
		for range 2 { // the first finds a link to nothing
			if saved, err := c.SaveFile(tt.path, start, Saved{}); saved.Entries != 1 || err != nil {
				t.Errorf("%s: saved %v, %v", tt.path, saved, err)
			}
			if info, err := os.Lstat(tt.file); err != nil || !info.Mode().IsRegular() {
				t.Errorf("%s: %s is %v, %v, want a file", tt.path, tt.file, info, err)
			}
		}
		if n, err := newCache(t, Config{}).LoadFile(t.Context(), tt.path, start); n != 1 || err != nil {
			t.Errorf("%s: loaded %d, %v", tt.path, n, err)
		}
	}
	for _, link := range []string{"etc/absolute", "etc/relative", "etc/chain", "etc/relative2", "here", "etc/up"} {
		if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
			t.Errorf("%s is %v, %v, want the link that it was", link, info, err)
		}
	}
	for path, want := range map[string]string{"loop": "saving the cache: stat loop: ", "etc/nowhere": "saving the cache: open etc/../none/6.bin.tmp: "} {
		if saved, err := c.SaveFile(path, start, Saved{}); saved != (Saved{}) || err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: saved %v, %v, want %s...", path, saved, err, want)
		}
	}
	if left, err := filepath.Glob("*/*.tmp"); err != nil || left != nil {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestFileUnchanged saves one time after the other, and looks whether the file is written.
func TestFileUnchanged(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 8 << 20, StaleFor: time.Hour})
	key := func(i int) []byte { return keyOf(fmt.Sprint("host", i), 1, 0, 0) }
	for i := range 2000 {
		put(c, key(i), address(t, 300), start+int64(i))
	}
	path := filepath.Join(t.TempDir(), "cache.bin")
	var last Saved
	now := start + second
	unread := address(t, 300)
	for _, tt := range []struct {
		name    string
		do      func()
		written bool
	}{
		{"the first", func() {}, true},
		{"nothing", func() {}, false},
		{"still nothing", func() {}, false},
		{"time goes by", func() { now += 10 * second }, false},
		{"a new answer", func() { put(c, key(2000), unread, now) }, true},
		{"a newer one", func() { put(c, key(7), unread, now) }, true},
		{"two that change places in time", func() {
			put(c, key(7), unread, start+9)
			put(c, key(9), unread, now)
		}, true},
		{"nothing after changes", func() {}, false},
		{"a failure", func() { c.Fail(key(3000), c.Hash(key(3000)), answer(t, response(t, 2, "")), now) }, false},
		{"the failure of what is known", func() { c.Fail(key(1), c.Hash(key(1)), nil, now) }, false},
		{"popularity", func() { get(c, key(3), now) }, true},
		{"popularity that is not counted", func() {
			for range 10 {
				get(c, key(3), now)
			}
			last, _ = c.SaveFile(path, now, last)
			get(c, key(3), now)
		}, false},
		{"a flush", func() { c.FlushName([]byte("\x05host5\x00"), false) }, true},
		{"a flush of nothing", func() { c.FlushName([]byte("\x05host5\x00"), false) }, false},
		{"all stale", func() { now += 400 * second }, false},
		{"the file is gone", func() { _ = os.Remove(path) }, true},
		{"the file is another one", func() {
			data, err := os.ReadFile(path)
			if err == nil {
				err = errors.Join(os.WriteFile(path+"2", data, 0o600), os.Chtimes(path+"2", time.Time{}, last.file.ModTime()), os.Rename(path+"2", path))
			}
			if err != nil {
				t.Error(err)
			}
		}, true},
		{"the file was written to", func() { _ = os.WriteFile(path, []byte("other"), 0o600) }, true},
		{"the file was cut", func() { _ = errors.Join(os.Truncate(path, 100), os.Chtimes(path, time.Time{}, last.file.ModTime())) }, true},
		{"the file was touched", func() { _ = os.Chtimes(path, time.Time{}, time.Unix(1, 0)) }, true},
		{"a save went wrong before", func() { last = Saved{} }, true},
		{"everything", func() { c.FlushName([]byte{0}, true) }, true},
		{"nothing at all", func() {}, false},
	} {
		tt.do()
		saved, err := c.SaveFile(path, now, last)
		if err != nil || saved.Written != tt.written {
			t.Errorf("%s: got %+v, %v, want written %v", tt.name, saved, err, tt.written)
		}
		if !saved.Written && (saved.Entries != last.Entries || saved.Bytes != last.Bytes) {
			t.Errorf("%s: got %+v, want what there was, %+v", tt.name, saved, last)
		}
		last = saved
		again, want := newCache(t, Config{MaxBytes: 8 << 20, StaleFor: time.Hour}), newCache(t, Config{MaxBytes: 8 << 20, StaleFor: time.Hour})
		n, err := again.LoadFile(t.Context(), path, now)
		if m := load(t, want, save(t, c, now), now); n != m || err != nil {
			t.Errorf("%s: the file has %d entries, %v, want %d", tt.name, n, err, m)
		}
	}
}

// TestSaveFails writes to a disk that is full after so many octets.
func TestSaveFails(t *testing.T) {
	c := newCache(t, Config{MaxBytes: 8 << 20})
	for i := range 5000 {
		put(c, keyOf(fmt.Sprint("host", i), 1, 0, 0), address(t, 3600), start)
	}
	for _, room := range []int{0, 1, 100_000, 300_000} {
		if _, err := c.Save(&full{room}, start); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("%d octets: %v", room, err)
		}
	}
}

type full struct{ room int }

func (f *full) Write(b []byte) (int, error) {
	if f.room -= len(b); f.room < 0 {
		return 0, io.ErrShortWrite
	}
	return len(b), nil
}

func BenchmarkSnapshot(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		c := newCache(b, Config{MaxBytes: int64(n) * 400})
		a := address(b, 3600)
		for i := range n {
			put(c, fmt.Appendf(nil, "\x08%08x\x07example\x03org\x00aabcccc", i), a, start)
		}
		var snapshot []byte
		b.Run(fmt.Sprintf("save/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Save(io.Discard, start); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("unchanged/%d", n), func(b *testing.B) { // what is left of a save then
			b.ReportAllocs()
			for b.Loop() {
				c.collect()
			}
		})
		snapshot = save(b, c, start)
		b.Run(fmt.Sprintf("load/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				load(b, newCache(b, Config{MaxBytes: int64(n) * 400}), snapshot, start)
			}
		})
	}
}
