package eql

import (
	"bytes"
	"maps"
	"slices"
	"strings"
)

// A wordIndex knows the words that atoms look for in one field, and finds those that a
// value has: of all atoms in one pass. It looks for them in lower case.
type wordIndex struct {
	field     int32                    // place in the Set
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

// shape is where in a value a word is.
type shape uint8

const (
	exactly shape = iota
	atStart
	atEnd
	inside

	shapes = iota
)

// hit is an atom that holds for a value with a word; if the word is there in the right
// case, and if the rest of a pattern matches, too.
type hit struct {
	atom  int32
	fold  bool
	shape shape
	word  string
	glob  *glob // nil if the word is all
}

func (h *hit) holds(s string) bool {
	switch {
	case h.glob != nil:
		return h.glob.match(s, h.fold)
	case h.fold:
		return true
	case h.shape == exactly:
		return s == h.word
	case h.shape == atStart:
		return strings.HasPrefix(s, h.word)
	case h.shape == atEnd:
		return strings.HasSuffix(s, h.word)
	}
	return strings.Contains(s, h.word)
}

// add makes the index know an atom.
func (x *wordIndex) add(atom int32, w *words) {
	for at, list := range [shapes][]string{w.exact, w.prefixes, w.suffixes, w.contained} {
		for _, word := range list {
			x.put(hit{atom: atom, fold: w.fold, shape: shape(at), word: word})
		}
	}
	for i := range w.globs {
		h := hit{atom: atom, fold: w.fold, glob: &w.globs[i]}
		h.shape, h.word = h.glob.part()
		x.put(h)
	}
}

func (x *wordIndex) put(h hit) {
	if h.word == "" && h.shape != exactly {
		x.others = append(x.others, h)
		return
	}
	if x.words[h.shape] == nil {
		x.words[h.shape] = map[string][]hit{}
	}
	word := lower(h.word)
	x.words[h.shape][word] = append(x.words[h.shape][word], h)
}

// part is a text that all strings have that a glob matches, and where. It is empty if
// there is none.
func (g *glob) part() (at shape, text string) {
	first, last := g.parts[0], g.parts[len(g.parts)-1]
	if text, _, _ := strings.Cut(first, "?"); text != "" {
		return atStart, text
	}
	if text := last[strings.LastIndexByte(last, '?')+1:]; text != "" {
		return atEnd, text
	}
	for _, part := range g.parts {
		for run := range strings.SplitSeq(part, "?") {
			if len(run) > len(text) {
				text = run
			}
		}
	}
	return inside, text
}

// finish is called after the last add. The budget is that of automata; words counts
// those that they find.
func (x *wordIndex) finish(budget, words *int) {
	x.exact = x.words[exactly]
	for word := range x.exact {
		x.sizes |= sizeBit(word)
		x.longest = max(x.longest, len(word))
	}
	x.prefixes = newHeads(x.words[atStart])
	x.longest = max(x.longest, x.prefixes.longest)
	backwards := map[string][]hit{}
	for word, hits := range x.words[atEnd] {
		b := []byte(word)
		slices.Reverse(b)
		backwards[string(b)] = hits
	}
	x.suffixes = newHeads(backwards)

	contained := slices.Sorted(maps.Keys(x.words[inside]))
	n, size := affordable(contained, *budget)
	*budget -= size
	if n > 0 {
		x.contained = newAutomaton(contained[:n], true)
		x.base = *words
		*words += n
	}
	for i, word := range contained {
		hits := x.words[inside][word]
		if i < n {
			x.found = append(x.found, hits)
			continue
		}
		for _, h := range hits {
			if h.glob == nil {
				g := newGlob("*" + h.word + "*")
				h.glob = &g
			}
			x.others = append(x.others, h)
		}
	}
	x.words = [shapes]map[string][]hit{}
}

// look tells m which atoms a string satisfies.
func (x *wordIndex) look(s string, m *Matcher) {
	if len(x.exact)+len(x.prefixes.words) > 0 {
		m.lower(s[:min(len(s), x.longest)])
		if x.sizes&sizeBit(s) != 0 && len(s) <= x.longest {
			m.hits(x.exact[string(m.text)], s)
		}
		x.prefixes.look(s, m)
	}
	if n := x.suffixes.longest; n > 0 {
		m.lower(s[max(0, len(s)-n):])
		slices.Reverse(m.text)
		x.suffixes.look(s, m)
	}
	if x.contained != nil {
		m.value++
		x.contained.each(s, func(word int32) {
			// Once, however often it is there: globs take time.
			if seen := &m.seen[x.base+int(word)]; *seen != m.value {
				*seen = m.value
				m.hits(x.found[word], s)
			}
		})
	}
	m.hits(x.others, s)
}

func (m *Matcher) hits(hits []hit, s string) {
	yes := m.now<<1 | 1
	for i := range hits {
		if h := &hits[i]; m.memo[h.atom] != yes && h.holds(s) {
			m.memo[h.atom] = yes
			m.opens(h.atom)
		}
	}
}

// lower makes m.text a string in lower case.
func (m *Matcher) lower(s string) {
	m.text = append(m.text[:0], s...)
	for i, c := range m.text {
		m.text[i] = lowerByte(c)
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
func (h *heads) look(s string, m *Matcher) {
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
			m.hits(h.hits[i], s)
		}
	}
}
