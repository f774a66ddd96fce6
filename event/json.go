package event

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// maxText bounds one field of a document, in bytes. Lower cuts the class
	// paths of long java command lines, on which people search; higher lets a
	// process blow up the log by its own arguments.
	maxText = 4096
	// maxTexts bounds the values of one field.
	maxTexts = 64
)

// AppendJSON appends the document as one line of JSON, without the newline.
// Text that a process or a client chose is redacted and cut. It never fails:
// whatever is in the event, the line parses.
func (v *View) AppendJSON(b []byte) []byte {
	b, _ = v.appendRows(append(b, '{'), rows[v.Document], 0)
	return append(b, '}')
}

// loss is what a line lacks of the text that rules were asked about.
type loss uint8

const (
	// altered text has a secret taken out, or is cut, or had bytes that are no UTF-8.
	altered loss = 1 << iota
	cut          // text was too long
)

// appendRows appends rows that are in one object, of so many that are open.
func (v *View) appendRows(b []byte, rows []row, depth int) (_ []byte, lost loss) {
	start := len(b)
	open, shared := depth, depth // objects that are, and those among them that the row is in, too
	for i := range rows {
		r := &rows[i]
		shared = min(shared, max(r.shared, depth))
		var value Value
		var one string
		var whole written
		switch {
		case r.others:
			if len(v.Subjects) < 2 {
				continue
			}
		case r.field == nil:
			if all := r.of(v); all != nil {
				whole = (*all)[r.ordinal]
			}
			if len(whole.json) == 0 {
				continue
			}
		case r.field.asked && v.Kind == Started, r.field.single && v.likeness:
			continue
		case r.field.tells != 0:
			if value = flag(true); lost&r.field.tells == 0 {
				continue
			}
		case r.fixed != "", r.field.write != nil:
		case r.field.text != nil:
			if one = r.field.text(v); one == "" {
				continue
			}
		default:
			if value = r.field.get(v); !value.Set {
				continue
			}
		}
		for ; open > shared; open-- {
			b = append(b, '}')
		}
		if len(b) > start && b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		for ; open < len(r.path); open++ {
			b = append(b, r.heads[open]...)
		}
		shared = open
		more := whole.lost
		switch {
		case r.others:
			b, more = v.appendOthers(b)
		case r.field == nil:
			b = append(b, whole.json...)
		case r.fixed != "":
			b = append(b, r.fixed...)
		case r.field.write != nil:
			b = append(b, r.field.key...)
			b, more = r.field.write(v, b)
		case r.field.text != nil:
			b = append(b, r.field.key...)
			b, more = r.field.appendText(b, one, maxText)
		default:
			b = append(b, r.field.key...)
			b, more = r.field.append(b, &value)
		}
		lost |= more
	}
	for ; open > depth; open-- {
		b = append(b, '}')
	}
	return b, lost
}

// append renders one value.
func (f *Field) append(b []byte, v *Value) (_ []byte, lost loss) {
	switch f.Type {
	case Long:
		if v.Ints == nil {
			return strconv.AppendInt(b, v.Int, 10), 0
		}
		b = append(b, '[')
		for i, n := range v.Ints[:min(len(v.Ints), maxTexts)] {
			if i > 0 {
				b = append(b, ',')
			}
			b = strconv.AppendInt(b, n, 10)
		}
		if len(v.Ints) > maxTexts {
			lost = altered | cut
		}
		return append(b, ']'), lost
	case Boolean:
		return strconv.AppendBool(b, v.Bool), 0
	case Date:
		return appendTime(b, v.Time.UTC(), f.exact), 0
	case IP:
		if v.Texts == nil {
			return appendAddr(b, v.Addr), 0
		}
	}
	texts := v.Texts
	switch {
	case v.hidden:
		return appendString(b, redacted), altered
	case v.command == nil:
	case v.Texts != nil:
		if texts = v.command.redactedArgs(); !same(texts, v.Texts) {
			lost = altered
		}
	case suspicious(v.Text):
		if texts := v.command.redactedArgs(); !same(texts, v.command.Args) {
			lost = altered
		}
		b, more := appendCut(b, strings.Join(v.command.redactedArgs(), " "), maxText)
		return b, lost | more
	}
	if texts == nil {
		return f.appendText(b, v.Text, maxText)
	}
	if f.first {
		return f.appendText(b, texts[0], maxText)
	}
	all := texts[:min(len(texts), maxTexts)]
	if len(all) < len(texts) {
		lost |= altered | cut
	}
	b = append(b, '[')
	left := maxText
	for i, s := range all {
		if left <= 0 {
			lost |= altered | cut
			break
		}
		if i > 0 {
			b = append(b, ',')
		}
		var more loss
		b, more = f.appendText(b, s, left)
		lost |= more
		left -= len(s)
	}
	return append(b, ']'), lost
}

