package procwatch

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unique"
)

// world is a table without a kernel. Its clock is in steps of a second, and boot was
// at 0.
type world struct {
	*table
	now     time.Duration
	running map[int]uint64
}

func newWorld(max int) *world {
	w := &world{running: map[int]uint64{}}
	w.table = newTable(max, func(pid int) (uint64, bool) { ticks, ok := w.running[pid]; return ticks, ok })
	return w
}

func (w *world) step() time.Duration { w.now += time.Second; return w.now }

func (w *world) forks(parent, pid int32) {
	w.apply(event{what: evFork, time: w.step(), pid: pid, tgid: pid, parent: parent})
}

func (w *world) execs(pid int32, path string) {
	e, img := w.apply(event{what: evExec, time: w.step(), pid: pid, tgid: pid})
	if path != "" && img != nil {
		w.fill(e, img, program1(path), w.now+time.Millisecond)
	}
}

func (w *world) exits(pid int32) { w.apply(event{what: evExit, time: w.step(), pid: pid, tgid: pid}) }

func (w *world) found(s *snapshot, pid, ppid int32, ticks uint64, path string) {
	s.merge(record{pid: pid, ppid: ppid, ticks: ticks, began: w.now, ended: w.now + 1, readable: path != "", content: program1(path)})
}

// boots is a snapshot of init and a shell.
func (w *world) boots() {
	w.joined = w.step()
	s := w.snapshot(w.now)
	w.found(s, 1, 0, 1, "init")
	w.found(s, 10, 1, 50, "sh")
	s.done(w.now)
}

func program1(path string) content {
	return content{file: unique.Make(File{Path: path, Inode: uint64(len(path))}), cmdline: path + "\x00-x\x00"}
}

// tells writes a process with its images and ancestors: "c|a>b < sh < init origin".
func (w *world) tells(pid int32) string {
	e := w.find(pid, 0)
	if e == nil {
		return "unknown"
	}
	p := w.process(e)
	name := func(i Image) string {
		s := "?"
		if i.Read {
			s = i.Path
		}
		if i.Missed {
			s += "!"
		}
		return s
	}
	var b strings.Builder
	for i, img := range p.Images {
		if i > 0 {
			b.WriteByte('>')
		}
		b.WriteString(name(img))
	}
	if p.Exited {
		b.WriteString(" (exited)")
	}
	if !p.Complete() && !p.FromSnapshot {
		fmt.Fprintf(&b, " (since %v)", p.CompleteSince)
	}
	for _, a := range p.Ancestors {
		b.WriteString(" < ")
		if a.Guess {
			b.WriteByte('~')
		}
		if a.Doubtful {
			b.WriteString("?")
		}
		b.WriteString(name(a.Image))
	}
	b.WriteString(" " + p.End.String())
	return b.String()
}

