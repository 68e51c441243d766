package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// census is what a process holds. -1 is unknown.
type census struct {
	Goroutines  int `json:"goroutines"`
	Descriptors int `json:"descriptors"`
}

// count takes the census of process pid, whose metrics are at admin, if it has any.
func count(ctx context.Context, pid int, admin netip.AddrPort, hasAdmin bool) (census, error) {
	c := census{-1, -1}
	if hasAdmin {
		n, err := goroutines(ctx, "http://"+admin.String()+"/metrics")
		if err != nil {
			return c, err
		}
		c.Goroutines = n
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat("/proc/self/fd"); err != nil {
			return c, nil // no such thing on this system
		}
	}
	if err != nil {
		return c, err
	}
	c.Descriptors = len(entries)
	return c, nil
}

// goroutines reads go_goroutines at url, on a connection that does not stay.
func goroutines(ctx context.Context, url string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			return strconv.Atoi(text)
		}
	}
	return 0, errors.Join(errors.New("no go_goroutines in the metrics"), lines.Err(), drain(resp.Body))
}

func drain(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// steady takes the census until three in a row agree, or for some seconds, and returns the last: a program that has just
// started, or whose clients have just gone, is not at rest yet.
func steady(ctx context.Context, take func() (census, error)) (census, error) {
	last, same := census{}, 0
	for range 50 {
		if !sleep(ctx, 100*time.Millisecond) {
			return last, ctx.Err()
		}
		now, err := take()
		if err != nil {
			return now, err
		}
		if now != last {
			same = 0
		}
		last = now
		if same++; same == 3 {
			break
		}
	}
	return last, nil
}

// connections returns how many connections to addr process pid's namespace has open or is opening.
func connections(pid int, addr netip.AddrPort) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		return 0
	}
	// The address is a number in the byte order of the machine, the port is not; see proc_net_tcp in the kernel's manual.
	ip := addr.Addr().As4()
	want := fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), addr.Port())
	n := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[2] != want {
			continue
		}
		state, _ := hex.DecodeString(fields[3])
		if len(state) == 1 && (state[0] == 1 || state[0] == 2) { // ESTABLISHED, SYN_SENT
			n++
		}
	}
	return n
}
