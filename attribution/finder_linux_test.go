package attribution

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

func newFinder(t testing.TB) *Finder {
	t.Helper()
	f := openFinder(t)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// listen stands for the proxy's listener, without a redirect in between.
func listen(t testing.TB, address string) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

func accept(t testing.TB, ln *net.TCPListener) Conn {
	t.Helper()
	ln.SetDeadline(time.Now().Add(5 * time.Second))
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	unmap := func(a net.Addr) netip.AddrPort {
		ap := a.(*net.TCPAddr).AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return Conn{Client: unmap(c.RemoteAddr()), Endpoint: unmap(c.LocalAddr())}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func find(t testing.TB, f *Finder, c Conn) *Lookup {
	l := f.Find(c)
	t.Cleanup(l.Close)
	return l
}

func pids(o Owner) []int {
	var pids []int
	for _, p := range o.Subjects {
		pids = append(pids, p.PID)
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

func called(o Owner) []string {
	var names []string
	for _, p := range o.Subjects {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	return names
}

func TestOwner(t *testing.T) {
	f := newFinder(t)
	program := install(t, "client")
	for _, test := range []struct{ how, address string }{
		{"plain", "127.0.0.1:0"},
		{"plain", "[::1]:0"},
		{"mapped", "127.0.0.1:0"},
		{"thread", "127.0.0.1:0"},
		{"lie", "127.0.0.1:0"},
	} {
		t.Run(test.how+" "+test.address, func(t *testing.T) {
			ln := listen(t, test.address)
			c := start(t, exec.Command(program, ln.Addr().String()), test.how)
			conn := accept(t, ln)
			c.line(t)
			l := find(t, f, conn)
			complete := l.Complete(within(t), true)
			if !complete.Complete || complete.Reason != Attributed {
				t.Fatalf("complete %v, reason %q, error %v", complete.Complete, complete.Reason, complete.Err)
			}
			if got := pids(complete); !slices.Equal(got, []int{c.Process.Pid}) {
				t.Fatalf("held by %v, want %d", got, c.Process.Pid)
			}
			p := complete.Subjects[0]
			if p.Executable.Path != program || p.Name != "client" || !p.Executable.HostVerified {
				t.Errorf("executable %+v, name %q", p.Executable, p.Name)
			}
			if p.Executable.RootOwned {
				t.Error("a program below a directory that anybody may write to counts as root's own")
			}
			if p.UID[1] != ordinaryUser || p.UserName != "" {
				t.Errorf("user %v %q", p.UID, p.UserName)
			}
			if p.Parent == nil || p.Parent.PID != os.Getpid() {
				t.Errorf("parent %+v, want this test", p.Parent)
			}
		})
	}
}

// The facts about a process are those that an independent reader of /proc finds.
func TestProcessAgainstProcfs(t *testing.T) {
	f := newFinder(t)
	program := install(t, "client")
	ln := listen(t, "127.0.0.1:0")
	cmd := exec.Command(program, ln.Addr().String(), "with space", "", "naïve\nline")
	cmd.Dir = "/usr"
	c := start(t, cmd, "plain")
	conn := accept(t, ln)
	c.line(t)
	p := find(t, f, conn).Complete(within(t), true).Subjects[0]

	fs, err := procfs.NewFS("/proc")
	if err != nil {
		t.Fatal(err)
	}
	proc, err := fs.Proc(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	stat, err := proc.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if p.StartTicks != stat.Starttime || p.Session != stat.Session || p.Group != stat.PGRP || p.Parent.PID != stat.PPID || p.Thread != stat.Comm {
		t.Errorf("%+v\nprocfs: %+v", p, stat)
	}
	if started, err := stat.StartTime(); err != nil || abs(float64(p.Start.UnixNano())/1e9-started) > 1.1 {
		t.Errorf("started %v, procfs says %v (%v)", p.Start, started, err)
	}
	if since := time.Since(p.Start); since < 0 || since > 5*time.Second {
		t.Errorf("started %v ago", since)
	}
	status, err := proc.NewStatus()
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.UID {
		if uint64(p.UID[i]) != status.UIDs[i] || uint64(p.GID[i]) != status.GIDs[i] {
			t.Errorf("uid %v gid %v, procfs %v %v", p.UID, p.GID, status.UIDs, status.GIDs)
		}
	}
	exe, _ := proc.Executable()
	cwd, _ := proc.Cwd()
	args, _ := proc.CmdLine()
	if p.Executable.Path != exe || p.WorkingDir != cwd || !slices.Equal(p.Args, args) {
		t.Errorf("exe %q cwd %q args %q, procfs %q %q %q", p.Executable.Path, p.WorkingDir, p.Args, exe, cwd, args)
	}
	if again, err := f.Process(c.Process.Pid); err != nil || again.EntityID != p.EntityID || len(p.EntityID) < 16 {
		t.Errorf("entity %q, read again %+v (%v)", p.EntityID, again, err)
	}
	var ppids []int
	for a := p; a != nil; a = a.Parent {
		ppids = append(ppids, a.PID)
	}
	if len(p.Ancestors()) != len(ppids)-1 {
		t.Errorf("ancestors %v", p.Ancestors())
	}
}

func abs(f float64) float64 { return max(f, -f) }

// Every holder is a subject: a socket that a child inherited has two.
func TestTwoHolders(t *testing.T) {
	f := newFinder(t)
	program := install(t, "client")
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(program, ln.Addr().String(), "/bin/sleep", "30"), "fork")
	conn := accept(t, ln)
	child := pidIn(t, c.line(t))
	o := find(t, f, conn).Complete(within(t), true)
	want := []int{c.Process.Pid, child}
	slices.Sort(want)
	if got := pids(o); !slices.Equal(got, want) || !o.Complete {
		t.Errorf("held by %v, complete %v; want %v", got, o.Complete, want)
	}
}

// A process that connects and then executes an allowed program is judged as
// what it was, too.
func TestExecAfterConnect(t *testing.T) {
	f := newFinder(t)
	program := install(t, "evil")
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(program, ln.Addr().String(), "/bin/sleep", "30"), "exec")
	conn := accept(t, ln)
	c.line(t)
	l := find(t, f, conn)
	if o := l.Owner(within(t)); len(o.Subjects) != 1 || o.Subjects[0].Name != "evil" {
		t.Fatalf("before: %+v", o)
	}
	if _, err := c.in.Write([]byte{'\n'}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		exe, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(c.Process.Pid), "exe"))
		return strings.HasSuffix(exe, "/sleep")
	})
	o := l.Complete(within(t), true)
	for _, p := range o.Subjects {
		if p.Earlier != (p.Name == "evil") {
			t.Errorf("%s: earlier %v", p.Name, p.Earlier)
		}
	}
	if got := called(o); !slices.Equal(got, []string{"evil", "sleep"}) {
		t.Errorf("judged as %v, want both images", got)
	}
}

// With its address space no longer placed at random, the next program looks like
// the one before to everything but its file.
func TestExecWithoutRandomAddresses(t *testing.T) {
	f := newFinder(t)
	evil := install(t, "evil")
	good := filepath.Join(filepath.Dir(evil), "good")
	copyFile(t, evil, good)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command("setarch", "-R", evil, ln.Addr().String(), good), "swap")
	conn := accept(t, ln)
	c.line(t)
	l := find(t, f, conn)
	if o := l.Owner(within(t)); len(o.Subjects) != 1 || o.Subjects[0].Name != "evil" {
		t.Fatalf("before: %+v", o)
	}
	if _, err := c.in.Write([]byte{'\n'}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		exe, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(c.Process.Pid), "exe"))
		return exe == good
	})
	if got := called(l.Complete(within(t), true)); !slices.Equal(got, []string{"evil", "good"}) {
		t.Errorf("judged as %v, want both images", got)
	}
}

