package procwatch

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// processes is a directory in which tests have processes, in place of /proc.
type processes struct {
	*testing.T
	Lockable
}

func newProcesses(t *testing.T) *processes {
	return &processes{t, Lockable{Proc: t.TempDir()}}
}

// locked makes the directory of a process whose command line nobody can read before the function is called. It is a pipe
// here; TestLockedMemory of package attribution has a real one.
func (p *processes) locked(pid, uid int) (dir int, unlock func()) {
	p.Helper()
	dir = p.of(pid, uid)
	path := filepath.Join(p.Proc, strconv.Itoa(pid), "cmdline")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		p.Fatal(err)
	}
	pipe, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { pipe.Close() })
	return dir, func() { fmt.Fprint(pipe, "x\x00") }
}

// of makes the directory of a process.
func (p *processes) of(pid, uid int) (dir int) {
	p.Helper()
	path := filepath.Join(p.Proc, strconv.Itoa(pid))
	err := os.Mkdir(path, 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(path, "status"), fmt.Appendf(nil, "Name:\tx\nState:\tS\nUid:\t%d\t0\t0\t0\n", uid), 0o600)
	}
	if err != nil {
		p.Fatal(err)
	}
	dir, err = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { unix.Close(dir) })
	return dir
}

// Who has many processes whose memory is locked keeps a few of our threads, and nobody else from being read.
func TestLockable(t *testing.T) {
	c := newProcesses(t)
	var unlock []func()
	var reads sync.WaitGroup
	for pid := range 2 * maxAtOnce {
		dir, f := c.locked(pid, 1000)
		unlock = append(unlock, f)
		reads.Go(func() {
			if b, err := c.Read(pid, dir, "cmdline", make([]byte, 64)); err != ErrLocked {
				t.Errorf("process %d: %q, %v", pid, b, err)
			}
		})
	}
	honest := c.of(1234, 1001)
	if err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/cmdline", honest), []byte("curl\x00-s\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	read := func(when string) {
		t.Helper()
		if b, err := c.Read(1234, honest, "cmdline", make([]byte, 64)); string(b) != "curl\x00-s\x00" || err != nil {
			t.Errorf("%s: %q, %v", when, b, err)
		}
	}
	read("while they are waited for")
	reads.Wait()
	read("while they are late")
	c.mu.Lock()
	late := len(c.asking)
	if late == 0 || late > maxAtOnce {
		t.Errorf("%d reads go on", late)
	}
	if w := c.waited[1000]; w == nil || *w < readIn || c.waited[1001] != nil {
		t.Errorf("waited for the one %v, for the other %v", w, c.waited[1001])
	}
	c.mu.Unlock()
	dir, f := c.locked(2000, 1000)
	unlock = append(unlock, f)
	if before, ok := c.tryBegin(ask(2000)); ok || before != nil {
		t.Error("one more is begun")
	}
	before := descriptors(t)
	for range 10 {
		if _, err := c.Read(2000, dir, "cmdline", make([]byte, 64)); err != ErrLocked {
			t.Errorf("one more: %v", err)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
	for _, f := range unlock {
		f()
	}
	ended := func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.asking) == 0
	}
	for end := time.Now().Add(5 * time.Second); !ended(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d reads go on", len(c.asking))
		}
	}
	read("afterwards")
}

// Who lets himself be read shortly before it is too late is waited for, but not for ever.
func TestLockableHeldUp(t *testing.T) {
	c := newProcesses(t)
	dir, unlock := c.locked(1, 1000)
	time.AfterFunc(2*slow, unlock)
	if b, err := c.Read(1, dir, "cmdline", make([]byte, 64)); string(b) != "x\x00" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if w := c.waited[1000]; w == nil || *w < slow {
		t.Fatalf("waited for %v", w)
	}
	c.charge(1000, maxWaited)
	q := ask(1)
	if _, ok := c.tryBegin(q); !ok || q.patience != shortly {
		t.Errorf("%v, %+v", ok, q)
	}
	c.of(2, 1001)
	q = ask(2)
	if _, ok := c.tryBegin(q); !ok || q.patience != readIn {
		t.Errorf("another: %v, %+v", ok, q)
	}
}

// Many clients of one user at a time, none of which locks anything, are all asked about.
func TestLockableCrowd(t *testing.T) {
	c := newProcesses(t)
	dir := c.of(1, 1000)
	if err := os.WriteFile(filepath.Join(c.Proc, "1", "cmdline"), []byte("curl\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 500 {
		all.Go(func() {
			if b, err := c.Read(1, dir, "cmdline", make([]byte, 64)); string(b) != "curl\x00" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	all.Wait()
}

func ask(pid int) *question {
	return &question{about: about{pid, true}, over: make(chan struct{}), patience: readIn}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
