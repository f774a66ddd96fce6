package eql

// An automaton tells whether a text contains any of a list of words, in one pass
// and one look-up per byte of the text, however many the words (Aho and Corasick,
// 1975). Command lines are long and chosen by whoever is being judged, so
// trying one word after the other will not do.
type automaton struct {
	column [256]uint16 // of a byte; 0 for those in no word
	width  int         // columns
	next   []int32     // row*width + column -> row*width of the next row; complemented if words end there
	word   []int32     // by row: the word that ends there as a whole; -1 if none does
	other  []int32     // by row: row*width of its longest proper suffix at which a word ends as a whole, or 0
}

// tableBudget bounds the tables of one query to 16 MB. Words that would need more
// are looked for one after the other. The longest list that is published takes a
// tenth of it; a file of a megabyte, written to that end, would take a gigabyte.
const tableBudget = 1 << 22

// affordable is how many of the words a table may have, and what it then takes
// from the budget.
func affordable(words []string, budget int) (n, size int) {
	var seen [256]bool
	width, rows := 1, 1
	for n, w := range words {
		for i := range len(w) {
			if !seen[w[i]] {
				seen[w[i]] = true
				width++
			}
		}
		if rows += len(w); rows*width > budget {
			return n, size
		}
		size = rows * width
	}
	return len(words), size
}

// newAutomaton takes words that are not empty, and lower case if they are to fold.
func newAutomaton(words []string, fold bool) *automaton {
	a := &automaton{width: 1}
	for _, w := range words {
		for i := range len(w) {
			if c := w[i]; a.column[c] == 0 {
				a.column[c] = uint16(a.width)
				a.width++
			}
		}
	}

	// The trie of the words, as rows that lead to rows: 0, the root, is "nowhere".
	a.next, a.word = make([]int32, a.width), []int32{-1}
	for n, w := range words {
		at := 0
		for i := range len(w) {
			to := &a.next[at+int(a.column[w[i]])]
			if *to == 0 {
				*to = int32(len(a.next))
				a.next, a.word = append(a.next, make([]int32, a.width)...), append(a.word, -1)
				to = &a.next[at+int(a.column[w[i]])]
			}
			at = int(*to)
		}
		a.word[at/a.width] = int32(n)
	}

	// Breadth first, so that the row for the longest proper suffix of a row is
	// complete before it is needed: what leads nowhere leads where it does there.
	suffix := make([]int32, len(a.word))
	a.other = make([]int32, len(a.word))
	for queue := []int32{0}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		row := int(at) / a.width
		back := suffix[row]
		if a.other[row] = back; a.word[int(back)/a.width] < 0 {
			a.other[row] = a.other[int(back)/a.width]
		}
		for col := range int32(a.width) {
			to := &a.next[at+col]
			switch fallback := a.next[back+col]; {
			case *to == 0 && at != 0:
				*to = fallback
			case *to != 0:
				if at != 0 {
					suffix[int(*to)/a.width] = fallback
				}
				queue = append(queue, *to)
			}
		}
	}
	for i, to := range a.next {
		if row := int(to) / a.width; a.word[row] >= 0 || a.other[row] > 0 {
			a.next[i] = ^to
		}
	}

	if fold {
		for c := 'A'; c <= 'Z'; c++ {
			a.column[c] = a.column[c|0x20]
		}
	}
	return a
}

// find reports whether s has one of the words.
func (a *automaton) find(s string) bool {
	at := int32(0)
	for i := range len(s) {
		if at = a.next[at+int32(a.column[s[i]])]; at < 0 {
			return true
		}
	}
	return false
}

// each calls has for the words that s has, by their places in the list, and as often
// as s has them. Of equal words it knows the last.
func (a *automaton) each(s string, has func(word int32)) {
	at := int32(0)
	for i := range len(s) {
		if at = a.next[at+int32(a.column[s[i]])]; at >= 0 {
			continue
		}
		at = ^at
		for row := int(at) / a.width; row > 0; row = int(a.other[row]) / a.width {
			if word := a.word[row]; word >= 0 {
				has(word)
			}
		}
	}
}