// A process is judged by every command line that it was seen with.
func TestCommandLineRewritten(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String(), "telling"), "rename")
	conn := accept(t, ln)
	c.line(t)
	l := find(t, f, conn)
	l.Owner(within(t))
	time.Sleep(max(freshFor, toldFor))
	if _, err := c.in.Write([]byte{'\n'}); err != nil {
		t.Fatal(err)
	}
	c.line(t)
	var said []string
	for _, p := range l.Complete(within(t), true).Subjects {
		said = append(said, p.Args[2])
	}
	slices.Sort(said)
	if !slices.Equal(said, []string{"another", "telling"}) {
		t.Errorf("command lines with %q, want both", said)
	}
}

// script runs a Python program as an ordinary user.
// What a holder was when the connection began is known at level 1 also when nobody
// looked before it became another program, and so is who had the socket before the
// holder was born.
func TestBeforeTheFirstLook(t *testing.T) {
	f := newLevel(t, Level1, Options{})
	for text, roles := range map[string][]Role{
		"os.execv('/bin/sleep', ['sleep', '60'])":                                                 {RoleHolder, RoleHolder},
		"if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '60'])\ns.close()\ntime.sleep(60)\n": {RoleHolder, RoleHolder, RoleAncestor},
	} {
		ln := listen(t, "127.0.0.1:0")
		c := script(t, ln, text)
		conn := accept(t, ln)
		waitFor(t, func() bool {
			sleeps, _ := exec.Command("pgrep", "-x", "-g", strconv.Itoa(c.Process.Pid), "sleep").Output()
			return len(sleeps) > 0
		})
		o := find(t, f, conn).Complete(within(t), true)
		slices.Sort(o.Roles)
		if names := slices.Compact(called(o)); len(names) != 2 || !strings.HasPrefix(names[0], "python3") || names[1] != "sleep" ||
			!slices.Equal(o.Roles, roles) || !o.Complete || o.Level != Level1 || o.Confidence() != Medium {
			t.Errorf("%s: %v, %+v", text, names, o)
		}
	}
}

