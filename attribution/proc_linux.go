package attribution

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"golang.org/x/sys/unix"
)

const (
	// maxCmdline bounds what is read of argv. Too low hides the end of a long
	// java command line from the rules; too high lets any user make us read
	// the 2 MiB that execve allows, for each request he sends.
	maxCmdline = 32 << 10
	// usualCmdline is what all but few command lines are shorter than.
	usualCmdline = 4 << 10
	// maxKept bounds the memory that all command lines together take that are
	// still referred to, from an event that waits for the disk, too. When that is
	// used up, new ones are cut to shortCmdline.
	maxKept      = 32 << 20
	shortCmdline = 512
	// maxAncestors bounds the chain of parents that is read.
	maxAncestors = 16
	// maxTries bounds how often a process is read again because it executed
	// another program meanwhile.
	maxTries = 3
	// retryAfter is about what an execve takes.
	retryAfter = 200 * time.Microsecond
)

// host reads processes of this machine. Its methods may be called from any
// goroutine.
type host struct {
	proc    string // where proc(5) is mounted
	cgroups CgroupMounts
	cgroup2 string // where cgroup2 is mounted, or systemd's hierarchy; "" if neither
	bootID  string
	self    int
	user    string // link text of our own namespaces: "user:[4026531837]"
	net     string
	sockets []byte // what fdinfo says of the mount that all sockets are on

	table   *procwatch.Watcher // nil below level 1
	witness Witness            // nil below level 2

	lockable procwatch.Lockable
	fdinfo   procwatch.Lockable // of processes about which lockable knows that they are locked
	owned    recent[bool]       // by path of an executable: only root can put another file there
	cgrouped recent[Cgroup]     // by content of /proc/PID/cgroup

	names names
	kept  atomic.Int64 // bytes of command lines

	mu   sync.Mutex // guards the following
	boot time.Time  // wall clock at boot
	pins map[int]*pin
	tick uint64 // of the last use, for eviction
}

// maxPins bounds what is kept open for processes that no connection refers to:
// two descriptors each. Too low, and the ancestors of every client are read anew for
// each connection.
const maxPins = 256

// pin is an open /proc/PID directory. It stays with the process it was opened
// for: when that ends, every read through it fails, also if the pid is reused.
type pin struct {
	pid      int
	dir      int
	statFile int // of the first thread; open, since it is what is read again and again
	start    uint64

	// guarded by host.mu
	refs int
	used uint64
	last *Process  // as last read
	stat stat      // then
	at   time.Time // when it was
	same bool      // the image was the same afterwards
}

func newHost(proc string) (*host, error) {
	h := &host{proc: proc, self: os.Getpid(), pins: map[int]*pin{}}
	h.lockable.Proc, h.fdinfo.Proc = proc, proc
	b, err := os.ReadFile(filepath.Join(proc, "sys/kernel/random/boot_id"))
	if err != nil {
		return nil, fmt.Errorf("name this boot: %w", err)
	}
	h.bootID = strings.TrimSpace(string(b))
	for name, dst := range map[string]*string{"user": &h.user, "net": &h.net} {
		if *dst, err = os.Readlink(filepath.Join(proc, "self/ns", name)); err != nil {
			return nil, fmt.Errorf("name our own %s namespace: %w", name, err)
		}
	}
	numbered := false
	if h.sockets, numbered, err = socketMount(proc); err != nil {
		return nil, fmt.Errorf("tell sockets from files: %w", err)
	}
	h.lockable.Insist = !numbered
	if h.cgroups, err = ReadCgroupMounts(proc); err != nil {
		return nil, err
	}
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) != nil {
			continue
		}
		if st.Type == unix.CGROUP2_SUPER_MAGIC || strings.HasSuffix(dir, "systemd") && st.Type == unix.CGROUP_SUPER_MAGIC {
			h.cgroup2 = dir
			break
		}
	}
	return h, nil
}

