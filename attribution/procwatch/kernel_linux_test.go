package procwatch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/tiny"
	"golang.org/x/sys/unix"
)

// What a process did before it wrote is in the table when it was read and drained.
func TestBarrier(t *testing.T) {
	w := open(t, Options{})
	n := 1000
	if testing.Short() {
		n = 50
	}
	for range n {
		p, err := echo("/bin/echo")
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Drain(); err != nil {
			t.Fatal(err)
		}
		got, ok := w.Process(p.Pid, 0)
		p.Wait()
		if !ok || got.Execs != 1 || got.Ancestors[0].PID != os.Getpid() || !got.Complete() {
			t.Fatalf("%v %+v", ok, got)
		}
	}
}

// echo starts a program that writes a line, and returns when it was read.
func echo(name string) (*os.Process, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := os.StartProcess(name, []string{name}, &os.ProcAttr{Files: []*os.File{nil, w}})
	w.Close()
	if err != nil {
		return nil, err
	}
	var b [1]byte
	_, err = r.Read(b[:])
	return p, err
}

// As many programs as this machine can start are all seen, and nothing is lost.
func TestStorm(t *testing.T) {
	var mu sync.Mutex
	called := map[int]bool{}
	w := open(t, Options{Exec: func(p Process, i Image) {
		mu.Lock()
		defer mu.Unlock()
		called[p.PID] = true
	}})
	duration := 3 * time.Second
	if testing.Short() {
		duration = time.Second / 2
	}
	var wg sync.WaitGroup
	var started []int
	exit := write(t, "exit", tiny.Exit())
	begin := time.Now()
	for range 2 * runtime.NumCPU() {
		wg.Go(func() {
			for time.Since(begin) < duration {
				p, err := os.StartProcess(exit, []string{"exit"}, &os.ProcAttr{})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				started = append(started, p.Pid)
				mu.Unlock()
				p.Wait()
			}
		})
	}
	// Requests come meanwhile.
	for range 4 {
		wg.Go(func() {
			for time.Since(begin) < duration {
				if err := w.Drain(); err != nil {
					t.Error(err)
				}
				w.Process(os.Getpid(), 0)
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	if err := w.Drain(); err != nil {
		t.Error(err)
	}
	waitFor(t, "the last exit", func() bool {
		w.Drain()
		for _, pid := range started {
			if p, ok := w.Process(pid, 0); ok && !p.Exited {
				return false
			}
		}
		return true
	})
	waitFor(t, "the last image", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.reads+w.missed+w.over >= w.table.stats.Execs
	})
	s := w.Stats()
	t.Logf("%d started, %.0f/s; %+v", len(started), float64(len(started))/time.Since(begin).Seconds(), s)
	if s.Lost != 0 || s.Epoch != 0 || s.Strangers != 0 || s.Foreign != 0 {
		t.Error("events were lost")
	}
	for _, pid := range started {
		p, ok := w.Process(pid, 0)
		if !ok || p.Execs != 1 || !p.Complete() || !p.Exited || p.Ancestors[0].PID != os.Getpid() {
			t.Fatalf("%d: %v %+v", pid, ok, p)
		}
	}
	if s.Unsent == 0 {
		waitFor(t, "the last call of Options.Exec", func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, pid := range started {
				if !called[pid] {
					return false
				}
			}
			return true
		})
	}
}

// TestSpawners runs programs that do nothing but start programs, as fast as the machine
// can: several thousand in a second, of which none is lost.
func TestSpawners(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Log("the spawner is machine code of amd64; TestStorm is for others")
		return
	}
	w := open(t, Options{})
	const each = 1500
	spawner := spawn(t, write(t, "exit", tiny.Exit()), each)
	before, begin := w.Stats(), time.Now()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := exec.Command(spawner).Run(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	if err := w.Drain(); err != nil {
		t.Error(err)
	}
	s := w.Stats()
	t.Logf("%.0f spawns/s: %d forks, %d execs, %d lost; %d images read, %d ended before that, %d over the budget",
		2*each/took.Seconds(), s.Forks-before.Forks, s.Execs-before.Execs, s.Lost, s.ImagesRead, s.ImagesMissed, s.ImagesOverBudget)
	if s.Lost != 0 || s.Epoch != 0 || s.Execs-before.Execs < 2*each+2 || s.Forks-before.Forks < 2*each+2 {
		t.Errorf("events were lost: %+v", s)
	}
}

// spawn writes a program that starts another one so many times, one after the other.
func spawn(t testing.TB, other string, times uint32) string {
	t.Helper()
	code := binary.LittleEndian.AppendUint32([]byte{0xbb}, times) // mov ebx, times
	code = append(code,
		0xb8, 58, 0, 0, 0, 0x0f, 0x05, // loop: vfork
		0x85, 0xc0, 0x74, 32, // jz child
		0xb8, 61, 0, 0, 0, 0xbf, 0xff, 0xff, 0xff, 0xff, 0x31, 0xf6, 0x31, 0xd2, 0x4d, 0x31, 0xd2, 0x0f, 0x05, // wait4(-1, 0, 0, 0)
		0xff, 0xcb, 0x75, 0xde, // dec ebx; jnz loop
		0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, // exit(0)
		0xb8, 59, 0, 0, 0, 0x48, 0x8d, 0x3d, 18, 0, 0, 0, 0x31, 0xf6, 0x31, 0xd2, 0x0f, 0x05, // child: execve(other, 0, 0)
		0xb8, 60, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x0f, 0x05) // exit(1)
	return write(t, "spawn", tiny.Program(append(append(code, other...), 0)))
}

// write makes a file of a program.
func write(t testing.TB, name string, program []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 1000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s did not come", what)
}

// A reader that is held up loses events, says so, and reads /proc again.
func TestOverrun(t *testing.T) {
	w := open(t, Options{Buffer: 208 << 10})
	first, second := program(t, "first"), program(t, "second")
	a := run(t, first, "exec", second)
	kept := run(t, first, "wait")
	settled(t, w, a.Process.Pid)
	settled(t, w, kept.Process.Pid)
	mark, _ := w.Mark(kept.Process.Pid, 0)
	before := w.Stats()

	w.socket.Lock() // nobody reads from here
	const programs = 200
	for range programs {
		exec.Command("/bin/true").Run()
	}
	a.say() // it executes the second
	a.read(t)
	born := run(t, second, "wait")
	w.socket.Unlock()

	if err := w.Drain(); !errors.Is(err, ErrLost) {
		t.Errorf("the first Drain says %v", err)
	}
	lost := monotonic()
	if w.Epoch() != before.Epoch+1 {
		t.Errorf("epoch %d after %d", w.Epoch(), before.Epoch)
	}
	if after, ok := w.Mark(kept.Process.Pid, 0); !ok || mark == after {
		t.Error("nothing marks the loss")
	}
	after := w.Stats()
	// 3 events for each, the exec of the one, fork and exec of the other.
	sent := uint64(programs*3 + 1 + 2)
	if got := after.Lost + after.Forks + after.Execs + after.Exits - before.Forks - before.Execs - before.Exits; after.Lost == 0 || got < sent {
		t.Errorf("%d of %d events are accounted for, %d of them lost", got, sent, after.Lost)
	}
	t.Logf("%d lost of %d, buffer %d", after.Lost, sent, after.Buffer)
	waitFor(t, "the table", func() bool { return w.Drain() == nil })
	t.Logf("rebuilt after %v", monotonic()-lost)

	p := process(t, w, kept.Process.Pid)
	if p.Complete() || p.CompleteSince <= p.Born || p.CompleteSince > lost || len(p.Images) != 2 || p.Image().Path != first {
		t.Errorf("one that did nothing meanwhile is %+v", p)
	}
	p = process(t, w, a.Process.Pid)
	if i := p.Image(); !i.Missed || i.Path != second || !i.Read || p.Images[1].Path != first || p.Execs != 2 {
		t.Errorf("one that executed meanwhile is %+v", p)
	}
	p = process(t, w, born.Process.Pid)
	if !p.FromSnapshot || p.Complete() || p.Image().Path != second || len(p.Ancestors) == 0 || p.Ancestors[0].PID != os.Getpid() || !p.Ancestors[0].Guess {
		t.Errorf("one that was born meanwhile is %+v", p)
	}
	p = settled(t, w, run(t, second, "wait").Process.Pid)
	if !p.Complete() || p.Ancestors[0].Doubtful || p.FromSnapshot {
		t.Errorf("one that was born afterwards is %+v", p)
	}
	if err := w.Check(context.Background()); err != nil {
		t.Error(err)
	}
	if s := w.Stats(); s.Rebuilds != 1 {
		t.Errorf("%+v", s)
	}
}

// What is not from the kernel is counted and not believed.
func TestForged(t *testing.T) {
	w := open(t, Options{})

	sa, err := unix.Getsockname(w.conn.fd)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, recordedFork(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: sa.(*unix.SockaddrNetlink).Pid}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the forged message", func() bool { w.Drain(); return w.Stats().Foreign == 1 })
	if p, ok := w.Process(27064, 0); ok && p.Born == 24254875914460 {
		t.Errorf("believed: %+v", p)
	}
}

// A pid that comes again is another process.
func TestPidReuse(t *testing.T) {
	w := open(t, Options{})
	first, second := program(t, "first"), program(t, "second")
	for range 50 {
		a := run(t, first, "wait")
		pid, ticks := a.Process.Pid, startTicks(t, a.Process.Pid)
		settled(t, w, pid)
		a.in.Close()
		a.Process.Wait()
		time.Sleep(30 * time.Millisecond) // the tick is another
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		b := run(t, second, "wait")
		if b.Process.Pid != pid {
			continue // somebody else was faster
		}
		p := settled(t, w, pid)
		if p.Exited || p.Image().Path != second || p.Execs != 1 {
			t.Errorf("the pid is now %+v", p)
		}
		old, ok := w.Process(pid, ticks)
		if !ok || !old.Exited || old.Image().Path != first || old.ExitedAt >= p.Born {
			t.Errorf("it was %v %+v", ok, old)
		}
		if _, ok := w.Process(pid, ticks+1); ok {
			t.Error("there is one with a start tick in between")
		}
		return
	}
	t.Error("the pid was never given out again")
}

// Processes come and go while /proc is read the first time; each of them is there
// once, with its parent.
func TestOpenInAStorm(t *testing.T) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					exec.Command("/bin/sh", "-c", "/bin/true; exec /bin/true").Run()
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	for range 10 {
		w := open(t, Options{})
		last := run(t, "/proc/self/exe", "wait")
		p := process(t, w, last.Process.Pid)
		if !p.Complete() || p.Ancestors[0].PID != os.Getpid() {
			t.Errorf("%+v", p)
		}
		if s := w.Stats(); s.Lost != 0 || s.Strangers != 0 {
			t.Errorf("%+v", s)
		}
		pids, err := (&reader{proc: "/proc"}).pids()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Drain(); err != nil {
			t.Fatal(err)
		}
		for _, pid := range pids {
			if _, ok := w.Process(int(pid), 0); !ok {
				t.Errorf("%d is not there", pid)
			}
		}
		w.mu.Lock()
		w.table.each(func(e *entry) {
			if !e.left && w.table.byPID[e.pid] != e {
				t.Errorf("%d lives twice", e.pid)
			}
		})
		w.mu.Unlock()
		w.Close()
	}
}

// With CLONE_PARENT the event names the parent that the child gets, and nobody the
// process that called clone.
func TestCloneParent(t *testing.T) {
	w := open(t, Options{})
	a := run(t, "/proc/self/exe", "sibling", program(t, "child"))
	pid, err := strconv.Atoi(a.first)
	if err != nil {
		t.Fatal(err)
	}
	a.read(t)
	p := process(t, w, pid)
	unix.Kill(pid, unix.SIGKILL)
	unix.Wait4(pid, nil, 0, nil)
	if p.Ancestors[0].PID != os.Getpid() {
		t.Errorf("the parent is %d, the creator %d and we are %d", p.Ancestors[0].PID, a.Process.Pid, os.Getpid())
	}
}

// The children of a daemon that only forks have its image.
func TestForkOnly(t *testing.T) {
	w := open(t, Options{})
	cmd := exec.Command("/bin/sh", "-c", "exec 3<&0; (read x <&3; :) & wait", "marker")
	in, _ := cmd.StdinPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	shell := settled(t, w, cmd.Process.Pid)
	pid := childOf(t, cmd.Process.Pid)
	p := process(t, w, pid)
	if len(p.Images) != 1 || p.Execs != 0 || p.Image().File != shell.Image().File || p.Image().Since != p.Born || !p.Image().Read {
		t.Errorf("%+v", p)
	}
	if m, ok := w.Mark(pid, startTicks(t, pid)); !ok || m.Execs != 0 || m.Exited {
		t.Errorf("%+v", m)
	}
}

func childOf(t *testing.T, parent int) (pid int) {
	t.Helper()
	waitFor(t, "the child of the shell", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", parent, parent))
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return pid != 0
	})
	return pid
}

