package attribution

import (
	"os"
	"testing"
)

// BenchmarkRead reads a process of which nothing is remembered: what a new client costs, and each of its parents that
// was not read a moment ago.
func BenchmarkRead(b *testing.B) {
	h := newFinder(b).host
	p, st, err := h.pin(os.Getppid())
	if err != nil {
		b.Fatal(err)
	}
	defer h.unpin(p)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.readImage(p, st); err != nil {
			b.Fatal(err)
		}
	}
}