// same reports whether redacting has left arguments alone, which are the same ones then.
func same(clean, args []string) bool {
	return len(clean) == len(args) && (len(args) == 0 || &clean[0] == &args[0])
}

func (f *Field) appendText(b []byte, s string, limit int) (_ []byte, lost loss) {
	if f.free {
		if clean := Redact(s); clean != s {
			s, lost = clean, altered
		}
	}
	b, more := appendCut(b, s, limit)
	return b, lost | more
}

// appendAddr renders an address. A zone is the name of an interface, and those may have
// any characters.
func appendAddr(b []byte, a netip.Addr) []byte {
	if !a.IsValid() || a.Zone() != "" {
		return appendString(b, a.String())
	}
	return append(a.AppendTo(append(b, '"')), '"')
}

// appendTime renders a time of UTC as RFC 3339 has it, to the millisecond or, exactly, to
// the nanosecond. There are four in each document, and time.AppendFormat reads its layout
// again for each.
func appendTime(b []byte, t time.Time, exact bool) []byte {
	year, month, day := t.Date()
	hour, minute, second := t.Clock()
	b = appendDigits(append(b, '"'), min(max(year, 0), 9999), 4) // the service says when credentials end
	b = appendDigits(append(b, '-'), int(month), 2)
	b = appendDigits(append(b, '-'), day, 2)
	b = appendDigits(append(b, 'T'), hour, 2)
	b = appendDigits(append(b, ':'), minute, 2)
	b = appendDigits(append(b, ':'), second, 2)
	if b = append(b, '.'); exact {
		b = appendDigits(b, t.Nanosecond(), 9)
	} else {
		b = appendDigits(b, t.Nanosecond()/1e6, 3)
	}
	return append(b, 'Z', '"')
}

// appendDigits renders the last so many digits of a number.
func appendDigits(b []byte, n, digits int) []byte {
	const zeros = "000000000"
	b = append(b, zeros[:digits]...)
	for i := range digits {
		b[len(b)-1-i] += byte(n % 10)
		n /= 10
	}
	return b
}

func appendCut[text string | []byte](b []byte, s text, limit int) (_ []byte, lost loss) {
	if len(s) > limit {
		end := limit
		for end > max(0, limit-utf8.UTFMax) && !utf8.RuneStart(s[end]) {
			end--
		}
		s, lost = s[:end], altered|cut
	}
	size := len(b)
	b = appendString(b, s)
	// What is no UTF-8 is found among what was escaped, of which there is little.
	if len(b)-size > len(s)+len(`""`) && !utf8.ValidString(string(s)) {
		lost |= altered
	}
	return b, lost
}

// appendString appends s as a JSON string (RFC 8259 section 7). Bytes that are
// no UTF-8 become U+FFFD, and line separators that JavaScript knows are
// escaped, so that a line stays a line for every reader.
func appendString[text string | []byte](b []byte, s text) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\' && c != 0x7f {
			i++
			continue
		}
		size := 1
		var r rune
		if c >= utf8.RuneSelf {
			r, size = utf8.DecodeRuneInString(string(s[i:min(len(s), i+utf8.UTFMax)]))
			if (r != utf8.RuneError || size > 1) && r != '\u2028' && r != '\u2029' && r != '\u0085' {
				i += size
				continue
			}
		}
		b = append(b, s[start:i]...)
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c == '\n':
			b = append(b, '\\', 'n')
		case c == '\t':
			b = append(b, '\\', 't')
		case c == '\r':
			b = append(b, '\\', 'r')
		case c < utf8.RuneSelf:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		default:
			b = append(b, '\\', 'u', hex[r>>12&0xf], hex[r>>8&0xf], hex[r>>4&0xf], hex[r&0xf])
		}
		i += size
		start = i
	}
	return append(append(b, s[start:]...), '"')
}
