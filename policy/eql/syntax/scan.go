package syntax

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// kind is what a token is. Operators and keywords are kinds of their own.
type kind uint8

const (
	eof     kind = iota
	invalid      // reported already, or the parser has given up on this part

	ident  // text is the name
	called // name~, text is the name
	quoted // `name`, text is the name
	text   // text is what the string says
	integer
	float

	assign
	bang
	comma
	dot
	question
	lparen
	rparen
	lbracket
	rbracket
	missing // ![
	bar

	eq
	ne
	lt
	le
	gt
	ge
	plus
	minus
	star
	slash
	percent
	colon

	kwAnd
	kwAny
	kwBy
	kwFalse
	kwIn
	kwInFold
	kwJoin
	kwLike
	kwLikeFold
	kwMaxspan
	kwNot
	kwNull
	kwOf
	kwOr
	kwRegex
	kwRegexFold
	kwSample
	kwSequence
	kwTrue
	kwUntil
	kwWhere
	kwWith
)

func (k kind) String() string {
	return [...]string{"the end of the query", "an error", "a name", "a function", "a back-quoted name", "a string", "a number", "a number",
		"=", "!", "a comma", "a dot", "?", "(", ")", "[", "]", "![", "|",
		"==", "!=", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", ":",
		"and", "any", "by", "false", "in", "in~", "join", "like", "like~", "maxspan", "not", "null", "of", "or", "regex", "regex~",
		"sample", "sequence", "true", "until", "where", "with"}[k]
}

// keywords, which are lower case only. A part of a field's name that is one of
// them must be back-quoted.
var keywords = func() map[string]kind {
	m := map[string]kind{}
	for k := kwAnd; k <= kwWith; k++ {
		m[k.String()] = k
	}
	return m
}()

// symbols has every symbol before its own prefixes.
var symbols = []struct {
	text string
	kind kind
}{
	{"![", missing}, {"==", eq}, {"!=", ne}, {"<=", le}, {">=", ge}, {"<", lt}, {">", gt}, {"=", assign}, {"!", bang},
	{"+", plus}, {"-", minus}, {"*", star}, {"/", slash}, {"%", percent}, {":", colon}, {"?", question}, {",", comma},
	{".", dot}, {"(", lparen}, {")", rparen}, {"[", lbracket}, {"]", rbracket}, {"|", bar},
}

type token struct {
	kind kind
	pos  Pos
	text string
	num  any // int64 or float64
}

// A scanner splits the text of a query into tokens. It reports a malformed token
// and goes on with its best reading of it, so that one slip costs one error.
type scanner struct {
	src    string // what is left
	pos    Pos    // of src
	report func(at Pos, hint, format string, args ...any)
}

func (s *scanner) scan() token {
	for {
		if t, ok := s.token(); ok {
			return t
		}
	}
}

// token returns false where it had to skip a character that begins nothing.
func (s *scanner) token() (token, bool) {
	s.skipBlanks()
	pos, src := s.pos, s.src
	if src == "" {
		return token{kind: eof, pos: pos}, true
	}
	c := src[0]
	switch {
	case isLetter(c):
		return s.name(), true
	case isDigit(c), c == '.' && len(src) > 1 && isDigit(src[1]):
		return s.number(), true
	case strings.HasPrefix(src, `"""`) && rawEnd(src) > 0:
		raw := s.take(rawEnd(src))
		return token{kind: text, pos: pos, text: raw[3 : len(raw)-3]}, true
	case c == '"':
		return s.text(), true
	case c == '`':
		return s.backquoted(), true
	case c == '\'', strings.HasPrefix(src, `?"`), strings.HasPrefix(src, `?'`):
		return s.oldText(), true
	case strings.HasPrefix(src, "&&"):
		s.report(pos, "write and", "&& is not an operator")
		s.take(2)
		return token{kind: kwAnd, pos: pos}, true
	case strings.HasPrefix(src, "||"):
		s.report(pos, "write or", "|| is not an operator")
		s.take(2)
		return token{kind: kwOr, pos: pos}, true
	}
	for _, sym := range symbols {
		if strings.HasPrefix(src, sym.text) {
			s.take(len(sym.text))
			return token{kind: sym.kind, pos: pos}, true
		}
	}
	r, n := utf8.DecodeRuneInString(src)
	s.take(n)
	s.report(pos, "", "unexpected character %q", r)
	return token{}, false
}