// Beyond the budget images are not read, and are not said to be.
func TestReads(t *testing.T) {
	w := open(t, Options{Reads: 5})
	var p Process
	for range 10 { // the budget is by the second, and a busy machine may take longer
		for range 20 {
			exec.Command("/bin/true").Run()
		}
		a := run(t, "/proc/self/exe", "wait")
		waitFor(t, "the end of the budget", func() bool { w.Drain(); return w.Stats().ImagesOverBudget > 0 })
		if p = process(t, w, a.Process.Pid); !p.Image().Read {
			break
		}
	}
	if p.Image().Read || p.Image().Path != "" || p.Execs != 1 {
		t.Errorf("%+v", p)
	}
}

func TestMax(t *testing.T) {
	w := open(t, Options{Max: 10})
	w.Drain()
	if s := w.Stats(); s.Processes != 10 || s.Refused == 0 {
		t.Errorf("%+v", s)
	}
	if w, err := Open(Options{Proc: t.TempDir()}); err == nil {
		w.Close()
		t.Error("an empty directory is taken for /proc")
	}
}

func TestShell(t *testing.T) {
	w := open(t, Options{})
	cmd := exec.Command("/bin/sh", "-c", "/bin/cat; true", "marker")
	in, _ := cmd.StdinPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	pid := childOf(t, cmd.Process.Pid)
	p := settled(t, w, pid)
	shell, _ := filepath.EvalSymlinks("/bin/sh")
	cat, _ := filepath.EvalSymlinks("/bin/cat")
	if a := p.Ancestors[0]; p.Image().Path != cat || a.Image.Path != shell || strings.Join(a.Image.Args(), " ") != "/bin/sh -c /bin/cat; true marker" || a.Image.UID != 0 {
		t.Errorf("%+v", p)
	}
}