// socketMount reads the mnt_id line of a socket of our own (proc_pid_fdinfo(5)), and
// whether its number is there, too. There is one mount of sockets, whatever the mount
// namespace (sock_init in net/socket.c).
func socketMount(proc string) (mount []byte, numbered bool, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, false, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	b, err := os.ReadFile(filepath.Join(proc, "self/fdinfo", strconv.Itoa(fd)))
	if err != nil {
		return nil, false, err
	}
	_, rest, _ := bytes.Cut(b, []byte("\nmnt_id:"))
	id, _, ok := bytes.Cut(rest, []byte("\n"))
	if !ok {
		return nil, false, errors.New("not the format of proc_pid_fdinfo(5)")
	}
	return slices.Concat([]byte("\nmnt_id:"), id), bytes.Contains(rest, []byte("\nino:\t")), nil
}

// close gives back every pin.
func (h *host) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.pins {
		h.forget(p) // one that a Lookup still has is closed with that
	}
}

// wall gives the wall-clock time of a start tick. Boot is computed anew only
// when the clock was set, so that two records about one process agree; the
// btime of /proc/stat is off by up to a second.
func (h *host) wall(ticks uint64) time.Time {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	boot := time.Now().Add(-time.Duration(ts.Nano())).Round(0)
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := boot.Sub(h.boot); d > 5*time.Millisecond || d < -5*time.Millisecond {
		h.boot = boot
	}
	return h.boot.Add(time.Duration(ticks) * (time.Second / ticksPerSecond))
}

// pin opens /proc/PID, or returns the one that is open already and still
// leads to a live process. The caller must unpin it.
func (h *host) pin(pid int) (*pin, stat, error) {
	p := h.pinned(pid)
	if p != nil {
		st, err := h.stat(p)
		if err == nil {
			return p, st, nil
		}
		h.drop(p)
		h.unpin(p)
	}

	dir, err := unix.Open(filepath.Join(h.proc, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, stat{}, fmt.Errorf("open the directory of process %d: %w", pid, err)
	}
	p = &pin{pid: pid, dir: dir, refs: 1}
	// The stat of all threads together takes longer the more there are (do_task_stat in
	// fs/proc/array.c).
	p.statFile, err = unix.Openat(dir, filepath.Join("task", strconv.Itoa(pid), "stat"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(dir)
		return nil, stat{}, p.error("stat", err)
	}
	st, err := h.stat(p)
	if err != nil {
		p.close()
		return nil, stat{}, err
	}
	p.start = st.start
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.pins[pid]; old != nil {
		if old.start == p.start { // somebody else was faster
			p.close()
			old.refs++
			return old, st, nil
		}
		h.forget(old)
	}
	h.tick++
	p.used = h.tick
	h.pins[pid] = p
	h.evict()
	return p, st, nil
}

// pinned is pin if it is open already, and nil otherwise. It does not ask whether the
// process lives.
func (h *host) pinned(pid int) *pin {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pins[pid]
	if p != nil {
		p.refs++
		h.tick++
		p.used = h.tick
	}
	return p
}

// pinSubject is pin for who is judged. One that was read a moment ago, and of which the
// kernel has told nothing since, is not asked anything.
func (h *host) pinSubject(pid int) (*pin, stat, error) {
	if p := h.pinned(pid); p != nil {
		if st, ok := h.known(p); ok {
			return p, st, nil
		}
		h.unpin(p)
	}
	return h.pin(pid)
}

// known is the stat of a process that was read a moment ago, and has executed nothing
// and not ended since.
func (h *host) known(p *pin) (stat, bool) {
	if h.table == nil || h.table.Drain() != nil {
		return stat{}, false
	}
	mark, ok := h.table.Mark(p.pid, p.start)
	h.mu.Lock()
	defer h.mu.Unlock()
	if !ok || mark.Exited || !p.same || p.stat.image.mark != mark || !h.fresh(p.at) {
		return stat{}, false
	}
	st := p.stat
	st.read = p.last
	return st, true
}

// fresh reports whether what was read then still serves, if the image is the same.
func (h *host) fresh(at time.Time) bool {
	if h.table != nil {
		return time.Since(at) < toldFor
	}
	return time.Since(at) < freshFor
}

func (h *host) unpin(p *pin) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.refs--
	switch {
	case p.refs > 0:
	case h.pins[p.pid] != p:
		p.close()
	case len(h.pins) > maxPins: // since as many were in use once
		h.forget(p)
	}
}

// drop makes the next pin of this pid open anew.
func (h *host) drop(p *pin) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pins[p.pid] == p {
		delete(h.pins, p.pid) // refs > 0: the caller's unpin closes it
	}
}

