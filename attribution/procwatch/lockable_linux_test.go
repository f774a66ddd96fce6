package procwatch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unique"

	"golang.org/x/sys/unix"
)

// processes is a directory in which tests have processes, in place of /proc.
type processes struct {
	*testing.T
	Lockable
}

func newProcesses(t *testing.T) *processes {
	p := &processes{T: t, Lockable: Lockable{Proc: t.TempDir()}}
	t.Cleanup(func() { // it looks for what has begun and was not asked
		p.mu.Lock()
		defer p.mu.Unlock()
		clear(p.asking)
	})
	return p
}

// charged has somebody be charged for having made us wait.
func (p *processes) charged(a account, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.charge(a, took)
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
	if one, other := c.waited[account{owner{uid: 1000}, true}], c.waited[account{owner{uid: 1001}, true}]; one < readIn || other >= maxWaited {
		t.Errorf("waited for the one %v, for the other %v", one, other)
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
	if c.waited[account{owner{uid: 1000}, true}] == 0 {
		t.Fatal("nothing was charged")
	}
	c.charged(account{owner{uid: 1000}, true}, maxWaited)
	c.charged(account{owner{uid: 1000}, false}, maxWaited)
	q := ask(1)
	if _, ok := c.tryBegin(q); !ok || q.patience != shortly {
		t.Errorf("%v, %+v", ok, q)
	}
	if err := c.DoAmong(1, nil, func() { t.Error("it is one of many, and asked") }); err != ErrLocked {
		t.Errorf("one of many: %v", err)
	}
	c.of(2, 1001)
	q = ask(2)
	if _, ok := c.tryBegin(q); !ok || q.patience != readIn {
		t.Errorf("another: %v, %+v", ok, q)
	}
	c.Insist = true
	if err := c.DoAmong(1, nil, func() {}); err != nil {
		t.Errorf("nothing else can be asked: %v", err)
	}
}

// Root is who works in many containers, and nobody of them keeps the others, or the host, from being asked about. Nor
// does he have it waited for long.
func TestLockableRoot(t *testing.T) {
	c := newProcesses(t)
	dir, unlock := c.locked(1, 0)
	defer unlock()
	c.charged(account{owner{uid: 0}, true}, maxWaited)
	c.charged(account{owner{uid: 0}, false}, maxWaited)
	if err := c.DoAmong(1, nil, func() {}); err != nil {
		t.Error(err)
	}
	for _, q := range []*question{ask(1), among(1)} {
		if _, ok := c.tryBegin(q); !ok || q.patience != shortly {
			t.Errorf("%v, %+v", ok, q)
		}
	}
	var far atomic.Int64
	ended := make(chan struct{})
	if err := c.DoAmong(1, &far, func() { // a search that goes on, slowly
		defer close(ended)
		for begin := time.Now(); time.Since(begin) < maxWaited; far.Add(1) {
			unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: lookEvery.Microseconds()})
		}
	}); err != ErrLocked || far.Load() == 0 {
		t.Errorf("asked %v, %v", far.Load() > 0, err)
	} else {
		<-ended
	}
	if _, err := c.read(among(1), dir, "cmdline", make([]byte, 64)); err != ErrLocked {
		t.Error(err)
	}
	// Nor is it known whose those are whose status cannot be read.
	c.charged(account{owner{uid: unknownUser}, false}, maxWaited)
	if err := c.DoAmong(2, nil, func() {}); err != nil {
		t.Errorf("whose it is is not known: %v", err)
	}
}

