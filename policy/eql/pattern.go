package eql

import (
	"slices"
	"strings"
	"unicode/utf8"
)

// A pattern of : and like is text in which * stands for any run of characters,
// also none, and ? for exactly one. Nothing escapes them. Rules list patterns by
// the dozen, and four of five begin or end with their only star, so a list is
// sorted by shape and each shape is looked up in its own way.

// words is a list of patterns by shape, or of the words of another condition that
// comes to the same; a string matches if it matches any. They are lower case if they
// fold.
type words struct {
	fold      bool
	all       bool // any string matches
	exact     []string
	prefixes  []string
	suffixes  []string
	contained []string
	globs     []glob
}

func sortByShape(patterns []string, fold bool) *words {
	w := &words{fold: fold}
	for _, p := range patterns {
		p = w.spelled(p)
		inner := strings.Trim(p, "*")
		switch {
		case strings.ContainsAny(inner, "*?"):
			w.globs = append(w.globs, newGlob(p))
		case p == inner:
			w.exact = append(w.exact, p)
		case inner == "":
			w.all = true
		case p[0] != '*':
			w.prefixes = append(w.prefixes, inner)
		case p[len(p)-1] != '*':
			w.suffixes = append(w.suffixes, inner)
		default:
			w.contained = append(w.contained, inner)
		}
	}
	return w
}

// spelled is a word as it is in the list.
func (w *words) spelled(word string) string {
	if w.fold {
		return lower(word)
	}
	return word
}

// compile returns the test for the list. The budget is that of automata.
func (w *words) compile(budget *int) func(string) bool {
	if w.all {
		return func(string) bool { return true }
	}
	c := &wildcards{words: w, set: newSet(w.exact, w.fold), rest: slices.Clip(w.globs)}
	if len(w.prefixes)+len(w.suffixes)+len(w.contained)+len(w.globs) == 0 {
		return c.set.has
	}
	n, size := affordable(w.contained, *budget)
	*budget -= size
	if n > 0 {
		c.contains = newAutomaton(w.contained[:n], w.fold)
	}
	for _, word := range w.contained[n:] {
		c.rest = append(c.rest, newGlob("*"+word+"*"))
	}
	return c.match
}

// wildcards is a compiled list.
type wildcards struct {
	*words
	set      set        // of exact
	contains *automaton // of contained; nil if there are none
	rest     []glob     // globs, and what the automaton has no room for
}

func (w *wildcards) match(s string) bool {
	if w.set.has(s) {
		return true
	}
	for _, p := range w.prefixes {
		if hasPrefix(s, p, w.fold) {
			return true
		}
	}
	for _, p := range w.suffixes {
		if hasSuffix(s, p, w.fold) {
			return true
		}
	}
	if w.contains != nil && w.contains.find(s) {
		return true
	}
	for i := range w.rest {
		if w.rest[i].match(s, w.fold) {
			return true
		}
	}
	return false
}

// A set has strings, lower-case ones if it folds.
type set struct {
	fold  bool
	sizes uint64 // a bit for each length; the last one for all from 63
	words map[string]struct{}
	long  []string // those that do not fit a buffer
}

// setBuffer bounds the strings that are folded on the stack and looked up; names
// and most paths do. It is cleared for every look-up, so it should not be large.
const setBuffer = 128

func newSet(words []string, fold bool) set {
	s := set{fold: fold, words: make(map[string]struct{}, len(words))}
	for _, w := range words {
		s.sizes |= sizeBit(w)
		switch {
		case !fold:
			s.words[w] = struct{}{}
		case len(w) <= setBuffer:
			s.words[lower(w)] = struct{}{}
		default:
			s.long = append(s.long, lower(w))
		}
	}
	return s
}

func (s *set) has(str string) bool {
	if s.sizes&sizeBit(str) == 0 {
		return false
	}
	if !s.fold {
		_, ok := s.words[str]
		return ok
	}
	if len(str) > setBuffer {
		return slices.ContainsFunc(s.long, func(w string) bool { return len(w) == len(str) && hasPrefix(str, w, true) })
	}
	var buf [setBuffer]byte
	for i := range len(str) {
		buf[i] = lowerByte(str[i])
	}
	_, ok := s.words[string(buf[:len(str)])]
	return ok
}

func sizeBit(s string) uint64 { return 1 << min(len(s), 63) }

// A glob is a pattern cut at its stars.
type glob struct {
	parts []string
	tail  int // characters in the last part
}

func newGlob(p string) glob {
	g := glob{parts: strings.Split(p, "*")}
	g.tail = utf8.RuneCountInString(g.parts[len(g.parts)-1])
	return g
}

// match finds the first part at the beginning, the last one at the end, and the
// others between them, each as far to the left as it goes: what is left over for
// the next one is then the most there can be.
func (g *glob) match(s string, fold bool) bool {
	parts := g.parts
	n := matchPart(s, parts[0], fold)
	if n < 0 {
		return false
	}
	s = s[n:]
	if len(parts) == 1 {
		return s == ""
	}
	end := len(s)
	for range g.tail {
		_, n := utf8.DecodeLastRuneInString(s[:end])
		end -= n
	}
	if last := parts[len(parts)-1]; matchPart(s[end:], last, fold) != len(s)-end {
		return false
	}
	s = s[:end]
	for _, part := range parts[1 : len(parts)-1] {
		for {
			if n := matchPart(s, part, fold); n >= 0 {
				s = s[n:]
				break
			}
			if s == "" {
				return false
			}
			_, n := utf8.DecodeRuneInString(s)
			s = s[n:]
		}
	}
	return true
}

// matchPart returns the length of the beginning of s that a part matches, or -1.
func matchPart(s, part string, fold bool) int {
	n := 0
	for i := range len(part) {
		if n == len(s) {
			return -1
		}
		switch c := s[n]; {
		case part[i] == '?':
			_, size := utf8.DecodeRuneInString(s[n:])
			n += size
		case c == part[i] || fold && lowerByte(c) == part[i]:
			n++
		default:
			return -1
		}
	}
	return n
}

// hasPrefix and hasSuffix take a lower-case p if they fold.
func hasPrefix(s, p string, fold bool) bool {
	if len(s) < len(p) {
		return false
	}
	s = s[:len(p)]
	return s == p || fold && equalFold(s, p)
}

func hasSuffix(s, p string, fold bool) bool {
	return len(s) >= len(p) && hasPrefix(s[len(s)-len(p):], p, fold)
}

// equalFold compares strings of equal length, the second in lower case.
func equalFold(s, p string) bool {
	for i := range len(s) {
		if lowerByte(s[i]) != p[i] {
			return false
		}
	}
	return true
}

// index is strings.Index, but for the folding. It takes a lower-case word then.
func index(s, word string, fold bool) int {
	if !fold {
		return strings.Index(s, word)
	}
	for i := 0; i+len(word) <= len(s); i++ {
		if equalFold(s[i:i+len(word)], word) {
			return i
		}
	}
	return -1
}

func lastIndex(s, word string, fold bool) int {
	if !fold {
		return strings.LastIndex(s, word)
	}
	for i := len(s) - len(word); i >= 0; i-- {
		if equalFold(s[i:i+len(word)], word) {
			return i
		}
	}
	return -1
}

// lower folds ASCII only, as Lucene does.
func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		b[i] = lowerByte(c)
	}
	return string(b)
}

func lowerByte(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}
