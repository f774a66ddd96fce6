package procwatch

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
	"unique"
)

func BenchmarkDrainIdle(b *testing.B) {
	w := open(b, Options{})
	b.ReportAllocs()
	for b.Loop() {
		w.Drain()
	}
}

func BenchmarkDrainShared(b *testing.B) {
	w := open(b, Options{})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w.Drain()
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	w := open(b, Options{})
	b.ReportAllocs()
	for b.Loop() {
		if err := w.Check(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkProcess(b *testing.B) {
	w := open(b, Options{})
	ticks := startTicks(b, os.Getpid())
	p, ok := w.Process(os.Getpid(), ticks)
	if !ok {
		b.Fatal("we are not in the table")
	}
	b.ReportMetric(float64(len(p.Ancestors)), "ancestors")
	b.ReportAllocs()
	for b.Loop() {
		w.Process(os.Getpid(), ticks)
	}
}

func BenchmarkMark(b *testing.B) {
	w := open(b, Options{})
	ticks := startTicks(b, os.Getpid())
	b.ReportAllocs()
	for b.Loop() {
		w.Mark(os.Getpid(), ticks)
	}
}

// One image as the reader reads it: directory, exe, its inode, cmdline, stat.
func BenchmarkRead(b *testing.B) {
	r := reader{proc: "/proc", lockable: new(Lockable)}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := r.record(int32(os.Getpid())); !ok {
			b.Fatal("not read")
		}
	}
}

// A fork, an exec and an exit, from bytes to the table, which is full of the dead.
func BenchmarkEvents(b *testing.B) {
	w := newWorld(defaultMax)
	w.boots()
	pid := int32(100)
	message := recordedFork()
	b.ReportAllocs()
	for b.Loop() {
		pid++
		for _, what := range []uint32{evFork, evExec, evExit} {
			if _, err := parseEvent(message); err != nil {
				b.Fatal(err)
			}
			w.now += time.Microsecond
			w.apply(event{what: what, time: w.now, pid: pid, tgid: pid, parent: 10})
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/3, "ns/event")
}

func BenchmarkSnapshot(b *testing.B) {
	w := open(b, Options{})
	b.ReportAllocs()
	for b.Loop() {
		if err := w.snapshot(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(w.Stats().Processes), "processes")
}

// Ten thousand processes take less than 16 MB, each with arguments and images of
// its own; a child that does not execute takes little.
func TestMemory(t *testing.T) {
	var w *world
	size := func(what string, most uint64, fill func()) {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		fill()
		runtime.GC()
		runtime.ReadMemStats(&after)
		n := (after.HeapAlloc - before.HeapAlloc) / uint64(w.count)
		t.Logf("%s: %d bytes for each of %d processes", what, n, w.count)
		if n > most {
			t.Errorf("%s: %d bytes each, more than %d", what, n, most)
		}
	}
	w = newWorld(defaultMax)
	w.boots()
	size("executed twice", 1600, func() {
		for pid := int32(100); pid < 10_100; pid++ {
			w.forks(10, pid)
			for i := range 2 {
				e, img := w.apply(event{what: evExec, time: w.step(), pid: pid, tgid: pid})
				w.fill(e, img, content{
					file:    unique.Make(File{Path: fmt.Sprintf("/usr/bin/program-%d", pid%100+int32(i)), Inode: uint64(pid % 100)}),
					cmdline: fmt.Sprintf("/usr/bin/program-%d\x00--one=%d\x00--configuration=/etc/program/%d.conf\x00", pid, pid, pid),
				}, w.now)
			}
		}
	})
	w = newWorld(defaultMax)
	w.boots()
	size("forked only", 400, func() {
		for pid := int32(100); pid < 10_100; pid++ {
			w.forks(10, pid)
		}
	})
	runtime.KeepAlive(w)
}

// Drains at the same time share one, and each sees what was before it.
func TestDrainShared(t *testing.T) {
	w := open(t, Options{})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 20 {
				p, err := echo("/bin/echo")
				if err != nil {
					t.Error(err)
					return
				}
				if err := w.Drain(); err != nil {
					t.Error(err)
				}
				if got, ok := w.Process(p.Pid, 0); !ok || got.Execs != 1 {
					t.Errorf("%v %+v", ok, got)
				}
				p.Wait()
			}
		})
	}
	wg.Wait()
}
