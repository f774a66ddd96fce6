package eql

import (
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// function is one of the functions of the language.
type function struct {
	name     string
	params   []kinds
	min      int  // how many of the params are needed
	variadic bool // the last param may be repeated
	fold     bool // there is a case-insensitive form, name~
	result   Type

	// call takes min arguments or more, each of the right kind or null.
	call func(args []Value, fold bool) Value

	// part, for some, is all there is to it: it compares a string with another, which is lower case if it folds.
	part func(s, part string, fold bool) bool
}

// words is what a part of a string comes to as a pattern; nil if it is none.
func (f *function) words(part string, fold bool) *words {
	w := &words{fold: fold}
	switch {
	case part == "":
		return nil
	case f.name == "startsWith":
		w.prefixes = []string{part}
	case f.name == "endsWith":
		w.suffixes = []string{part}
	case f.name == "stringContains":
		w.contained = []string{part}
	default:
		return nil
	}
	return w
}

// kinds is a set of types that an argument may have.
type kinds uint8

const (
	strs     = kinds(1) << Keyword
	numbers  = kinds(1)<<Long | 1<<Double
	bools    = kinds(1) << Boolean
	addrs    = kinds(1)<<IP | 1<<Keyword
	anything = ^kinds(0)
)

const cidrMatch = "cidrMatch"

// functions by lower-case name; names are found whatever their case.
var functions = func() map[string]*function {
	m := map[string]*function{}
	for _, f := range []*function{
		{"add", []kinds{numbers, numbers}, 2, false, false, Double, arithmetic('+'), nil},
		{"between", []kinds{strs, strs, strs, bools}, 3, false, true, Keyword, between, nil},
		{cidrMatch, []kinds{addrs, strs}, 2, true, false, Boolean, nil, nil}, // see inBlocks
		{"concat", []kinds{anything}, 1, true, false, Keyword, concat, nil},
		{"divide", []kinds{numbers, numbers}, 2, false, false, Double, arithmetic('/'), nil},
		{"endsWith", []kinds{strs, strs}, 2, false, true, Boolean, nil, hasSuffix},
		{"indexOf", []kinds{strs, strs, numbers}, 2, false, true, Long, indexOf, nil},
		{"length", []kinds{strs}, 1, false, false, Long, length, nil},
		{"modulo", []kinds{numbers, numbers}, 2, false, false, Double, arithmetic('%'), nil},
		{"multiply", []kinds{numbers, numbers}, 2, false, false, Double, arithmetic('*'), nil},
		{"number", []kinds{strs, numbers}, 1, false, false, Double, number, nil},
		{"startsWith", []kinds{strs, strs}, 2, false, true, Boolean, nil, hasPrefix},
		{"string", []kinds{anything}, 1, false, false, Keyword, toString, nil},
		{"stringContains", []kinds{strs, strs}, 2, false, true, Boolean, nil, contains},
		{"substring", []kinds{strs, numbers, numbers}, 2, false, false, Keyword, substring, nil},
		{"subtract", []kinds{numbers, numbers}, 2, false, false, Double, arithmetic('-'), nil},
	} {
		if f.part != nil {
			f.call = callPart(f.part)
		}
		m[strings.ToLower(f.name)] = f
	}
	return m
}()

// foreign are functions of other dialects, with what to use instead.
var foreign = map[string]string{
	"arraycontains": "a condition on an array holds if any of its values satisfies it: use == or in",
	"arraysearch":   "a condition on an array holds if any of its values satisfies it",
	"match":         "use regex",
	"matchlite":     "use regex",
	"wildcard":      "use : or like",
}

// isNull reports whether any of the arguments is null.
func isNull(args ...Value) bool {
	for i := range args {
		if args[i].kind == none {
			return true
		}
	}
	return false
}

func between(args []Value, fold bool) Value {
	if isNull(args[:3]...) {
		return Value{}
	}
	s, left, right := args[0].str(), args[1].str(), args[2].str()
	if fold {
		left, right = lower(left), lower(right)
	}
	i := index(s, left, fold)
	if i < 0 {
		return Value{}
	}
	s = s[i+len(left):]
	if len(args) > 3 && args[3].bool() {
		i = lastIndex(s, right, fold)
	} else {
		i = index(s, right, fold)
	}
	if i < 0 {
		return Value{}
	}
	return String(s[:i])
}

func concat(args []Value, _ bool) Value {
	if isNull(args...) {
		return Value{}
	}
	var b strings.Builder
	for i := range args {
		b.WriteString(args[i].String())
	}
	return String(b.String())
}

func callPart(test func(s, part string, fold bool) bool) func([]Value, bool) Value {
	return func(args []Value, fold bool) Value {
		if isNull(args...) {
			return Value{}
		}
		part := args[1].str()
		if fold {
			part = lower(part)
		}
		return Bool(test(args[0].str(), part, fold))
	}
}

// contains differs from its siblings: nothing contains the empty string.
func contains(s, part string, fold bool) bool { return part != "" && index(s, part, fold) >= 0 }

// indexOf counts characters.
func indexOf(args []Value, fold bool) Value {
	if isNull(args[:2]...) {
		return Value{}
	}
	s, part, start := args[0].str(), args[1].str(), int64(0)
	if fold {
		part = lower(part)
	}
	if len(args) > 2 && args[2].kind != none {
		start = max(0, whole(args[2]))
	}
	if start > int64(utf8.RuneCountInString(s)) {
		return Value{}
	}
	from := byteOffset(s, start)
	i := index(s[from:], part, fold)
	if i < 0 {
		return Value{}
	}
	return Int(start + int64(utf8.RuneCountInString(s[from:from+i])))
}

// whole is a number without its fraction.
func whole(v Value) int64 {
	if v.kind == isInt {
		return v.int()
	}
	return int64(max(math.MinInt32, min(math.MaxInt32, v.float())))
}

// byteOffset is where the nth character of s begins, or the end of s.
func byteOffset(s string, n int64) int {
	for i := range s {
		if n == 0 {
			return i
		}
		n--
	}
	return len(s)
}

func length(args []Value, _ bool) Value {
	if isNull(args[0]) {
		return Value{}
	}
	return Int(int64(utf8.RuneCountInString(args[0].str())))
}

func number(args []Value, _ bool) Value {
	if isNull(args[0]) {
		return Value{}
	}
	s := strings.TrimSpace(args[0].str())
	base := int64(0)
	if len(args) > 1 && args[1].kind != none {
		if base = whole(args[1]); base < 2 || base > 36 {
			return Value{}
		}
	}
	sign := ""
	if strings.HasPrefix(s, "-") || strings.HasPrefix(s, "+") {
		sign, s = s[:1], s[1:]
	}
	if (base == 0 || base == 16) && (strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X")) {
		base, s = 16, s[2:]
		if strings.HasPrefix(s, "-") || strings.HasPrefix(s, "+") {
			return Value{}
		}
	}
	if base == 0 {
		base = 10
	}
	if i, err := strconv.ParseInt(sign+s, int(base), 64); err == nil {
		return Int(i)
	}
	if base != 10 || strings.Trim(s, "0123456789.eE+-") != "" {
		return Value{} // nor hexadecimal fractions, nor "infinity"
	}
	f, err := strconv.ParseFloat(sign+s, 64)
	if err != nil {
		return Value{}
	}
	return Float(f)
}

func toString(args []Value, _ bool) Value {
	if isNull(args[0]) {
		return Value{}
	}
	return String(args[0].String())
}

// substring counts characters, from the end where negative.
func substring(args []Value, _ bool) Value {
	if isNull(args[0]) {
		return Value{}
	}
	s := args[0].str()
	n := int64(utf8.RuneCountInString(s))
	place := func(v Value) int64 {
		i := whole(v)
		if i < 0 {
			i += n
		}
		return max(0, min(i, n))
	}
	start, end := int64(0), n
	if args[1].kind != none {
		start = place(args[1])
	}
	if len(args) > 2 && args[2].kind != none {
		end = place(args[2])
	}
	if start >= end {
		return String("")
	}
	from := byteOffset(s, start)
	return String(s[from : from+byteOffset(s[from:], end-start)])
}

// arithmetic keeps integers as long as both operands are. What has no result,
// or none that an int64 can hold, is null.
func arithmetic(op byte) func([]Value, bool) Value {
	return func(args []Value, _ bool) Value {
		a, b := &args[0], &args[1]
		switch {
		case a.kind == none || b.kind == none:
			return Value{}
		case a.kind == isInt && b.kind == isInt:
			return intArithmetic(op, a.int(), b.int())
		}
		x, y := a.float(), b.float()
		switch op {
		case '+':
			return Float(x + y)
		case '-':
			return Float(x - y)
		case '*':
			return Float(x * y)
		}
		if y == 0 {
			return Value{}
		}
		if op == '/' {
			return Float(x / y)
		}
		return Float(math.Mod(x, y))
	}
}

func intArithmetic(op byte, x, y int64) Value {
	switch op {
	case '+':
		if z := x + y; (z > x) == (y > 0) {
			return Int(z)
		}
	case '-':
		if z := x - y; (z < x) == (y > 0) {
			return Int(z)
		}
	case '*':
		if x == 0 || y == 0 {
			return Int(0)
		}
		if z := x * y; z/y == x && !(x == -1 && y == math.MinInt64) && !(y == -1 && x == math.MinInt64) {
			return Int(z)
		}
	case '/':
		if y != 0 && !(x == math.MinInt64 && y == -1) {
			return Int(x / y)
		}
	case '%':
		if y != 0 {
			return Int(x % y)
		}
	}
	return Value{}
}
