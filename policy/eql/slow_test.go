package eql_test

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"math/big"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// The definition of the language, as directly as it can be written down: a walk
// over the tree for each event, with plain Go values and nil for null. The
// compiler must agree with it on every query and every event.

func slowMatch(s schema, e *syntax.Event, ev *event) bool {
	if !e.Any && !slices.Contains(ev.plain["event.category"], any(e.Category)) {
		return false
	}
	return slowHolds(s, e.Where, ev)
}

func slowHolds(s schema, e syntax.Expr, ev *event) bool {
	switch e := e.(type) {
	case *syntax.Logic:
		for _, x := range e.X {
			if slowHolds(s, x, ev) == (e.Op == syntax.Or) {
				return e.Op == syntax.Or
			}
		}
		return e.Op == syntax.And
	case *syntax.Not:
		return !slowHolds(s, e.X, ev)
	case *syntax.Binary:
		if e.Op == syntax.Ne {
			return !slowHolds(s, &syntax.Binary{Op: syntax.Eq, X: e.X, Y: e.Y}, ev)
		}
	case *syntax.In:
		if e.Not {
			return !slowHolds(s, &syntax.In{X: e.X, Fold: e.Fold, List: e.List}, ev)
		}
	}
	combinations := []map[string]any{{}}
	syntax.Walk(e, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.Field); ok {
			if _, seen := combinations[0][f.Name]; seen {
				return true
			}
			values := ev.plain[f.Name]
			if len(values) == 0 {
				values = []any{nil}
			}
			var more []map[string]any
			for _, c := range combinations {
				for _, v := range values {
					c := maps.Clone(c)
					c[f.Name] = v
					more = append(more, c)
				}
			}
			combinations = more
		}
		return true
	})
	return slices.ContainsFunc(combinations, func(c map[string]any) bool { return slowValue(s, e, c) == true })
}

func slowValue(s schema, e syntax.Expr, fields map[string]any) any {
	value := func(e syntax.Expr) any { return slowValue(s, e, fields) }
	switch e := e.(type) {
	case *syntax.Literal:
		return e.Value
	case *syntax.Field:
		return fields[e.Name]
	case *syntax.Not:
		return slowNot(value(e.X))
	case *syntax.Logic:
		null := false
		for _, x := range e.X {
			switch value(x) {
			case e.Op == syntax.Or:
				return e.Op == syntax.Or
			case nil:
				null = true
			}
		}
		if null {
			return nil
		}
		return e.Op == syntax.And
	case *syntax.Unary:
		if e.Op == syntax.Add {
			return value(e.X)
		}
		return slowArithmetic("-", int64(0), value(e.X))
	case *syntax.Binary:
		if e.Op >= syntax.Add {
			return slowArithmetic(e.Op.String(), value(e.X), value(e.Y))
		}
		if isNull(s, e.X) || isNull(s, e.Y) {
			switch e.Op {
			case syntax.Eq:
				return value(e.X) == nil && value(e.Y) == nil
			case syntax.Ne:
				return value(e.X) != nil || value(e.Y) != nil
			}
		}
		x, y := value(e.X), value(e.Y)
		if e.Op == syntax.Ne {
			return slowNot(slowCompare("==", x, y))
		}
		return slowCompare(e.Op.String(), x, y)
	case *syntax.In:
		x := value(e.X)
		if x == nil {
			return nil
		}
		in := false
		for _, y := range e.List {
			y := value(y)
			if slowCompare("==", x, y) == true {
				in = true
			}
			xs, ok1 := x.(string)
			ys, ok2 := y.(string)
			if e.Fold && ok1 && ok2 && slowFold(xs) == slowFold(ys) {
				in = true
			}
		}
		return in != e.Not
	case *syntax.Match:
		x := value(e.X)
		if x == nil {
			return nil
		}
		return slices.ContainsFunc(e.Patterns, func(p *syntax.Literal) bool {
			if e.Op >= syntax.Regex {
				fold := e.Op == syntax.RegexFold
				text := x.(string)
				if fold {
					text = slowFold(text)
				}
				return slowRegex(p.Value.(string), fold).MatchString(text)
			}
			return slowWildcard(p.Value.(string), x.(string), e.Op != syntax.Like)
		})
	case *syntax.Call:
		args := make([]any, len(e.Args))
		for i, a := range e.Args {
			args[i] = value(a)
		}
		return slowCall(strings.ToLower(e.Name), e.Fold, args)
	}
	panic(fmt.Sprintf("%T", e))
}

