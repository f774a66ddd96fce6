package attribution

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"golang.org/x/sys/unix"
)

const (
	// yieldAfter is how long a search of the host goes on before it lets the
	// scheduler look for connections to serve: with one processor nobody else
	// would before the search is preempted, after 10 ms. Shorter, and the search
	// of a large host takes longer than a request can wait for it.
	yieldAfter = 4 * time.Millisecond
	// yieldFor is not 0, because a goroutine that only yields is scheduled again
	// before the network is polled; the scheduler makes a millisecond of it if
	// there is nothing to do.
	yieldFor = 20 * time.Microsecond
)

// holder is one descriptor that refers to a socket.
type holder struct {
	pid, tid, fd int // tid is pid unless a thread has a descriptor table of its own
}

// A search goes through the descriptors of processes for sockets.
type search struct {
	h      *host
	wanted map[uint32][]holder // by inode; filled with what is found
	first  bool                // stop at the first holder
	budget int                 // stop after so many descriptors, if not zero
	seen   int                 // descriptors

	unreadable []int  // processes all of whose uids are 0, and that a security module keeps from us
	reason     Reason // why anything may be in what was not searched
	err        error  // with reason Failed
	closed     int    // the last process that could not be read
	largest    Table

	found bool // something, since the last look

	part *search      // goes through one process, which may not let that end
	far  atomic.Int64 // how far it is

	path    []byte // of the process or thread, below h.proc
	dirents []byte
	link    [64]byte
}

func newSearch(h *host, inodes ...uint32) *search {
	s := &search{h: h, wanted: make(map[uint32][]holder, len(inodes)), dirents: make([]byte, 32<<10)}
	for _, inode := range inodes {
		s.wanted[inode] = nil
	}
	return s
}

// pids lists the processes, youngest first as far as pids tell.
func (h *host) pids(buf []byte) ([]int, error) {
	pids, err := numbersIn(h.proc, buf)
	if err != nil {
		return nil, fmt.Errorf("list the processes: %w", err)
	}
	pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == h.self })
	slices.Sort(pids)
	slices.Reverse(pids)
	return pids, nil
}

// numbersIn lists the entries of a directory that are numbers.
func numbersIn(path string, buf []byte) ([]int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var all []int
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return all, nil
		}
		all = slices.AppendSeq(all, numbers(buf[:n]))
	}
}

// maxRounds bounds how often processes are listed in one search. Each round
// searches only those that the one before did not see, so that the second is
// already short: a host where more than one is born in each of so many rounds is
// one where somebody forks without end.
const maxRounds = 8

// all searches every descriptor table of every process. A holder may fork and end
// while the search is elsewhere; so it is over only when a list of the processes
// has none that was not searched.
func (s *search) all() {
	began := time.Now()
	searched := make(map[int]struct{}, 256)
	for range maxRounds {
		pids, err := s.h.pids(s.dirents)
		if err != nil {
			s.reason, s.err = Failed, err
			return
		}
		found := false
		for _, pid := range pids {
			if _, ok := searched[pid]; ok {
				continue
			}
			searched[pid], found = struct{}{}, true
			before := s.seen
			if !s.process(pid, true) {
				return
			}
			if n := s.seen - before; n > s.largest.Descriptors {
				s.largest = Table{PID: pid, Descriptors: n}
			}
			if time.Since(began) > yieldAfter {
				time.Sleep(yieldFor)
				began = time.Now()
			}
		}
		if !found {
			return
		}
	}
	if s.reason == Attributed {
		s.reason = Churn
	}
}

// byKernel lets the kernel go through the descriptors. It reports false if this
// kernel cannot.
func (s *search) byKernel(w Witness) bool {
	if w == nil {
		return false
	}
	inodes := slices.Collect(maps.Keys(s.wanted))
	ctx, cancel := context.WithTimeout(context.Background(), kernelTakes)
	defer cancel()
	found, err := w.Holders(ctx, inodes)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return false
	case err != nil:
		s.reason, s.err = Failed, err
	}
	for inode, all := range found {
		for _, d := range all {
			holders := s.wanted[inode]
			if d.PID != s.h.self && !slices.ContainsFunc(holders, func(h holder) bool { return h.pid == d.PID }) {
				s.wanted[inode] = append(holders, holder{pid: d.PID, tid: d.TID, fd: d.FD})
			}
		}
	}
	return true
}

// kernelTakes is far more than going through millions of descriptors does.
const kernelTakes = 5 * time.Second

// process searches the table of a process's leader, and those of its threads if they are
// wanted. It reports whether the search goes on.
func (s *search) process(pid int, threads bool) bool {
	if s.spent() {
		return false
	}
	part := s.newPart()
	on := false
	if s.h.lockable.DoAmong(pid, &part.far, func() { on = part.tables(pid, threads, part.table) }) != nil {
		s.part = nil // it may go on
		return s.locked(pid, threads)
	}
	return s.take(on)
}