// forget is called with h.mu held.
func (h *host) forget(p *pin) {
	delete(h.pins, p.pid)
	if p.refs == 0 {
		p.close()
	}
}

// evict is called with h.mu held.
func (h *host) evict() {
	if len(h.pins) <= maxPins {
		return
	}
	var oldest *pin
	for _, p := range h.pins {
		if p.refs == 0 && (oldest == nil || p.used < oldest.used) {
			oldest = p
		}
	}
	if oldest != nil {
		h.forget(oldest)
	}
}

// bufs has buffers for reading files of proc(5).
var bufs = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

func (h *host) stat(p *pin) (stat, error) {
	var st stat
	var err error
	if locked := h.lockable.Do(p.pid, func() {
		bp := bufs.Get().(*[]byte)
		defer bufs.Put(bp)
		n, failed := unix.Pread(p.statFile, *bp, 0)
		if err = failed; err == nil {
			st, err = parseStat((*bp)[:n])
		}
	}); locked != nil {
		return stat{}, p.error("stat", locked)
	}
	if err != nil {
		return stat{}, p.error("stat", err)
	}
	return st, nil
}

func (p *pin) close() {
	unix.Close(p.statFile)
	unix.Close(p.dir)
}

func (p *pin) error(file string, err error) error {
	return fmt.Errorf("read /proc/%d/%s: %w", p.pid, file, err)
}

// readAt reads a file of /proc/PID below dir into buf, cutting what does not fit. Such
// a file is made whole for each read(2) (single_open, proc_pid_cmdline_read in fs/proc),
// so that a second one would only say that there is no more.
func readAt(dir int, name string, buf []byte) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

func linkAt(dir int, name string) (string, error) {
	bp := bufs.Get().(*[]byte)
	defer bufs.Put(bp)
	n, err := unix.Readlinkat(dir, name, *bp)
	if err != nil {
		return "", err
	}
	return string((*bp)[:n]), nil
}

// errExecRace says that a process executed another program each time it was
// read.
var errExecRace = errors.New("executed another program while it was read, three times")

// gone reports whether an error says that the process has ended.
func gone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist)
}

// denied reports whether an error says that we may not look.
func denied(err error) bool { return errors.Is(err, fs.ErrPermission) }

// read reads a process with its ancestors, and says which image it read: the
// same before and after, or it is read again.
//
// What was read a moment ago serves again while the image is the same, and if it fits
// what else is known; nil is for nothing: a client that fetches credentials asks three
// times within milliseconds.
func (h *host) read(p *pin, st stat, fits func(*Process) bool) (*Process, image, error) {
	if st.read != nil {
		if fits == nil || fits(st.read) {
			return st.read, st.image, nil
		}
		var err error
		if st, err = h.stat(p); err != nil {
			return nil, image{}, err
		}
	}
	if err := h.identify(p, &st.image); err != nil {
		return nil, image{}, err
	}
	h.mu.Lock()
	last := p.last
	if !p.same || p.stat.image != st.image || !h.fresh(p.at) || st.between() {
		last = nil
	}
	h.mu.Unlock()
	if last != nil && (fits == nil || fits(last)) {
		return last, st.image, nil
	}
	for try := range maxTries {
		if try > 0 {
			time.Sleep(retryAfter)
		}
		proc, err := h.readImage(p, st)
		if err != nil {
			return nil, image{}, err
		}
		after, err := h.stat(p)
		if err != nil {
			return nil, image{}, err
		}
		if err := h.identify(p, &after.image); err != nil {
			return nil, image{}, err
		}
		if after.image == st.image && !st.between() {
			h.lineage(proc, st, maxAncestors)
			h.mu.Lock()
			p.last, p.stat, p.at, p.same = proc, st, time.Now(), true
			h.mu.Unlock()
			return proc, st.image, nil
		}
		st = after
	}
	return nil, image{}, p.error("exe", errExecRace)
}

