package ndjson

import (
	"fmt"
	"net/netip"

	"github.com/imdsgate/imdsgate/event/scan"
)

const (
	// sampleEvents is how many events are looked at for what the schema does not
	// know. With fewer, a field that only some kinds of events have is taken for
	// missing; with more, a slow stream is kept waiting when a field is.
	sampleEvents = 1000
	// sampleBytes bounds what a stream has to keep meanwhile, sampleNames and
	// sampleName what strangers can make us remember.
	sampleBytes = 16 << 20
	sampleNames = 10_000
	sampleName  = 1000
)

// kind is what kind of value a field has in a line.
type kind uint8

const (
	none kind = iota
	isText
	isDate    // text
	isAddress // text
	isNumber
	isBool
)

// sample is what is known of the data from the first events: all names with the
// kind of the first value. It is looked at only until every field that is wanted
// has been seen.
type sample struct {
	kinds  map[string]kind
	wanted map[string]bool // and not seen yet
	events int
	bytes  int
	all    bool // there were no more events
}

func newSample(wanted ...string) *sample {
	s := &sample{kinds: map[string]kind{}, wanted: map[string]bool{}}
	for _, name := range wanted {
		if name != "" {
			s.wanted[name] = true
		}
	}
	return s
}

// enough reports whether more events would tell nothing more.
func (s *sample) enough() bool {
	return s.events >= sampleEvents || s.bytes >= sampleBytes || s.events > 0 && len(s.wanted) == 0
}

// nobody begins a sentence about what was not seen.
func (s *sample) nobody() string {
	if s.all {
		return "no event has"
	}
	return fmt.Sprintf("none of the first %d events has", s.events)
}

// look looks at one line, which may be a bad one.
func (s *sample) look(line []byte) {
	s.bytes += len(line)
	c := walk(line)
	if c.Next() != '{' {
		return
	}
	c.Skip()
	if c.End(); c.Err != nil {
		return
	}
	s.events++
	c = walk(line)
	s.value(&c, "")
}

// value looks at a value, which is valid.
func (s *sample) value(c *scan.JSON, name string) {
	switch c.Next() {
	case '{':
		for more := c.Begin('{', '}'); more; more = c.More('}') {
			key := string(c.Key())
			if name != "" {
				key = name + "." + key
			}
			if len(key) > sampleName {
				c.Skip()
			} else {
				s.value(c, key)
			}
		}
	case '[':
		for more := c.Begin('[', ']'); more; more = c.More(']') {
			s.value(c, name)
		}
	case '"':
		from := c.At
		c.Skip()
		s.saw(name, kindOf(unquote(c.Line[from:c.At])))
	case 't', 'f':
		c.Skip()
		s.saw(name, isBool)
	case 'n':
		c.Skip()
	default:
		c.Skip()
		s.saw(name, isNumber)
	}
}

func kindOf(text string) kind {
	if _, err := netip.ParseAddr(text); err == nil {
		return isAddress
	}
	if _, ok := parseDate(text); ok {
		return isDate
	}
	return isText
}

func (s *sample) saw(name string, k kind) {
	if s.kinds[name] == none && (len(s.kinds) < sampleNames || s.wanted[name]) {
		s.kinds[name] = k
	}
	delete(s.wanted, name)
}