// Root of a container without a user namespace keeps the host's from nothing, nor another container's; and all together
// keep no more threads than subordinate users do.
func TestLockableContainers(t *testing.T) {
	c := newProcesses(t)
	of := func(pid int, cgroup string) *question {
		c.of(pid, 0)
		if err := os.WriteFile(filepath.Join(c.Proc, strconv.Itoa(pid), "cgroup"), []byte("0::"+cgroup+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return ask(pid)
	}
	begins := func(q *question) bool {
		_, ok := c.tryBegin(q)
		return ok
	}
	pid := 0
	late := func(cgroup string) {
		for range maxLate {
			q := of(pid, cgroup)
			if !begins(q) {
				t.Errorf("process %d in %s is not asked", pid, cgroup)
			}
			c.mu.Lock()
			q.late = true
			c.mu.Unlock()
			pid++
		}
	}
	asked := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.asking)
	}
	late("/docker/one")
	if before, ok := c.tryBegin(of(pid, "/docker/one")); ok || before != nil {
		t.Error("one who has locked so many is asked on")
	}
	pid++
	late("/docker/two")
	late("/system.slice/amazon-ssm-agent.service")
	for asked() < maxAsking {
		late(fmt.Sprintf("/docker/one/%d", pid))
	}
	if begins(of(pid, "/docker/one/more")) {
		t.Error("one with many cgroups keeps more threads")
	}
	c.of(pid+1, minSubordinate)
	if !begins(ask(pid + 1)) {
		t.Error("he keeps a subordinate user from being asked about")
	}
	c.mu.Lock()
	clear(c.asking)
	c.mu.Unlock()
	for i := range maxCrowd / maxWaited {
		c.charged(account{owner{cgroup: fmt.Sprint(i)}, false}, maxWaited)
	}
	c.of(pid+2, 0)
	if q := among(pid + 2); !begins(q) || q.patience != shortly {
		t.Errorf("a search waits %v for each of root's", q.patience)
	}
	if q := one(pid + 2); !begins(q) || q.patience != readIn {
		t.Errorf("a client of the host's root has %v for its answer", q.patience)
	}
}