// identify completes the image of a process with its executable, if it has one, and
// with what the kernel has told of it up to now: between two equal images there was
// no execve. The error is procwatch.ErrLocked: two of which nobody knows the executable
// are not equal.
func (h *host) identify(p *pin, i *image) error {
	if h.table != nil {
		h.table.Drain() // what is lost changes the mark, too
		i.mark, _ = h.table.Mark(p.pid, p.start)
	}
	var file unix.Stat_t
	var err error
	if locked := h.lockable.Do(p.pid, func() { err = unix.Fstatat(p.dir, "exe", &file, 0) }); locked != nil {
		return p.error("exe", locked)
	}
	if err == nil {
		i.device, i.inode = file.Dev, file.Ino
	}
	return nil
}

// parent reads the process that is a parent now, or takes what was read of it a
// moment ago while it runs the same image.
func (h *host) parent(pid int, childStart uint64, depth int) *Process {
	if pid == 0 || depth == 0 {
		return nil
	}
	p, st, err := h.pin(pid)
	if err != nil {
		return nil
	}
	defer h.unpin(p)
	if st.start > childStart {
		return nil // the parent has ended and its pid is somebody else's
	}
	if h.identify(p, &st.image) != nil {
		return nil
	}
	h.mu.Lock()
	last := p.last
	if p.stat.image != st.image || !h.fresh(p.at) {
		last = nil
	}
	h.mu.Unlock()
	if last != nil && last.adoptedBy() == st.ppid {
		return last
	}
	proc, err := h.readImage(p, st)
	if err != nil {
		return nil
	}
	h.lineage(proc, st, depth-1)
	h.mu.Lock()
	p.last, p.stat, p.at, p.same = proc, st, time.Now(), false
	h.mu.Unlock()
	return proc
}

