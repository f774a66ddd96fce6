package eql

import (
	"bytes"
	"maps"
	"slices"
	"strings"
)

// A wordIndex knows the words that atoms look for in one field, and finds those that a
// value has: of all atoms in one pass.
type wordIndex struct {
	field         int32 // place in the Set
	plain, folded lookup
}

// lookup is the part of an index for words that are all folded, or all are not.
type lookup struct {
	fold      bool
	words     [shapes]map[string][]hit // while atoms are added
	sizes     uint64                   // of exact words, as in set
	exact     map[string][]hit
	prefixes  heads
	suffixes  heads // reversed
	contained *automaton
	found     [][]hit // by the automaton
	base      int     // where a Matcher notes the first of them
	others    []hit   // for every value
	longest   int     // of exact words and prefixes
}

const (
	asExact = iota
	asPrefix
	asSuffix
	asContained
	shapes
)

// hit is what follows from a word: an atom holds, if the value matches the glob, too,
// or there is none.
type hit struct {
	atom int32
	glob *glob
}

// add makes the index know an atom.
func (x *wordIndex) add(atom int32, w *words) {
	l := &x.plain
	if w.fold {
		l = &x.folded
		l.fold = true
	}
	for shape, list := range [shapes][]string{w.exact, w.prefixes, w.suffixes, w.contained} {
		for _, word := range list {
			l.put(shape, word, hit{atom: atom})
		}
	}
	for i := range w.globs {
		shape, word := w.globs[i].part()
		l.put(shape, word, hit{atom, &w.globs[i]})
	}
}

func (l *lookup) put(shape int, word string, h hit) {
	if word == "" && shape != asExact {
		l.others = append(l.others, h)
		return
	}
	if l.words[shape] == nil {
		l.words[shape] = map[string][]hit{}
	}
	l.words[shape][word] = append(l.words[shape][word], h)
}

// part is a text that all strings have that a glob matches, and where. It is empty if
// there is none.
func (g *glob) part() (shape int, text string) {
	first, last := g.parts[0], g.parts[len(g.parts)-1]
	if text, _, _ := strings.Cut(first, "?"); text != "" {
		return asPrefix, text
	}
	if text := last[strings.LastIndexByte(last, '?')+1:]; text != "" {
		return asSuffix, text
	}
	for _, part := range g.parts {
		for run := range strings.SplitSeq(part, "?") {
			if len(run) > len(text) {
				text = run
			}
		}
	}
	return asContained, text
}

// finish is called after the last add. The budget is that of automata; words counts
// those that they find.
func (x *wordIndex) finish(budget, words *int) {
	x.plain.finish(budget, words)
	x.folded.finish(budget, words)
}

func (l *lookup) finish(budget, words *int) {
	l.exact = l.words[asExact]
	for word := range l.exact {
		l.sizes |= sizeBit(word)
		l.longest = max(l.longest, len(word))
	}
	l.prefixes = newHeads(l.words[asPrefix])
	l.longest = max(l.longest, l.prefixes.longest)
	backwards := map[string][]hit{}
	for word, hits := range l.words[asSuffix] {
		b := []byte(word)
		slices.Reverse(b)
		backwards[string(b)] = hits
	}
	l.suffixes = newHeads(backwards)

	contained := slices.Sorted(maps.Keys(l.words[asContained]))
	n, size := affordable(contained, *budget)
	*budget -= size
	if n > 0 {
		l.contained = newAutomaton(contained[:n], l.fold)
		l.base = *words
		*words += n
	}
	for i, word := range contained {
		hits := l.words[asContained][word]
		if i < n {
			l.found = append(l.found, hits)
			continue
		}
		for _, h := range hits {
			if h.glob == nil {
				g := newGlob("*" + word + "*")
				h.glob = &g
			}
			l.others = append(l.others, h)
		}
	}
	l.words = [shapes]map[string][]hit{}
}

// look tells m which atoms a string satisfies.
func (x *wordIndex) look(s string, m *Matcher) {
	x.plain.look(s, m)
	x.folded.look(s, m)
}

func (l *lookup) look(s string, m *Matcher) {
	if len(l.exact)+len(l.prefixes.words) > 0 {
		m.text = append(m.text[:0], s[:min(len(s), l.longest)]...)
		if l.fold {
			lowerBytes(m.text)
		}
		if l.sizes&sizeBit(s) != 0 && len(s) <= l.longest {
			m.hits(l.exact[string(m.text)], s, l.fold)
		}
		l.prefixes.look(s, l.fold, m)
	}
	if n := l.suffixes.longest; n > 0 {
		m.text = append(m.text[:0], s[max(0, len(s)-n):]...)
		if l.fold {
			lowerBytes(m.text)
		}
		slices.Reverse(m.text)
		l.suffixes.look(s, l.fold, m)
	}
	if l.contained != nil {
		m.value++
		l.contained.each(s, func(word int32) {
			// Once, however often it is there: globs take time.
			if seen := &m.seen[l.base+int(word)]; *seen != m.value {
				*seen = m.value
				m.hits(l.found[word], s, l.fold)
			}
		})
	}
	m.hits(l.others, s, l.fold)
}

func (m *Matcher) hits(hits []hit, s string, fold bool) {
	for _, h := range hits {
		if h.glob == nil || h.glob.match(s, fold) {
			m.hit(h.atom)
		}
	}
}

func lowerBytes(b []byte) {
	for i, c := range b {
		b[i] = lowerByte(c)
	}
}

// heads are words with which a text may begin.
type heads struct {
	first   [256]bool // what the words begin with
	words   [][]byte  // sorted
	hits    [][]hit
	shorter []int32 // the next shorter of the words that begins this one; -1 if there is none
	longest int
}

func newHeads(words map[string][]hit) heads {
	var h heads
	for _, word := range slices.Sorted(maps.Keys(words)) {
		shorter := int32(len(h.words)) - 1
		for shorter >= 0 && !strings.HasPrefix(word, string(h.words[shorter])) {
			shorter = h.shorter[shorter]
		}
		h.first[word[0]] = true
		h.words = append(h.words, []byte(word))
		h.hits = append(h.hits, words[word])
		h.shorter = append(h.shorter, shorter)
		h.longest = max(h.longest, len(word))
	}
	return h
}

// look finds the words with which m.text begins, which s has at one of its ends. What
// lies between a beginning of the text and the text, in their order, begins with the
// former; so that the last word not after the text, and the shorter ones that begin
// it, are all that there can be.
func (h *heads) look(s string, fold bool, m *Matcher) {
	if len(h.words) == 0 || len(m.text) == 0 || !h.first[m.text[0]] {
		return
	}
	lo, hi := 0, len(h.words)
	for lo < hi {
		if mid := (lo + hi) / 2; bytes.Compare(h.words[mid], m.text) <= 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	for i := int32(lo) - 1; i >= 0; i = h.shorter[i] {
		if bytes.HasPrefix(m.text, h.words[i]) {
			m.hits(h.hits[i], s, fold)
		}
	}
}
