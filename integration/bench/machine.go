//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of times in /proc, USER_HZ; see proc(5). It is 100 on every architecture that Go runs on.
const tick = 10 * time.Millisecond

// cpuTime returns the CPU that a line of /proc/PID/stat counts: the process's own, and that of children that it has waited
// for.
func cpuTime(stat []byte) time.Duration {
	// The command's name, in parentheses, may hold anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 15 {
		return 0
	}
	var sum int
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		n, _ := strconv.Atoi(string(f))
		sum += n
	}
	return time.Duration(sum) * tick
}

func cpuOf(pids ...int) (sum time.Duration) {
	for _, pid := range pids {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
			sum += cpuTime(stat)
		}
	}
	return sum
}

// cpuOfAll is the CPU that all processes of the machine have used. Unlike that of /proc/stat it is not sampled.
func cpuOfAll() (sum time.Duration) {
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		if stat, err := os.ReadFile(path); err == nil { // else it has ended
			sum += cpuTime(stat)
		}
	}
	return sum
}

// stolen is the time in which the host ran something else on this machine's cores.
func stolen() time.Duration {
	text, _ := os.ReadFile("/proc/stat")
	fields := strings.Fields(string(text))
	if len(fields) < 9 {
		return 0
	}
	n, _ := strconv.Atoi(fields[8])
	return time.Duration(n) * tick
}

// family returns pid and all its descendants.
func family(pid int) []int {
	pids := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for _, f := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(f); err == nil {
				pids = append(pids, family(child)...)
			}
		}
	}
	return pids
}

// status returns the sum of a field of /proc/PID/status, such as VmRSS, in bytes.
func status(pids []int, field string) (sum int64) {
	for _, pid := range pids {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			if f := strings.Fields(value); name == field && len(f) == 2 && f[1] == "kB" {
				n, _ := strconv.ParseInt(f[0], 10, 64)
				sum += n << 10
			}
		}
	}
	return sum
}

// established returns how many connections that addr serves are open in this network namespace.
func established(addr netip.AddrPort) int {
	text, _ := os.ReadFile("/proc/net/tcp")
	// The address is a number in the byte order of the machine, the port is not; see proc_net_tcp in the kernel's manual.
	ip := addr.Addr().As4()
	want := fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), addr.Port())
	n := 0
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != want {
			continue
		}
		if state, _ := hex.DecodeString(f[3]); len(state) == 1 && state[0] == 1 { // ESTABLISHED
			n++
		}
	}
	return n
}

// counters are what the upstream has counted.
type counters struct{ responses, handshakes uint64 }

func readCounters(path string) (c counters, err error) {
	b, err := os.ReadFile(path)
	if err != nil || len(b) < 16 {
		return c, fmt.Errorf("reading the upstream's counters: %d octets: %w", len(b), err)
	}
	return counters{binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint64(b[8:])}, nil
}

// description says in a line what machine this is.
func description() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%s, Linux %s", model, strings.TrimSpace(string(kernel)))
}