// take consumes n bytes.
func (s *scanner) take(n int) string {
	t := s.src[:n]
	s.src = s.src[n:]
	s.pos = s.pos.after(t)
	return t
}

// after is the place after t, which begins at p.
func (p Pos) after(t string) Pos {
	if n := strings.Count(t, "\n"); n > 0 {
		p = Pos{p.Line + n, 1}
		t = t[strings.LastIndexByte(t, '\n')+1:]
	}
	p.Col += utf8.RuneCountInString(t)
	return p
}

func (s *scanner) skipBlanks() {
	for {
		rest := strings.TrimLeft(s.src, " \t\r\n")
		s.take(len(s.src) - len(rest))
		switch {
		case strings.HasPrefix(s.src, "//"):
			n := strings.IndexAny(s.src, "\r\n")
			if n < 0 {
				n = len(s.src)
			}
			s.take(n)
		case strings.HasPrefix(s.src, "/*"):
			n := commentEnd(s.src)
			if n < 0 {
				s.report(s.pos, "", "this comment does not end")
				n = len(s.src)
			}
			s.take(n)
		default:
			return
		}
	}
}

// commentEnd is the length of the block comment that src begins with, or -1.
// Block comments nest.
func commentEnd(src string) int {
	depth := 0
	for i := 0; i+1 < len(src); {
		switch src[i : i+2] {
		case "/*":
			depth++
			i += 2
		case "*/":
			depth--
			i += 2
			if depth == 0 {
				return i
			}
		default:
			i++
		}
	}
	return -1
}

func (s *scanner) name() token {
	pos, n := s.pos, 1
	for n < len(s.src) && (isLetter(s.src[n]) && s.src[n] != '@' || isDigit(s.src[n])) {
		n++
	}
	name := s.take(n)
	tilde := strings.HasPrefix(s.src, "~")
	if k, ok := keywords[name+"~"]; ok && tilde {
		s.take(1)
		return token{kind: k, pos: pos, text: name + "~"}
	}
	if k, ok := keywords[name]; ok {
		return token{kind: k, pos: pos, text: name}
	}
	if tilde {
		s.take(1)
		return token{kind: called, pos: pos, text: name}
	}
	return token{kind: ident, pos: pos, text: name}
}

// number takes digits, a point with digits on at least one side of it, and an
// exponent. What overflows an int64 becomes a double.
func (s *scanner) number() token {
	pos, src := s.pos, s.src
	digits := func(i int) int {
		for i < len(src) && isDigit(src[i]) {
			i++
		}
		return i
	}
	n := digits(0)
	kind := integer
	if n < len(src) && src[n] == '.' {
		kind, n = float, digits(n+1)
	}
	if n < len(src) && (src[n] == 'e' || src[n] == 'E') {
		m := n + 1
		if m < len(src) && (src[m] == '+' || src[m] == '-') {
			m++
		}
		if end := digits(m); end > m {
			kind, n = float, end
		}
	}
	lit := s.take(n)
	if kind == integer {
		if i, err := strconv.ParseInt(lit, 10, 64); err == nil {
			return token{kind: integer, pos: pos, text: lit, num: i}
		}
	}
	f, err := strconv.ParseFloat(lit, 64)
	if err != nil {
		s.report(pos, "", "a number as large as this cannot be represented")
	}
	return token{kind: float, pos: pos, text: lit, num: f}
}

// rawEnd is the length of the raw string that src begins with, or -1. A raw
// string ends at the last three of three to five quotes in a row, so that its
// content may end in one or two.
func rawEnd(src string) int {
	end := strings.Index(src[3:], `"""`)
	if end < 0 || strings.ContainsAny(src[3:3+end], "\r\n") {
		return -1
	}
	end += 6
	for extra := 0; extra < 2 && end < len(src) && src[end] == '"'; extra++ {
		end++
	}
	return end
}

