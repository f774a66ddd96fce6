package ndjson

import (
	"cmp"
	"encoding/json"
	"errors"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/imdsgate/imdsgate/event/scan"
	"github.com/imdsgate/imdsgate/policy/eql"
)

// What a line says
//
// A field is found by its dotted name, however its parts are distributed over
// objects and keys with dots: {"process":{"parent.name":"sh"}} has process.parent.name. An
// array of objects has the values of all of them. A name that is there
// several times, also in both ways, has all the values: nothing hides behind
// anything else. null and [] are no value.
//
// Values become what the type of their field is, as Elasticsearch would take them into
// its index: a number is good for a string, and a string that is a number
// for a number; a number for an integer loses its fraction. What cannot be taken is no
// value, and is counted.
//
// Bytes that are no UTF-8 are U+FFFD.

// Roles are the fields that mean something to a search beside what the query says of
// them.
type Roles struct {
	Category   string // what "process where ..." tests
	Timestamp  string // when it happened
	Form       Form   // of the timestamp
	Tiebreaker string // orders events of the same time; "" for none
	ID         string // what an event is called; "" for nothing
}

// An Event is one line.
type Event struct {
	line   string
	values []eql.Value // by slot
	id     string      // as JSON has it
	tie    tiebreaker
	at     int64 // nanoseconds of Unix
	timed  bool
	order  uint64 // of arrival
}

var _ eql.Event = (*Event)(nil)

// Value is the value of one of the fields that the query reads.
func (e *Event) Value(slot int) eql.Value { return e.values[slot] }

// Time is when it happened.
func (e *Event) Time() time.Time { return time.Unix(0, e.at) }

// JSON is the line without blanks around it. It is UTF-8.
func (e *Event) JSON() string { return strings.ToValidUTF8(e.line, "\uFFFD") }

// ID is what the field for it has, as JSON; null without one.
func (e *Event) ID() string { return strings.ToValidUTF8(cmp.Or(e.id, "null"), "\uFFFD") }

// size is about what an event takes in memory.
func (e *Event) size() int {
	return len(e.line) + len(e.values)*int(unsafe.Sizeof(eql.Value{})) + int(unsafe.Sizeof(*e))
}

// place is where names lead to from an object: what a field there means, and where the
// names of further fields lead. Keys may have dots, so that an object has a way to
// each of the fields below it.
type place struct {
	below map[string]*place
	marks uint64 // those of the names in below
	field *Field // that the query reads
	time  bool
	tie   bool
	id    bool
}

func (p *place) to(name string) *place {
	for at := p; ; {
		part, rest, more := strings.Cut(name, ".")
		next := at.below[part]
		if next == nil {
			next = &place{}
			if at.below == nil {
				at.below = map[string]*place{}
			}
			at.below[part] = next
		}
		if !more {
			return next
		}
		at, name = next, rest
	}
}

// dotted adds the ways of several parts.
func (p *place) dotted() {
	all := map[string]*place{}
	for part, next := range p.below {
		next.dotted()
		all[part] = next
		for rest, far := range next.below {
			all[part+"."+rest] = far
		}
	}
	p.below = all
	for name := range all {
		p.marks |= mark([]byte(name))
	}
}

// under is where a key leads to, or nil. Most lead nowhere, which is mostly seen from
// their marks.
func (p *place) under(key []byte) *place {
	if p.marks&mark(key) == 0 {
		return nil
	}
	return p.below[view(key)]
}

// mark is one of 64 bits.
func mark(key []byte) uint64 {
	n := len(key)
	if n == 0 {
		return 1
	}
	return 1 << ((uint(key[0])*5 + uint(key[n-1])*3 + uint(n)) % 64)
}

// decoder reads lines. Its event is good until the next line.
type decoder struct {
	json    scan.JSON
	root    *place
	form    Form
	odd     string // what stands where the time should be
	event   Event
	slots   []slot
	misfits []uint64 // values that could not be taken, for each slot
}

// slot has the values of one field, in memory that is used again.
type slot struct {
	texts []string    // of a keyword
	list  []eql.Value // of others
}