func TestTable(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(w *world)
		pid  int32
		want string
	}{
		{"from /proc", func(w *world) {}, 10, "sh < ~init origin"},
		{"fork and exec", func(w *world) { w.forks(10, 11); w.execs(11, "curl") }, 11, "sh>curl < sh < ~init origin"},
		{"fork without exec", func(w *world) { w.forks(10, 11) }, 11, "sh < sh < ~init origin"},
		{"the parent executes after the fork", func(w *world) { w.forks(10, 11); w.execs(10, "vi") }, 11, "sh < sh < ~init origin"},
		{"the parent executed before the fork", func(w *world) { w.execs(10, "vi"); w.forks(10, 11) }, 11, "vi < vi < ~init origin"},
		{"the parent is dead", func(w *world) {
			w.forks(10, 11)
			w.execs(11, "evil")
			w.forks(11, 12)
			w.exits(11)
			w.execs(12, "curl")
		}, 12, "evil>curl < evil < sh < ~init origin"},
		{"an image that could not be read", func(w *world) { w.forks(10, 11); w.execs(11, ""); w.forks(11, 12) }, 12, "? < ? < sh < ~init origin"},
		{"images of one process", func(w *world) { w.forks(10, 11); w.execs(11, "a"); w.execs(11, "b"); w.execs(11, "c") }, 11, "sh>a>b>c < sh < ~init origin"},
		{"exit", func(w *world) { w.forks(10, 11); w.exits(11) }, 11, "sh (exited) < sh < ~init origin"},
		{"exec by another thread", func(w *world) { w.forks(10, 11); w.exits(11); w.execs(11, "b") }, 11, "sh>b < sh < ~init origin"},
		{"pid reused", func(w *world) { w.forks(10, 11); w.execs(11, "a"); w.exits(11); w.forks(10, 11) }, 11, "sh < sh < ~init origin"},
		{"pid reused, exit after fork", func(w *world) {
			w.forks(10, 11)
			w.forks(10, 11)
			w.running[11] = uint64(w.now / tick)
			w.exits(11)
		}, 11, "sh < sh < ~init origin"},
		{"pid reused, and both are over", func(w *world) { w.forks(10, 11); w.forks(10, 11); w.exits(11) }, 11, "sh (exited) < sh < ~init origin"},
		{"nobody knows the fork", func(w *world) { w.execs(99, "a") }, 99, "?>a (since 2s) unknown"},
		{"nobody knows the parent", func(w *world) { w.forks(98, 99); w.execs(99, "a") }, 99, "?>a < ? unknown"},

		{"loss: exec of a known process", func(w *world) {
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			w.found(s, 10, 1, 50, "vi")
			s.done(w.now)
		}, 10, "sh>vi! < ~init origin"},
		{"loss: children forked before it is read anew", func(w *world) { w.loses(); w.forks(10, 11) }, 11, "sh < ?sh < ~init origin"},
		{"loss: children forked after it was read anew", func(w *world) {
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			w.found(s, 10, 1, 50, "sh")
			s.done(w.now)
			w.forks(10, 11)
		}, 11, "sh < sh < ~init origin"},
		{"loss: fork", func(w *world) {
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			w.found(s, 10, 1, 50, "sh")
			w.found(s, 11, 10, 150, "curl")
			s.done(w.now)
		}, 11, "curl < ~sh < ~init origin"},
		{"loss: exit", func(w *world) {
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			s.done(w.now)
		}, 10, "sh (exited) < ~init origin"},
		{"loss: exit and fork with the same pid", func(w *world) {
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			w.found(s, 10, 1, 150, "cat")
			s.done(w.now)
		}, 10, "cat < ~init origin"},
		{"loss: exec of a child that had not executed", func(w *world) {
			w.forks(10, 11)
			w.loses()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			w.found(s, 10, 1, 50, "sh")
			w.found(s, 11, 10, 200, "vi")
			s.done(w.now)
		}, 11, "sh>vi! (since 3s) < sh < ~init origin"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(100)
			w.boots()
			test.do(w)
			if got := w.tells(test.pid); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			w.check(t)
		})
	}
}

func (w *world) loses() { from := w.now; w.lost(from, w.step(), 1) }

// check compares the counts with the table.
func (w *world) check(t *testing.T) {
	t.Helper()
	count, images := 0, 0
	children := map[*entry]int32{}
	w.each(func(e *entry) {
		count++
		images += len(e.images)
		if e.parent != nil {
			children[e.parent]++
			if e.parent.gone {
				t.Errorf("%d has a parent that is not in the table", e.pid)
			}
		}
		if e.gone {
			t.Errorf("%d is gone and in the table", e.pid)
		}
		if e.left != (e.dead != nil || e.held) {
			t.Errorf("%d: left %v, queued %v, held %v", e.pid, e.left, e.dead != nil, e.held)
		}
	})
	w.each(func(e *entry) {
		if e.children != children[e] {
			t.Errorf("%d counts %d children and has %d", e.pid, e.children, children[e])
		}
	})
	if count != w.count || images != w.images || count > w.max {
		t.Errorf("%d entries and %d images, counted as %d and %d; at most %d", count, images, w.count, w.images, w.max)
	}
}

