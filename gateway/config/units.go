package config

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// The words of messages about values with a unit.
const (
	wantDuration = "a duration such as 3s (units: ms, s, m, h, d)"
	wantSize     = "a size such as 64MB (units: B, KB, MB, GB), or off"
	wantRate     = "a rate such as 200/s (units: /s, /m, /h)"
	wantNumber   = "a whole number"
	wantPercent  = "a percentage such as 10%"
)

// splitNumber cuts s behind its leading decimal number, whose digits may have a point between them.
func splitNumber(s string) (num, rest string) {
	n := 0
	for n < len(s) && (s[n] >= '0' && s[n] <= '9' || s[n] == '.' && n > 0) {
		n++
	}
	return s[:n], s[n:]
}

// isNumber reports whether s is a decimal number and nothing else.
func isNumber(s string) bool {
	_, err := strconv.ParseFloat(s, 64)
	num, rest := splitNumber(s)
	return num != "" && rest == "" && err == nil
}

var durationUnits = map[string]time.Duration{
	"ms": time.Millisecond, "s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour,
}

// longer spellings that people try
var unitWords = map[string]string{
	"msec": "ms", "millis": "ms", "milliseconds": "ms", "sec": "s", "secs": "s", "second": "s", "seconds": "s", "min": "m",
	"mins": "m", "minute": "m", "minutes": "m", "hour": "h", "hours": "h", "hr": "h", "day": "d", "days": "d",
}

// parseDuration reads "3s", "1.8s", "1h30m", or 0.
func parseDuration(s string) (time.Duration, error) {
	if s == "0" {
		return 0, nil
	}
	if isNumber(s) {
		return 0, fmt.Errorf("needs a unit; did you mean %ss?", s)
	}
	if num, ok := strings.CutPrefix(s, "-"); ok && num != "" && num[0] >= '0' && num[0] <= '9' {
		return 0, fmt.Errorf("%s is negative", quote(s))
	}
	var sum float64
	for rest := s; ; {
		var num string
		num, rest = splitNumber(rest)
		f, err := strconv.ParseFloat(num, 64)
		if err != nil {
			return 0, fmt.Errorf("want %s, got %s", wantDuration, quote(s))
		}
		end := strings.IndexAny(rest, "0123456789")
		if end < 0 {
			end = len(rest)
		}
		unit := rest[:end]
		rest = rest[end:]
		u, ok := durationUnits[unit]
		if !ok {
			short := strings.ToLower(strings.TrimSpace(unit))
			if w := unitWords[short]; w != "" {
				short = w
			}
			if _, ok := durationUnits[short]; ok && rest == "" && strings.HasPrefix(s, num) {
				return 0, fmt.Errorf("%s has no unit that is known; did you mean %s%s?", quote(s), num, short)
			}
			return 0, fmt.Errorf("want %s, got %s", wantDuration, quote(s))
		}
		sum += f * float64(u)
		if rest == "" {
			break
		}
	}
	if sum > float64(maxDuration) {
		return 0, fmt.Errorf("%s is longer than %s", quote(s), formatDuration(maxDuration))
	}
	return time.Duration(math.Round(sum)), nil
}

// maxDuration is the largest TTL in days, RFC 2181, section 8: 2^31-1 seconds. Nothing here lasts longer.
const maxDuration = 24855 * 24 * time.Hour

// formatDuration is the inverse of parseDuration for the durations that stand in messages.
func formatDuration(d time.Duration) string {
	for _, u := range []string{"d", "h", "m", "s", "ms"} {
		if d%durationUnits[u] == 0 && d != 0 {
			return fmt.Sprintf("%d%s", d/durationUnits[u], u)
		}
	}
	return d.String()
}

// duration reads a duration from least to most, both included.
func (v value) duration(least, most time.Duration) (time.Duration, bool) {
	s, ok := v.text(wantDuration)
	if !ok {
		return 0, false
	}
	d, err := parseDuration(s)
	if err != nil {
		v.errorf("%v", err)
		return 0, false
	}
	if d < least || d > most {
		v.errorf("%s is out of range; want %s to %s", quote(s), formatDuration(least), formatDuration(most))
		return 0, false
	}
	return d, true
}

// A KB is 1024 bytes, and so is a KiB: these are sizes of memory.
var sizeUnits = map[string]int64{
	"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
}

