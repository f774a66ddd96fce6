package eql

// An automaton tells whether a text contains any of a list of words, in one pass
// and one look-up per byte of the text, however many the words (Aho and Corasick,
// 1975). Command lines are long and chosen by whoever is being judged, so
// trying one word after the other will not do.
type automaton struct {
	column [256]uint16 // of a byte; 0 for those in no word
	width  int         // columns
	next   []int32     // row*width + column -> row*width of the next row, or found
}

const found = -1

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
	a.next = make([]int32, a.width)
	for _, w := range words {
		at := 0
		for i := range len(w) {
			cell := at + int(a.column[w[i]])
			if a.next[cell] == found {
				break // a shorter word is a prefix of this one
			}
			if i == len(w)-1 {
				a.next[cell] = found
				break
			}
			if a.next[cell] == 0 {
				a.next[cell] = int32(len(a.next))
				a.next = append(a.next, make([]int32, a.width)...)
			}
			at = int(a.next[cell])
		}
	}

	// Breadth first, so that the row for the longest proper suffix of a row is
	// complete before it is needed: what leads nowhere leads where it does there.
	suffix := make([]int32, len(a.next)/a.width)
	for queue := []int32{0}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		back := suffix[int(at)/a.width]
		for col := range int32(a.width) {
			to := &a.next[at+col]
			fallback := a.next[back+col]
			switch {
			case *to == found:
			case *to == 0 && at != 0, fallback == found && at != 0:
				*to = fallback
			case *to != 0:
				if at != 0 {
					suffix[int(*to)/a.width] = fallback
				}
				queue = append(queue, *to)
			}
		}
	}

	if fold {
		for c := 'A'; c <= 'Z'; c++ {
			a.column[c] = a.column[c|0x20]
		}
	}
	return a
}

func (a *automaton) find(s string) bool {
	at := int32(0)
	for i := range len(s) {
		at = a.next[at+int32(a.column[s[i]])]
		if at == found {
			return true
		}
	}
	return false
}