func script(t *testing.T, ln net.Listener, text string) *client {
	t.Helper()
	host, port, _ := net.SplitHostPort(ln.Addr().String())
	return start(t, exec.Command("/usr/bin/python3", "-c", "import os, socket, time\n"+
		"s = socket.create_connection(('"+host+"', "+port+")); s.set_inheritable(True)\n"+text), "")
}

// A holder that forks and ends faster than anybody can read /proc is either found
// or leaves the evidence incomplete; another holder that stays is not taken for
// the only one.
func TestForkHopping(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	script(t, ln, `
if os.fork() == 0:
    os.execv('/bin/sleep', ['sleep', '30'])
end = time.monotonic() + 20
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
`)
	conn := accept(t, ln)
	missed, complete, found := 0, 0, 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		l := f.Find(conn)
		o := l.Complete(within(t), true)
		l.Close()
		python := slices.ContainsFunc(o.Subjects, func(p *Process) bool { return strings.HasPrefix(p.Name, "python") })
		switch {
		case o.Complete && !python:
			missed++
		case o.Complete:
			complete++
		case python:
			found++
		}
	}
	t.Logf("%d times found, %d of them with the evidence complete", found+complete, complete)
	if missed > 0 {
		t.Errorf("%d times the evidence was complete without the one that hops", missed)
	}
}

// More holders than anybody needs are not read, and nobody is let through.
func TestCrowd(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := script(t, ln, `
for i in range(`+strconv.Itoa(maxHolders)+`):
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
print('forked', flush=True)
time.sleep(30)
`)
	conn := accept(t, ln)
	c.line(t)
	o := find(t, f, conn).Complete(within(t), true)
	if o.Complete || o.Reason != Crowd || len(o.Subjects) != maxHolders {
		t.Errorf("complete %v, reason %q, %d subjects", o.Complete, o.Reason, len(o.Subjects))
	}
}