func newDecoder(fs *Fields, roles Roles) *decoder {
	n := len(fs.bySlot)
	d := &decoder{root: &place{}, form: roles.Form, slots: make([]slot, n), misfits: make([]uint64, n)}
	d.event.values = make([]eql.Value, n)
	for _, f := range fs.bySlot {
		d.root.to(f.Name).field = f
	}
	d.root.to(roles.Timestamp).time = true
	if roles.Tiebreaker != "" {
		d.root.to(roles.Tiebreaker).tie = true
	}
	if roles.ID != "" {
		d.root.to(roles.ID).id = true
	}
	d.root.dotted()
	return d
}

// decode reads a line, into which the event then points. The error says what is
// wrong with the line.
func (d *decoder) decode(line []byte) error {
	for i := range d.slots {
		if s := &d.slots[i]; len(s.texts)+len(s.list) > 0 {
			s.texts, s.list, d.event.values[i] = s.texts[:0], s.list[:0], eql.Value{}
		}
	}
	d.event, d.odd = Event{line: view(line), values: d.event.values}, ""
	d.json = walk(line)
	if d.json.Next() != '{' {
		return fault(line, errors.New("no JSON object"))
	}
	d.object(d.root)
	if d.json.Next(); d.json.Err != nil || d.json.At < len(line) {
		return fault(line, errors.New("more than one JSON object"))
	}
	return nil
}

// keep is the event with memory of its own.
func (d *decoder) keep() *Event {
	e := d.event
	e.line = strings.Clone(e.line)
	own := func(s string) string { return moved(s, d.event.line, e.line) }
	e.id, e.tie.text = own(e.id), own(e.tie.text)
	e.values = slices.Clone(e.values)
	for i := range d.slots {
		switch s := &d.slots[i]; {
		case len(s.texts) == 1:
			e.values[i] = eql.String(own(s.texts[0]))
		case len(s.texts) > 1:
			texts := make([]string, len(s.texts))
			for i, text := range s.texts {
				texts[i] = own(text)
			}
			e.values[i] = eql.Strings(texts)
		case len(s.list) > 1:
			e.values[i] = eql.List(slices.Clone(s.list)...)
		}
	}
	return &e
}

// moved is the place in a copy of a line that s has in the line. What is not in the line,
// because it had to be unquoted, has memory of its own.
func moved(s, line, copied string) string {
	at := uintptr(unsafe.Pointer(unsafe.StringData(s))) - uintptr(unsafe.Pointer(unsafe.StringData(line)))
	if at >= uintptr(len(line)) {
		return s
	}
	return copied[at : at+uintptr(len(s))]
}

// newClock is a decoder that has eyes for the time only.
func newClock(roles Roles) *decoder {
	return newDecoder(&Fields{}, Roles{Timestamp: roles.Timestamp, Form: roles.Form})
}

// when is the time of an event, as far as the line says one before it goes wrong. What
// stands behind the time is not read.
func (d *decoder) when(line []byte) (at int64, ok bool) {
	d.event = Event{values: d.event.values}
	d.json = walk(line)
	d.seek(d.root)
	return d.event.at, d.event.timed
}

// seek reads until there is a time.
func (d *decoder) seek(p *place) {
	if d.json.Next() != '{' || p.below == nil {
		d.value(p)
		return
	}
	for more := d.json.Begin('{', '}'); more; more = d.json.More('}') {
		if next := p.under(d.json.Key()); next != nil {
			d.seek(next)
		} else {
			d.json.Skip()
		}
		if d.event.timed {
			return
		}
	}
}

// fault says what is wrong with a line in the words of encoding/json, which people
// know, or in those of err where it sees nothing wrong.
func fault(line []byte, err error) error {
	var v any
	if std := json.Unmarshal(line, &v); std != nil {
		return std
	}
	return err
}

func (d *decoder) object(p *place) {
	for more := d.json.Begin('{', '}'); more; more = d.json.More('}') {
		if next := p.under(d.json.Key()); next != nil {
			d.value(next)
		} else {
			d.json.Skip()
		}
	}
}

