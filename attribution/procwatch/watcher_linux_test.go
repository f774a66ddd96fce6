package procwatch

import (
	"context"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheck(t *testing.T) {
	w := open(t, Options{})
	for range 100 {
		if err := w.Check(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if s := w.Stats(); s.Buffer != defaultBuffer || s.Lost != 0 {
		t.Errorf("%+v", s)
	}
}

// The program that started another one and ended is known by name, although /proc
// says that the subreaper is the parent.
func TestOrphan(t *testing.T) {
	w := open(t, Options{})
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	middle, last := program(t, "middle"), program(t, "last")
	a := run(t, middle, "orphan", last)
	orphan, err := strconv.Atoi(a.first)
	if err != nil {
		t.Fatal(err)
	}
	a.read(t) // it is ready
	if _, err := a.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		unix.Kill(orphan, unix.SIGKILL)
		unix.Wait4(orphan, nil, 0, nil)
	}()
	p := settled(t, w, orphan)
	if p.Image().Path != last || !p.Complete() || p.FromSnapshot || p.Exited {
		t.Errorf("the orphan is %+v", p)
	}
	if len(p.Ancestors) < 2 || p.End != Origin {
		t.Fatalf("the chain is %+v, %v", p.Ancestors, p.End)
	}
	if m := p.Ancestors[0]; m.PID != a.Process.Pid || !m.Exited || m.Guess || m.Doubtful || !m.Image.Read || m.Image.Path != middle || m.Image.Args()[1] != last {
		t.Errorf("the parent is %+v", m)
	}
	if g := p.Ancestors[1]; g.PID != os.Getpid() || g.Exited || !g.Image.Read || g.Start != startTicks(t, os.Getpid()) {
		t.Errorf("the grandparent is %+v", g)
	}
	if r := p.Ancestors[len(p.Ancestors)-1]; r.PID != 1 {
		t.Errorf("the chain begins with %+v", r)
	}
	if i := p.Images; len(i) != 2 || i[0].Since != p.Born || i[0].Path != middle || i[1].Since <= p.Born || i[1].Seq != 1 || p.Execs != 1 {
		t.Errorf("its images are %+v", i)
	}
}

func TestExec(t *testing.T) {
	w := open(t, Options{})
	for _, by := range []string{"exec", "exec-thread"} {
		t.Run(by, func(t *testing.T) {
			first, second := program(t, "first"), program(t, "second")
			a := run(t, first, by, second)
			pid := a.Process.Pid
			settled(t, w, pid)
			before, ok := w.Mark(pid, startTicks(t, pid))
			if !ok || before.Execs != 1 {
				t.Fatalf("marked %+v", before)
			}
			a.say()
			a.read(t)
			p := settled(t, w, pid)
			after, _ := w.Mark(pid, startTicks(t, pid))
			if before == after || after.Execs != 2 || after.Exited {
				t.Errorf("marked %+v before, %+v after", before, after)
			}
			if p.Exited || len(p.Images) != 3 || p.Images[1].Path != first || p.Images[2].Path != second || p.Images[2].Args()[1] != "second" {
				t.Errorf("%+v", p)
			}
		})
	}
}

// A process whose first thread has ended is not over.
func TestFirstThreadEnds(t *testing.T) {
	w := open(t, Options{})
	a := run(t, "/proc/self/exe", "leave")
	p := process(t, w, a.Process.Pid)
	if p.Exited {
		t.Errorf("%+v", p)
	}
	if m, ok := w.Mark(p.PID, p.Start); !ok || !m.Exited {
		t.Errorf("no exit event came: %+v", m)
	}
}
