package policy

import (
	"iter"
	"math/bits"
)

// bitset is a set of small numbers.
type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(n int)      { b[n/64] |= 1 << (n % 64) }
func (b bitset) has(n int) bool { return b[n/64]>>(n%64)&1 == 1 }

// add makes b the union with another of the same size.
func (b bitset) add(other bitset) {
	for i, w := range other {
		b[i] |= w
	}
}

// or lists what is in either of two sets of the same size, in order.
func (b bitset) or(other bitset) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range b {
			for w := b[i] | other[i]; w != 0; w &= w - 1 {
				if !yield(i*64 + bits.TrailingZeros64(w)) {
					return
				}
			}
		}
	}
}