// A search for which we lack descriptors ourselves says so.
func TestSearchWithoutDescriptors(t *testing.T) {
	f := newFinder(t)
	waitFor(t, func() bool { return f.Stats().Scans > 0 })
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	s := newSearch(f.host, 1)
	s.process(os.Getppid(), false)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if s.reason != Failed || !errors.Is(s.err, unix.EMFILE) {
		t.Errorf("reason %q, error %v", s.reason, s.err)
	}
}

// What a hint costs is bounded, whatever is in the tables of the youngest.
func TestHintBudget(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := script(t, ln, `
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
for i in range(10000): os.dup(0)
print('hoarded', flush=True)
time.sleep(30)
`)
	c.line(t)
	s := newSearch(f.host, 1)
	s.budget = hintBudget
	if s.process(c.Process.Pid, false) || s.seen < hintBudget || s.seen > 2*hintBudget {
		t.Errorf("%d of 10000 descriptors looked at", s.seen)
	}
}

// What level 0 cannot see it does not guess: a descriptor in a message in
// flight is nobody's.
func TestHiddenInFlight(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String()), "flight")
	conn := accept(t, ln)
	c.line(t)
	o := find(t, f, conn).Complete(within(t), true)
	if o.Attributed() || o.Reason != NoHolder || o.Complete {
		t.Errorf("%+v, want unattributed for %v", o, NoHolder)
	}
}

func TestClientGone(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := accept(t, ln)
	d.Close()
	o := find(t, f, conn).Complete(within(t), true)
	if o.Attributed() || o.Reason != ClientGone {
		t.Errorf("%+v, want unattributed for %v", o, ClientGone)
	}
	conn.Client = netip.AddrPortFrom(conn.Client.Addr(), conn.Client.Port()^1)
	if o := find(t, f, conn).Owner(within(t)); o.Reason != NoSocket {
		t.Errorf("no such client: %v, want %v", o.Reason, NoSocket)
	}
	conn.Forwarded = true
	if o := find(t, f, conn).Owner(within(t)); o.Reason != Remote {
		t.Errorf("forwarded: %v, want %v", o.Reason, Remote)
	}
}

// A client in another network namespace is found there: by a socket that was opened in
// it, and by its table where we may not open one.
func TestOtherNamespace(t *testing.T) {
	for _, mayEnter := range []bool{true, false} {
		f := newFinder(t)
		f.namespaces.closed = !mayEnter
		for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
			cmd := exec.Command(install(t, "inside"), address)
			cmd.Env = append(os.Environ(), actAs+"=self")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			if !lines.Scan() {
				t.Fatal("it said nothing")
			}
			ends := strings.Fields(lines.Text())
			l := find(t, f, Conn{Client: netip.MustParseAddrPort(ends[0]), Endpoint: netip.MustParseAddrPort(ends[1]), Forwarded: true})
			o := l.Complete(within(t), true)
			if !slices.Equal(pids(o), []int{cmd.Process.Pid}) || !o.Complete {
				t.Errorf("may enter %v, %s: %+v", mayEnter, address, o)
			}
			in.Close()
			cmd.Wait()
			time.Sleep(2 * checkedFor) // an answer may be so old
			if o := l.Owner(within(t)); o.Reason != ClientGone && o.Reason != Remote {
				t.Errorf("afterwards: %+v", o)
			}
		}
		if mayEnter == (len(f.namespaces.conns) == 0) {
			t.Errorf("may enter %v, and %d sockets are kept", mayEnter, len(f.namespaces.conns))
		}
	}
}

