package syntax

import (
	"fmt"
	"iter"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// An Error is one fault in a query, told so that its author can mend it. As text
// it is the place and the complaint, and below them the line with a caret.
//
// A query that is a part of a larger file has lines of its own: whoever took it
// out may add to Line before the error is shown.
type Error struct {
	File string
	Pos
	Msg  string
	Hint string // what was probably meant, or what to do; may be empty
	Text string // the line
	Err  error  // errors.ErrUnsupported where the query is right but asks for what is not done here; else nil
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File + ":")
	}
	fmt.Fprintf(&b, "%s: %s", e.Pos, e.Msg)
	if e.Hint != "" {
		b.WriteString("; " + e.Hint)
	}
	line, caret := Excerpt(e.Text, e.Col)
	fmt.Fprintf(&b, "\n\t%s\n\t%s^", line, caret)
	return b.String()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// Excerpt is a line, or what fits on a screen around a column of it, and the blanks
// that bring a caret under that. Rules come from strangers and errors go to
// terminals: what does not print is replaced.
func Excerpt(of string, column int) (line, blanks string) {
	const width, before = 100, 70
	text := []rune(of)
	at := min(max(column-1, 0), len(text))
	from := max(0, min(at-before, len(text)-width))
	to := min(from+width, len(text))
	more := to < len(text)
	text, at = text[from:to], at-from
	for i, r := range text {
		if !unicode.IsPrint(r) && r != '\t' {
			text[i] = utf8.RuneError
		}
	}
	pad := make([]rune, at)
	for i := range pad {
		pad[i] = ' '
		if text[i] == '\t' {
			pad[i] = '\t'
		}
	}
	line, blanks = string(text), string(pad)
	if from > 0 {
		line, blanks = "…"+line, " "+blanks
	}
	if more {
		line += "…"
	}
	return line, blanks
}

// An ErrorList is the faults of one query, in their order. It is never empty.
type ErrorList []*Error

func (l ErrorList) Error() string {
	lines := make([]string, len(l))
	for i, e := range l {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.Is and errors.As see each fault.
func (l ErrorList) Unwrap() []error {
	errs := make([]error, len(l))
	for i, e := range l {
		errs[i] = e
	}
	return errs
}

// Sort puts the faults into the order of the text.
func (l ErrorList) Sort() {
	slices.SortStableFunc(l, func(a, b *Error) int {
		switch {
		case a.Pos.before(b.Pos):
			return -1
		case b.Pos.before(a.Pos):
			return 1
		}
		return 0
	})
}

// Errorf describes a fault at a place in q.
func (q *Query) Errorf(at Pos, format string, args ...any) *Error {
	return &Error{File: q.File, Pos: at, Msg: fmt.Sprintf(format, args...), Text: lineOf(q.Source, at.Line)}
}

func lineOf(src string, n int) string {
	for ; n > 1; n-- {
		_, src, _ = strings.Cut(src, "\n")
	}
	line, _, _ := strings.Cut(src, "\n")
	return strings.TrimSuffix(line, "\r")
}

// Nearest returns the candidate that somebody who wrote word most likely meant,
// or "" if none is near.
func Nearest(word string, candidates iter.Seq[string]) string {
	if len(word) > 100 { // no slip of the fingers
		return ""
	}
	best, least := "", max(2, len(word)/4+1)
	for c := range candidates {
		d := distance(strings.ToLower(word), strings.ToLower(c), least)
		if d < least || d == least && best != "" && c < best {
			best, least = c, d
		}
	}
	return best
}

// distance is the number of characters to insert, delete, replace or swap with
// their neighbours to turn a into b, or anything above limit if it takes more.
func distance(a, b string, limit int) int {
	if max(len(a)-len(b), len(b)-len(a)) > limit {
		return limit + 1
	}
	before, prev, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, prev, row = prev, row, before
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(prev[j]+1, row[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