func TestActiveLive(t *testing.T) {
	w := open(t, Options{})
	since := monotonic()
	a := run(t, "/proc/self/exe", "wait")
	w.Drain()
	found := false
	for _, pid := range w.Active(since, nil) {
		found = found || pid == a.Process.Pid
	}
	if !found {
		t.Errorf("%d is not among %v", a.Process.Pid, w.Active(since, nil))
	}
}

func TestClosed(t *testing.T) {
	w := open(t, Options{})
	w.Close()
	if err := w.Drain(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if err := w.Check(context.Background()); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if _, ok := w.Process(os.Getpid(), 0); !ok {
		t.Error("what was known is forgotten")
	}
}

// Where the program runs decides whether it works, and what it says if not.
func TestWhere(t *testing.T) {
	labtest.RequireRoot(t)
	const works = "forks true, execs true, netns unchanged true"
	self := program(t, "where")
	os.Chmod(filepath.Dir(self), 0o755)
	os.Chmod(filepath.Dir(filepath.Dir(self)), 0o755)
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	for _, test := range []struct {
		name string
		attr syscall.SysProcAttr
		drop []uintptr
		want string
	}{
		{"here", syscall.SysProcAttr{}, nil, works},
		{"another network namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, nil, works},
		{"another network namespace, without CAP_SYS_ADMIN", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, []uintptr{unix.CAP_SYS_ADMIN},
			"error: enter the initial network namespace, the only one with a proc connector (needs CAP_SYS_ADMIN; or run this process in the host's: docker run --net=host, hostNetwork: true): operation not permitted"},
		{"another pid namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, nil, "error: the proc connector answers in the initial pid namespace only"},
		{"another user namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}}}, nil, "error: the proc connector answers in the initial user namespace only"},
		{"an ordinary user with CAP_NET_ADMIN", syscall.SysProcAttr{Credential: nobody, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}}, nil, works},
		// Since Linux 6.6; before, it says that it needs CAP_NET_ADMIN.
		{"an ordinary user", syscall.SysProcAttr{Credential: nobody}, nil, ""},
		{"an ordinary user with CAP_NET_ADMIN in another network namespace", syscall.SysProcAttr{Credential: nobody, Cloneflags: unix.CLONE_NEWNET, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}}, nil,
			"error: listen to the proc connector: there is none in this network namespace, or the kernel lacks CONFIG_PROC_EVENTS"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := exec.Command(self)
			cmd.Dir = "/"
			cmd.Env = []string{role + "=open"}
			cmd.SysProcAttr = &test.attr
			out, err := runWithout(cmd, test.drop)
			if err != nil || !strings.HasPrefix(string(out), test.want) {
				t.Errorf("%v\n%s\nwant %s", err, out, test.want)
			}
			t.Logf("%s", bytes.TrimSpace(out))
		})
	}
}

// runWithout takes capabilities out of the bounding set of the thread that starts
// the program, which ends with it.
func runWithout(cmd *exec.Cmd, caps []uintptr) (out []byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if len(caps) == 0 {
			defer runtime.UnlockOSThread()
		}
		for _, c := range caps {
			unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		}
		out, err = cmd.CombinedOutput()
	}()
	<-done
	return out, err
}