func (d *decoder) value(p *place) {
	switch d.json.Next() {
	case '{':
		if p.field != nil {
			d.misfits[p.field.Slot]++
		}
		if p.below != nil {
			d.object(p)
		} else {
			d.json.Skip()
		}
	case '[':
		for more := d.json.Begin('[', ']'); more; more = d.json.More(']') {
			d.value(p)
		}
	case 'n':
		d.json.Skip()
	default:
		from := d.json.At
		if d.json.Skip(); d.json.Err == nil {
			d.take(p, d.json.Line[from:d.json.At])
		}
	}
}

// take gives a single value, as it stands in the line, to all that want it.
func (d *decoder) take(p *place, raw []byte) {
	e, text := &d.event, view(raw)
	if raw[0] == '"' {
		text = unquote(raw)
	}
	if f := p.field; f != nil && !d.field(f, raw[0], text) {
		d.misfits[f.Slot]++
	}
	if p.time && !e.timed {
		if e.at, e.timed = d.form.unixTime(text); !e.timed {
			d.odd = text
		}
	}
	if p.tie && e.tie == (tiebreaker{}) {
		e.tie = newTiebreaker(raw[0], text)
	}
	if p.id && e.id == "" {
		e.id = view(raw)
	}
}

// field adds a value that begins with a byte as JSON to a field. It returns false if it
// is none of the type.
func (d *decoder) field(f *Field, first byte, text string) bool {
	s, v := &d.slots[f.Slot], &d.event.values[f.Slot]
	if f.Type == eql.Keyword {
		s.texts = append(s.texts, text)
		if *v = eql.String(text); len(s.texts) > 1 {
			*v = eql.Strings(s.texts)
		}
		return true
	}
	one, ok := f.convert(first, text)
	if ok {
		s.list = append(s.list, one)
		if *v = one; len(s.list) > 1 {
			*v = eql.List(s.list...)
		}
	}
	return ok
}

// convert makes a value of the field, whose type is not Keyword, of one that begins with
// a byte as JSON.
func (f *Field) convert(first byte, text string) (v eql.Value, ok bool) {
	switch f.Type {
	case eql.Boolean:
		return eql.Bool(text == "true"), text == "true" || text == "false"
	case eql.IP:
		addr, err := netip.ParseAddr(text)
		return eql.Addr(addr), err == nil
	case eql.Date:
		at, ok := f.form.unixTime(text)
		return eql.Time(time.Unix(0, at)), ok
	}
	if first == '"' {
		text = strings.TrimSpace(text)
	}
	if !numeric(text) {
		return v, false
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return eql.Int(n), true
	}
	x, err := strconv.ParseFloat(text, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		return v, false
	case f.Type == eql.Double:
		return eql.Float(x), true
	}
	return eql.Int(int64(x)), math.Abs(x) < math.MaxInt64
}

// numeric reports whether text may be a decimal number, and is not one of the
// other things that strconv takes for one.
func numeric(text string) bool {
	for i := range len(text) {
		switch c := text[i]; {
		case '0' <= c && c <= '9', c == '.', c == '-', c == '+', c == 'e', c == 'E':
		default:
			return false
		}
	}
	return text != ""
}

// view is a string of bytes that must not change as long as it is used. The values of
// a line are looked at millions of times and kept seldom.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// tiebreaker orders events of the same time: numbers, then strings, then those
// without one.
type tiebreaker struct {
	kind    tieKind
	number  float64
	integer int64 // all its digits, if it is one
	text    string
}

type tieKind uint8

const (
	tieNone tieKind = iota
	tieNumber
	tieText
)

func newTiebreaker(first byte, text string) tiebreaker {
	if first == '"' || !numeric(text) {
		return tiebreaker{kind: tieText, text: text}
	}
	x, _ := strconv.ParseFloat(text, 64)
	n, _ := strconv.ParseInt(text, 10, 64)
	return tiebreaker{kind: tieNumber, number: x, integer: n}
}

func (a tiebreaker) compare(b tiebreaker) int {
	if (a.kind == tieNone) != (b.kind == tieNone) {
		return cmp.Compare(b.kind, a.kind)
	}
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.number, b.number), cmp.Compare(a.integer, b.integer), strings.Compare(a.text, b.text))
}
