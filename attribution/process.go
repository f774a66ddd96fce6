package attribution

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/attribution/procwatch"
)

// ticksPerSecond is USER_HZ, in which /proc/PID/stat counts. It is 100 on
// every architecture we build for, whatever the kernel's HZ
// (include/asm-generic/param.h).
const ticksPerSecond = 100

// Process is one process in one program image. It is never changed after it
// was published, so it may be shared between goroutines.
type Process struct {
	PID        int
	StartTicks uint64    // since boot, as in field 22 of /proc/PID/stat
	Start      time.Time // StartTicks on the wall clock, by way of CLOCK_BOOTTIME
	Executed   time.Time // when it became this program; zero if nobody saw that, or it was forked as it is
	EntityID   string    // same for the whole life of the process, never reused

	Executable File
	Name       string   // base name of Executable.Path; "" when that is unknown
	Thread     string   // comm of the leader, which the process itself may write
	Args       []string // argv, which the process itself may write
	WorkingDir string   // which the process itself chooses

	UID, GID  [4]uint32 // real, effective, saved, filesystem; of one that has Ended only the effective, or NoID
	Groups    []uint32
	UserName  string // of the effective uid; "" when the host does not know it
	GroupName string // of the effective gid

	Cgroup   Cgroup
	HostUser bool // in the user namespace of this daemon
	Session  int  // session id: the pid of the session leader
	Group    int  // process group id: the pid of the group leader
	TTY      bool // has a controlling terminal

	// Denied says that a security module kept the executable, the working
	// directory or the user namespace from us.
	Denied bool
	// Earlier marks an image that the process has left by execve since the
	// connection was accepted.
	Earlier bool

	// Swapped says that /proc/PID/exe named another file than the kernel was seen
	// to execute (prctl(2), PR_SET_MM_EXE_FILE); Executable is the latter. It is also true
	// if nobody could ask then, because the process or its user's others were locked.
	Swapped bool
	// Ended says that nothing but the program, its arguments and its parents is
	// known, from the time when the process lived or ran that program: no user, no
	// cgroup, no namespaces.
	Ended bool

	// Parent is the process that forked this one, in the image that it had then,
	// where Ancestry is Birth or Snapshot. Where it is Present, which is all that
	// level 0 knows, it is a reaper if the one that forked this process has
	// ended. Nil at the end of the known chain.
	Parent   *Process
	Ancestry Ancestry
	// ParentNow is the present parent, if that is another process than Parent.
	ParentNow *Process
}

// NoID is no user and no group (chown(2) takes it for "none").
const NoID = ^uint32(0)

// Ancestry is how the parent of a process is known.
type Ancestry uint8

const (
	// Unknown: the process was forked while events were lost, or the record of its
	// parent had to make room.
	Unknown Ancestry = iota
	// Present: as /proc says.
	Present
	// Snapshot: as /proc said when the daemon started. A process that had been
	// orphaned by then shows its reaper.
	Snapshot
	// Birth: as the kernel said when it forked the process.
	Birth
)

var ancestryNames = [...]string{"", "present", "snapshot", "birth"}

func (a Ancestry) String() string { return ancestryNames[a] }

// File is an executable as the kernel runs it.
type File struct {
	Path    string // as in /proc/PID/exe, without the mark of a deleted file; "" when unknown
	Device  uint64
	Inode   uint64
	UID     uint32
	GID     uint32
	Mode    uint32 // permission bits
	Deleted bool   // no name is left: unlinked, or made by memfd_create

	// Unproven says that it is not known whether this is the host's own file: the
	// process has ended or is another program now. HostVerified is false then.
	Unproven bool
	// HostVerified says that the same path, looked up by us, is the same
	// device and inode, and that the process is in our user namespace, where
	// PR_SET_MM_MAP cannot exchange the file (prctl(2)).
	HostVerified bool
	// RootOwned says that the file and every directory above it belong to
	// root and that nobody else may write to them.
	RootOwned bool
	// Loader says that the file is a dynamic loader (ld.so(8)), which runs
	// whatever program it is given as an argument.
	Loader bool
}

// adoptedBy is the pid of the present parent, as far as it is known; 0 without one.
func (p *Process) adoptedBy() int {
	switch {
	case p.ParentNow != nil:
		return p.ParentNow.PID
	case p.Parent != nil:
		return p.Parent.PID
	}
	return 0
}

// Ancestors is the chain of parents, nearest first.
func (p *Process) Ancestors() []*Process {
	var chain []*Process
	for a := p.Parent; a != nil; a = a.Parent {
		chain = append(chain, a)
	}
	return chain
}

// entityID names a process for ever: the boot, the pid and the start tick are
// never the same for two processes, and stay the same through execve and
// through a restart of this daemon.
func entityID(bootID string, pid int, start uint64) string {
	h := sha256.New()
	h.Write([]byte(bootID))
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(pid))
	binary.BigEndian.PutUint64(b[8:], start)
	h.Write(b[:])
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:15])
}