// Who goes through all processes does not wait for each that one user keeps locked for a few milliseconds at a time.
func TestLockableMany(t *testing.T) {
	c := newProcesses(t)
	r := reader{proc: c.Proc, lockable: &c.Lockable}
	const each = 12 * time.Millisecond
	const all = 3 * int32(maxWaited/each)
	var took time.Duration
	for pid := range all {
		dir, unlock := c.locked(int(pid), 1000)
		if err := unix.Symlinkat("/proc/self/exe", dir, "exe"); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(each, unlock)
		begin := time.Now()
		if got, ok := r.content(pid, dir); !ok || got.file.Value().Inode == 0 { // it is only the memory that is locked
			t.Fatalf("process %d: %+v, %v", pid, got, ok)
		}
		took += time.Since(begin)
	}
	if took > 2*maxWaited {
		t.Errorf("%d took %v", all, took)
	}
	dir := c.of(int(all), 1001)
	if err := errors.Join(unix.Symlinkat("/proc/self/exe", dir, "exe"), os.WriteFile(filepath.Join(c.Proc, strconv.Itoa(int(all)), "cmdline"), []byte("curl\x00"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if got, ok := r.content(all, dir); got.cmdline != "curl\x00" || !ok {
		t.Errorf("another's: %+v, %v", got, ok)
	}
}

// A search that goes on is let go on, unless its user makes it take too long.
func TestLockableFar(t *testing.T) {
	c := newProcesses(t)
	c.of(1, 1000)
	begin := time.Now()
	var far atomic.Int64
	var stop atomic.Bool
	ended := make(chan struct{})
	if err := c.DoAmong(1, &far, func() {
		defer close(ended)
		for !stop.Load() && time.Since(begin) < 5*maxWaited {
			unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: slow.Microseconds()})
			far.Add(1)
		}
	}); err != ErrLocked {
		t.Error(err)
	}
	if took := time.Since(begin); took < 2*readIn || took > 3*maxWaited {
		t.Errorf("took %v", took)
	}
	stop.Store(true)
	<-ended
}

// Where we are slow ourselves nobody is charged, and nothing is late.
func TestLockableStill(t *testing.T) {
	c := newProcesses(t)
	c.of(1, 1000)
	if err := c.Do(1, func() {
		for begin := time.Now(); time.Since(begin) < 2*readIn; {
		}
	}); err != nil || len(c.waited) > 0 {
		t.Errorf("%v, charged %v", err, c.waited)
	}
}

// Of users with subordinate ones no more is asked at the same time than of some, whatever their number.
func TestLockableSubordinates(t *testing.T) {
	c := newProcesses(t)
	asked := 0
	for pid := range 2 * maxAsking {
		c.of(pid, minSubordinate+pid)
		if _, ok := c.tryBegin(ask(pid)); ok {
			asked++
		}
	}
	if asked != maxAsking {
		t.Errorf("%d are asked", asked)
	}
	c.of(2*maxAsking, 1000)
	if _, ok := c.tryBegin(ask(2 * maxAsking)); !ok {
		t.Error("another is not")
	}
	asks := func() bool {
		_, ok := c.tryBegin(among(2*maxAsking - 1))
		return ok
	}
	c.charged(account{owner{uid: minSubordinate}, true}, maxWaited)
	for user := range uint32(maxCrowd / maxWaited) { // of whom the first, and who is not known, take no more than theirs
		if !asks() {
			t.Errorf("after %d users one of many others is not asked", user)
		}
		c.charged(account{owner{uid: minSubordinate + user}, false}, maxWaited)
		c.charged(account{owner{uid: minSubordinate}, false}, maxCrowd)
		c.charged(account{owner{uid: unknownUser}, false}, maxCrowd)
	}
	if asks() {
		t.Error("one of many is asked")
	}
}

// Who keeps his memory locked does not keep his descriptors from being searched.
func TestLockableApart(t *testing.T) {
	c := newProcesses(t)
	memory := account{owner{uid: 1000}, true}
	const most = 100
	next := 0
	for waited := time.Duration(0); waited < maxWaited; next++ {
		if next == most {
			t.Fatalf("waited %v", waited)
		}
		dir, unlock := c.locked(next, 1000)
		c.Read(next, dir, "cmdline", make([]byte, 64))
		unlock()
		c.mu.Lock()
		waited = c.waited[memory]
		c.mu.Unlock()
	}
	var reads sync.WaitGroup
	for pid := next; pid < next+maxLate; pid++ {
		dir, unlock := c.locked(pid, 1000)
		defer unlock()
		reads.Go(func() { c.Read(pid, dir, "cmdline", make([]byte, 64)) })
	}
	reads.Wait()
	if before, ok := c.tryBegin(ask(0)); ok || before != nil {
		t.Error("memory is read")
	}
	if err := c.DoAmong(0, nil, func() {}); err != nil {
		t.Error(err)
	}
}

// That it cannot be read whether a thread of ours waits does not keep it from being late.
func TestLockableUnread(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/proc/self/nothing"} {
		if !sleeps(path) {
			t.Errorf("it is known that what %s is about does not wait", path)
		}
	}
}

// A program that could not be asked for when it was executed is known as that, also if somebody reads another later. An
// ordinary user's is not asked for when others of his have let us wait.
func TestLockableProgram(t *testing.T) {
	w := open(t, Options{})
	const user = 4242
	c := w.reader.lockable
	c.mu.Lock()
	c.charge(account{owner{uid: user}, false}, maxWaited)
	c.mu.Unlock()
	a := runAs(t, &syscall.Credential{Uid: user, Gid: user}, "/proc/self/exe", "wait")
	var p Process
	waitFor(t, "its program", func() bool {
		p = process(t, w, a.Process.Pid)
		return p.Image().Locked || p.Image().Read
	})
	if i := p.Image(); !i.Locked || i.Read || p.Execs != 1 {
		t.Errorf("%+v", p)
	}
	w.mu.Lock()
	e := w.table.byPID[int32(p.PID)]
	w.table.fill(e, e.image(), content{file: unique.Make(File{Inode: 1})}, monotonic())
	i := e.image().public()
	w.mu.Unlock()
	if !i.Read || !i.Locked {
		t.Errorf("read later: %+v", i)
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

// ask is for the memory of a process.
func ask(pid int) *question {
	q := one(pid)
	q.memory, q.over = true, make(chan struct{})
	return q
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