// readImage reads everything but the parents.
func (h *host) readImage(p *pin, st stat) (*Process, error) {
	proc := &Process{
		PID: p.pid, StartTicks: st.start, Start: h.wall(st.start), EntityID: entityID(h.bootID, p.pid, st.start),
		Thread: st.comm, Session: st.sess, Group: st.pgrp, TTY: st.tty != 0,
	}
	check := func(file string, err error) error {
		if denied(err) {
			proc.Denied = true
			return nil
		}
		if err != nil {
			return p.error(file, err)
		}
		return nil
	}

	links, err := h.links(p, st.threads)
	if err != nil { // everything else is about what is not known, or not locked either
		return nil, p.error("exe", err)
	}
	dir, prefix, link, err := p.dir, links.prefix, links.exe, links.exeErr
	switch {
	case errors.Is(err, fs.ErrNotExist) && st.flags&pfKthread != 0:
	case errors.Is(err, fs.ErrNotExist): // a zombie, or about to be one: nobody to judge
		return nil, p.error("exe", err)
	case err != nil:
		if err := check("exe", err); err != nil {
			return nil, err
		}
	default:
		file := &links.file
		if err := links.fileErr; err != nil {
			if err := check("exe", err); err != nil {
				return nil, err
			}
			proc.Executable.Path = link
			break
		}
		proc.Executable = exeFile(link, uint64(file.Nlink))
		proc.Executable.Device, proc.Executable.Inode = file.Dev, file.Ino
		proc.Executable.UID, proc.Executable.GID, proc.Executable.Mode = file.Uid, file.Gid, file.Mode&0o7777
	}
	if err := check("ns/user", links.userErr); err != nil {
		return nil, err
	}
	proc.HostUser = links.userErr == nil && links.user == h.user
	if exe := &proc.Executable; exe.Path != "" {
		proc.Name = filepath.Base(exe.Path)
		if h.executed(p, proc); proc.Swapped {
			exe.HostVerified = false
		} else {
			exe.HostVerified = proc.HostUser && !exe.Deleted && h.sameFile(p.pid, exe)
		}
		exe.RootOwned = exe.HostVerified && h.changedByRoot(p.pid, exe.Path)
	}

	buf := make([]byte, usualCmdline)
	b, err := h.lockable.Read(p.pid, dir, prefix+"cmdline", buf)
	if err == nil && len(b) == len(buf) {
		long := make([]byte, maxCmdline)
		b, err = h.lockable.Read(p.pid, dir, prefix+"cmdline", long)
	}
	if err == procwatch.ErrLocked {
		if then, ok := h.argsThen(p, proc); ok { // or else they are denied, and somebody's evidence is missing
			b, err = then, nil
		}
	}
	if err := check("cmdline", err); err != nil {
		return nil, err
	}
	proc.Args = h.keepArgs(b)

	proc.WorkingDir = links.cwd
	if err := check("cwd", links.cwdErr); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}

	b, err = readAt(dir, prefix+"status", buf)
	if err != nil {
		return nil, p.error("status", err)
	}
	cred, err := parseStatus(b)
	if err != nil {
		return nil, p.error("status", err)
	}
	proc.UID, proc.GID, proc.Groups = cred.uid, cred.gid, cred.groups
	proc.UserName = h.names.userOf(proc.UID[1])
	proc.GroupName = h.names.groupOf(proc.GID[1])

	b, err = readAt(dir, prefix+"cgroup", buf)
	if err := check("cgroup", err); err != nil {
		return nil, err
	}
	proc.Cgroup = h.cgrouped.get(string(b), func() (Cgroup, bool) { return h.cgroups.Of(b), true })
	return proc, nil
}

// links are those of a process.
type links struct {
	prefix                           string // of the thread that has them, if its first has ended
	exe, user, cwd                   string
	file                             unix.Stat_t // exe
	exeErr, fileErr, userErr, cwdErr error
}

// links reads them all at once. The error is procwatch.ErrLocked.
func (h *host) links(p *pin, threads int) (*links, error) {
	l := new(links)
	err := h.lockable.Do(p.pid, func() {
		l.exe, l.exeErr = linkAt(p.dir, "exe")
		if gone(l.exeErr) && threads > 1 {
			// The leader has ended and the other threads run on: only they still
			// have the executable (task/TID of proc_pid_task(5)).
			if tid := h.otherThread(p); tid != 0 {
				l.prefix = "task/" + strconv.Itoa(tid) + "/"
				l.exe, l.exeErr = linkAt(p.dir, l.prefix+"exe")
			}
		}
		if l.exeErr == nil {
			l.fileErr = unix.Fstatat(p.dir, l.prefix+"exe", &l.file, 0)
		}
		l.user, l.userErr = linkAt(p.dir, l.prefix+"ns/user")
		l.cwd, l.cwdErr = linkAt(p.dir, l.prefix+"cwd")
	})
	return l, err
}

// argsThen are the arguments as they were read when the process began to run its program.
func (h *host) argsThen(p *pin, proc *Process) ([]byte, bool) {
	if h.table == nil {
		return nil, false
	}
	rec, ok := h.table.Process(p.pid, p.start)
	if !ok {
		return nil, false
	}
	now := &rec.Images[len(rec.Images)-1]
	if !now.Read || now.Denied || now.Cmdline == "" || now.Device != proc.Executable.Device || now.Inode != proc.Executable.Inode {
		return nil, false
	}
	return []byte(now.Cmdline), true
}

