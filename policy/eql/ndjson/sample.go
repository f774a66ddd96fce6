package ndjson

import (
	"fmt"
	"net/netip"

	"github.com/go-faster/jx"
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
	d := jx.DecodeBytes(line)
	if d.Next() != jx.Object || d.Validate() != nil {
		return
	}
	s.events++
	d.ResetBytes(line)
	s.value(d, "") // which is valid
}

func (s *sample) value(d *jx.Decoder, name string) error {
	switch d.Next() {
	case jx.Object:
		return d.Obj(func(d *jx.Decoder, key string) error {
			if name != "" {
				key = name + "." + key
			}
			if len(key) > sampleName {
				return d.Skip()
			}
			return s.value(d, key)
		})
	case jx.Array:
		return d.Arr(func(d *jx.Decoder) error { return s.value(d, name) })
	case jx.String:
		text, err := d.Str()
		s.saw(name, kindOf(text))
		return err
	case jx.Number:
		s.saw(name, isNumber)
	case jx.Bool:
		s.saw(name, isBool)
	}
	return d.Skip()
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
