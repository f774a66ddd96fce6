package attribution

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"golang.org/x/sys/unix"
)

// unanswered mounts a file of an ordinary user's whose content never comes (fuse(4), include/uapi/linux/fuse.h), until
// the function is called.
func unanswered(t *testing.T) (path string, giveUp func()) {
	t.Helper()
	labtest.RequireRoot(t)
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		missing := "needs FUSE: " + err.Error()
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	dir, err := os.MkdirTemp("", "imdsgate-attribution")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "file")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=100644,user_id=%d,group_id=%d", dev, ordinaryUser, ordinaryUser)
	if err := unix.Mount("fuse", path, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	server := os.NewFile(uintptr(dev), "fuse")
	served := make(chan struct{})
	go func() {
		defer close(served)
		serveUnanswered(server)
	}()
	giveUp = func() { server.Close() }
	t.Cleanup(func() { // before it is unmounted, or else that waits for an answer
		giveUp()
		<-served
	})
	return path, giveUp
}

// serveUnanswered answers everything but reads, closes and polls, until it is closed itself.
func serveUnanswered(server *os.File) {
	const (
		forget, getattr, open, read, flush, initialize, interrupt, poll = 2, 3, 14, 15, 25, 26, 36, 40
		inHeader, outHeader                                             = 40, 16
	)
	in := make([]byte, 1<<20)
	for {
		n, err := server.Read(in)
		if err != nil || n < inHeader {
			return
		}
		var body []byte
		errno := int32(0)
		switch binary.NativeEndian.Uint32(in[4:]) {
		case forget, interrupt, read, flush, poll:
			continue
		case initialize:
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body, 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 4096) // max_write
		case getattr:
			body = make([]byte, 16+88)
			attr := body[16:]
			binary.NativeEndian.PutUint64(attr, 1<<32|1) // ino: more than a socket has
			binary.NativeEndian.PutUint64(attr[8:], 1<<20)
			binary.NativeEndian.PutUint32(attr[60:], unix.S_IFREG|0o644)
			binary.NativeEndian.PutUint32(attr[64:], 1)
			binary.NativeEndian.PutUint32(attr[68:], ordinaryUser)
		case open:
			body = make([]byte, 16)
		default:
			errno = -int32(unix.ENOSYS)
		}
		out := make([]byte, outHeader, outHeader+len(body))
		binary.NativeEndian.PutUint32(out, uint32(outHeader+len(body)))
		binary.NativeEndian.PutUint32(out[4:], uint32(errno))
		copy(out[8:], in[8:16]) // unique
		if _, err := server.Write(append(out, body...)); err != nil && !errors.Is(err, unix.ENOENT) {
			return
		}
	}
}

// waits shows that who reads a file of a client's waits, and returns what comes of that.
func waits(t *testing.T, c *client, file string) <-chan error {
	t.Helper()
	read := make(chan error, 1)
	time.Sleep(200 * time.Millisecond)
	go func() {
		_, err := os.ReadFile("/proc/" + strconv.Itoa(c.Process.Pid) + "/" + file)
		read <- err
	}()
	select {
	case err := <-read:
		t.Fatalf("%s is not locked: %v", file, err)
	case <-time.After(300 * time.Millisecond):
	}
	return read
}

// A client can keep others from its memory, where its arguments are, for as long as it likes. Nobody waits for it then,
// not who asks for it, nor a daemon that starts; and it is told that something of it is not known.
func TestLockedMemory(t *testing.T) {
	path, giveUp := unanswered(t)
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String(), path), "locked")
	defer giveUp() // or else the client cannot end
	conn := accept(t, ln)
	c.line(t)
	read := waits(t, c, "cmdline")

	for range 2 {
		begin := time.Now()
		l := find(t, f, conn)
		o := l.Owner(within(t))
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("found after %v", took)
		}
		if o.Reason != AccessDenied || len(o.Subjects) != 1 || o.Subjects[0].PID != c.Process.Pid || !o.Subjects[0].Denied || o.Subjects[0].Executable.Path == "" || len(o.Subjects[0].Args) != 0 {
			t.Errorf("%s, %+v", o.Reason, o.Subjects)
		}
	}
	inode := find(t, f, conn).socket.Inode
	s := newSearch(f.host, inode)
	if s.locked(c.Process.Pid, true); len(s.wanted[inode]) != 1 || s.reason != Attributed { // beside that file
		t.Errorf("searched: %+v, %v, %v", s.wanted, s.reason, s.err)
	}
	begin := time.Now()
	again, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("begun after %v", took)
	}

	giveUp()
	if err := <-read; err != nil {
		t.Error(err)
	}
	waitFor(t, func() bool {
		o := find(t, f, conn).Owner(within(t))
		return len(o.Subjects) == 1 && !o.Subjects[0].Denied && len(o.Subjects[0].Args) == 3
	})
}

