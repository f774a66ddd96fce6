package eql

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"
	"unicode/utf8"
)

// A pattern of regex is Lucene's kind of regular expression and matches whole
// values. It is translated into Go's, which takes linear time on any input. The
// two agree less than they look:
//
//   - ^ and $ are ordinary characters: there is nothing to anchor.
//   - .*? is not lazy but (.*)?, and .+? thereby matches the empty string.
//   - "..." quotes, and ~ & # @ < > are operators. The operators are refused:
//     nobody uses them on purpose and they cannot be translated.
//   - A backslash before a letter is \d \w \s or their complements, or a mistake.
//
// Go's (?i) is not used because it folds beyond ASCII: a K would match the Kelvin
// sign. A letter becomes a class of two instead.

// regexFault is what is wrong with a pattern.
type regexFault struct{ msg, hint string }

// compileRegex joins patterns into one expression that holds if any of them does.
// If a pattern is at fault it returns its index.
func compileRegex(patterns []string, fold bool) (*regexp.Regexp, int, *regexFault) {
	alternatives := make([]string, len(patterns))
	for i, p := range patterns {
		t := regexTranslator{src: p, fold: fold}
		s, fault := t.translate()
		if fault == nil {
			fault = compilable(s)
		}
		if fault != nil {
			return nil, i, fault
		}
		alternatives[i] = s
	}
	all := `(?s)\A(?:` + strings.Join(alternatives, "|") + `)\z`
	if fault := compilable(all); fault != nil {
		return nil, 0, fault
	}
	return regexp.MustCompile(all), 0, nil
}

// compilable tells what Go has against an expression: counts above 1000, size.
func compilable(s string) *regexFault {
	_, err := syntax.Parse(s, syntax.Perl)
	var e *syntax.Error
	if errors.As(err, &e) {
		return &regexFault{msg: "this regular expression cannot be used: " + e.Code.String()}
	}
	return nil
}

// A regexTranslator descends through Lucene's grammar and writes Go's. After a
// fault it writes on, to no effect.
type regexTranslator struct {
	src   string // what is left
	fold  bool
	depth int
	fault *regexFault
}

func (t *regexTranslator) translate() (string, *regexFault) {
	if t.src == "" {
		return "", nil
	}
	s := t.union()
	if t.src != "" {
		t.fail("", "unexpected ) in a regular expression")
	}
	return s, t.fault
}

func (t *regexTranslator) fail(hint, format string, args ...any) {
	if t.fault == nil {
		t.fault = &regexFault{fmt.Sprintf(format, args...), hint}
	}
	t.src = ""
}

func (t *regexTranslator) got(c string) bool {
	rest, ok := strings.CutPrefix(t.src, c)
	t.src = rest
	return ok
}

func (t *regexTranslator) union() string {
	t.depth++
	defer func() { t.depth-- }()
	if t.depth > 100 {
		t.fail("", "this regular expression nests too deeply")
	}
	s := t.concat()
	for t.got("|") {
		s += "|" + t.concat()
	}
	return s
}

func (t *regexTranslator) concat() string {
	var b strings.Builder
	for n := 0; ; n++ {
		switch {
		case t.src != "" && t.src[0] != '|' && t.src[0] != ')':
			b.WriteString(t.repeat())
			continue
		case n == 0:
			t.fail("", "an alternative of this regular expression is empty")
		}
		return b.String()
	}
}

// repeat is an atom with any number of quantifiers, each of which repeats all
// that is before it.
func (t *regexTranslator) repeat() string {
	s := t.atom()
	for n := 0; ; n++ {
		q := ""
		switch {
		case t.got("?"):
			q = "?"
		case t.got("*"):
			q = "*"
		case t.got("+"):
			q = "+"
		case t.got("{"):
			q = t.count()
		default:
			return s
		}
		if n > 0 {
			s = "(?:" + s + ")"
		}
		s += q
		if n > 100 {
			t.fail("", "this regular expression nests too deeply")
		}
	}
}

