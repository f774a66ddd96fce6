// Package scan walks over JSON (RFC 8259) from the front, one line at a time. It says where
// a value ends without making anything of it, which the libraries do not: most of a line
// of events is of no interest to who reads it, or is as it was in a line before.
//
// It takes what encoding/json takes, and nothing else. It is no decoder: for what is read
// once, that library is the right one.
package scan

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
)

// JSON is a line that is walked over. The first fault ends the walk: everything after that
// is empty. What it returns is a part of the line, unless that has escapes.
//
//	for more := j.Begin('{', '}'); more; more = j.More('}') {
//		key := j.Key()
//		j.Skip()
//	}
type JSON struct {
	Line     []byte
	At       int // where the walk is
	MaxDepth int // bounds objects in objects
	Err      error
	depth    int
}

// Fail ends the walk.
func (j *JSON) Fail(format string, args ...any) {
	if j.Err == nil {
		j.Err = fmt.Errorf("byte %d: %s", j.At+1, fmt.Sprintf(format, args...))
		j.At = len(j.Line)
	}
}

// Unexpected ends the walk because of what comes next.
func (j *JSON) Unexpected(wanted string) {
	if j.At >= len(j.Line) {
		j.Fail("the line ends where %s should be", wanted)
		return
	}
	j.Fail("%q where %s should be", j.Line[j.At], wanted)
}

// Next is what comes behind blanks: the byte with which a value or the like begins. It is
// 0 at the end, and where there is a byte of that value, which begins nothing.
func (j *JSON) Next() byte {
	if j.At < len(j.Line) && j.Line[j.At] > ' ' {
		return j.Line[j.At]
	}
	return j.behindBlanks()
}

func (j *JSON) behindBlanks() byte {
	for ; j.At < len(j.Line); j.At++ {
		if c := j.Line[j.At]; c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			return c
		}
	}
	return 0
}

// Begin enters an object or array, and More goes on behind a member. They report whether
// there is one, and leave if there is none.
func (j *JSON) Begin(open, end byte) bool {
	if j.Next() != open {
		j.Unexpected(string(rune(open)))
		return false
	}
	return j.enter(end)
}

// enter is Begin at what is known to open.
func (j *JSON) enter(end byte) bool {
	j.At++
	if j.depth++; j.depth > j.MaxDepth {
		j.Fail("more than %d objects in each other", j.MaxDepth)
		return false
	}
	if j.Next() == end {
		j.At++
		j.depth--
		return false
	}
	return j.Err == nil
}

func (j *JSON) More(end byte) bool {
	switch j.Next() {
	case ',':
		j.At++
		return true
	case end:
		j.At++
		j.depth--
		return false
	}
	j.Unexpected("a comma or " + string(rune(end)))
	return false
}

// Key reads the name of a member, with its colon.
func (j *JSON) Key() []byte {
	quoted, escaped := j.Quoted()
	j.colon()
	return j.content(quoted, escaped)
}

func (j *JSON) colon() {
	if j.Next() != ':' {
		j.Unexpected("a colon")
		return
	}
	j.At++
}

// Text reads a string.
func (j *JSON) Text() []byte { return j.content(j.Quoted()) }

func (j *JSON) content(quoted []byte, escaped bool) []byte {
	switch {
	case escaped:
		return j.Unquote(quoted)
	case len(quoted) >= 2:
		return quoted[1 : len(quoted)-1]
	}
	return nil // after a failure
}

// Unquote is what a string says that Quoted has returned.
func (j *JSON) Unquote(quoted []byte) []byte {
	var text string
	if err := json.Unmarshal(quoted, &text); err != nil {
		j.Fail("%v", err)
		return nil
	}
	return []byte(text)
}

// Quoted passes over a string, and returns it as it stands, and whether it has escapes.
func (j *JSON) Quoted() (quoted []byte, escaped bool) {
	if j.Next() != '"' {
		j.Unexpected("a string")
		return nil, false
	}
	start := j.At
	if j.At, escaped = j.pass(start); j.Err != nil {
		return nil, false
	}
	return j.Line[start:j.At], escaped
}

// pass finds the end of the string that begins at some place, and whether it has escapes.
func (j *JSON) pass(start int) (end int, escaped bool) {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	line, at := j.Line, start+1
	for at < len(line) {
		if at+8 <= len(line) {
			// Eight bytes at once. The lowest bit that is set in one of these three is that
			// of the first quote, backslash or control character: what is borrowed goes
			// upwards.
			w := binary.LittleEndian.Uint64(line[at:])
			quote, backslash := w^'"'*ones, w^'\\'*ones
			found := ((quote-ones)&^quote | (backslash-ones)&^backslash | (w-' '*ones)&^w) & highs
			if found == 0 {
				at += 8
				continue
			}
			at += bits.TrailingZeros64(found) / 8
		}
		switch c := line[at]; {
		case c == '"':
			return at + 1, escaped
		case c == '\\':
			n := escape(line[at:])
			if n == 0 {
				j.At = at
				j.Fail("a string with an escape that there is not")
				return j.At, false
			}
			at += n
			escaped = true
		case c < ' ':
			j.At = at
			j.Unexpected("a character of a string")
			return j.At, false
		default: // one of the last bytes
			at++
		}
	}
	j.At = len(line)
	j.Fail("the line ends in a string")
	return j.At, false
}