// A client can keep others from asking in which system call it is, too: with an execve that closes a file whose owner
// does not let it (do_close_on_exec in fs/file.c, under exec_update_lock).
func TestLockedCall(t *testing.T) {
	path, giveUp := unanswered(t)
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String(), path), "closing")
	defer giveUp() // or else the client cannot end
	conn := accept(t, ln)
	c.line(t)
	read := waits(t, c, "syscall")

	soon := func(what string, ask func()) {
		t.Helper()
		begin := time.Now()
		ask()
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("%s took %v", what, took)
		}
	}
	// The search of the host is what lower levels have.
	soon("a search", func() {
		inode := find(t, f, conn).socket.Inode
		s := newSearch(f.host, inode, inode+1)
		s.all()
		if found := s.wanted[inode]; len(found) != 1 || found[0].pid != c.Process.Pid || s.reason != Attributed {
			t.Errorf("%+v, %v, %v", found, s.reason, s.err)
		}
	})
	soon("a stranger's question", func() {
		dir, err := unix.Open("/proc/"+strconv.Itoa(c.Process.Pid), unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(dir)
		h := holder{pid: c.Process.Pid, tid: c.Process.Pid, fd: 3}
		if is, locked := f.holds(&pin{pid: h.pid, dir: dir}, h, 1); is || !locked {
			t.Errorf("it holds what is a stranger's: %v, %v", is, locked)
		}
		f.remember(h)
		stranger := start(t, exec.Command(install(t, "stranger"), ln.Addr().String()), "plain")
		conn := accept(t, ln)
		stranger.line(t)
		if o := find(t, f, conn).Complete(within(t), true); o.Reason == AccessDenied || !slices.Equal(pids(o), []int{stranger.Process.Pid}) {
			t.Errorf("%s, %+v", o.Reason, o.Subjects)
		}
	})
	soon("a start", func() {
		again, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	})
	soon("a client", func() {
		if o := find(t, f, conn).Complete(within(t), true); o.Complete || o.Reason != AccessDenied {
			t.Errorf("%s, %+v", o.Reason, o.Subjects)
		}
	})
	giveUp()
	<-read
}

// What fdinfo says of an epoll descriptor can be locked by who keeps that from looking at one of its files (ep_show_fdinfo
// in fs/eventpoll.c).
func TestLockedDescriptor(t *testing.T) {
	path, giveUp := unanswered(t)
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String(), path), "polling")
	defer giveUp() // or else the client cannot end
	accept(t, ln)
	line := c.line(t)
	read := waits(t, c, "fdinfo/"+line[len(line)-1])
	begin := time.Now()
	s := newSearch(f.host, 1)
	if s.locked(c.Process.Pid, true); s.reason != AccessDenied {
		t.Errorf("%v, %v", s.reason, s.err)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("searched for %v", took)
	}
	giveUp()
	<-read
}

// What fdinfo tells of sockets is not taken from files, and threads with tables of their own are not left out.
func TestLockedSearch(t *testing.T) {
	f := newFinder(t)
	ln := listen(t, "127.0.0.1:0")
	c := start(t, exec.Command(install(t, "client"), ln.Addr().String()), "thread")
	conn := accept(t, ln)
	c.line(t)
	inode := find(t, f, conn).socket.Inode
	s := newSearch(f.host, inode)
	s.locked(c.Process.Pid, true)
	if found := s.wanted[inode]; len(found) != 1 || found[0].pid != c.Process.Pid || found[0].tid == c.Process.Pid || s.reason != Attributed {
		t.Errorf("%+v, %v, %v", found, s.reason, s.err)
	}

	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	s = newSearch(f.host, uint32(st.Ino))
	if s.locked(os.Getpid(), true); s.found || len(s.wanted[uint32(st.Ino)]) > 0 || s.reason != Attributed {
		t.Errorf("a file: %+v, %v, %v", s.wanted, s.reason, s.err)
	}
}

// What a process does not let be asked is not known, and its answer nobody else's.
func TestLockedAnswer(t *testing.T) {
	labtest.RequireRoot(t)
	h, err := newHost("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	p, st, err := h.pin(os.Getppid())
	if err != nil {
		t.Fatal(err)
	}
	defer h.unpin(p)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1]) // and it ends
	if err := h.lockable.Do(p.pid, func() {
		unix.Read(pipe[0], make([]byte, 1))
		unix.Close(pipe[0])
	}); err != procwatch.ErrLocked {
		t.Fatal(err)
	}
	if err := h.identify(p, &st.image); !denied(err) {
		t.Errorf("identified: %v", err)
	}
	if h.changedByRoot(p.pid, "/") {
		t.Error("it is not asked")
	}
	if !h.changedByRoot(os.Getpid(), "/") {
		t.Error("another has its answer")
	}
}