func (s *scanner) text() token {
	pos, src := s.pos, s.src
	if strings.HasPrefix(src, `"""`) {
		s.report(pos, "a raw string is closed with three quotes on the same line", "this string does not end")
		s.take(lineEnd(src))
		return token{kind: text, pos: pos}
	}
	var b strings.Builder
	for i := 1; i < len(src); {
		switch c := src[i]; c {
		case '"':
			s.take(i + 1)
			return token{kind: text, pos: pos, text: b.String()}
		case '\r', '\n':
			i = len(src)
		case '\\':
			r, n, err := unescape(src[i:])
			if err != nil {
				s.report(pos.after(src[:i]), err.hint, "%s", err.msg)
			}
			b.WriteRune(r)
			i += n
		default:
			b.WriteByte(c)
			i++
		}
	}
	s.report(pos, "a string is closed on the line where it begins", "this string does not end")
	s.take(lineEnd(src))
	return token{kind: text, pos: pos, text: b.String()}
}

type badEscape struct{ msg, hint string }

// unescape reads the escape sequence at the beginning of src: what it stands
// for and how long it is.
func unescape(src string) (rune, int, *badEscape) {
	const hint = `write \\ for a backslash, or use a raw string, """..."""`
	if len(src) < 2 || src[1] == '\n' || src[1] == '\r' {
		return utf8.RuneError, 1, nil // the string does not end, which is what will be said
	}
	switch src[1] {
	case 'b':
		return '\b', 2, nil
	case 't':
		return '\t', 2, nil
	case 'n':
		return '\n', 2, nil
	case 'f':
		return '\f', 2, nil
	case 'r':
		return '\r', 2, nil
	case '"', '\'', '\\':
		return rune(src[1]), 2, nil
	case 'u':
		hex, _, ok := strings.Cut(src[2:], "}")
		hex, open := strings.CutPrefix(hex, "{")
		if !ok || !open || len(hex) < 2 || len(hex) > 8 {
			return utf8.RuneError, 2, &badEscape{`\u needs two to eight hexadecimal digits in braces`, `as in \u{1F511}`}
		}
		u, err := strconv.ParseUint(hex, 16, 32)
		if err != nil || !utf8.ValidRune(rune(u)) {
			return utf8.RuneError, 2, &badEscape{fmt.Sprintf(`\u{%s} is not a character`, hex), ""}
		}
		return rune(u), 4 + len(hex), nil
	}
	r, n := utf8.DecodeRuneInString(src[1:])
	return r, 1 + n, &badEscape{fmt.Sprintf(`unknown escape sequence \%c`, r), hint}
}

// oldText is a string of the language's first dialect.
func (s *scanner) oldText() token {
	pos, src := s.pos, s.src
	hint := "write double quotes"
	if src[0] == '?' {
		hint = `write """..."""`
		src = src[1:]
	}
	s.report(pos, hint, "strings of this form are no longer a part of EQL")
	s.take(len(s.src) - len(src))
	end := strings.IndexByte(src[1:lineEnd(src)], src[0])
	if end < 0 {
		return token{kind: text, pos: pos, text: s.take(lineEnd(src))}
	}
	return token{kind: text, pos: pos, text: s.take(end + 2)}
}

func (s *scanner) backquoted() token {
	pos, src := s.pos, s.src
	var b strings.Builder
	for i := 1; i < lineEnd(src); i++ {
		if src[i] != '`' {
			b.WriteByte(src[i])
			continue
		}
		if i+1 < len(src) && src[i+1] == '`' {
			b.WriteByte('`')
			i++
			continue
		}
		s.take(i + 1)
		if b.Len() == 0 {
			s.report(pos, "", "this name is empty")
		}
		return token{kind: quoted, pos: pos, text: b.String()}
	}
	s.report(pos, "", "this name does not end")
	s.take(lineEnd(src))
	return token{kind: quoted, pos: pos, text: b.String()}
}

func lineEnd(src string) int {
	if n := strings.IndexAny(src, "\r\n"); n >= 0 {
		return n
	}
	return len(src)
}

func isLetter(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c == '@'
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
