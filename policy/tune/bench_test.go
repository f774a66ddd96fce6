package tune

import (
	"testing"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// BenchmarkLine reads requests that would be refused, each of another process, over and
// over; "read" is what of that the reader takes.
func BenchmarkLine(b *testing.B) {
	h := read(b, policy.Config{}, Options{})
	for i := range 500 {
		h.asked(monday.AddDate(0, 0, i%7), nil)
	}
	b.Run("read", func(b *testing.B) {
		r, rec := event.NewReader(), event.Record{}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if err := r.Read(h.lines[i%len(h.lines)], &rec); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("tune", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if err := h.tuner.Line(h.lines[i%len(h.lines)]); err != nil {
				b.Fatal(err)
			}
		}
	})
}
