package procwatch

import (
	"bytes"
	"errors"
	"io/fs"
	"strconv"
	"strings"
	"time"
	"unique"

	"golang.org/x/sys/unix"
)

// maxCmdline bounds what is read of the arguments. Too low hides the end of a long
// command line from rules about ancestors; too high lets any user make us read and
// keep the 2 MiB that execve allows.
const maxCmdline = 4 << 10

// reader reads processes from /proc, as one who goes through many. It is not safe for
// concurrent use.
type reader struct {
	proc     string
	lockable *Lockable
	buf      [maxCmdline]byte
	path     []byte
}

// open pins a process: when it has ended, everything read through its directory
// fails, also if the pid is another's then.
func (r *reader) open(pid int32) (int, error) {
	r.path = strconv.AppendInt(append(append(r.path[:0], r.proc...), '/'), int64(pid), 10)
	return unix.Open(string(r.path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// content reads what an image is. The executable comes first, because the process
// may be about to end.
func (r *reader) content(pid int32, dir int) (content, bool) {
	var c content
	f, err := r.executable(pid, dir)
	if err == ErrLocked { // which is not to be taken for a security module's answer
		return content{locked: true}, false
	}
	if errors.Is(err, fs.ErrPermission) {
		c.denied = true
	} else if err != nil {
		return content{}, false
	}
	c.file = unique.Make(f)
	var st unix.Stat_t
	if unix.Fstat(dir, &st) != nil {
		return content{}, false
	}
	c.uid, c.gid = st.Uid, st.Gid // effective, for a directory (task_dump_owner in fs/proc/base.c)
	b, err := r.lockable.read(among(int(pid)), dir, "cmdline", r.buf[:])
	if err != nil && err != ErrLocked && !c.denied {
		return content{}, false
	}
	c.cmdline, c.cut = string(b), len(b) == len(r.buf) || err == ErrLocked
	return c, true
}

// executable is the file that a process runs.
func (r *reader) executable(pid int32, dir int) (File, error) {
	var f File
	var err error
	if locked := r.lockable.DoAmong(int(pid), nil, func() {
		b := hold(maxCmdline)
		defer release(b)
		n, failed := unix.Readlinkat(dir, "exe", *b)
		if err = failed; err != nil {
			return
		}
		f.Path = string((*b)[:n])
		var st unix.Stat_t
		if err = unix.Fstatat(dir, "exe", &st, 0); err == nil {
			f.Device, f.Inode, f.Links = uint64(st.Dev), st.Ino, uint32(st.Nlink)
		}
	}); locked != nil {
		return File{}, locked
	}
	return f, err
}

// stat is what we use of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	state   byte
	ppid    int32
	kernel  bool
	threads int
	ticks   uint64
}

// running reports whether some thread has not ended.
func (s stat) running() bool { return s.state != 'Z' && s.state != 'X' || s.threads > 1 }

const pfKthread = 0x00200000 // PF_KTHREAD, include/linux/sched.h

func (r *reader) stat(pid int32, dir int) (stat, error) {
	b, err := r.lockable.read(among(int(pid)), dir, "stat", r.buf[:])
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

var errStat = errors.New("not the format of proc_pid_stat(5)")

func parseStat(b []byte) (stat, error) {
	end := bytes.LastIndexByte(b, ')') // comm may have anything in it
	if end < 0 {
		return stat{}, errStat
	}
	var s stat
	field := 2
	for f := range strings.FieldsSeq(string(b[end+1:])) {
		field++
		var n uint64
		var err error
		switch field {
		case 3:
			s.state = f[0]
		case 4:
			n, err = strconv.ParseUint(f, 10, 31)
			s.ppid = int32(n)
		case 9:
			n, err = strconv.ParseUint(f, 10, 64)
			s.kernel = n&pfKthread != 0
		case 20:
			s.threads, err = strconv.Atoi(f)
		case 22:
			s.ticks, err = strconv.ParseUint(f, 10, 64)
			if err != nil {
				return stat{}, errStat
			}
			return s, nil
		}
		if err != nil {
			return stat{}, errStat
		}
	}
	return stat{}, errStat
}

// record reads one process for a snapshot.
func (r *reader) record(pid int32) (record, bool) {
	began := monotonic()
	dir, err := r.open(pid)
	if err != nil {
		return record{}, false
	}
	defer unix.Close(dir)
	st, err := r.stat(pid, dir)
	if err != nil {
		return record{}, false
	}
	rec := record{pid: pid, ppid: st.ppid, ticks: st.ticks, kernel: st.kernel, began: began}
	if !st.kernel {
		rec.content, rec.readable = r.content(pid, dir)
	}
	rec.ended = monotonic()
	rec.dead = !st.running()
	return rec, true
}

// alive reads the start tick of a process of which some thread runs. It is asked while
// others wait for the table, and so not for long: who locks himself counts as ended.
func (r *reader) alive(pid int) (uint64, bool) {
	dir, err := r.open(int32(pid))
	if err != nil {
		return 0, false
	}
	defer unix.Close(dir)
	var buf [1024]byte
	q := among(pid)
	q.patience = briefly
	b, err := r.lockable.read(q, dir, "stat", buf[:])
	if err != nil {
		return 0, false
	}
	st, err := parseStat(b)
	return st.ticks, err == nil && st.running()
}

// briefly is for a question that others wait for.
const briefly = 2 * time.Millisecond

// pids lists the processes. Those that live from the beginning to the end of the
// call are all in it (next_tgid in fs/proc/base.c goes by number).
func (r *reader) pids() ([]int32, error) {
	fd, err := unix.Open(r.proc, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var pids []int32
	var names []string
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return pids, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names[:0])
		for _, name := range names {
			if pid, err := strconv.ParseInt(name, 10, 32); err == nil {
				pids = append(pids, int32(pid))
			}
		}
	}
}

func clock(id int32) time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(id, &ts)
	return time.Duration(ts.Nano())
}

// origin is one moment on both clocks: CLOCK_MONOTONIC by a system call, and the
// one of package time, which is the same clock without one.
var origin = func() (s struct {
	mono time.Duration
	time time.Time
}) {
	s.mono = clock(unix.CLOCK_MONOTONIC)
	s.time = time.Now()
	return s
}()

// monotonic is CLOCK_MONOTONIC, less the microsecond that origin took: never more.
func monotonic() time.Duration { return origin.mono + time.Since(origin.time) }