// aCrowd is a Finder that may not enter a network namespace, in which a client has many connections.
func aCrowd(t testing.TB) (f *Finder, conns []Conn) {
	t.Helper()
	f = newFinder(t)
	f.namespaces.closed = true
	cmd := exec.Command(install(t, "inside"), "127.0.0.1:0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	c := start(t, cmd, "crowd")
	for range crowd {
		ends := c.line(t)
		conns = append(conns, Conn{Client: netip.MustParseAddrPort(ends[0]), Endpoint: netip.MustParseAddrPort(ends[1]), Forwarded: true})
	}
	return f, conns
}

// What many connections of a container ask at once about does not have its table read for each of them.
func TestCrowdAsks(t *testing.T) {
	f, conns := aCrowd(t)
	var lookups []*Lookup
	for _, conn := range conns[:64] {
		l := find(t, f, conn)
		if o := l.Owner(within(t)); !o.Attributed() {
			t.Fatalf("%+v", o)
		}
		lookups = append(lookups, l)
	}
	spent := func(what func()) time.Duration {
		var before, after unix.Rusage
		unix.Getrusage(unix.RUSAGE_SELF, &before)
		what()
		unix.Getrusage(unix.RUSAGE_SELF, &after)
		return time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	}
	changed := func(l *Lookup) {
		if l.Changed() {
			t.Error("changed")
		}
	}
	one := spent(func() {
		for _, l := range lookups[:8] {
			changed(l)
		}
	}) / 8
	all := spent(func() {
		var asking sync.WaitGroup
		for _, l := range lookups {
			asking.Go(func() { changed(l) })
		}
		asking.Wait()
	})
	if t.Logf("one takes %v, and %d at once %v", one, len(lookups), all); all > one*time.Duration(len(lookups))/3 {
		t.Error("it is read for each of them")
	}
}

func BenchmarkCrowd(b *testing.B) {
	f, conns := aCrowd(b)
	l := find(b, f, conns[crowd/2])
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l.Changed()
		}
	})
	var lookups []*Lookup
	for _, conn := range conns[:64] {
		lookups = append(lookups, find(b, f, conn))
	}
	b.Run("64 at once", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var asking sync.WaitGroup
			for _, l := range lookups {
				asking.Go(func() { l.Changed() })
			}
			asking.Wait()
		}
	})
}

// A path that another mount namespace shows, and a file that another user
// namespace may have exchanged, are not the host's.
func TestNotHostVerified(t *testing.T) {
	f := newFinder(t)
	program := install(t, "evil")
	run := func(t *testing.T, cmd *exec.Cmd, how string) *Process {
		t.Helper()
		ln := listen(t, "127.0.0.1:0")
		cmd.Args = append(cmd.Args, ln.Addr().String())
		c := start(t, cmd, how)
		conn := accept(t, ln)
		c.line(t)
		o := find(t, f, conn).Complete(within(t), true)
		if len(o.Subjects) != 1 {
			t.Fatalf("%+v", o)
		}
		return o.Subjects[0]
	}
	t.Run("bind mount", func(t *testing.T) {
		cmd := exec.Command("/bin/sh", "-c", `mount --bind "$0" /bin/sleep && exec /bin/sleep "$1"`, program)
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		p := run(t, cmd, "plain")
		sleep, err := filepath.EvalSymlinks("/bin/sleep")
		if err != nil {
			t.Fatal(err)
		}
		if p.Executable.Path != sleep || p.Executable.HostVerified || p.Executable.RootOwned {
			t.Errorf("%+v", p.Executable)
		}
	})
	t.Run("user namespace", func(t *testing.T) {
		cmd := exec.Command(program)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
		p := run(t, cmd, "plain")
		if p.Executable.Path != program || p.Executable.HostVerified || p.HostUser {
			t.Errorf("%+v, host user namespace %v", p.Executable, p.HostUser)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		gone := install(t, "gone")
		ln := listen(t, "127.0.0.1:0")
		c := start(t, exec.Command(gone, ln.Addr().String()), "plain")
		conn := accept(t, ln)
		c.line(t)
		os.Remove(gone)
		copyFile(t, "/bin/true", gone)
		p := find(t, f, conn).Complete(within(t), true).Subjects[0]
		if p.Executable.Path != gone || !p.Executable.Deleted || p.Executable.HostVerified {
			t.Errorf("%+v", p.Executable)
		}
	})
	t.Run("memfd", func(t *testing.T) {
		fd, err := unix.MemfdCreate("usr/bin/amazon-ssm-agent", 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fd), "memfd")
		defer file.Close()
		b, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Write(b); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/fd/3")
		cmd.ExtraFiles = []*os.File{file}
		p := run(t, cmd, "plain")
		if p.Executable.HostVerified || !p.Executable.Deleted || !strings.HasPrefix(p.Executable.Path, "/memfd:") {
			t.Errorf("%+v", p.Executable)
		}
	})
	t.Run("loader", func(t *testing.T) {
		loaders, _ := filepath.Glob("/lib*/ld-linux*.so.*")
		if len(loaders) == 0 {
			t.Fatal("no dynamic loader in /lib or /lib64: is this a glibc host?")
		}
		ln := listen(t, "127.0.0.1:0")
		address := ln.Addr().(*net.TCPAddr)
		cmd := exec.Command(loaders[0], "/bin/bash", "-c",
			"exec 3<>/dev/tcp/127.0.0.1/"+strconv.Itoa(address.Port)+"; echo connected; read x")
		c := start(t, cmd, "plain")
		conn := accept(t, ln)
		c.line(t)
		p := find(t, f, conn).Complete(within(t), true).Subjects[0]
		if !p.Executable.Loader || !p.Executable.RootOwned {
			t.Errorf("%+v", p.Executable)
		}
	})
}