// isNull reports whether e is null for every event: the literal, or an optional field
// that none has.
func isNull(s schema, e syntax.Expr) bool {
	switch e := e.(type) {
	case *syntax.Literal:
		return e.Value == nil
	case *syntax.Field:
		f, ok := s[e.Name]
		return e.Optional && (!ok || f.Slot < 0)
	}
	return false
}

func slowNot(v any) any {
	if v == nil {
		return nil
	}
	return !v.(bool)
}

func slowCompare(op string, x, y any) any {
	if x == nil || y == nil {
		return nil
	}
	// A string beside an address or a date stands for one.
	for range 2 {
		x, y = y, x
		text, ok := y.(string)
		switch v := x.(type) {
		case netip.Addr:
			if ok {
				first, last := slowBlock(text)
				a := v.As16()
				return bytes.Compare(first, a[:]) <= 0 && bytes.Compare(a[:], last) <= 0
			}
		case time.Time:
			if ok {
				for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", time.DateOnly, "2006-01", "2006", "2006-01-02T15", "2006-01-02T15Z0700"} {
					if d, err := time.Parse(layout, text); err == nil {
						y = d
					}
				}
			}
			if ms, ok := y.(int64); ok {
				y = time.UnixMilli(ms)
			}
		}
	}
	var order int
	switch x := x.(type) {
	case string:
		order = slices.Compare([]rune(x), []rune(y.(string)))
	case bool:
		if x != y.(bool) {
			order = 1
		}
	case time.Time:
		order = x.Compare(y.(time.Time))
	default:
		if xi, ok := x.(int64); ok {
			if yi, ok := y.(int64); ok {
				order = map[bool]int{true: 1, false: -1}[xi > yi]
				if xi == yi {
					order = 0
				}
				break
			}
		}
		xf, yf := slowFloat(x), slowFloat(y)
		switch {
		case xf < yf:
			order = -1
		case xf > yf:
			order = 1
		case xf != yf:
			return false // not a number
		}
	}
	return map[string]bool{"==": order == 0, "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}[op]
}

// slowBlock is the first and the last address of a block, in 16 bytes.
func slowBlock(s string) (first, last []byte) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a := netip.MustParseAddr(s)
		p = netip.PrefixFrom(a, a.BitLen())
	}
	a := p.Addr().As16()
	first, last = slices.Clone(a[:]), slices.Clone(a[:])
	for i := 128 - p.Addr().BitLen() + p.Bits(); i < 128; i++ {
		first[i/8] &^= 0x80 >> (i % 8)
		last[i/8] |= 0x80 >> (i % 8)
	}
	return first, last
}

func slowFloat(v any) float64 {
	if i, ok := v.(int64); ok {
		return float64(i)
	}
	return v.(float64)
}

func slowArithmetic(op string, x, y any) any {
	if x == nil || y == nil {
		return nil
	}
	a, ok1 := x.(int64)
	b, ok2 := y.(int64)
	if !ok1 || !ok2 {
		a, b := slowFloat(x), slowFloat(y)
		switch {
		case op == "+":
			return a + b
		case op == "-":
			return a - b
		case op == "*":
			return a * b
		case b == 0:
			return nil
		case op == "/":
			return a / b
		}
		return math.Mod(a, b)
	}
	z, bigA, bigB := new(big.Int), big.NewInt(a), big.NewInt(b)
	switch {
	case op == "+":
		z.Add(bigA, bigB)
	case op == "-":
		z.Sub(bigA, bigB)
	case op == "*":
		z.Mul(bigA, bigB)
	case b == 0:
		return nil
	case op == "/":
		z.Quo(bigA, bigB)
	default:
		z.Rem(bigA, bigB)
	}
	if !z.IsInt64() {
		return nil
	}
	return z.Int64()
}