// The first reading of /proc goes on while events come.
func TestSnapshotRaces(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(w *world, s *snapshot)
		pid  int32
		want string
	}{
		{"executed before it was read", func(w *world, s *snapshot) {
			w.execs(10, "vi")
			w.step()
			w.found(s, 10, 1, 50, "vi")
		}, 10, "?>vi < ~init origin"},
		{"executed while it was read", func(w *world, s *snapshot) {
			began := w.now
			w.execs(10, "")
			s.merge(record{pid: 10, ppid: 1, ticks: 50, began: began, ended: w.now, readable: true, content: program1("sh")})
		}, 10, "?>? < ~init origin"},
		{"executed after it was read", func(w *world, s *snapshot) {
			w.found(s, 10, 1, 50, "sh")
			w.execs(10, "vi")
		}, 10, "sh>vi < ~init origin"},
		{"executed right after it was read, by the same program", func(w *world, s *snapshot) {
			w.found(s, 10, 1, 50, "sh")
			e, img := w.apply(event{what: evExec, time: w.now + time.Millisecond, pid: 10, tgid: 10})
			w.fill(e, img, program1("sh"), w.now+2*time.Millisecond)
		}, 10, "?>sh < ~init origin"},
		{"executed right after it was read, by another program", func(w *world, s *snapshot) {
			w.found(s, 10, 1, 50, "sh")
			e, img := w.apply(event{what: evExec, time: w.now + time.Millisecond, pid: 10, tgid: 10})
			w.fill(e, img, program1("vi"), w.now+2*time.Millisecond)
		}, 10, "sh>vi < ~init origin"},
		{"forked before its parent was read", func(w *world, s *snapshot) {
			w.forks(10, 11)
			w.step()
			w.found(s, 10, 1, 50, "sh")
			w.found(s, 11, 1, uint64(2*time.Second/tick), "sh")
		}, 11, "sh < sh < ~init origin"},
		{"forked before its parent was read, which then executed", func(w *world, s *snapshot) {
			w.forks(10, 11)
			w.execs(10, "vi")
			w.step()
			w.found(s, 10, 1, 50, "vi")
		}, 11, "? < ? < ~init origin"},
		{"read in the middle of its fork", func(w *world, s *snapshot) {
			ticks := uint64((w.now + time.Second) / tick)
			w.running[11] = ticks
			w.found(s, 10, 1, 50, "sh")
			w.found(s, 11, 10, ticks, "sh")
			w.forks(10, 11)
		}, 11, "sh < sh < ~init origin"},
		{"ended before it was read", func(w *world, s *snapshot) { w.exits(11) }, 11, "? (exited) (since 2s) unknown"},
		{"orphaned and read", func(w *world, s *snapshot) {
			w.forks(10, 11)
			w.forks(11, 12)
			w.exits(11)
			w.step()
			w.found(s, 10, 1, 50, "sh")
			w.found(s, 12, 1, 300, "sh")
		}, 12, "sh < sh < sh < ~init origin"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(100)
			w.joined = w.step()
			s := w.snapshot(w.now)
			w.found(s, 1, 0, 1, "init")
			test.do(w, s)
			s.done(w.now)
			if got := w.tells(test.pid); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			w.check(t)
		})
	}
}

// A start tick tells the lives of a pid apart.
func TestFind(t *testing.T) {
	w := newWorld(100)
	w.boots()
	w.forks(10, 11) // at 2 s, tick 200
	w.exits(11)
	w.forks(10, 11) // at 4 s
	w.ticksKnown(10, 50)
	for _, test := range []struct {
		ticks uint64
		born  time.Duration
	}{{0, 4 * time.Second}, {400, 4 * time.Second}, {399, 4 * time.Second}, {398, 4 * time.Second}, {397, 0}, {401, 0}, {200, 2 * time.Second}, {198, 2 * time.Second}, {201, 0}, {1, 0}} {
		e := w.find(11, test.ticks)
		if born := time.Duration(0); e != nil && e.born != test.born || e == nil && born != test.born {
			t.Errorf("tick %d: %+v, want one born at %v", test.ticks, e, test.born)
		}
	}
	if w.find(10, 50) == nil || w.find(10, 49) != nil || w.find(10, 51) != nil {
		t.Error("the tick of a process that was read is exact")
	}
}

func (w *world) ticksKnown(pid int32, ticks uint64) { w.byPID[pid].ticks = ticks }

func TestExpiry(t *testing.T) {
	w := newWorld(100)
	w.boots()
	w.forks(10, 11)
	w.forks(11, 12)
	w.forks(12, 13)
	w.exits(11)
	w.exits(12)
	w.now += keepDead - time.Second
	w.expire(w.now)
	if got := w.tells(13); got != "sh < sh < sh < sh < ~init origin" {
		t.Error(got)
	}
	w.now += time.Hour
	w.expire(w.now)
	w.check(t)
	if got := w.tells(13); got != "sh < sh < sh < sh < ~init origin" {
		t.Errorf("with a child alive, an hour later: %s", got)
	}
	w.running[13] = uint64(w.byPID[13].born / tick) // by another thread
	w.exits(13)
	w.now += time.Hour
	w.expire(w.now)
	if w.tells(13) == "unknown" || w.count != 5 {
		t.Errorf("a process that runs on without its first thread is gone: %d left", w.count)
	}
	delete(w.running, 13)
	w.now += time.Hour
	for w.expire(w.now) {
	}
	w.check(t)
	if w.count != 2 {
		t.Errorf("%d processes are left, want init and sh", w.count)
	}
}

