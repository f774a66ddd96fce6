package ndjson

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"unicode/utf8"
)

// cursor walks over the JSON of one line: it takes what encoding/json takes, and nothing
// else. Most of a line is of no interest to a query, so most of the time of a search goes
// into passing over it, which a parser for values of all kinds does at half the speed.
//
// At what is no JSON the walk is over: failed is set, and from there on nothing comes.
type cursor struct {
	data   []byte
	at     int
	depth  int
	failed bool
}

// maxDepth is that of encoding/json.
const maxDepth = 10_000

func (c *cursor) reset(line []byte) { *c = cursor{data: line} }

func (c *cursor) fail() { c.at, c.failed = len(c.data), true }

// next is what comes behind blanks: the byte with which a value or the like begins, or
// 0 at the end.
func (c *cursor) next() byte {
	if c.at < len(c.data) && c.data[c.at] > ' ' {
		return c.data[c.at]
	}
	return c.nextBehindBlanks()
}

func (c *cursor) nextBehindBlanks() byte {
	for ; c.at < len(c.data); c.at++ {
		switch b := c.data[c.at]; {
		case b > ' ':
			return b
		case b != ' ' && b != '\t' && b != '\n' && b != '\r':
			c.fail()
		}
	}
	return 0
}

// open enters the object or array that comes next and ends in a byte, and more goes on
// behind a member. They report whether there is one, and leave if there is none:
//
//	for more := c.open('}'); more; more = c.more('}') {
//		key := c.key()
//		c.skip()
//	}
func (c *cursor) open(end byte) bool {
	c.at++
	if c.depth++; c.depth > maxDepth {
		c.fail()
		return false
	}
	if c.next() == end {
		c.at++
		c.depth--
		return false
	}
	return true
}

func (c *cursor) more(end byte) bool {
	switch c.next() {
	case ',':
		c.at++
		return true
	case end:
		c.at++
		c.depth--
	default:
		c.fail()
	}
	return false
}

// key reads a key with its colon.
func (c *cursor) key() []byte {
	switch key, escaped := c.name(); {
	case escaped:
		return []byte(unquote(key))
	case len(key) >= 2:
		return key[1 : len(key)-1]
	}
	return nil // after a failure
}

// name is key as it is written, for those who do not want to know what it says.
func (c *cursor) name() (quoted []byte, escaped bool) {
	if c.next() != '"' {
		c.fail()
		return nil, false
	}
	quoted, escaped = c.text()
	if c.next() != ':' {
		c.fail()
		return nil, false
	}
	c.at++
	return quoted, escaped
}

// skip passes over the value that comes next.
func (c *cursor) skip() {
	switch b := c.next(); b {
	case '"':
		c.text()
	case '{':
		for more := c.open('}'); more; more = c.more('}') {
			c.name()
			c.skip()
		}
	case '[':
		for more := c.open(']'); more; more = c.more(']') {
			c.skip()
		}
	case 't':
		c.literal("true")
	case 'f':
		c.literal("false")
	case 'n':
		c.literal("null")
	default:
		c.number()
	}
}

func (c *cursor) literal(word string) {
	if !bytes.HasPrefix(c.data[c.at:], []byte(word)) {
		c.fail()
		return
	}
	c.at += len(word)
}

func (c *cursor) number() {
	if c.has('-') {
		c.at++
	}
	switch {
	case c.has('0'):
		c.at++
	case !c.digits():
		c.fail()
		return
	}
	if c.has('.') {
		c.at++
		if !c.digits() {
			c.fail()
			return
		}
	}
	if c.has('e') || c.has('E') {
		c.at++
		if c.has('+') || c.has('-') {
			c.at++
		}
		if !c.digits() {
			c.fail()
		}
	}
}

func (c *cursor) has(b byte) bool { return c.at < len(c.data) && c.data[c.at] == b }

// digits passes over digits, and reports whether there is any.
func (c *cursor) digits() bool {
	from := c.at
	for c.at < len(c.data) && c.data[c.at]-'0' <= 9 {
		c.at++
	}
	return c.at > from
}

// text passes over the string that comes next. It returns the string with its quotes, and
// whether it has escapes.
func (c *cursor) text() (quoted []byte, escaped bool) {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	data, at := c.data, c.at+1
	for at < len(data) {
		if at+8 <= len(data) {
			// Eight bytes at once. The lowest bit that is set in one of these three is that
			// of the first quote, backslash or control character: what is borrowed goes
			// upwards.
			w := binary.LittleEndian.Uint64(data[at:])
			quote, backslash := w^'"'*ones, w^'\\'*ones
			found := ((quote-ones)&^quote | (backslash-ones)&^backslash | (w-' '*ones)&^w) & highs
			if found == 0 {
				at += 8
				continue
			}
			at += bits.TrailingZeros64(found) / 8
		}
		switch b := data[at]; {
		case b == '"':
			quoted = data[c.at : at+1]
			c.at = at + 1
			return quoted, escaped
		case b == '\\':
			n := escape(data[at:])
			if n == 0 {
				c.fail()
				return nil, false
			}
			at += n
			escaped = true
		case b < ' ':
			c.fail()
			return nil, false
		default: // one of the last bytes
			at++
		}
	}
	c.fail()
	return nil, false
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
		for _, b := range s[2:6] {
			if !('0' <= b && b <= '9' || 'a' <= b|0x20 && b|0x20 <= 'f') {
				return 0
			}
		}
		return 6
	}
	return 0
}

// unquote reads a JSON string, which is valid.
func unquote(raw []byte) string {
	if bytes.IndexByte(raw, '\\') >= 0 {
		var text string
		json.Unmarshal(raw, &text)
		return text
	}
	text := view(raw[1 : len(raw)-1])
	if !utf8.ValidString(text) {
		return string([]rune(text))
	}
	return text
}