// parseSize reads "64MB", or 0.
func parseSize(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	if isNumber(s) {
		return 0, fmt.Errorf("needs a unit; did you mean %sMB?", s)
	}
	if num, ok := strings.CutPrefix(s, "-"); ok && num != "" && num[0] >= '0' && num[0] <= '9' {
		return 0, fmt.Errorf("%s is negative", quote(s))
	}
	num, unit := splitNumber(s)
	f, err := strconv.ParseFloat(num, 64)
	if err != nil {
		return 0, fmt.Errorf("want %s, got %s", wantSize, quote(s))
	}
	u, ok := sizeUnits[unit]
	if !ok {
		guess := strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(unit)), "B") + "B"
		if _, ok := sizeUnits[guess]; ok {
			return 0, fmt.Errorf("%s has no unit that is known; did you mean %s%s?", quote(s), num, guess)
		}
		return 0, fmt.Errorf("want %s, got %s", wantSize, quote(s))
	}
	if f *= float64(u); f > 1<<50 {
		return 0, fmt.Errorf("%s is more memory than there is", quote(s))
	}
	return int64(f), nil
}

var rateUnits = map[string]float64{"/s": 1, "/m": 60, "/h": 3600}

// maxRate is the highest rate in events per second. It is no limit in practice, and exact in nanoseconds.
const maxRate = 1e9

// rate reads "200/s", or "off" and 0 for no limit, as events per second.
func (v value) rate() (float64, bool) {
	s, ok := v.text(wantRate + " or off")
	if !ok || s == "off" || s == "0" {
		return 0, ok
	}
	num, unit := splitNumber(s)
	n, err := strconv.ParseUint(num, 10, 32)
	per := rateUnits[unit]
	switch {
	case isNumber(s):
		v.errorf("needs a unit; did you mean %s/s?", s)
	case strings.HasPrefix(s, "-"):
		v.errorf("%s is negative; want %s or off", quote(s), wantRate)
	case err != nil || per == 0:
		v.errorf("want %s or off, got %s", wantRate, quote(s))
	case n == 0:
		v.errorf("%s would let nobody ask; off means no limit", quote(s))
	case float64(n)/per > maxRate:
		v.errorf("%s is out of range; the most is 1000000000/s", quote(s))
	default:
		return float64(n) / per, true
	}
	return 0, false
}

// number reads a whole number from least to most, both included.
func (v value) number(least, most int) (int, bool) {
	s, ok := v.text(wantNumber)
	if !ok {
		return 0, false
	}
	digits := strings.TrimPrefix(s, "-")
	if digits == "" || strings.Trim(digits, "0123456789") != "" {
		v.errorf("want %s, got %s", wantNumber, quote(s))
		return 0, false
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most {
		v.errorf("%s is out of range; want %d to %d", s, least, most)
		return 0, false
	}
	return n, true
}

// percent reads a percentage from least to most, both included, as a part of 1.
func (v value) percent(least, most float64) (float64, bool) {
	s, ok := v.text(wantPercent)
	if !ok {
		return 0, false
	}
	num, unit := splitNumber(s)
	f, err := strconv.ParseFloat(num, 64)
	switch {
	case isNumber(s) && f > 0 && f < 1:
		v.errorf("needs a unit; did you mean %s%%?", strconv.FormatFloat(math.Round(f*1e6)/1e4, 'f', -1, 64))
	case isNumber(s):
		v.errorf("needs a unit; did you mean %s%%?", s)
	case err != nil || unit != "%":
		v.errorf("want %s, got %s", wantPercent, quote(s))
	case f < least || f > most:
		v.errorf("%s is out of range; want %v%% to %v%%", quote(s), least, most)
	default:
		return f / 100, true
	}
	return 0, false
}

// boolean reads true or false.
func (v value) boolean() (yes, ok bool) {
	s, ok := v.text("true or false")
	if ok && s != "true" && s != "false" {
		hint := didYouMean(s, []string{"true", "false"})
		switch strings.ToLower(s) {
		case "yes", "on", "true", "1":
			hint = `; did you mean true?`
		case "no", "off", "false", "0":
			hint = `; did you mean false?`
		}
		v.errorf("want true or false, got %s%s", quote(s), hint)
		return false, false
	}
	return s == "true", ok
}

// parsePrefix reads an address or a network whose host bits are zero.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" || addr.Is4In6() {
			return netip.Prefix{}, fmt.Errorf("%s cannot be the address of a client; did you mean %q?",
				quote(s), addr.WithZone("").Unmap())
		}
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%s is neither an address, nor a network such as 192.168.0.0/16, nor any, private or loopback",
			quote(s))
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%s is an IPv4 network in IPv6 form; write it as IPv4", quote(s))
	case p != p.Masked():
		return p, fmt.Errorf("%s has bits set behind its /%d; did you mean %q?", quote(s), p.Bits(), p.Masked())
	}
	return p, nil
}