// escape is the length of the escape sequence at the beginning of s, or 0.
func escape(s []byte) int {
	if len(s) < 2 {
		return 0
	}
	switch s[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		if len(s) < 6 {
			return 0
		}
		for _, c := range s[2:6] {
			if !('0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f') {
				return 0
			}
		}
		return 6
	}
	return 0
}

// Null skips a null, and reports whether there was one.
func (j *JSON) Null() bool {
	if j.Next() != 'n' {
		return false
	}
	j.literal("null")
	return true
}

// Bool reads true or false.
func (j *JSON) Bool() bool {
	switch j.Next() {
	case 't':
		j.literal("true")
		return j.Err == nil
	case 'f':
		j.literal("false")
	default:
		j.Unexpected("true or false")
	}
	return false
}

func (j *JSON) literal(word string) {
	if !bytes.HasPrefix(j.Line[j.At:], []byte(word)) {
		j.Unexpected("a value")
		return
	}
	j.At += len(word)
}

// Int reads an integer that fits.
func (j *JSON) Int() int64 {
	if c := j.Next(); c != '-' && (c < '0' || c > '9') {
		j.Unexpected("a number")
		return 0
	}
	start := j.At
	negative := j.Line[j.At] == '-'
	if negative {
		j.At++
	}
	n, first := int64(0), j.At
	for ; j.At < len(j.Line) && '0' <= j.Line[j.At] && j.Line[j.At] <= '9'; j.At++ {
		digit := int64(j.Line[j.At] - '0')
		if n > (math.MaxInt64-digit)/10 {
			j.Fail("a number that is too large")
			return 0
		}
		n = n*10 + digit
	}
	switch {
	case j.At == first, j.At > first+1 && j.Line[first] == '0':
		j.At = start
		j.Unexpected("an integer")
		return 0
	case j.At < len(j.Line) && (j.Line[j.At] == '.' || j.Line[j.At]|0x20 == 'e'):
		j.Unexpected("the end of an integer")
		return 0
	}
	if negative {
		return -n
	}
	return n
}

// Raw skips a value and returns it as it stands.
func (j *JSON) Raw() []byte {
	j.Next()
	start := j.At
	j.Skip()
	if j.Err != nil {
		return nil
	}
	return j.Line[start:j.At]
}

// Skip passes over the value that comes next.
func (j *JSON) Skip() {
	switch j.Next() {
	case '"':
		j.At, _ = j.pass(j.At)
	case '{':
		for more := j.enter('}'); more; more = j.More('}') {
			if j.Next() != '"' {
				j.Unexpected("a string")
				return
			}
			at, _ := j.pass(j.At)
			if at+1 < len(j.Line) && j.Line[at] == ':' && j.Line[at+1] == '"' { // as most are
				j.At, _ = j.pass(at + 1)
				continue
			}
			j.At = at
			j.colon()
			j.Skip()
		}
	case '[':
		for more := j.enter(']'); more; more = j.More(']') {
			j.Skip()
		}
	case 't':
		j.literal("true")
	case 'f':
		j.literal("false")
	case 'n':
		j.literal("null")
	default:
		j.number()
	}
}

// number skips one.
func (j *JSON) number() {
	start := j.At
	if j.has('-') {
		j.At++
	}
	ok := true
	if j.has('0') {
		j.At++
	} else {
		ok = j.digits()
	}
	if ok && j.has('.') {
		j.At++
		ok = j.digits()
	}
	if ok && (j.has('e') || j.has('E')) {
		j.At++
		if j.has('+') || j.has('-') {
			j.At++
		}
		ok = j.digits()
	}
	if !ok {
		j.At = start
		j.Unexpected("a value")
	}
}

func (j *JSON) has(c byte) bool { return j.At < len(j.Line) && j.Line[j.At] == c }

// digits passes over digits, and reports whether there is any.
func (j *JSON) digits() bool {
	from := j.At
	for j.At < len(j.Line) && j.Line[j.At]-'0' <= 9 {
		j.At++
	}
	return j.At > from
}

// End checks that nothing follows.
func (j *JSON) End() {
	if j.Next(); j.Err == nil && j.At < len(j.Line) {
		j.Unexpected("the end of the line")
	}
}