// newPart is for one process.
func (s *search) newPart() *search {
	if s.part == nil {
		s.part = newSearch(s.h, slices.Collect(maps.Keys(s.wanted))...)
	}
	part := s.part
	part.first, part.seen, part.closed = s.first, 0, s.closed
	if s.budget > 0 {
		part.budget = s.budget - s.seen
	}
	return part
}

// take takes over what was found in one process.
func (s *search) take(on bool) bool {
	part := s.part
	s.seen, s.closed = s.seen+part.seen, part.closed
	s.unreadable = append(s.unreadable, part.unreadable...)
	if part.reason != Attributed && s.reason != Failed {
		s.reason, s.err = part.reason, part.err
	}
	part.unreadable, part.reason, part.err = nil, Attributed, nil
	if part.found {
		part.found = false
		for inode, holders := range part.wanted {
			s.wanted[inode] = append(s.wanted[inode], holders...)
			part.wanted[inode] = nil
		}
	}
	return on
}

// locked searches a process that does not let its descriptors be read, or of whose user
// others do not. What fdinfo says of them is not locked with them (proc_pid_fdinfo(5); ino
// is there since Linux 5.14), but may be each by itself, as one of epoll(7) is. Which
// threads share a table is locked with them, but an execve that locks them has one thread.
func (s *search) locked(pid int, threads bool) bool {
	part := s.newPart()
	on := false
	if s.h.fdinfo.DoAmong(pid, &part.far, func() { on = part.tables(pid, threads, part.infos) }) != nil {
		s.part = nil
		s.unsearched(procwatch.ErrLocked)
		return true
	}
	return s.take(on)
}

// infos searches one descriptor table by what fdinfo says, the directory below s.path.
func (s *search) infos(who holder) bool {
	if s.spent() {
		return false
	}
	s.seen++
	path := s.h.proc + "/" + string(s.path) + "/fdinfo"
	fds, err := numbersIn(path, s.dirents)
	if err != nil {
		s.missed(who.pid, err)
		return true
	}
	bp := bufs.Get().(*[]byte)
	defer bufs.Put(bp)
	for _, who.fd = range fds {
		if s.spent() {
			return false
		}
		s.seen++
		s.far.Add(1)
		b, err := readAt(unix.AT_FDCWD, path+"/"+strconv.Itoa(who.fd), *bp)
		if gone(err) {
			continue // it was closed
		}
		if err != nil {
			s.missed(who.pid, err)
			return true
		}
		before, line, ok := bytes.Cut(b, []byte("\nino:\t"))
		text, _, _ := bytes.Cut(line, []byte("\n"))
		inode, err := strconv.ParseUint(string(text), 10, 64)
		if !ok || err != nil {
			s.unsearched(procwatch.ErrLocked)
			return true
		}
		if !bytes.HasSuffix(before, s.h.sockets) || inode > math.MaxUint32 {
			continue // files have such numbers, too
		}
		if !s.note(who, uint32(inode)) {
			return false
		}
	}
	return true
}

// note notes who has a socket, if it is wanted. It reports whether the search goes on.
func (s *search) note(who holder, inode uint32) bool {
	holders, ok := s.wanted[inode]
	if !ok {
		return true
	}
	if len(holders) == 0 || holders[len(holders)-1].pid != who.pid {
		s.wanted[inode], s.found = append(holders, who), true
	}
	return !s.first
}

// unsearched notes that a process could not be searched, whosever it is.
func (s *search) unsearched(err error) {
	if s.reason != Failed {
		s.reason, s.err = AccessDenied, err
	}
}

// tables searches the table of a process's leader, and those of its threads if they are
// wanted, each by search.
func (s *search) tables(pid int, threads bool, search func(holder) bool) bool {
	s.path = strconv.AppendInt(s.path[:0], int64(pid), 10)
	return search(holder{pid: pid, tid: pid}) && (!threads || s.threads(pid, search))
}

// threads searches the tables of those threads that do not share the leader's:
// one that left it (unshare(2), CLONE_FILES), and all of them if the leader has
// ended. kcmp(2) tells; a kernel without it makes every thread be searched.
func (s *search) threads(pid int, search func(holder) bool) bool {
	if pid == s.closed {
		return true // its leader was counted as not readable
	}
	s.path = append(strconv.AppendInt(s.path[:0], int64(pid), 10), "/task"...)
	path := s.h.proc + "/" + string(s.path)
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Nlink <= 3 {
		return true // ".", "..", and one thread
	}
	var searched map[int]struct{}
	for range maxRounds {
		tids, err := numbersIn(path, s.dirents)
		if err != nil {
			s.missed(pid, err)
			return true
		}
		found := false
		for _, tid := range tids {
			if _, ok := searched[tid]; ok || tid == pid || sameTable(pid, tid) {
				continue
			}
			if searched == nil {
				searched = map[int]struct{}{}
			}
			searched[tid], found = struct{}{}, true
			s.path = strconv.AppendInt(s.path[:0], int64(pid), 10)
			s.path = append(append(s.path, "/task/"...), strconv.Itoa(tid)...)
			if !search(holder{pid: pid, tid: tid}) {
				return false
			}
		}
		if !found {
			return true
		}
	}
	if s.reason == Attributed {
		s.reason = Churn
	}
	return true
}