func TestEviction(t *testing.T) {
	w := newWorld(20)
	w.boots()
	for pid := range int32(100) {
		w.forks(10, 100+pid)
		w.exits(100 + pid)
	}
	w.check(t)
	if w.tells(199) == "unknown" || w.tells(100) != "unknown" || w.count != 20 {
		t.Errorf("the oldest should be gone, and the newest not; %d are there", w.count)
	}

	// A chain of orphans is all ancestors.
	w = newWorld(20)
	w.boots()
	parent := int32(10)
	for pid := int32(100); pid < 150; pid++ {
		w.forks(parent, pid)
		if parent != 10 {
			w.exits(parent)
		}
		parent = pid
	}
	w.check(t)
	if got := w.tells(149); !strings.HasSuffix(got, " truncated") || strings.Count(got, "<") < 10 {
		t.Error(got)
	}

	// Of the living nobody goes.
	w = newWorld(20)
	w.boots()
	for pid := range int32(30) {
		w.forks(10, 100+pid)
	}
	w.check(t)
	if w.stats.Refused != 12 || w.stats.Evicted != 0 || w.tells(100) == "unknown" || w.tells(129) != "unknown" {
		t.Errorf("%+v", w.stats)
	}
	w.exits(100)
	w.exits(101)
	w.forks(129, 200)
	w.check(t)
	if got := w.tells(200); got == "unknown" {
		t.Error("there was room")
	}
}

func TestExecLoop(t *testing.T) {
	w := newWorld(100)
	w.boots()
	w.forks(10, 11)
	for i := range 1000 {
		w.execs(11, fmt.Sprint("p", i))
	}
	w.check(t)
	p := w.process(w.find(11, 0))
	if !p.ImagesCut || p.Execs != 1000 || len(p.Images) != maxImages+1 || p.Images[1].Path != "p0" || p.Image().Path != "p999" || p.Image().Seq != 1000 {
		t.Errorf("%d images: %+v", len(p.Images), p)
	}
	for pid := int32(100); pid < 190; pid++ {
		w.forks(10, pid)
		for range 100 {
			w.execs(pid, "x")
		}
	}
	w.check(t)
	if w.images > 8*w.max {
		t.Errorf("%d images of %d processes", w.images, w.count)
	}
}

// Long arguments do not add up without bound.
func TestLongText(t *testing.T) {
	w := newWorld(20_000)
	w.boots()
	long := strings.Repeat("x", maxCmdline)
	cut := 0
	for pid := int32(100); pid < 6000; pid++ {
		w.forks(10, pid)
		e, img := w.apply(event{what: evExec, time: w.step(), pid: pid, tgid: pid})
		w.fill(e, img, content{file: unique.Make(File{Path: "/bin/a"}), cmdline: strings.Clone(long)}, w.now)
		if i := img.public(); i.CmdlineCut {
			cut++
			if len(i.Cmdline) != shortText || i.Path != "/bin/a" {
				t.Fatalf("cut to %d", len(i.Cmdline))
			}
		}
	}
	if n := w.text.Load(); n > maxText || cut != 5900-maxText/maxCmdline {
		t.Errorf("%d bytes are kept, %d cut", n, cut)
	}
	w.table.byPID, w.table.dead = nil, nil
	for range 100 {
		runtime.GC()
		if w.text.Load() == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d bytes are still accounted for", w.text.Load())
}

func TestActive(t *testing.T) {
	w := newWorld(100)
	w.boots()
	w.forks(10, 11)
	w.forks(10, 12)
	w.forks(10, 13)
	w.execs(11, "a")
	w.exits(13)
	if got := w.active(0, nil); !slices.Equal(got, []int{11, 12}) {
		t.Error(got)
	}
	if got := w.active(w.now-time.Second, nil); !slices.Equal(got, []int{11}) {
		t.Error(got)
	}
}
