package cache

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"slices"
	"time"

	"dnsgateway/gateway/wire"
)

// A snapshot is a header of 16 octets, blocks of entries, and a final block; numbers are little-endian.
//
//	header: the magic, 12 octets; the version, 4
//	block:  the number of entries in it, 4 octets; the length of its payload, 4; a CRC-32C of these and the payload, 4;
//	        the payload
//	entry:  when it was stored, Unix nanoseconds, 8 octets; flags, 1; the length of the key, 2, and of the answer, 2;
//	        the key; the answer as a packed response
//
// The final block says that it has no entries; its payload is how many there were in all, 8 octets, and nothing follows.
// What is popular comes first. How long an answer may be kept is not written: it follows from the answer itself.
const (
	snapshotMagic   = "dnsgw cache\n"
	snapshotVersion = 1
	headerLen       = len(snapshotMagic) + 4
	blockHeaderLen  = 12
	entryHeaderLen  = 13
	// blockSize is when a block is ended. A larger one only delays.
	blockSize = 128 << 10
	// maxPayload is a block that was about to be ended, and the largest entry.
	maxPayload = blockSize + entryHeaderLen + 2*wire.MaxMessage
)

// The flags of an entry: its frequency in the lower two bits, and
const (
	flagMain   = 1 << 2 // it is in the main queue
	flagSecure = 1 << 3 // wire.Answer.Secure
	flagsKnown = frequencyMask | flagMain | flagSecure
)

// castagnoli is the polynomial that processors have instructions for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Save writes all answers that are alive or stale at the time now to w, the most popular first, and returns how many they
// are. It locks one shard after the other for as long as it takes to copy pointers, and no lock is held while it writes;
// what leaves the cache meanwhile is written nevertheless, and kept in memory until then. Failures are not saved.
func (c *Cache) Save(w io.Writer, now int64) (entries int, err error) {
	return c.save(w, c.collect(), now)
}

// save writes what was collected to w, and lets go of it.
func (c *Cache) save(w io.Writer, all *collection, now int64) (entries int, err error) {
	b := blockWriter{w: w}
	b.buf = binary.LittleEndian.AppendUint32(append(b.buf, snapshotMagic...), snapshotVersion)
	b.begin()
	for r := len(all.ranks) - 1; r >= 0; r-- {
		for i, e := range all.ranks[r] {
			all.ranks[r][i] = nil // what was evicted meanwhile may go
			if _, state := e.age(now, c.staleFor); state == dead {
				continue
			}
			b.add(e, r)
			entries++
			if len(b.buf)-b.start >= blockSize {
				if err := b.flush(); err != nil {
					return entries, err
				}
			}
		}
	}
	if b.count > 0 {
		if err := b.flush(); err != nil {
			return entries, err
		}
	}
	b.buf = binary.LittleEndian.AppendUint64(b.buf, uint64(entries))
	return entries, b.flush()
}

// goldenRatio is 2^64 divided by that: no time that entries have, so that none of them is multiplied by zero.
const goldenRatio = 0x9e3779b97f4a7c15

// ranks is how many steps of popularity a snapshot knows: a rank is the flags flagMain and the frequency.
const ranks = flagMain << 1

// collection is all that is in a cache, at about one moment.
type collection struct {
	ranks [ranks][]*entry
	// sum is the same for two collections of one cache if snapshots of them at one time are, and another one if they are not,
	// but for one chance in 2^64.
	sum uint64
}

func (c *Cache) collect() *collection {
	all := new(collection)
	for i := range c.shards {
		c.shards[i].collect(all)
	}
	return all
}

// collect adds the shard's entries. It goes by the table and not by the queues: the processor can fetch the next entries
// while it waits for one.
func (s *shard) collect(all *collection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.slots {
		for e := s.slots[i].Load(); e != nil; e = e.chain.Load() {
			if e.failure {
				continue
			}
			r := e.frequency()
			if e.main {
				r |= flagMain
			}
			all.ranks[r] = append(all.ranks[r], e)
			// The answer is in it by its time: no two for a key were stored at the same.
			high, low := bits.Mul64(e.hash+uint64(r), uint64(e.stored)^goldenRatio)
			all.sum += high ^ low
		}
	}
}

// blockWriter writes blocks to w.
type blockWriter struct {
	w     io.Writer
	buf   []byte
	start int // where the block's header begins in buf; before it may be the snapshot's
	count uint32
}

// begin leaves room for a block's header.
func (b *blockWriter) begin() {
	b.start, b.count = len(b.buf), 0
	b.buf = append(b.buf, make([]byte, blockHeaderLen)...)
}

func (b *blockWriter) add(e *entry, flags int) {
	if e.answer.Secure {
		flags |= flagSecure
	}
	b.count++
	b.buf = binary.LittleEndian.AppendUint64(b.buf, uint64(e.stored))
	b.buf = append(b.buf, byte(flags))
	b.buf = binary.LittleEndian.AppendUint16(b.buf, e.keyLen)
	length := len(b.buf)
	b.buf = append(b.buf, 0, 0)
	b.buf = append(b.buf, e.keyBytes()...)
	start := len(b.buf)
	b.buf = e.answer.AppendPacked(b.buf)
	binary.LittleEndian.PutUint16(b.buf[length:], uint16(len(b.buf)-start))
}

// flush writes the block, and begins another one.
func (b *blockWriter) flush() error {
	block := b.buf[b.start:]
	binary.LittleEndian.PutUint32(block, b.count)
	binary.LittleEndian.PutUint32(block[4:], uint32(len(block)-blockHeaderLen))
	binary.LittleEndian.PutUint32(block[8:], checksum(block[:8], block[blockHeaderLen:]))
	_, err := b.w.Write(b.buf)
	b.buf = b.buf[:0]
	b.begin()
	return err
}

