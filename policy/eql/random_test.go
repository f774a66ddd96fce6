package eql_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// random makes queries and events from so few words that they often meet.
type random struct {
	*rand.Rand
	untyped bool // without addresses and dates
}

func newRandom(seed uint64) random { return random{Rand: rand.New(rand.NewPCG(seed, 0))} }

func (r random) pick(words ...string) string { return words[r.IntN(len(words))] }

func (r random) some(of func() string) string {
	list := []string{of()}
	for r.IntN(2) == 0 {
		list = append(list, of())
	}
	return "(" + strings.Join(list, ", ") + ")"
}

// query is a sequence, a sample or a condition, and perhaps pipes.
func (r random) query() string {
	src := ""
	switch r.IntN(6) {
	case 0:
		src = r.pick("any", "a", "b") + " where " + r.condition(2)
	case 1:
		src = r.sample()
	case 2:
		src = r.sequence()
	default:
		src = r.withMissing()
	}
	for r.IntN(4) == 0 {
		src += r.pick(" | head ", " | tail ") + r.pick("0", "1", "2", "5")
	}
	return src
}

// mangled is a query with some tokens removed, added, replaced or swapped.
func (r random) mangled() string {
	toks := strings.Fields(strings.NewReplacer("(", " ( ", ")", " ) ", "[", " [ ", "]", " ] ", ",", " , ").Replace(r.query()))
	for range r.IntN(4) {
		i := r.IntN(len(toks))
		switch r.IntN(4) {
		case 0:
			toks = slices.Delete(toks, i, i+1)
		case 1:
			toks = slices.Insert(toks, i, r.token())
		case 2:
			toks[i] = r.token()
		case 3:
			j := r.IntN(len(toks))
			toks[i], toks[j] = toks[j], toks[i]
		}
		if len(toks) == 0 {
			return ""
		}
	}
	return strings.Join(toks, r.pick(" ", "\n"))
}

func (r random) token() string {
	return r.pick("and", "or", "not", "any", "by", "false", "true", "null", "in", "in~", "join", "like", "like~", "maxspan", "of",
		"regex", "regex~", "sequence", "where", "with", "runs", "head", "a", "s", "n", "`a b`.`x``y`", "@t", "_x", "f~", "length",
		"0", "5", "1.", ".5", "1e3", "1s", "ms", `"x"`, `"""y"""`, `""""q"""""`, `"\n\""`, `"\u{41}"`, `'x'`, `?"x"`,
		"(", ")", "[", "]", "![", ",", ".", "?", ":", "==", "!=", "<", "<=", "=", "+", "-", "*", "/", "%", "|",
		"/* c /* d */ */", "// z\n", "[0]", "~")
}

func (r random) sequence() string {
	return r.sequenceOf(r.pick("", " with maxspan=5ms", " with maxspan=3ms"), 2+r.IntN(2), func() string { return "" })
}

// withMissing is a sequence with missing events, as often as not.
func (r random) withMissing() string {
	return r.sequenceOf(r.pick(" with maxspan=9ms", " with maxspan=5ms", " with maxspan=3ms", " with maxspan=1ms"), 1+r.IntN(3), func() string { return r.pick("", "", "!") })
}

// sequenceOf has some items that are not missing, and between them what absent
// says.
func (r random) sequenceOf(span string, items int, absent func() string) string {
	src := "sequence" + r.pick("", "", "", " by s", " by ?s", " by args", " by ?args, n") + span
	own := r.pick("", "", "n", "t", "args")
	simple := r.IntN(2) == 0
	if simple {
		own = ""
	}
	all := 0
	item := func() {
		if simple {
			src += "[" + r.pick("a", "b", "c") + " where " + r.pick("true", "true", "n > 1") + "]"
		} else {
			src += r.item(own)
		}
		all++
		if r.IntN(4) == 0 {
			src += " with runs=2"
			all++
		}
	}
	gap := func() {
		for absent() != "" {
			src += " !"
			item()
		}
	}
	for range items {
		gap()
		src += " "
		item()
	}
	gap()
	if all == 1 {
		src += " " + r.item(own)
	}
	if r.IntN(3) == 0 {
		src += " until " + r.item(own)
	}
	return src
}

