package attribution_test

import (
	"context"
	"testing"
)

// BenchmarkLevel3 asks about a connection of a process that is known, as a client's second one within milliseconds is.
func BenchmarkLevel3(b *testing.B) {
	s := level3(b)
	_, out := s.start("plain")
	f := s.Finder
	conn, _ := s.accept(out)
	ctx := context.Background()
	b.Run("Accounted", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l := f.Find(conn)
			if o, ok := l.Accounted(ctx); !ok || !o.Complete {
				b.Fatalf("%+v", o)
			}
			l.Close()
		}
	})
	l := f.Find(conn)
	defer l.Close()
	b.Run("Changed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if l.Changed() {
				b.Fatal("changed")
			}
		}
	})
	b.Run("Owner", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if o := l.Owner(ctx); !o.Attributed() {
				b.Fatal(o.Reason)
			}
		}
	})
	b.Run("Process", func(b *testing.B) {
		pid := l.Owner(ctx).Subjects[0].PID
		b.ReportAllocs()
		for b.Loop() {
			if _, err := f.Process(pid); err != nil {
				b.Fatal(err)
			}
		}
	})
}
