package wire

import (
	"errors"
	"fmt"
)

// maxLabel is from RFC 1035, section 2.3.4.
const maxLabel = 63

// ParseName reads a domain name as people write it (RFC 1035, section 5.1: \. and \DDD stand for octets) and returns it in
// wire form and lower case, as [Query.Key] has it. A dot at its end changes nothing; "." is the root. Names are octets here: one that is
// not ASCII is wanted in A-labels (RFC 5890, section 2.3.2.1). An error says what is wrong without repeating s.
func ParseName(s string) ([]byte, error) {
	switch s {
	case "":
		return nil, errors.New("the name is empty; the root is written as one dot")
	case ".":
		return []byte{0}, nil
	}
	name := make([]byte, 1, min(len(s)+2, MaxName))
	label := 0 // the offset of the label's length
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '.':
			if len(name) == label+1 {
				return nil, errors.New("a label is empty: two dots follow each other, or one stands in front")
			}
			label = len(name)
			name = append(name, 0)
			continue
		case c == '\\':
			octet, n := escaped(s[i+1:])
			if n == 0 {
				return nil, errors.New(`behind a backslash stands a character, or three digits up to 255`)
			}
			c, i = octet, i+n
		case c >= 0x80:
			return nil, errors.New("not ASCII; such names are asked for as A-labels, which begin with xn--")
		case c <= ' ' || c == 0x7f:
			return nil, fmt.Errorf("the character %q stands in a name only as \\%03d", c, c)
		}
		if name[label]++; name[label] > maxLabel {
			return nil, fmt.Errorf("a label is longer than %d octets", maxLabel)
		}
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		name = append(name, c)
	}
	if len(name) > label+1 {
		name = append(name, 0)
	}
	if len(name) > MaxName {
		return nil, fmt.Errorf("longer than %d octets", MaxName)
	}
	return name, nil
}

// escaped reads what follows a backslash and returns the octet that is meant and how many characters mean it, 0 for none.
func escaped(s string) (octet byte, n int) {
	digit := func(i int) bool { return i < len(s) && s[i] >= '0' && s[i] <= '9' }
	switch {
	case s == "" || s[0] < ' ' || s[0] >= 0x7f:
		return 0, 0
	case !digit(0):
		return s[0], 1
	case !digit(1) || !digit(2):
		return 0, 0
	}
	d := int(s[0]-'0')*100 + int(s[1]-'0')*10 + int(s[2]-'0')
	if d > 255 {
		return 0, 0
	}
	return byte(d), 3
}