func (r random) sample() string {
	own := r.pick("n", "t", "args")
	src := "sample" + r.pick("", " by s", " by ?s", " by args, n")
	for range 2 + r.IntN(2) {
		src += " " + r.item(own)
	}
	return src
}

func (r random) item(own string) string {
	src := "[" + r.pick("any", "a", "b") + " where " + r.pick("true", "true", "n > 1", "not ok", `s == "ab"`, r.condition(1)) + "]"
	switch {
	case own == "":
	case own == "n":
		src += " by " + r.pick("n", "?n", "m")
	default:
		src += " by " + r.pick("s", "?t", "args")
	}
	return src
}

func (r random) condition(depth int) string {
	if depth == 0 || r.IntN(4) == 0 {
		return r.atom()
	}
	switch r.IntN(5) {
	case 0, 1:
		return "not (" + r.condition(depth-1) + ")"
	case 2:
		return "(" + r.condition(depth-1) + ") or " + r.condition(depth-1)
	}
	return "(" + r.condition(depth-1) + ") and (" + r.condition(depth-1) + ")"
}

func (r random) atom() string {
	kind := r.IntN(14)
	if r.untyped && (kind == 10 || kind == 11) {
		kind = 9
	}
	switch kind {
	case 0, 1, 2:
		return r.text() + " " + r.pick(":", "like", "like~") + " " + r.some(r.pattern)
	case 3:
		return r.text() + " " + r.pick("regex", "regex~") + " " + r.some(r.regex)
	case 4:
		return r.text() + r.pick(" in ", " not in ", " in~ ", " not in~ ") + r.some(r.word)
	case 5:
		return r.text() + r.comparison() + r.pick(r.word(), "null")
	case 6:
		return r.number() + r.comparison() + r.pick(r.integer(), r.integer(), "1.5", "null", "1 / 0")
	case 7:
		return "(" + r.number() + ")" + r.pick(" in ", " not in ") + r.some(r.integer)
	case 8:
		return r.pick("ok", "?ok", "?gone", "true", "null", "ok == true", "false != ok", "ok in (true, null)")
	case 9:
		return r.pick("startsWith", "startsWith~", "endsWith", "endsWith~", "stringContains", "stringContains~") + "(" + r.text() + ", " + r.pick(r.word(), r.text()) + ")"
	case 10:
		return r.pick(`ip == "10.0.0.0/8"`, `"10.1.2.3" == ip`, `ip != "fd00:ec2::254"`, `ip in ("::1", "10.1.0.0/16")`, `cidrMatch(ip, "10.1.2.3", "fd00::/8")`, `cidrMatch(s, "::1")`, "ip == null")
	case 11:
		return r.pick(`at > "2025-02-04T00:00:00.003Z"`, `at == null`, `at in ("2025-02-04")`, `"2025-02-04T00:00:00.002Z" >= at`)
	case 12:
		return "(" + r.atom() + r.pick(") == ", ") != ") + r.pick("null", "true", "false")
	}
	return "(" + r.atom() + r.pick(" and ", " or ", " and not ") + r.atom() + r.pick(") == null", ") != true", ") == false")
}

func (r random) comparison() string { return " " + r.pick("==", "!=", "<", "<=", ">", ">=") + " " }

func (r random) text() string {
	switch r.IntN(10) {
	case 0:
		return "concat(" + r.pick("s", "t", "n", "d", "ok") + ", " + r.pick("args", r.word(), "null", r.printed()) + ")"
	case 1:
		return "substring(" + r.field() + ", " + r.integer() + r.pick("", ", "+r.integer()) + ")"
	case 2:
		return r.pick("between", "between~") + "(" + r.field() + ", " + r.word() + ", " + r.word() + r.pick("", ", true", ", ok") + ")"
	case 3:
		return "string(" + r.pick("s", "n", "ok", "d", r.printed()) + ")"
	}
	return r.field()
}

