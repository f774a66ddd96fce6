package witness_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
)

func TestExecuted(t *testing.T) {
	w := open(t, witness.Options{})
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &st); err != nil {
		t.Fatal(err)
	}
	check := func(name string, p *process, want attribution.Execution) attribution.Execution {
		t.Helper()
		got, err := w.Executed(p.pid())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if age := now() - got.At; age < 0 || age.Minutes() > 1 || got.ExecID == 0 {
			t.Errorf("%s: %+v", name, got)
		}
		at, exec := got.At, got.ExecID
		got.At, got.ExecID = 0, 0
		if got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
		got.At, got.ExecID = at, exec
		return got
	}
	this := attribution.Execution{Device: st.Dev, Inode: st.Ino, Links: uint32(st.Nlink), Name: "/proc/self/exe"}
	p := start(t, "say")
	p.line()
	check("file", p, this)
	pid := p.pid()
	p.stop()
	if got, err := w.Executed(pid); !errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("after its end: %+v, %v", got, err)
	}
	if got, err := w.Executed(os.Getppid()); !errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("a process older than the witness: %+v, %v", got, err)
	}

	// The leader ends, a thread takes its place; then another leader ends.
	p = start(t, "thread execs")
	if tid := p.numbers()[0]; tid == p.pid() {
		t.Fatal("it is the leader")
	}
	first := check("before", p, this)
	p.tell()
	if pid := p.numbers()[0]; pid != p.pid() {
		t.Fatalf("process %d became %d", p.pid(), pid)
	}
	if second := check("thread", p, this); second.ExecID == first.ExecID || second.At <= first.At {
		t.Errorf("%+v, then %+v", first, second)
	}

	// A file that no directory has.
	fd, err := unix.MemfdCreate("evil", 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	binary, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		_, err = f.Write(binary)
	}
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	p = run(t, exec.Command(path), "say")
	p.line()
	check("memfd", p, attribution.Execution{Device: st.Dev, Inode: st.Ino, Links: 0, Name: path})

	// Of a script, its interpreter.
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho $$; read x\n:\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat("/bin/sh", &st); err != nil {
		t.Fatal(err)
	}
	p = run(t, exec.Command(script), "")
	p.line()
	check("script", p, attribution.Execution{Device: st.Dev, Inode: st.Ino, Links: uint32(st.Nlink), Name: "/bin/sh"})
}

func TestCreator(t *testing.T) {
	w := open(t, witness.Options{})
	p := start(t, "clone")
	child := p.numbers()[0]
	defer func() {
		p.stop()
		var status unix.WaitStatus
		if _, err := unix.Wait4(child, &status, 0, nil); err != nil || status != 0 {
			t.Errorf("the clone: %v, %v", status, err)
		}
		if got, err := w.Creator(child); !errors.Is(err, attribution.ErrNoWitness) {
			t.Errorf("after its end: %+v, %v", got, err)
		}
	}()
	got, err := w.Creator(child)
	if err != nil || got.PID != p.pid() || got.UID != 4321 || got.Start == 0 || got.ExecID == 0 {
		t.Errorf("%+v, %v, want process %d", got, err, p.pid())
	}
	if got, err := w.Creator(p.pid()); !errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("a usual child: %+v, %v", got, err)
	}
}