// keepArgs parses a command line and accounts for its memory, or cuts it.
func (h *host) keepArgs(cmdline []byte) []string {
	if len(cmdline) > shortCmdline {
		// Once as arguments, and once with blanks between them in events.
		size := int64(2*len(cmdline) + 16*bytes.Count(cmdline, []byte{0}))
		if h.kept.Add(size) <= maxKept {
			args := parseCmdline(cmdline)
			runtime.AddCleanup(&args[0], func(size int64) { h.kept.Add(-size) }, size)
			return args
		}
		h.kept.Add(-size)
		cmdline = cmdline[:shortCmdline]
	}
	return parseCmdline(cmdline)
}

// otherThread names a thread of a process whose leader has ended.
func (h *host) otherThread(p *pin) int {
	fd, err := unix.Openat(p.dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	bp := bufs.Get().(*[]byte)
	defer bufs.Put(bp)
	n, err := unix.ReadDirent(fd, *bp)
	if err != nil {
		return 0
	}
	for tid := range numbers((*bp)[:n]) {
		if tid != p.pid {
			return tid
		}
	}
	return 0
}

// sameFile reports whether the path of a process's program leads to it. It may lead
// through a file system of the user's, which does not answer.
func (h *host) sameFile(pid int, exe *File) bool {
	path, device, inode, is := exe.Path, exe.Device, exe.Inode, false
	locked := h.lockable.Do(pid, func() {
		var st unix.Stat_t
		is = unix.Stat(path, &st) == nil && st.Dev == device && st.Ino == inode
	})
	return locked == nil && is
}

// changedByRoot is ChangedByRoot, as it was a moment ago.
func (h *host) changedByRoot(pid int, path string) bool {
	return h.owned.get(path, func() (is, had bool) {
		by := false
		if h.lockable.Do(pid, func() { by = ChangedByRoot(path) == nil }) != nil {
			return false, false
		}
		return by, true
	})
}

// ChangedByRoot returns nil if only root can put another file at this path, and
// otherwise says who else can: the file and every directory above it must belong to
// root, and nobody else may write to them: no group either, because where there is an
// access list the group's bits are its mask (acl(5)). A sticky directory counts as
// writable.
func ChangedByRoot(path string) error {
	for ; ; path = filepath.Dir(path) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		switch {
		case st.Uid != 0:
			return fmt.Errorf("%s belongs to uid %d", path, st.Uid)
		case st.Mode&0o022 != 0:
			return fmt.Errorf("others than root may write to %s (mode %04o)", path, st.Mode&0o7777)
		case path == "/":
			return nil
		}
	}
}

// names remembers what the account database said, for a minute: os/user reads
// the whole file for every question. The zero value is ready.
type names struct {
	mu     sync.Mutex // guards the following
	users  map[uint32]string
	groups map[uint32]string
	since  time.Time
}

func (n *names) userOf(uid uint32) string {
	return n.lookup(uid, &n.users, func(id string) (string, error) {
		u, err := user.LookupId(id)
		if err != nil {
			return "", err
		}
		return u.Username, nil
	})
}

func (n *names) groupOf(gid uint32) string {
	return n.lookup(gid, &n.groups, func(id string) (string, error) {
		g, err := user.LookupGroupId(id)
		if err != nil {
			return "", err
		}
		return g.Name, nil
	})
}

func (n *names) lookup(id uint32, m *map[uint32]string, ask func(string) (string, error)) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if time.Since(n.since) > time.Minute || len(*m) > 1024 {
		n.users, n.groups, n.since = map[uint32]string{}, map[uint32]string{}, time.Now()
	}
	name, ok := (*m)[id]
	if !ok {
		name, _ = ask(strconv.FormatUint(uint64(id), 10))
		(*m)[id] = name
	}
	return name
}

// numbers yields the numeric names of a buffer that getdents64(2) filled.
func numbers(b []byte) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for name := range direntNames(b) {
			n := 0
			for _, c := range bytes.TrimSuffix(name, []byte{0}) {
				if c < '0' || c > '9' {
					n = -1
					break
				}
				n = n*10 + int(c-'0')
			}
			if n >= 0 && !yield(n) {
				return
			}
		}
	}
}
