package syntax

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Format prints a query, or a part of one, in canonical form: one line for an
// event and for every item of a sequence, single blanks, no parentheses but
// those that the tree needs, strings in double quotes.
func Format(n Node) string {
	var f formatter
	switch n := n.(type) {
	case *Query:
		f.query(n)
	case *Event:
		f.event(n)
	case *Sequence:
		f.sequence(n)
	case *Sample:
		f.sample(n)
	case *Item:
		f.item(n)
	case *Pipe:
		f.pipe(n)
	case Expr:
		f.expr(n, 0)
	}
	return f.String()
}

type formatter struct{ strings.Builder }

func (f *formatter) print(args ...string) {
	for _, a := range args {
		f.WriteString(a)
	}
}

func (f *formatter) query(q *Query) {
	f.print(Format(q.Body))
	sep := " "
	if _, ok := q.Body.(*Event); !ok {
		sep = "\n"
	}
	for _, p := range q.Pipes {
		f.print(sep)
		f.pipe(p)
	}
}

func (f *formatter) pipe(p *Pipe) { f.print("| ", p.Name, " ", strconv.Itoa(p.Count)) }

func (f *formatter) event(e *Event) {
	switch {
	case e.Any:
		f.print("any")
	case isName(e.Category):
		f.print(e.Category)
	default:
		f.print(quote(e.Category))
	}
	f.print(" where ")
	f.expr(e.Where, 0)
}

func (f *formatter) sequence(s *Sequence) {
	f.print("sequence")
	f.by(s.By)
	if s.MaxSpan > 0 {
		f.print(" with maxspan=", formatSpan(s.MaxSpan))
	}
	for _, it := range s.Items {
		f.print("\n  ")
		f.item(it)
	}
	if s.Until != nil {
		f.print("\nuntil ")
		f.item(s.Until)
	}
}

func formatSpan(d time.Duration) string {
	u := units[0]
	for _, u = range units {
		if d%u.span == 0 {
			break
		}
	}
	return strconv.FormatInt(int64(d/u.span), 10) + u.name
}

func (f *formatter) sample(s *Sample) {
	f.print("sample")
	f.by(s.By)
	for _, it := range s.Items {
		f.print("\n  ")
		f.item(it)
	}
}

func (f *formatter) item(it *Item) {
	if it.Missing {
		f.print("!")
	}
	f.print("[")
	f.event(it.Event)
	f.print("]")
	f.by(it.By)
	if it.Runs != 1 {
		f.print(" with runs=", strconv.Itoa(it.Runs))
	}
}

func (f *formatter) by(keys []*Field) {
	for i, k := range keys {
		if i == 0 {
			f.print(" by ")
		} else {
			f.print(", ")
		}
		f.expr(k, 0)
	}
}

// How tightly an expression binds. An operand that binds less tightly than its
// place demands is put into parentheses.
const (
	bindOr = 1 + iota
	bindAnd
	bindNot
	bindComparison
	bindSum
	bindProduct
	bindSign
	bindPredicate
	bindPrimary
)

func binding(e Expr) int {
	switch e := e.(type) {
	case *Logic:
		if e.Op == Or {
			return bindOr
		}
		return bindAnd
	case *Not:
		return bindNot
	case *Binary:
		switch e.Op {
		case Add, Sub:
			return bindSum
		case Mul, Div, Mod:
			return bindProduct
		}
		return bindComparison
	case *Unary:
		return bindSign
	case *In, *Match:
		return bindPredicate
	}
	return bindPrimary
}

func (f *formatter) expr(e Expr, place int) {
	b := binding(e)
	if b < place {
		f.print("(")
		defer f.print(")")
	}
	switch e := e.(type) {
	case *Logic:
		for i, x := range e.X {
			if i > 0 {
				f.print(" ", e.Op.String(), " ")
			}
			f.expr(x, b+1)
		}
	case *Not:
		f.print("not ")
		f.expr(e.X, bindNot)
	case *Binary:
		left := b // sums and products group to the left
		if b == bindComparison {
			left++
		}
		f.expr(e.X, left)
		f.print(" ", e.Op.String(), " ")
		f.expr(e.Y, b+1)
	case *Unary:
		f.print(e.Op.String())
		f.expr(e.X, bindSign)
	case *In:
		f.expr(e.X, bindPrimary)
		if e.Not {
			f.print(" not")
		}
		f.print(" in")
		if e.Fold {
			f.print("~")
		}
		f.print(" ")
		list(f, e.List)
	case *Match:
		f.expr(e.X, bindPrimary)
		f.print(" ", e.Op.String(), " ")
		if len(e.Patterns) == 1 {
			f.expr(e.Patterns[0], 0)
		} else {
			list(f, e.Patterns)
		}
	case *Call:
		f.print(e.Name)
		if e.Fold {
			f.print("~")
		}
		list(f, e.Args)
	case *Field:
		if e.Optional {
			f.print("?")
		}
		f.print(formatName(e.Name))
	case *Literal:
		f.print(formatLiteral(e.Value))
	}
}

func list[E Expr](f *formatter, xs []E) {
	f.print("(")
	for i, x := range xs {
		if i > 0 {
			f.print(", ")
		}
		f.expr(x, 0)
	}
	f.print(")")
}

// formatName puts backquotes around the parts of a path that need them, or
// around all of it if a part is empty.
func formatName(name string) string {
	parts := strings.Split(name, ".")
	for i, p := range parts {
		if p == "" {
			return backquote(name)
		}
		if !isName(p) {
			parts[i] = backquote(p)
		}
	}
	return strings.Join(parts, ".")
}

func backquote(s string) string { return "`" + strings.ReplaceAll(s, "`", "``") + "`" }

func isName(s string) bool {
	if _, ok := keywords[s]; ok || s == "" || !isLetter(s[0]) {
		return false
	}
	for i := 1; i < len(s); i++ {
		if s[i] == '@' || !isLetter(s[i]) && !isDigit(s[i]) {
			return false
		}
	}
	return true
}

func formatLiteral(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return quote(v)
	case float64:
		s := strconv.FormatFloat(v, 'g', -1, 64)
		if !strings.ContainsAny(s, ".e") {
			s += ".0" // else it would be read as an integer
		}
		return s
	}
	return fmt.Sprint(v)
}

func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch r {
		case '"', '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case '\b':
			b.WriteString(`\b`)
		case '\t':
			b.WriteString(`\t`)
		case '\n':
			b.WriteString(`\n`)
		case '\f':
			b.WriteString(`\f`)
		case '\r':
			b.WriteString(`\r`)
		default:
			if unicode.IsPrint(r) {
				b.WriteRune(r)
			} else {
				fmt.Fprintf(&b, `\u{%02x}`, r)
			}
		}
	}
	b.WriteByte('"')
	return b.String()
}