func slowFold(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 32
		}
	}
	return string(b)
}

func slowWildcard(pattern, s string, fold bool) bool {
	if fold {
		pattern, s = slowFold(pattern), slowFold(s)
	}
	r := []rune(s)
	// match[j] says whether the pattern so far matches the first j characters.
	match := make([]bool, len(r)+1)
	match[0] = true
	for _, c := range pattern {
		next := make([]bool, len(r)+1)
		for j := range next {
			switch {
			case c == '*':
				next[j] = match[j] || j > 0 && next[j-1]
			case j > 0:
				next[j] = match[j-1] && (c == '?' || c == r[j-1])
			}
		}
		match = next
	}
	return match[len(r)]
}

// slowRegex understands what the random queries contain, which means the same to
// Go and to Lucene.
func slowRegex(p string, fold bool) *regexp.Regexp {
	if fold {
		p = slowFold(p)
	}
	return regexp.MustCompile(`(?s)\A(?:` + p + `)\z`)
}

func slowString(v any) string {
	switch v := v.(type) {
	case float64:
		if math.IsInf(v, 0) || math.IsNaN(v) {
			return map[bool]string{true: "NaN", false: strings.TrimPrefix(fmt.Sprint(v), "+") + "inity"}[math.IsNaN(v)]
		}
		s := strconv.FormatFloat(v, 'f', -1, 64)
		if a := math.Abs(v); a != 0 && (a < 1e-3 || a >= 1e7) {
			s = regexp.MustCompile(`E\+?(-?)0?`).ReplaceAllString(strconv.FormatFloat(v, 'E', -1, 64), "E$1")
			s = regexp.MustCompile(`^(-?\d)E`).ReplaceAllString(s, "$1.0E")
		} else if !strings.Contains(s, ".") {
			s += ".0"
		}
		return s
	case netip.Addr:
		return v.Unmap().String()
	case time.Time:
		return v.UTC().Format(time.RFC3339Nano)
	}
	return fmt.Sprint(v)
}