// stat is what we use of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	comm             string
	state            byte
	flags            uint64
	ppid, pgrp, sess int
	tty              int
	threads          int
	start            uint64
	image            image

	read *Process // what was read then, if nothing has happened to it since; not from the file
}

// image changes at every execve, because the kernel places a new program's
// code, stack and arguments at random (kernel.randomize_va_space), and where
// somebody has switched that off (personality(2)) with every other executable. A
// process that may not be ptraced by us shows none of it, and a program can set
// the fields itself with PR_SET_MM; so a change proves an execve, and no change
// proves little. (The start of the heap is not among them: it is set last, so
// that one execve could be seen as two.)
type image struct {
	startCode, startStack, startData, argStart, envStart uint64

	device, inode uint64         // of the executable; not from the stat file
	mark          procwatch.Mark // at level 1
}

// between reports whether the process was seen in the middle of execve, when
// the new address space is there and not yet filled in (load_elf_binary in
// fs/binfmt_elf.c). A process that is kept from us has a startCode of 1, and one
// without an address space is not alive.
func (s stat) between() bool {
	return s.state != 'Z' && s.state != 'X' && s.flags&pfKthread == 0 &&
		s.image.startCode != 1 && (s.image.startCode == 0 || s.image.startStack == 0 || s.image.argStart == 0 || s.image.envStart == 0)
}

const pfKthread = 0x00200000 // PF_KTHREAD, include/linux/sched.h

var errStat = errors.New("not the format of proc_pid_stat(5)")

func parseStat(b []byte) (stat, error) {
	space := []byte{' '}
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat{}, errStat
	}
	s := stat{comm: string(b[open+1 : end])}
	field := 2
	bad := false
	num := func(f []byte) uint64 {
		var n uint64
		for _, c := range f {
			if c < '0' || c > '9' {
				bad = true
				return 0
			}
			n = n*10 + uint64(c-'0')
		}
		return n
	}
	for f, rest := []byte(nil), bytes.TrimRight(b[end+1:], "\n"); len(rest) > 0; {
		if f, rest, _ = bytes.Cut(rest, space); len(f) == 0 {
			continue
		}
		field++
		switch field {
		case 3:
			s.state = f[0]
		case 9:
			s.flags = num(f)
		case 4:
			s.ppid = int(num(f))
		case 5:
			s.pgrp = int(num(f))
		case 6:
			s.sess = int(num(f))
		case 7:
			s.tty, _ = strconv.Atoi(string(f)) // negative for no device on old kernels
		case 20:
			s.threads = int(num(f))
		case 22:
			s.start = num(f)
		case 26:
			s.image.startCode = num(f)
		case 28:
			s.image.startStack = num(f)
		case 45:
			s.image.startData = num(f)
		case 48:
			s.image.argStart = num(f)
		case 50:
			s.image.envStart = num(f)
		}
	}
	if field < 22 || bad {
		return stat{}, errStat
	}
	return s, nil
}

// credentials is what we use of /proc/PID/status (proc_pid_status(5)).
type credentials struct {
	uid, gid [4]uint32
	groups   []uint32
}

func parseStatus(b []byte) (credentials, error) {
	var c credentials
	seen := 0
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		key, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		var four *[4]uint32
		switch string(key) {
		case "Uid":
			four = &c.uid
		case "Gid":
			four = &c.gid
		case "Groups":
			for _, f := range bytes.Fields(value) {
				n, err := strconv.ParseUint(string(f), 10, 32)
				if err != nil {
					return c, fmt.Errorf("groups line %q: %w", line, err)
				}
				c.groups = append(c.groups, uint32(n))
			}
			continue
		default:
			continue
		}
		fields := bytes.Fields(value)
		if len(fields) != 4 {
			return c, fmt.Errorf("%s line %q: want 4 numbers", key, line)
		}
		for i, f := range fields {
			n, err := strconv.ParseUint(string(f), 10, 32)
			if err != nil {
				return c, fmt.Errorf("%s line %q: %w", key, line, err)
			}
			four[i] = uint32(n)
		}
		seen++
	}
	if seen != 2 {
		return c, errors.New("not the format of proc_pid_status(5)")
	}
	return c, nil
}

// parseCmdline splits what /proc/PID/cmdline has. A process that wrote over
// its own argv may have left no terminating NUL.
func parseCmdline(b []byte) []string {
	b = bytes.TrimSuffix(b, []byte{0})
	if len(b) == 0 {
		return nil
	}
	return strings.Split(string(b), "\x00")
}

// exeFile reads the text of the link /proc/PID/exe together with the link
// count of the file it leads to. The mark of a deleted file is believed only
// when no name is left, since a file may be called "x (deleted)".
func exeFile(link string, nlink uint64) File {
	f := File{Path: link, Deleted: nlink == 0}
	if f.Deleted {
		f.Path = strings.TrimSuffix(link, " (deleted)")
	}
	base := path.Base(f.Path)
	f.Loader = (strings.HasPrefix(base, "ld-") || strings.HasPrefix(base, "ld.so") || strings.HasPrefix(base, "ld64.so")) &&
		strings.Contains(base, ".so")
	return f
}