// count is what follows an opening brace: n} or n,} or n,m}.
func (t *regexTranslator) count() string {
	q, rest, ok := strings.Cut(t.src, "}")
	t.src = rest
	from, to, ranged := strings.Cut(q, ",")
	if !ok || !isNumber(from) || ranged && to != "" && !isNumber(to) {
		t.fail(`write \{ for a brace`, "a quantifier of a regular expression is {n}, {n,} or {n,m}")
	}
	return "{" + q + "}"
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func (t *regexTranslator) atom() string {
	r, n := utf8.DecodeRuneInString(t.src)
	t.src = t.src[n:]
	switch r {
	case '.':
		return "."
	case '(':
		if t.got(")") {
			return "(?:)"
		}
		s := t.union()
		if !t.got(")") {
			t.fail("", "a ( of this regular expression is not closed")
		}
		return "(?:" + s + ")"
	case '[':
		return t.class()
	case '"':
		quoted, rest, ok := strings.Cut(t.src, `"`)
		if !ok {
			t.fail(`write \" for the character`, "a quote of this regular expression is not closed")
			return ""
		}
		t.src = rest
		var b strings.Builder
		for _, r := range quoted {
			b.WriteString(t.literal(r))
		}
		return "(?:" + b.String() + ")"
	case '*', '+', '?', '{':
		t.fail(fmt.Sprintf(`write \%c for the character`, r), "%c has nothing to repeat in this regular expression", r)
		return ""
	case '~', '&', '#', '@', '<', '>':
		t.fail(fmt.Sprintf(`write \%c for the character`, r), "%c is an operator of Lucene's regular expressions that is not supported", r)
		return ""
	case '\\':
		if class, ok := t.shorthand(); ok {
			return "[" + class + "]"
		}
		return t.literal(t.escaped())
	}
	return t.literal(r)
}

// shorthand is the class that is meant by the letter after a backslash.
func (t *regexTranslator) shorthand() (string, bool) {
	for letter, class := range map[string]string{
		"d": `0-9`, "D": `\x00-/:-\x{10FFFF}`,
		"w": `0-9A-Z_a-z`, "W": "\\x00-/:-@\\[-\\^\\x60{-\\x{10FFFF}",
		"s": ` \t\n\r`, "S": `\x00-\x08\x0B\x0C\x0E-\x1F!-\x{10FFFF}`,
	} {
		if t.got(letter) {
			return class, true
		}
	}
	return "", false
}

// escaped is the character after a backslash.
func (t *regexTranslator) escaped() rune {
	r, n := utf8.DecodeRuneInString(t.src)
	switch {
	case n == 0:
		t.fail(`write \\ for a backslash`, "this regular expression ends in a backslash")
	case 'a' <= r|0x20 && r|0x20 <= 'z', '0' <= r && r <= '9':
		t.fail(`there are \d \w \s and \D \W \S`, `\%c means nothing in a regular expression`, r)
	default:
		t.src = t.src[n:]
	}
	return r
}

func (t *regexTranslator) literal(r rune) string {
	if t.fold && isASCIILetter(r) {
		return fmt.Sprintf("[%c%c]", r&^0x20, r|0x20)
	}
	return regexp.QuoteMeta(string(r))
}

func isASCIILetter(r rune) bool { return 'a' <= r|0x20 && r|0x20 <= 'z' && r < utf8.RuneSelf }

// class is what follows an opening bracket. The first character belongs to the
// class whatever it is, and so does a dash at the end.
func (t *regexTranslator) class() string {
	var b strings.Builder
	b.WriteString("[")
	if t.got("^") {
		b.WriteString("^")
	}
	for first := true; first || !t.got("]"); first = false {
		if t.src == "" {
			t.fail(`write \[ for the character`, "a [ of this regular expression is not closed")
			return ""
		}
		from, class := t.member()
		if class != "" {
			b.WriteString(class)
			continue
		}
		to := from
		if strings.HasPrefix(t.src, "-") && !strings.HasPrefix(t.src, "-]") {
			t.got("-")
			if to, class = t.member(); class != "" || to < from {
				t.fail(`write \- for a dash`, "a range of this regular expression is out of order")
				return ""
			}
		}
		fmt.Fprintf(&b, `\x{%x}-\x{%x}`, from, to)
		if t.fold {
			for _, letters := range [][2]rune{{'a', 'z'}, {'A', 'Z'}} {
				if lo, hi := max(from, letters[0]), min(to, letters[1]); lo <= hi {
					fmt.Fprintf(&b, "%c-%c", lo^0x20, hi^0x20)
				}
			}
		}
	}
	b.WriteString("]")
	return b.String()
}

// member is one character of a class, or a shorthand for several.
func (t *regexTranslator) member() (rune, string) {
	if t.got(`\`) {
		if class, ok := t.shorthand(); ok {
			return 0, class
		}
		return t.escaped(), ""
	}
	r, n := utf8.DecodeRuneInString(t.src)
	t.src = t.src[n:]
	return r, ""
}