func sameTable(pid, tid int) bool {
	const kcmpFiles = 2 // KCMP_FILES
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(tid), kcmpFiles, 0, 0, 0)
	return errno == 0 && r == 0
}

func (s *search) spent() bool { return s.budget > 0 && s.seen >= s.budget }

// table searches one descriptor table, the directory fd below s.path.
func (s *search) table(who holder) bool {
	if s.spent() {
		return false
	}
	s.seen++ // a table without descriptors costs something, too
	fd, err := unix.Open(s.h.proc+"/"+string(s.path)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		s.missed(who.pid, err)
		return true
	}
	defer unix.Close(fd)
	for {
		if s.spent() {
			return false
		}
		n, err := unix.ReadDirent(fd, s.dirents)
		if err != nil {
			s.missed(who.pid, err)
			return true
		}
		if n == 0 {
			return true
		}
		names := direntNames(s.dirents[:n])
		if s.first {
			// What a client opened last is mostly last.
			all := slices.Collect(names)
			slices.Reverse(all)
			names = slices.Values(all)
		}
		for name := range names {
			if name[0] == '.' {
				continue
			}
			if s.seen++; s.seen%64 == 0 {
				s.far.Add(1)
			}
			inode, err := s.socket(fd, name)
			if err != 0 {
				if gone(err) {
					continue
				}
				s.missed(who.pid, err)
				return true
			}
			if _, ok := s.wanted[inode]; !ok {
				continue
			}
			who.fd, _ = strconv.Atoi(string(bytes.TrimSuffix(name, []byte{0})))
			if !s.note(who, inode) {
				return false
			}
		}
	}
}

// missed notes a process that could not be searched, unless it has ended. One
// that runs with no uid but root's, and that a security module keeps from us, is
// named and passed over: an ordinary user cannot have put the socket there, and on
// hosts with a confined pid 1 nothing could ever be complete otherwise.
func (s *search) missed(pid int, err error) {
	switch {
	case gone(err) || pid == s.closed:
		return
	case !denied(err):
		s.reason, s.err = Failed, fmt.Errorf("search the descriptors of process %d: %w", pid, err)
		return
	}
	s.closed = pid
	if p, _, err := s.h.pin(pid); err == nil {
		defer s.h.unpin(p)
		bp := bufs.Get().(*[]byte)
		defer bufs.Put(bp)
		if b, err := readAt(p.dir, "status", *bp); err == nil {
			if c, err := parseStatus(b); err == nil && c.uid == [4]uint32{} {
				s.unreadable = append(s.unreadable, pid)
				return
			}
		}
	}
	if s.reason != Failed {
		s.reason = AccessDenied
	}
}

// socket reads the link of one descriptor: "socket:[INODE]" if it is a socket,
// else 0. The name ends with its NUL, as getdents64 left it, so that no
// string is made for each of the host's descriptors.
func (s *search) socket(dir int, name []byte) (inode uint32, errno unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])),
		uintptr(unsafe.Pointer(&s.link[0])), uintptr(len(s.link)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	digits, ok := bytes.CutPrefix(s.link[:n], []byte("socket:["))
	if !ok {
		return 0, 0
	}
	for _, c := range digits {
		if c < '0' || c > '9' {
			break
		}
		inode = inode*10 + uint32(c-'0')
	}
	return inode, 0
}

// direntNames yields the names in a buffer that getdents64(2) filled, each
// with its terminating NUL.
func direntNames(b []byte) iter.Seq[[]byte] {
	const header = 19 // ino, off, reclen, type of struct linux_dirent64
	return func(yield func([]byte) bool) {
		for len(b) > header {
			size := int(binary.NativeEndian.Uint16(b[16:]))
			if size <= header || size > len(b) {
				return
			}
			name := b[header:size]
			if end := bytes.IndexByte(name, 0); end > 0 && !yield(name[:end+1]) {
				return
			}
			b = b[size:]
		}
	}
}

// cgroupMembers lists the processes of the cgroup2 directory with this id, as
// sock_diag reports it for the socket, the last that came first. Nil when the id is the root's, the
// directory is gone or cannot be opened.
func (h *host) cgroupMembers(id uint64) []int {
	const fileidKernfs = 0xfe // FILEID_KERNFS, include/linux/exportfs.h
	if id <= 1 || h.cgroup2 == "" {
		return nil
	}
	mount, err := unix.Open(h.cgroup2, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(mount)
	var handle [8]byte
	binary.NativeEndian.PutUint64(handle[:], id)
	dir, err := unix.OpenByHandleAt(mount, unix.NewFileHandle(fileidKernfs, handle[:]), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return nil
	}
	defer unix.Close(dir)
	buf := make([]byte, 4096)
	b, err := readAt(dir, "cgroup.procs", buf)
	if err != nil || len(b) >= len(buf)-len("4194304\n") { // the next pid may not have fitted
		return nil // so many that a search of them is no hint
	}
	var pids []int
	for line := range bytes.Lines(b) {
		if pid, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Reverse(pids)
	return pids
}
