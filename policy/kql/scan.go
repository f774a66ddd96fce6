package kql

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// kind is what a token is.
type kind uint8

const (
	eof    kind = iota
	failed      // the parser has given up
	word        // a run of characters without blanks
	quoted
	lparen
	rparen
	lbrace
	rbrace
	colon
	lt
	le
	gt
	ge
	kwAnd
	kwOr
	kwNot
)

func (k kind) String() string {
	return [...]string{"the end of the query", "", "a word", "a string", "(", ")", "{", "}", ":", "<", "<=", ">", ">=", "and", "or", "not"}[k]
}

// A token is a part of the source.
type token struct {
	kind  kind
	pos   syntax.Pos
	parts []string // of a word or a string, cut at its wildcards
	from  int      // offset in the source
	to    int
}

// scanner cuts a query into tokens. The characters that are special, and what a
// backslash may stand before, are those of Kibana's grammar.
type scanner struct {
	src  string
	at   int
	pos  syntax.Pos
	fail func(at syntax.Pos, hint, format string, args ...any)
}

const special = `\():<>"*{}`

func (s *scanner) peek() rune {
	r, _ := utf8.DecodeRuneInString(s.src[s.at:])
	return r
}

func (s *scanner) take() rune {
	r, n := utf8.DecodeRuneInString(s.src[s.at:])
	s.at += n
	if r == '\n' {
		s.pos = syntax.Pos{Line: s.pos.Line + 1, Col: 1}
	} else {
		s.pos.Col++
	}
	return r
}

func blank(r rune) bool { return unicode.IsSpace(r) || r == '\uFEFF' }

func (s *scanner) scan() token {
	end := s.pos
	for s.at < len(s.src) && blank(s.peek()) {
		s.take()
	}
	if s.at == len(s.src) {
		return token{kind: eof, pos: end, from: s.at, to: s.at} // what is missing is missing before the blanks
	}
	t := token{pos: s.pos, from: s.at}
	switch s.peek() {
	case '(':
		t.kind = lparen
	case ')':
		t.kind = rparen
	case '{':
		t.kind = lbrace
	case '}':
		t.kind = rbrace
	case ':':
		t.kind = colon
	case '<':
		t.kind = lt
	case '>':
		t.kind = gt
	case '"':
		s.string(&t)
		return t
	default:
		s.word(&t)
		return t
	}
	s.take()
	if (t.kind == lt || t.kind == gt) && strings.HasPrefix(s.src[s.at:], "=") {
		t.kind++
		s.take()
	}
	t.to = s.at
	return t
}

func (s *scanner) string(t *token) {
	t.kind = quoted
	s.take()
	var b strings.Builder
	for s.at < len(s.src) {
		switch r := s.take(); r {
		case '"':
			t.parts, t.to = []string{b.String()}, s.at
			return
		case '\\':
			if r, ok := s.escape(`"\`); ok {
				b.WriteRune(r)
			} else {
				b.WriteByte('\\') // before anything else it is itself
			}
		default:
			b.WriteRune(r)
		}
	}
	s.fail(t.pos, "", "this string is not closed")
	t.parts, t.to = []string{b.String()}, s.at
}

func (s *scanner) word(t *token) {
	t.kind = word
	var b strings.Builder
	for s.at < len(s.src) {
		at, r := s.pos, s.peek()
		switch {
		case r == '*':
			t.parts = append(t.parts, b.String())
			b.Reset()
			s.take()
			continue
		case r == '\\':
			s.take()
			c, ok := s.escape(special)
			if !ok && s.keyword() {
				c, ok = s.take(), true
			}
			if !ok {
				s.fail(at, `a backslash is written \\`, "this backslash escapes nothing")
			}
			b.WriteRune(c)
			continue
		case blank(r) || strings.ContainsRune(special, r):
		default:
			b.WriteRune(s.take())
			continue
		}
		break
	}
	t.parts, t.to = append(t.parts, b.String()), s.at
	switch strings.ToLower(s.src[t.from:t.to]) {
	case "and":
		t.kind = kwAnd
	case "or":
		t.kind = kwOr
	case "not":
		t.kind = kwNot
	}
}

// escape takes what follows a backslash, if it is one of the characters or a letter
// that stands for one.
func (s *scanner) escape(characters string) (rune, bool) {
	if s.at == len(s.src) {
		return 0, false
	}
	switch r := s.peek(); {
	case strings.ContainsRune(characters, r):
		return s.take(), true
	case r == 't':
		s.take()
		return '\t', true
	case r == 'r':
		s.take()
		return '\r', true
	case r == 'n' && !s.keyword():
		s.take()
		return '\n', true
	case r == 'u' && len(s.src)-s.at >= 5:
		n, err := strconv.ParseUint(s.src[s.at+1:s.at+5], 16, 16)
		if err != nil {
			return 0, false
		}
		for range 5 {
			s.take()
		}
		return rune(n), true
	}
	return 0, false
}

// keyword reports whether a keyword follows, which a backslash makes a word.
func (s *scanner) keyword() bool {
	rest := strings.ToLower(s.src[s.at:min(s.at+3, len(s.src))])
	return rest == "and" || rest == "not" || strings.HasPrefix(rest, "or")
}