// A container is not forgotten because its user has let us wait, so that none of his is asked where it is any more. One
// client is.
func TestLockedNetwork(t *testing.T) {
	h := &host{proc: t.TempDir(), net: "net:[1]"}
	h.lockable.Proc = h.proc
	const user = 4242
	process := func(pid, uid int, net string) {
		t.Helper()
		dir := filepath.Join(h.proc, strconv.Itoa(pid))
		ns := filepath.Join(dir, "ns")
		status := fmt.Appendf(nil, "Name:\tx\nUid:\t%d\t0\t0\t0\n", uid)
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(ns, 0o700), os.WriteFile(filepath.Join(dir, "status"), status, 0o600),
			os.WriteFile(filepath.Join(ns, net), nil, 0o600), os.Symlink(net, filepath.Join(ns, "net"))); err != nil {
			t.Fatal(err)
		}
	}
	process(100, user, "net:[2]")
	process(200, user+1, "net:[1]")
	var n namespaces
	if all, err := n.others(h, 0); err != nil || len(all) != 1 || all["net:[2]"] != 100 {
		t.Errorf("%v, %v", all, err)
	}
	process(200, user+1, "net:[3]")
	var far atomic.Int64
	var stop atomic.Bool
	ended, begin := make(chan struct{}), time.Now()
	if err := h.lockable.DoAmong(100, &far, func() {
		defer close(ended)
		for ; !stop.Load() && time.Since(begin) < 10*time.Second; far.Add(1) {
			unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: 20_000})
		}
	}); err != procwatch.ErrLocked {
		t.Fatal(err)
	}
	stop.Store(true)
	<-ended
	if err := h.lockable.DoAmong(100, nil, func() {}); err != procwatch.ErrLocked {
		t.Fatalf("it is asked: %v", err)
	}
	if all, err := n.others(h, 0); err != nil || len(all) != 2 || all["net:[2]"] != 100 || all["net:[3]"] != 200 {
		t.Errorf("%v, %v", all, err)
	}
	for _, among := range []bool{false, true} {
		ns, err := h.openNet(100, among)
		if (err == nil) == among {
			t.Errorf("among %v: %v", among, err)
		}
		if err == nil {
			unix.Close(ns)
		}
	}
}

// Linux before 5.14 has no numbers in fdinfo, and there it is no other way to what is locked.
func TestLockedNumbers(t *testing.T) {
	h, err := newHost("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	here := t.TempDir()
	dir := filepath.Join(here, "self/fdinfo")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for fd := range 1000 {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(fd)), []byte("pos:\t0\nflags:\t02\nmnt_id:\t9\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mount, numbered, err := socketMount(here)
	if string(mount) != "\nmnt_id:\t9" || numbered || err != nil {
		t.Errorf("%q, %v, %v", mount, numbered, err)
	}
	_, numbered, err = socketMount("/proc")
	if err != nil || h.lockable.Insist == numbered {
		t.Errorf("numbered %v, %v; insists %v", numbered, err, h.lockable.Insist)
	}
}

// A program of which nobody could see what it was when it was executed is not taken for what it shows.
func TestLockedProgram(t *testing.T) {
	shown := File{Path: "/usr/bin/aws", Device: 1, Inode: 2}
	same := procwatch.File{Path: shown.Path, Device: shown.Device, Inode: shown.Inode}
	other := procwatch.File{Path: "/tmp/x", Device: 1, Inode: 3}
	for _, c := range []struct {
		image   procwatch.Image
		lost    bool
		swapped bool
		path    string
	}{
		{procwatch.Image{Read: true, File: same}, false, false, shown.Path},
		{procwatch.Image{Read: true, File: same}, true, false, shown.Path},
		{procwatch.Image{Read: true, File: other}, false, true, other.Path},
		{procwatch.Image{}, false, false, shown.Path},
		{procwatch.Image{}, true, true, shown.Path},
		{procwatch.Image{Locked: true}, false, true, shown.Path},
		{procwatch.Image{Locked: true, Read: true, File: same}, false, true, shown.Path}, // later
	} {
		p := &Process{Executable: shown}
		if p.compare(&c.image, c.lost); p.Swapped != c.swapped || p.Executable.Path != c.path {
			t.Errorf("%+v, lost %v: swapped %v, %s", c.image, c.lost, p.Swapped, p.Executable.Path)
		}
	}
}