func TestWriters(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	name := fmt.Sprintf("@witness-test-%d", os.Getpid())
	giver := start(t, "give", name)
	fd := giver.numbers()[0]
	_, tuple := accept(t, ln)
	cookie := one(t, w, tuple, false).SocketCookie
	check := func(what string, want ...int) {
		t.Helper()
		got, err := w.Writers(cookie)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		var pids []int
		for _, a := range got {
			pids = append(pids, a.PID)
			if a.Start == 0 || a.ExecID == 0 || a.TID == 0 {
				t.Errorf("%s: %+v", what, a)
			}
		}
		if !slices.Equal(pids, want) {
			t.Errorf("%s: writers %v, want %v", what, pids, want)
		}
	}
	giver.tell()
	giver.line()
	check("its own")
	taker := start(t, "take", name)
	taker.line()
	check("passed", taker.pid())
	thief := startAs(t, nil, "steal", strconv.Itoa(giver.pid()), strconv.Itoa(fd))
	thief.line()
	check("stolen", taker.pid(), thief.pid())
	for range 7 {
		startAs(t, nil, "steal", strconv.Itoa(giver.pid()), strconv.Itoa(fd)).line()
	}
	if got, err := w.Writers(cookie); !errors.Is(err, attribution.ErrTooMany) || len(got) != 8 {
		t.Errorf("nine foreign writers: %+v, %v", got, err)
	}
	if s := w.Stats(); s.LostWriters == 0 || s.Writes == 0 {
		t.Errorf("%+v", s)
	}
	if got, err := w.Writers(1); !errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("of no socket: %+v, %v", got, err)
	}

	c := start(t, "connect, exec")
	c.line()
	_, tuple = accept(t, ln)
	connector := one(t, w, tuple, false)
	cookie = connector.SocketCookie
	check("after an execve", c.pid())
	if got, _ := w.Writers(cookie); len(got) == 1 && got[0].ExecID == connector.ExecID {
		t.Errorf("%+v has the ExecID of the connector %+v", got, connector)
	}
	// The same in the execve's own record.
	if e, err := w.Executed(c.pid()); err != nil || e.At <= connector.At {
		t.Errorf("connected at %v, executed %+v, %v", connector.At, e, err)
	}
	c = start(t, "deferred, inherited")
	child := c.numbers()[0]
	c.line()
	_, tuple = accept(t, ln)
	connector = one(t, w, tuple, false)
	cookie = connector.SocketCookie
	if connector.PID != c.pid() {
		t.Errorf("%+v, want process %d", connector, c.pid())
	}
	check("first write by another", child)
}

func TestHolders(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	c := start(t, "hold")
	n := c.numbers()
	accept(t, ln)
	inode := uint32(n[0])
	holding := func(pid, descriptors, references int, fds ...int) {
		t.Helper()
		got, err := w.Holding(t.Context(), pid, inode)
		want := attribution.Holding{Descriptors: descriptors, References: references, FD: got.FD}
		if err != nil || got != want || descriptors > 0 && !slices.Contains(fds, got.FD) {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
	}
	holders := func(want ...attribution.Descriptor) {
		t.Helper()
		got, err := w.Holders(t.Context(), []uint32{inode, 1})
		if err != nil || !slices.Equal(got[inode], want) || len(got[1]) != 0 {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
	}
	holding(c.pid(), 3, 3, n[1:]...)
	holding(os.Getpid(), 0, 0)
	d := attribution.Descriptor{PID: c.pid(), TID: c.pid()}
	var all []attribution.Descriptor
	for _, fd := range n[1:] {
		d.FD = fd
		all = append(all, d)
	}
	holders(all...)
	c.tell()
	c.line()
	holding(c.pid(), 3, 4, n[1:]...) // one is in a message
	c.tell()
	child := c.numbers()[0]
	holding(c.pid(), 0, 0)
	holding(child, 1, 2, 3)
	holders(attribution.Descriptor{PID: child, TID: child, FD: 3})
	c.stop()

	soon(t, "an ended process holds a socket", func() bool {
		got, _ := w.Holding(t.Context(), child, inode)
		return got == (attribution.Holding{})
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Holders(ctx, []uint32{inode}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A thread with a table of its own.
func TestHoldingThread(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	c := start(t, "thread")
	tid := c.numbers()[0]
	_, tuple := accept(t, ln)
	inode := inodeOf(t, tuple)
	var u unix.Utsname
	var major, minor int
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	leavesOut := major < 6 || major == 6 && minor < 7
	if got, err := w.Holding(t.Context(), c.pid(), inode); err != nil || got.Descriptors != 1 && !(leavesOut && got.Descriptors == 0) {
		t.Errorf("%+v, %v", got, err)
	}
	got, err := w.Holders(t.Context(), []uint32{inode})
	if err != nil || len(got[inode]) != 1 || got[inode][0].TID != tid || got[inode][0].PID != c.pid() {
		t.Errorf("%+v, %v, want thread %d", got, err, tid)
	}
}