// A request that is answered on the hints alone and one that wants everybody
// share a search when they come together.
func TestSharedScan(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	program := install(t, "client")
	const clients = 8
	var lookups []*Lookup
	for range clients {
		c := start(t, exec.Command(program, ln.Addr().String()), "plain")
		conn := accept(t, ln)
		c.line(t)
		lookups = append(lookups, find(t, f, conn))
	}
	answers := make(chan Owner, clients)
	for _, l := range lookups {
		go func() { answers <- l.Complete(within(t), false) }()
	}
	for range clients {
		if o := <-answers; !o.Complete {
			t.Errorf("%+v", o)
		}
	}
	if s := f.Stats(); s.Answered != clients || s.Scans > clients/2 {
		t.Errorf("%+v for %d questions", s, clients)
	}
}

func TestLateAnswer(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String()), "plain")
	conn := accept(t, ln)
	c.line(t)
	l := find(t, f, conn)
	l.Owner(within(t))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if o := l.Complete(ctx, true); o.Complete || o.Reason != Late || o.Err != nil {
		t.Errorf("%+v, want what is known, with reason %v", o, Late)
	}
	l.Close()
	l.Close()
	if o := l.Complete(within(t), true); o.Complete {
		t.Errorf("complete after Close: %+v", o)
	}
}

// No descriptor is left when everything is closed.
func TestNoDescriptorsLeft(t *testing.T) {
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	f := openFinder(t)
	ln := listen(t, "127.0.0.1:0")
	program := install(t, "client")
	for range 3 {
		c := start(t, exec.Command(program, ln.Addr().String()), "plain")
		conn := accept(t, ln)
		c.line(t)
		l := f.Find(conn)
		l.Complete(within(t), true)
		c.in.Close()
		c.Wait()
		l.Complete(within(t), true)
		l.Close()
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	// The listener, and three accepted connections.
	if after := count(); after > before+4 {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func openFinder(t testing.TB) *Finder {
	t.Helper()
	labtest.RequireRoot(t) // to read other users' descriptors
	f, err := open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.begin()
	return f
}

// newLevel makes a Finder of a higher level. Connections over loopback are tracked
// for it, as they are behind a redirect.
func newLevel(t testing.TB, level Level, o Options) *Finder {
	t.Helper()
	labtest.RequireRoot(t)
	rule := func(verb string) error {
		return exec.Command("iptables", "-w", verb, "OUTPUT", "-m", "conntrack", "--ctstate", "NEW").Run()
	}
	if err := rule("-A"); err != nil {
		t.Fatal(err)
	}
	f, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(f.Close(), rule("-D")); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_timestamp"); err != nil || string(b) != "0\n" {
			t.Errorf("conntrack still notes times: %q, %v", b, err)
		}
	})
	if got := f.Level(); got != level {
		t.Fatalf("level %s, want %s: %v", got, level, f.Levels())
	}
	return f
}