func slowCall(name string, fold bool, args []any) any {
	arg := func(i int) any {
		if i < len(args) {
			return args[i]
		}
		return nil
	}
	for i, a := range args {
		optional := i == 1 && (name == "number" || name == "substring") || i == 2 && (name == "indexof" || name == "substring") || i == 3
		if a == nil && (!optional || name == "concat") {
			return nil
		}
	}
	text := func(i int) string {
		if fold {
			return slowFold(args[i].(string))
		}
		return args[i].(string)
	}
	switch name {
	case "add", "subtract", "multiply", "divide", "modulo":
		return slowArithmetic(map[string]string{"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "modulo": "%"}[name], args[0], args[1])
	case "between":
		s := text(0)
		from := strings.Index(s, text(1))
		if from < 0 {
			return nil
		}
		from += len(text(1))
		n := strings.Index(s[from:], text(2))
		if arg(3) == true {
			n = strings.LastIndex(s[from:], text(2))
		}
		if n < 0 {
			return nil
		}
		return args[0].(string)[from : from+n]
	case "cidrmatch":
		ip, ok := args[0].(netip.Addr)
		if !ok {
			var err error
			if ip, err = netip.ParseAddr(args[0].(string)); err != nil {
				return false
			}
		}
		return slices.ContainsFunc(args[1:], func(b any) bool { return slowCompare("==", ip, b) == true })
	case "concat":
		var b strings.Builder
		for _, a := range args {
			b.WriteString(slowString(a))
		}
		return b.String()
	case "string":
		return slowString(args[0])
	case "startswith":
		return strings.HasPrefix(text(0), text(1))
	case "endswith":
		return strings.HasSuffix(text(0), text(1))
	case "stringcontains":
		return text(1) != "" && strings.Contains(text(0), text(1))
	case "length":
		return int64(len([]rune(args[0].(string))))
	case "indexof":
		r, start := []rune(text(0)), int64(0)
		if i, ok := arg(2).(int64); ok {
			start = max(0, i)
		}
		for i := start; i <= int64(len(r)); i++ {
			if strings.HasPrefix(string(r[i:]), text(1)) {
				return i
			}
		}
		return nil
	case "substring":
		r := []rune(args[0].(string))
		place := func(v any, otherwise int) int {
			if v == nil {
				return otherwise
			}
			i, ok := v.(int64)
			if !ok {
				i = int64(v.(float64))
			}
			if i < 0 {
				i += int64(len(r))
			}
			return int(min(max(i, 0), int64(len(r))))
		}
		start, end := place(arg(1), 0), place(arg(2), len(r))
		return string(r[start:max(start, end)])
	case "number":
		s := strings.TrimSpace(args[0].(string))
		base := 10
		if b, ok := arg(1).(int64); ok {
			base = int(b)
		} else if regexp.MustCompile(`^[+-]?0[xX]`).MatchString(s) {
			base = 16
		}
		if base == 16 && !regexp.MustCompile(`^[+-]?(0[xX])?[0-9a-fA-F]+$`).MatchString(s) {
			return nil
		}
		if base == 16 {
			s = regexp.MustCompile(`^([+-]?)0[xX]`).ReplaceAllString(s, "$1")
		}
		if i, err := strconv.ParseInt(s, base, 64); err == nil {
			return i
		}
		if f, err := strconv.ParseFloat(s, 64); err == nil && base == 10 && regexp.MustCompile(`^[+-]?[0-9.]+([eE][+-]?[0-9]+)?$`).MatchString(s) {
			return f
		}
		return nil
	}
	panic(name)
}

// slowSearch answers a query from all events, which are in order.
func slowSearch(s schema, q *syntax.Query, events []*event) [][]int {
	var found [][]int
	switch body := q.Body.(type) {
	case *syntax.Event:
		for _, e := range events {
			if slowMatch(s, body, e) {
				found = append(found, []int{e.id})
			}
		}
	case *syntax.Sequence:
		found = slowSequence(s, body, events)
	case *syntax.Sample:
		found = slowSample(s, body, events)
	}
	for _, p := range q.Pipes {
		n := min(p.Count, len(found))
		if p.Name == "tail" {
			n = len(found) - n
			found = found[n:]
		} else {
			found = found[:n]
		}
	}
	return found
}

// slowChain is events with the keys that they have in common.
type slowChain struct {
	keys   []any
	events []*event
}

// slowSequence finds sequences by keeping, for every stage and key, the chain
// that waits there, as a list of events; and then looks for events that ought to
// be missing among all that there are.
func slowSequence(s schema, seq *syntax.Sequence, events []*event) [][]int {
	var all, steps []*syntax.Item
	for _, it := range seq.Items {
		for range it.Runs {
			all = append(all, it)
			if !it.Missing {
				steps = append(steps, it)
			}
		}
	}
	stages := make([][]slowChain, len(steps))
	take := func(stage int, keys []any) []*event {
		for i, w := range stages[stage] {
			if reflect.DeepEqual(w.keys, keys) {
				stages[stage] = slices.Delete(stages[stage], i, i+1)
				return w.events
			}
		}
		return nil
	}
	var complete []slowChain
	for _, e := range events {
		for i := len(steps) - 1; i >= 0; i-- {
			if !slowMatch(s, steps[i].Event, e) {
				continue
			}
			for _, keys := range slowKeys(slices.Concat(seq.By, steps[i].By), e) {
				var chain []*event
				if i > 0 {
					if chain = take(i-1, keys); chain == nil {
						continue
					}
					if seq.MaxSpan > 0 && e.at.Sub(chain[0].at) > seq.MaxSpan {
						continue
					}
				}
				chain = append(slices.Clone(chain), e)
				if i == len(steps)-1 {
					complete = append(complete, slowChain{keys, chain})
					continue
				}
				take(i, keys)
				stages[i] = append(stages[i], slowChain{keys, chain})
			}
		}
		if seq.Until != nil && slowMatch(s, seq.Until.Event, e) {
			for _, keys := range slowKeys(slices.Concat(seq.By, seq.Until.By), e) {
				for i := range stages {
					take(i, keys)
				}
			}
		}
	}
	var found [][]int
	for _, c := range complete {
		if ids := slowVeto(s, seq, all, c, events); ids != nil {
			found = append(found, ids)
		}
	}
	return found
}

// slowVeto is the numbers of a chain's events, with -1 for those that are missing,
// or nil if one is not. Events are numbered in their order.
func slowVeto(s schema, seq *syntax.Sequence, items []*syntax.Item, c slowChain, events []*event) []int {
	var ids []int
	var before, after []*event // that ought to be missing at the beginning and at the end
	first, last := c.events[0], c.events[len(c.events)-1]
	n := 0
	for _, it := range items {
		if !it.Missing {
			ids = append(ids, c.events[n].id)
			n++
			continue
		}
		ids = append(ids, -1)
		for _, e := range events {
			if !slowMatch(s, it.Event, e) || !slices.ContainsFunc(slowKeys(slices.Concat(seq.By, it.By), e), func(k []any) bool { return reflect.DeepEqual(k, c.keys) }) {
				continue
			}
			switch {
			case n == 0:
				if e.id < first.id && last.at.Sub(e.at) <= seq.MaxSpan {
					before = append(before, e)
				}
			case n == len(c.events):
				if e.id > last.id && e.at.Sub(first.at) <= seq.MaxSpan {
					after = append(after, e)
				}
			case c.events[n-1].id < e.id && e.id < c.events[n].id:
				return nil
			}
		}
	}
	switch begins, ends := items[0].Missing, items[len(items)-1].Missing; {
	case begins && ends:
		for _, b := range before {
			if slices.ContainsFunc(after, func(a *event) bool { return a.at.Sub(b.at) <= seq.MaxSpan }) {
				return nil
			}
		}
	case len(before)+len(after) > 0:
		return nil
	}
	return ids
}

// slowSample tries all choices of events for each key, the first ones first.
func slowSample(s schema, sample *syntax.Sample, events []*event) [][]int {
	var chains []slowChain // one for each key
	for _, e := range events {
		for _, it := range sample.Items {
			if !slowMatch(s, it.Event, e) {
				continue
			}
			for _, keys := range slowKeys(slices.Concat(sample.By, it.By), e) {
				if !slices.ContainsFunc(chains, func(c slowChain) bool { return reflect.DeepEqual(c.keys, keys) }) {
					chains = append(chains, slowChain{keys: keys})
				}
			}
		}
	}
	slices.SortFunc(chains, func(a, b slowChain) int { return slices.CompareFunc(a.keys, b.keys, slowOrder) })
	var found [][]int
	for _, c := range chains {
		var choose func(ids []int) []int
		choose = func(ids []int) []int {
			if len(ids) == len(sample.Items) {
				return ids
			}
			it := sample.Items[len(ids)]
			for _, e := range events {
				if slices.Contains(ids, e.id) || !slowMatch(s, it.Event, e) ||
					!slices.ContainsFunc(slowKeys(slices.Concat(sample.By, it.By), e), func(k []any) bool { return reflect.DeepEqual(k, c.keys) }) {
					continue
				}
				if all := choose(append(slices.Clone(ids), e.id)); all != nil {
					return all
				}
			}
			return nil
		}
		if ids := choose(nil); ids != nil {
			found = append(found, ids)
		}
	}
	return found
}

func slowOrder(a, b any) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return -1
	case b == nil:
		return 1
	case slowCompare("==", a, b) == true:
		return 0
	case slowCompare("<", a, b) == true:
		return -1
	}
	return 1
}

func slowKeys(by []*syntax.Field, e *event) [][]any {
	keys := [][]any{nil}
	for _, f := range by {
		var values []any
		for _, v := range e.plain[f.Name] {
			if !slices.Contains(values, v) {
				values = append(values, v)
			}
		}
		if len(values) == 0 {
			if !f.Optional {
				return nil
			}
			values = []any{nil}
		}
		var more [][]any
		for _, k := range keys {
			for _, v := range values {
				more = append(more, append(slices.Clone(k), v))
			}
		}
		keys = more
	}
	return keys
}

var _ eql.Event = (*event)(nil)
