package event

import (
	"net/netip"
	"strconv"
	"strings"
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
	b = append(b, '{')
	b, cut := v.appendRows(b, rows[v.Document], 0)
	if cut {
		b = append(b, `,"labels":{"imdsgate_truncated":"true"}`...)
	}
	return append(b, '}')
}

// appendRows appends rows that are in one object, of so many that are open. cut says
// that a value was cut.
func (v *View) appendRows(b []byte, rows []row, depth int) (_ []byte, cut bool) {
	start := len(b)
	open, shared := depth, depth // objects that are, and those among them that the row is in, too
	for i := range rows {
		r := &rows[i]
		shared = min(shared, max(r.shared, depth))
		var value Value
		var whole written
		switch {
		case r.field == nil:
			if all := r.of(v); all != nil {
				whole = (*all)[r.ordinal]
			}
			if len(whole.json) == 0 {
				continue
			}
		case r.field.asked && v.Kind == Started:
			continue
		case r.fixed == "":
			if r.field.write != nil {
				break
			}
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
		short := whole.cut
		switch {
		case r.field == nil:
			b = append(b, whole.json...)
		case r.fixed != "":
			b = append(b, r.fixed...)
		case r.field.write != nil:
			b = append(b, r.field.key...)
			b, short = r.field.write(v, b)
		default:
			b = append(b, r.field.key...)
			b, short = r.field.append(b, &value)
		}
		cut = cut || short
	}
	for ; open > depth; open-- {
		b = append(b, '}')
	}
	return b, cut
}

// append renders one value. short says that something was cut.
func (f *Field) append(b []byte, v *Value) (_ []byte, short bool) {
	switch f.Type {
	case Long:
		if v.Ints == nil {
			return strconv.AppendInt(b, v.Int, 10), false
		}
		b = append(b, '[')
		for i, n := range v.Ints[:min(len(v.Ints), maxTexts)] {
			if i > 0 {
				b = append(b, ',')
			}
			b = strconv.AppendInt(b, n, 10)
		}
		return append(b, ']'), len(v.Ints) > maxTexts
	case Boolean:
		return strconv.AppendBool(b, v.Bool), false
	case Date:
		b = append(b, '"')
		form := "2006-01-02T15:04:05.000Z"
		if f.exact {
			form = "2006-01-02T15:04:05.000000000Z"
		}
		b = v.Time.UTC().AppendFormat(b, form)
		return append(b, '"'), false
	case IP:
		if v.Texts == nil {
			return appendAddr(b, v.Addr), false
		}
	}
	texts := v.Texts
	switch {
	case v.hidden:
		return appendString(b, redacted), false
	case v.command == nil:
	case v.Texts != nil:
		texts = v.command.redactedArgs()
	case suspicious(v.Text):
		return appendCut(b, strings.Join(v.command.redactedArgs(), " "), maxText)
	}
	if texts == nil {
		return f.appendText(b, v.Text, maxText)
	}
	if f.first {
		return f.appendText(b, texts[0], maxText)
	}
	all := texts[:min(len(texts), maxTexts)]
	short = len(all) < len(texts)
	b = append(b, '[')
	left := maxText
	for i, s := range all {
		if left <= 0 {
			short = true
			break
		}
		if i > 0 {
			b = append(b, ',')
		}
		var one bool
		b, one = f.appendText(b, s, left)
		short = short || one
		left -= len(s)
	}
	return append(b, ']'), short
}

func (f *Field) appendText(b []byte, s string, limit int) (_ []byte, short bool) {
	if f.free {
		s = Redact(s)
	}
	return appendCut(b, s, limit)
}

// appendAddr renders an address. A zone is the name of an interface, and those may have
// any characters.
func appendAddr(b []byte, a netip.Addr) []byte {
	if !a.IsValid() || a.Zone() != "" {
		return appendString(b, a.String())
	}
	return append(a.AppendTo(append(b, '"')), '"')
}

func appendCut[text string | []byte](b []byte, s text, limit int) (_ []byte, short bool) {
	if len(s) > limit {
		end := limit
		for end > max(0, limit-utf8.UTFMax) && !utf8.RuneStart(s[end]) {
			end--
		}
		s, short = s[:end], true
	}
	return appendString(b, s), short
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