// Conntrack notes no times any more after a Finder that has told it to, also one that was
// killed, and goes on if somebody else has.
func TestTimed(t *testing.T) {
	l := labtest.Start(t, netlab.Options{NoIMDS: true})
	note := filepath.Join(t.TempDir(), "timed")
	const file = "/proc/sys/net/netfilter/nf_conntrack_timestamp"
	for name, c := range map[string]struct {
		noted  bool
		before string
		opened bool // a Finder follows
		after  string
	}{
		"off":                            {before: "0", opened: true, after: "0"},
		"somebody else's":                {before: "1", opened: true, after: "1"},
		"of one that was killed":         {noted: true, before: "1", opened: true, after: "0"},
		"killed, and it is off":          {noted: true, before: "0", opened: true, after: "0"},
		"of one that was killed, alone":  {noted: true, before: "1", after: "0"},
		"nobody has ever told it, alone": {before: "1", after: "1"},
	} {
		if c.noted {
			if err := os.WriteFile(note, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var got []byte
		if err := l.Instance.Do(func() (err error) {
			if err := errors.Join(diag.EnableTimestamps(), os.WriteFile(file, []byte(c.before), 0)); err != nil {
				return err
			}
			if !c.opened {
				err = Untime(note)
			} else {
				f, openErr := New(Options{TimedNote: note})
				if openErr != nil {
					return openErr
				}
				for _, when := range []string{"first", "after somebody has switched it off"} {
					if on, err := f.conntrack.Timestamps(); !on || err != nil {
						t.Errorf("%s: %s: the Finder has no times: %v", name, when, err)
					}
					if c.after == "0" {
						err = errors.Join(err, os.WriteFile(file, []byte("0"), 0), f.Check(t.Context()))
					}
				}
				err = f.Close()
			}
			var readErr error
			got, readErr = os.ReadFile(file)
			return errors.Join(err, readErr)
		}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if string(got) != c.after+"\n" {
			t.Errorf("%s: it is %q, want %s", name, got, c.after)
		}
		if _, err := os.Stat(note); err == nil {
			t.Errorf("%s: the note is left", name)
		}
	}
}

func waitFor(t testing.TB, what func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if what() {
			return
		}
	}
	t.Fatal("did not happen within 5 s")
}

func BenchmarkOwner(b *testing.B) {
	f := newFinder(b)
	ln := listen(b, "127.0.0.1:0")
	c := start(b, exec.Command(install(b, "client"), ln.Addr().String()), "plain")
	conn := accept(b, ln)
	c.line(b)
	ctx := within(b)
	b.Run("known client", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l := f.Find(conn)
			if o := l.Owner(ctx); !o.Attributed() {
				b.Fatal(o.Reason)
			}
			l.Close()
		}
	})
	b.Run("same connection", func(b *testing.B) {
		l := f.Find(conn)
		defer l.Close()
		b.ReportAllocs()
		for b.Loop() {
			l.Owner(ctx)
		}
	})
	b.Run("whole host", func(b *testing.B) {
		l := f.Find(conn)
		defer l.Close()
		b.ReportAllocs()
		for b.Loop() {
			l.Complete(context.Background(), true)
		}
	})
}

// Who makes counting references take long, as one user or as many, leaves room to root.
func TestTurns(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	turns := newTurns()
	var all []func()
	take := func(ctx context.Context, uid uint32) bool {
		done, ok := turns.take(ctx, uid)
		if ok {
			all = append(all, done)
		}
		return ok
	}
	for _, want := range []struct {
		uid uint32
		ok  bool
	}{{100000, true}, {100000, true}, {100000, false}, {100256, false}, {100001, true}, {100002, false}, {0, true}, {0, true}} {
		ctx := t.Context()
		if !want.ok {
			ctx = over
		}
		if got := take(ctx, want.uid); got != want.ok {
			t.Errorf("user %d: %t", want.uid, got)
		}
	}
	for _, done := range all {
		done()
	}
	for _, uid := range []uint32{100000, 100256, 100002} {
		if !take(t.Context(), uid) {
			t.Errorf("user %d, when all have ended", uid)
		}
	}
}