func checksum(header, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(header, castagnoli), castagnoli, payload)
}

// Load takes in a snapshot that [Cache.Save] has written, and returns how many entries it took. Their ages go on from when
// they were stored. Left out is what is too old or from the future, what there is a good entry for already, what there is
// no room for (nothing is evicted; the most popular come first), and what is not an answer that may be kept.
//
// Load reads r twice from where it stands: only when the whole snapshot is sound it takes anything. So a damaged one, which
// is an error, changes nothing, unless it was sound at first and is damaged by the second reading: even then nothing of a
// damaged block is taken. When ctx ends, Load returns after the block that it is in, with the error of ctx: then the cache
// may have a part of the snapshot.
func (c *Cache) Load(ctx context.Context, r io.ReadSeeker, now int64) (entries int, err error) {
	start, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	if err := readSnapshot(ctx, r, func(savedEntry) {}); err != nil {
		return 0, err
	}
	if _, err := r.Seek(start, io.SeekStart); err != nil {
		return 0, err
	}
	var a wire.Answer
	err = readSnapshot(ctx, r, func(e savedEntry) {
		if c.restore(e, &a, now) {
			entries++
		}
	})
	return entries, err
}

// restore takes in a saved entry, by way of a, and reports whether it did.
func (c *Cache) restore(s savedEntry, a *wire.Answer, now int64) bool {
	if s.stored > now+clockSlack || s.stored < now-maxAge {
		return false
	}
	if _, err := a.Read(s.answer); err != nil {
		return false
	}
	life, low, high := c.lifetime(a)
	if life == 0 {
		return false
	}
	a.Secure = s.flags&flagSecure != 0
	hash := c.Hash(s.key)
	e := newEntry(s.key, hash, a, s.stored, life)
	if _, state := e.age(now, c.staleFor); state == dead {
		return false
	}
	e.answer.ClampTTL(low, high)
	e.setFrequency(uint32(s.flags & frequencyMask))
	return c.shard(hash).restore(e, s.flags&flagMain != 0)
}

// maxAge is older than an entry can be, in nanoseconds: the longest life and the longest Config.StaleFor.
const maxAge = 2 * (1 << 31) * int64(time.Second)

// savedEntry is an entry of a snapshot. Its slices are valid until the next block is read.
type savedEntry struct {
	stored int64
	flags  byte
	key    []byte
	answer []byte
}

// The ways in which a snapshot can be damaged.
var (
	errMagic    = errors.New("it is not a cache snapshot")
	errChecksum = errors.New("the checksum does not match")
	errBlock    = errors.New("the block does not hold what it says")
	errCount    = errors.New("entries are missing")
	errBehind   = errors.New("something follows the end")
)

// readSnapshot reads a snapshot from end to end and hands its entries to take, block by block, after the block's checksum
// and structure were found sound, until ctx ends. It needs the memory for one block.
func readSnapshot(ctx context.Context, r io.Reader, take func(savedEntry)) error {
	in := bufio.NewReaderSize(r, 4<<10) // for the headers; payloads are read past it
	offset := int64(0)
	var buf []byte
	read := func(n int) ([]byte, error) {
		buf = slices.Grow(buf[:0], n)[:n]
		m, err := io.ReadFull(in, buf)
		offset += int64(m)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return buf, err
	}
	header, err := read(headerLen)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	if err != nil || string(header[:len(snapshotMagic)]) != snapshotMagic {
		return errMagic
	}
	if v := binary.LittleEndian.Uint32(header[len(snapshotMagic):]); v != snapshotVersion {
		return fmt.Errorf("its version is %d, want %d", v, snapshotVersion)
	}
	var total uint64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		at := offset
		damaged := func(err error) error { return fmt.Errorf("the block at octet %d: %w", at, err) }
		b, err := read(blockHeaderLen)
		if err != nil {
			return damaged(err)
		}
		head := [blockHeaderLen]byte(b)
		count, length := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])
		if length > uint32(maxPayload) {
			return damaged(errBlock)
		}
		payload, err := read(int(length))
		if err != nil {
			return damaged(err)
		}
		if checksum(head[:8], payload) != binary.LittleEndian.Uint32(head[8:]) {
			return damaged(errChecksum)
		}
		if count == 0 {
			if len(payload) != 8 {
				return damaged(errBlock)
			}
			if binary.LittleEndian.Uint64(payload) != total {
				return damaged(errCount)
			}
			break
		}
		if !readBlock(payload, count, func(savedEntry) {}) {
			return damaged(errBlock)
		}
		readBlock(payload, count, take)
		total += uint64(count)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		if err == nil {
			err = errBehind
		}
		return fmt.Errorf("octet %d: %w", offset, err)
	}
	return nil
}

// readBlock hands the entries in a block's payload to take, and reports whether they were count and nothing else.
func readBlock(payload []byte, count uint32, take func(savedEntry)) bool {
	for ; len(payload) >= entryHeaderLen && count > 0; count-- {
		e := savedEntry{stored: int64(binary.LittleEndian.Uint64(payload)), flags: payload[8]}
		key := int(binary.LittleEndian.Uint16(payload[9:]))
		answer := int(binary.LittleEndian.Uint16(payload[11:]))
		payload = payload[entryHeaderLen:]
		if key+answer > len(payload) || e.flags&^flagsKnown != 0 {
			return false
		}
		e.key, e.answer, payload = payload[:key], payload[key:key+answer], payload[key+answer:]
		take(e)
	}
	return len(payload) == 0 && count == 0
}
