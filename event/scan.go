package event

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"unicode/utf8"
)

// scanner reads JSON (RFC 8259) from the front. It says where a value ends without
// making anything of it, which the libraries do not: most of a document is as it was in
// a document before, and is recognised by its bytes. The first fault ends it; everything
// after that is empty.
//
// What it returns is a part of the text, unless that has escapes.
type scanner struct {
	text  []byte
	at    int
	depth int
	err   error
}

// maxDepth bounds objects in objects. Documents have five.
const maxDepth = 64

func (s *scanner) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("byte %d: %s", s.at+1, fmt.Sprintf(format, args...))
		s.at = len(s.text)
	}
}

// next is the first byte of the next token, or 0 at the end.
func (s *scanner) next() byte {
	for s.at < len(s.text) {
		switch c := s.text[s.at]; c {
		case ' ', '\t', '\r', '\n':
			s.at++
		default:
			return c
		}
	}
	return 0
}

// begin enters an object or array, and reports whether there is anything in it.
func (s *scanner) begin(open, end byte) bool {
	if c := s.next(); c != open {
		s.unexpected(string(open))
		return false
	}
	s.at++
	if s.depth++; s.depth > maxDepth {
		s.fail("more than %d objects in each other", maxDepth)
		return false
	}
	if s.next() == end {
		s.at++
		s.depth--
		return false
	}
	return s.err == nil
}

// more reports whether another member or element follows, or leaves the object or
// array.
func (s *scanner) more(end byte) bool {
	switch s.next() {
	case ',':
		s.at++
		return true
	case end:
		s.at++
		s.depth--
		return false
	}
	s.unexpected("a comma or " + string(end))
	return false
}

func (s *scanner) unexpected(wanted string) {
	if s.at >= len(s.text) {
		s.fail("the line ends where %s should be", wanted)
		return
	}
	s.fail("%q where %s should be", s.text[s.at], wanted)
}

// key reads the name of a member.
func (s *scanner) key() []byte {
	key := s.string()
	if s.next() != ':' {
		s.unexpected("a colon")
		return nil
	}
	s.at++
	return key
}

// specials has the highest bit of a byte set, of eight, that does not stand for itself in a
// string: the first is right, and those above it may be wrong.
func specials(eight uint64) uint64 {
	const ones = 0x0101010101010101
	quote, backslash := eight^ones*'"', eight^ones*'\\'
	return ((quote-ones)&^quote | (backslash-ones)&^backslash | (eight-ones*' ')&^eight) & (ones << 7)
}

// string reads one.
func (s *scanner) string() []byte {
	quoted, escaped := s.quoted()
	switch {
	case escaped:
		return s.unquote(quoted)
	case quoted == nil:
		return nil
	}
	return quoted[1 : len(quoted)-1]
}

func (s *scanner) unquote(quoted []byte) []byte {
	var text string
	if err := json.Unmarshal(quoted, &text); err != nil {
		s.fail("%v", err)
		return nil
	}
	return []byte(text)
}

// quoted passes over a string, and returns it as it stands, and whether it has escapes.
// Which these are only unquote looks at.
func (s *scanner) quoted() (quoted []byte, escaped bool) {
	if s.next() != '"' {
		s.unexpected("a string")
		return nil, false
	}
	text, i := s.text, s.at+1
	for i < len(text) {
		if i+8 <= len(text) {
			special := specials(binary.LittleEndian.Uint64(text[i:]))
			if special == 0 {
				i += 8
				continue
			}
			i += bits.TrailingZeros64(special) / 8
		}
		switch c := text[i]; {
		case c == '"':
			quoted = text[s.at : i+1]
			s.at = i + 1
			return quoted, escaped
		case c == '\\':
			escaped = true
			i += 2
		case c < ' ':
			s.at = i
			s.unexpected("a character of a string")
			return nil, false
		default: // one of the last bytes
			i++
		}
	}
	s.at = len(text)
	s.fail("the line ends in a string")
	return nil, false
}

// null skips a null, and reports whether there was one.
func (s *scanner) null() bool {
	if s.next() != 'n' {
		return false
	}
	s.word("null")
	return true
}

func (s *scanner) word(w string) {
	if !bytes.HasPrefix(s.text[s.at:], []byte(w)) {
		s.unexpected("a value")
		return
	}
	s.at += len(w)
}

func (s *scanner) bool() bool {
	switch s.next() {
	case 't':
		s.word("true")
		return s.err == nil
	case 'f':
		s.word("false")
	default:
		s.unexpected("true or false")
	}
	return false
}

// int reads an integer that fits.
func (s *scanner) int() int64 {
	if c := s.next(); c != '-' && (c < '0' || c > '9') {
		s.unexpected("a number")
		return 0
	}
	start := s.at
	negative := s.text[s.at] == '-'
	if negative {
		s.at++
	}
	n, first := int64(0), s.at
	for ; s.at < len(s.text) && '0' <= s.text[s.at] && s.text[s.at] <= '9'; s.at++ {
		digit := int64(s.text[s.at] - '0')
		if n > (math.MaxInt64-digit)/10 {
			s.fail("a number that is too large")
			return 0
		}
		n = n*10 + digit
	}
	switch {
	case s.at == first, s.at > first+1 && s.text[first] == '0':
		s.at = start
		s.unexpected("an integer")
		return 0
	case s.at < len(s.text) && (s.text[s.at] == '.' || s.text[s.at]|0x20 == 'e'):
		s.unexpected("the end of an integer")
		return 0
	}
	if negative {
		return -n
	}
	return n
}

// raw skips a value and returns it as it stands.
func (s *scanner) raw() []byte {
	s.next()
	start := s.at
	s.skip()
	if s.err != nil {
		return nil
	}
	return s.text[start:s.at]
}

func (s *scanner) skip() {
	switch c := s.next(); c {
	case '{':
		for more := s.begin('{', '}'); more; more = s.more('}') {
			s.key()
			s.skip()
		}
	case '[':
		for more := s.begin('[', ']'); more; more = s.more(']') {
			s.skip()
		}
	case '"':
		if quoted, escaped := s.quoted(); escaped && !json.Valid(quoted) {
			s.fail("a string with an escape that there is not")
		}
	case 't', 'f':
		s.bool()
	case 'n':
		s.null()
	default:
		s.number()
	}
}

// number skips one.
func (s *scanner) number() {
	start := s.at
	for s.at < len(s.text) {
		switch c := s.text[s.at]; {
		case '0' <= c && c <= '9', c == '-', c == '+', c == '.', c == 'e', c == 'E':
			s.at++
			continue
		}
		break
	}
	if s.at == start || !json.Valid(s.text[start:s.at]) {
		s.at = start
		s.unexpected("a value")
	}
}

// end checks that nothing follows.
func (s *scanner) end() {
	if s.next(); s.err == nil && s.at < len(s.text) {
		s.unexpected("the end of the line")
	}
}

// whole reports whether a text in a document is what it was when it was observed:
// nothing in it was redacted, cut, or no UTF-8.
func whole(text []byte) bool {
	if len(text) > maxText-utf8.UTFMax {
		return false
	}
	return !bytes.Contains(text, []byte(redacted)) && !bytes.Contains(text, []byte("\uFFFD"))
}