// Many processes that have connections at once do not have us keep their directories open for ever.
func TestPinsOfAPeak(t *testing.T) {
	f := newFinder(t)
	var pins []*pin
	for range maxPins + 20 {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		p, _, err := f.host.pin(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		pins = append(pins, p)
	}
	for _, p := range pins {
		f.host.unpin(p)
	}
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	if n := len(f.host.pins); n > maxPins {
		t.Errorf("%d are open", n)
	}
}

// Who becomes another program is not taken for what it was a moment ago, when it was not asked again because the kernel
// had told nothing: the kernel tells before the first instruction of the next one, after /proc shows that already.
func TestExecAfterReading(t *testing.T) {
	f := newLevel(t, Level1, Options{})
	name := func(pid int) (name string, asked bool) {
		p, st, err := f.host.pinSubject(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer f.host.unpin(p)
		proc, _, err := f.host.read(p, st, nil)
		if err != nil {
			t.Fatal(err)
		}
		return proc.Name, st.read == nil
	}
	soon := 0
	for range 20 {
		c := start(t, exec.Command("/bin/sh", "-c", "echo; read x; exec /bin/cat"), "")
		c.line(t)
		was, _ := name(c.Process.Pid)
		begin := time.Now()
		_, asked := name(c.Process.Pid)
		if _, err := c.in.Write([]byte("\n\n")); err != nil {
			t.Fatal(err)
		}
		c.line(t) // of the next program, which runs
		took := time.Since(begin)
		if is, _ := name(c.Process.Pid); was == "cat" || is != "cat" {
			t.Errorf("it was %s, and is taken for %s", was, is)
		}
		if !asked && took < toldFor {
			soon++
		}
	}
	if soon == 0 {
		t.Error("none was read so soon after that it could have been taken for what it was")
	}
}

// Who becomes another user and makes a socket as that is judged as that at once. Who holds a socket of another's is read
// for each of his connections, and not for each question about one.
func TestOtherUser(t *testing.T) {
	f := newLevel(t, Level1, Options{})
	ln := listen(t, "127.0.0.1:0")
	cmd := exec.Command(install(t, "client"), ln.Addr().String())
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	c := start(t, cmd, "user")
	connection := func() Conn {
		t.Helper()
		conn := accept(t, ln)
		c.line(t)
		return conn
	}
	next := func() {
		t.Helper()
		if _, err := c.in.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
	}
	owner := func(l *Lookup) *Process {
		t.Helper()
		o := l.Owner(within(t))
		if len(o.Subjects) != 1 {
			t.Fatalf("%+v", o)
		}
		return o.Subjects[0]
	}
	if p := owner(find(t, f, connection())); p.UID != [4]uint32{} {
		t.Errorf("users %d at the beginning", p.UID)
	}
	next()
	madeBefore := connection()
	next()
	const u = ordinaryUser
	if p := owner(find(t, f, connection())); p.UID != [4]uint32{u, u, u, u} || p.GID != p.UID {
		t.Errorf("users %d and groups %d, want %d", p.UID, p.GID, u)
	}
	was := owner(find(t, f, madeBefore))
	begin := time.Now()
	l := find(t, f, madeBefore)
	is := owner(l)
	if is == was {
		t.Error("not read for a connection that another user's socket has")
	}
	for range 5 {
		time.Sleep(2 * checkedFor) // an answer may be so old
		if now := owner(l); now != is && time.Since(begin) < toldFor {
			t.Fatal("read again for one connection")
		}
	}
}
