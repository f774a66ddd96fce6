package event

// A document is about one subject. That a decision can be judged again, its document has
// what is known of the others, too: imdsgate.others is an array of objects, each of which
// has for one of them what the document has for the first, under the same names. It is no
// field that rules could ask for: they are asked about each subject as the first.

// maxOthers bounds them. Fewer, and what several hold can less often be judged again;
// more, and whoever lets many processes hold a connection makes long lines.
const maxOthers = 15

// ofToken is what a document says of a token and the process that uses it.
var ofToken = objects("imdsgate.token")

// appendOthers appends the subjects that come after the first.
func (v *View) appendOthers(b []byte) (_ []byte, lost loss) {
	b = append(b, `"others":[`...)
	others := v.Subjects[1:]
	if len(others) > maxOthers {
		others, lost = others[:maxOthers], altered|cut
	}
	for i, p := range others {
		if i > 0 {
			b = append(b, ',')
		}
		var more loss
		b, more = v.appendOther(b, p)
		lost |= more
	}
	return append(b, ']'), lost
}

func (v *View) appendOther(b []byte, p *Process) (_ []byte, lost loss) {
	one := View{Event: v.Event, Document: v.Document, Subject: p, likeness: v.likeness}
	b = append(b, '{')
	ours := false // the object "imdsgate" is open
	for i, w := range *one.ofProcess() {
		if len(w.json) == 0 {
			continue
		}
		if is := len(ofProcess[i].path) == 2; is != ours {
			if ours = is; ours {
				b = append(comma(b), `"imdsgate":{`...)
			} else {
				var more loss
				b, more = one.appendToken(b)
				b, lost = append(b, '}'), lost|more
			}
		}
		b = append(comma(b), w.json...)
		lost |= w.lost
	}
	if ours {
		var more loss
		b, more = one.appendToken(b)
		b, lost = append(b, '}'), lost|more
	}
	return append(b, '}'), lost
}

// appendToken appends what the document says of the token, if it says anything.
func (v *View) appendToken(b []byte) (_ []byte, lost loss) {
	start := len(b)
	b = append(comma(b), `"token":{`...)
	head := len(b)
	b, lost = v.appendRows(b, ofToken[0].rows, len(ofToken[0].path))
	if len(b) == head {
		return b[:start], 0
	}
	return append(b, '}'), lost
}

// comma appends one after a member.
func comma(b []byte) []byte {
	if b[len(b)-1] == '{' {
		return b
	}
	return append(b, ',')
}