// printed is a field whose value is not a string.
func (r random) printed() string {
	if r.untyped {
		return "n"
	}
	return r.pick("at", "ip")
}

func (r random) field() string { return r.pick("s", "t", "args", "?s", "?gone") }

func (r random) number() string {
	switch r.IntN(8) {
	case 0:
		return "length(" + r.text() + ")"
	case 1:
		return r.pick("indexOf", "indexOf~") + "(" + r.text() + ", " + r.word() + r.pick("", ", 1", ", n") + ")"
	case 2:
		return "number(" + r.pick("s", "concat(n)", `"0x1"`) + ")"
	case 3, 4:
		return "(" + r.number() + r.pick(" + ", " - ", " * ", " / ", " % ") + r.pick("n", "m", "2", "1.5") + ")"
	}
	return r.pick("n", "m", "d", "-n", "?gone")
}

func (r random) integer() string { return r.pick("0", "1", "2", "-1", "3") }

func (r random) word() string {
	return r.pick(`"a"`, `"ab"`, `"AB"`, `"b"`, `"aab"`, `""`, `"é"`, `"É"`, `"aéb"`)
}

func (r random) pattern() string {
	p := ""
	for range r.IntN(5) {
		p += r.pick("*", "*", "?", "a", "b", "A", "é", "ab")
	}
	return `"` + p + `"`
}

func (r random) regex() string {
	p := r.pick("a", "b", ".", "é")
	for range r.IntN(3) {
		p += r.pick("a", "b*", ".*", "(a|b)", "[ab]+", "[^a]?", "é{1,2}")
	}
	return `"` + p + `"`
}

// events have few values, one in five fields empty, one in five an array, and often
// the same time.
func (r random) events(n int) []*event {
	values := []struct {
		name string
		one  func() any
	}{
		{"s", func() any { return r.pick("a", "ab", "AB", "aab", "é", "aÉb", "", "1") }},
		{"t", func() any { return r.pick("a", "ab", "b") }},
		{"args", func() any { return r.pick("a", "ab", "Ab", "bab", "é") }},
		{"n", func() any { return int64(r.IntN(4)) }},
		{"m", func() any { return int64(r.IntN(3) - 1) }},
		{"d", func() any { return float64(r.IntN(4)) / 2 }},
		{"ip", func() any { return netip.MustParseAddr(r.pick("10.1.2.3", "::1", "::ffff:10.1.2.3", "fd00:ec2::254")) }},
		{"ok", func() any { return r.IntN(2) == 0 }},
		{"at", func() any { return epoch.Add(time.Duration(r.IntN(5)) * time.Millisecond) }},
	}
	events, at := make([]*event, n), epoch
	for i := range events {
		plain := map[string][]any{"event.category": {r.pick("a", "b", "c")}}
		for _, v := range values {
			switch r.IntN(5) {
			case 0:
			case 1:
				for range 1 + r.IntN(3) {
					plain[v.name] = append(plain[v.name], v.one())
				}
			default:
				plain[v.name] = []any{v.one()}
			}
		}
		at = at.Add(time.Duration(r.IntN(3)) * time.Millisecond)
		events[i] = newEvent(letters, plain)
		events[i].id, events[i].at = i+1, at
	}
	return events
}

func describe(events []*event) string {
	var lines []string
	for _, e := range events {
		var fields []string
		for name, vs := range e.plain {
			fields = append(fields, fmt.Sprintf("%s=%v", name, vs))
		}
		slices.Sort(fields)
		lines = append(lines, fmt.Sprintf("%d @%v %s", e.id, e.at.Sub(epoch), strings.Join(fields, " ")))
	}
	return strings.Join(lines, "\n")
}
