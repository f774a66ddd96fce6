// Package procwatch knows who forked whom, and which programs a process has been.
//
// /proc tells of the present: a process whose parent has ended shows init, or
// some subreaper, as its parent, and of a program that was left by execve nothing
// remains. The kernel's proc connector (drivers/connector/cn_proc.c) tells of each
// fork, execve and exit while it happens. A Watcher listens to it and keeps the
// table that follows.
//
// The events are synchronous: the kernel queues them to our socket inside fork and
// execve, before the child runs and before the new program does. So a Drain, which
// reads until there is nothing more, is a barrier: whatever a process did before
// it sent the bytes that you have just read is in the table when Drain returns.
//
// To read a process that lives: open its directory in /proc and read its start tick
// (field 22 of stat); Drain, and take its Mark; read what there is to read; Drain
// again. If the Mark is the same, all of that was one program, and Process has its
// birth parents and the programs before it, with their times.
//
// What is promised. The parent of a process that was born while we watched is
// the one at its birth, in the program image it had at that moment, dead or alive.
// The number of execs is exact and their times are the kernel's. What an image's
// file and arguments were is read from /proc right after the exec: Image.Read says
// whether that came in time, and it is not filled in by guessing. Where events were
// lost the epoch rises, the table is read anew from /proc, and CompleteSince of the
// processes that lived through the gap says from when on nothing is missing. What
// was there before us comes from /proc, and says so.
//
// What is not. The event of a clone with CLONE_PARENT names the parent that the
// child gets, not the process that called clone, and no event names that one.
// A process may exchange its own exe link (PR_SET_MM_MAP in a user namespace) and
// its own arguments at any time after the exec, also before they were read. A fork
// for whose event the kernel had no memory (GFP_NOWAIT) is lost unseen: events of
// such a process are counted as Stats.Strangers, and it has no parent.
//
// The kernel answers only in the initial network, pid and user namespaces, and
// until Linux 6.6 only with CAP_NET_ADMIN. Where it does not, Open says what to do.
//
// It is the wrong tool for threads, which it does not know, and for processes on
// the far side of a pid namespace: every pid here is of the initial one.
package procwatch

import (
	"errors"
	"os"
	"strings"
	"time"
)

// ErrLost says that events were lost and that the table is not yet rebuilt.
var ErrLost = errors.New("events of the proc connector were lost, and the table is being read anew")

// Options says what to keep. The zero value is what the daemon uses.
type Options struct {
	// Proc is where proc(5) of the initial pid namespace is mounted; "" is /proc.
	Proc string
	// Socket is a netlink socket of NETLINK_CONNECTOR that was opened in the initial
	// network namespace by somebody who may, as systemd does for ListenNetlink=
	// (systemd.socket(5)). Open takes it over. Nil makes Open open one.
	Socket *os.File
	// Buffer is the receive buffer in bytes; 0 is 16 MiB, which is some 20,000
	// events, two seconds of the worst that two CPUs can do. With less, a shorter
	// stall of ours loses events (212,992, the usual default, is 255 of them);
	// more only costs memory while we are stalled.
	Buffer int
	// Max bounds the processes of the table, dead ones included; 0 is 200,000.
	// When it is full, dead processes without children go first, the longest dead
	// before others; then dead ancestors, whose descendants then have a chain that
	// ends with Truncated; and if all are alive, new ones are not entered. Lower
	// forgets parents earlier on a host that forks much; an entry takes 170 bytes, and
	// one with two images and their arguments 480.
	Max int
	// Reads bounds how many images are read from /proc per second; 0 is 2,000,
	// which takes a tenth of a core. Lower leaves more images of a busy host without a
	// name; higher lets whoever executes in a loop take more of our time.
	Reads int
	// Exec, if set, is called for each execve after its image was read, one call
	// at a time, by a goroutine that does nothing else. Up to 4,096 calls may wait;
	// what comes then is left out and counted (Stats.Unsent). It must not call
	// Close.
	Exec func(Process, Image)
}

// File is an executable as the kernel runs it.
type File struct {
	Path          string // text of the link /proc/PID/exe, with the mark of a deleted file
	Device, Inode uint64
	Links         uint32
}

// Image is one program that a process was, from one execve to the next.
type Image struct {
	// Since is when it began, on CLOCK_MONOTONIC: the execve that we saw or, for an
	// image that was inherited, the fork. It is 0 if that was before we watched.
	Since time.Duration
	// Seq counts the execs of the process: 0 is the image that it was born or found
	// with.
	Seq int
	// Missed says that no event told of this image: it was found by reading /proc
	// after events were lost. It began at Since at the latest.
	Missed bool

	// Read says that the following was read while this image ran, and no other.
	Read bool
	// Denied says that a security module kept the executable from us.
	Denied bool
	// Locked says that the process could not be asked for the executable when it executed
	// it, because it, or others of its user's, let us wait. What is read later, Read or
	// not, may be what the process has exchanged it for.
	Locked bool
	// Kernel says that this is a thread of the kernel, which has no executable.
	Kernel bool
	File
	Cmdline    string // as /proc/PID/cmdline had it, each argument with a NUL
	CmdlineCut bool
	UID, GID   uint32 // effective, when it was read
}

// Args are the arguments, as far as they were read.
func (i *Image) Args() []string {
	s := strings.TrimSuffix(i.Cmdline, "\x00")
	if s == "" {
		return nil
	}
	return strings.Split(s, "\x00")
}

// Process is what is known of one process. It is a copy that belongs to the caller.
type Process struct {
	PID   int
	Start uint64        // field 22 of /proc/PID/stat; 0 while that was not read
	Born  time.Duration // CLOCK_MONOTONIC of the fork; 0 if that was before we watched

	// Exited says that no thread of it runs. A process whose first thread has ended
	// and whose others run on is not over. The kernel sends the event a moment after
	// wait(2) could have told of the end.
	Exited   bool
	ExitedAt time.Duration

	// Images are oldest first and never none; the last is the present one, or was
	// when the process ended. ImagesCut says that some are missing between the
	// first and the second, since a process may execute without end.
	Images    []Image
	ImagesCut bool
	Execs     int // that we saw, or found after a loss

	// FromSnapshot says that the process was found in /proc: its parent is what
	// /proc said, and may be the reaper that took it over.
	FromSnapshot bool
	// CompleteSince is the moment from which on no fork or exec of the process is
	// missing: Born, if all of its life was seen.
	CompleteSince time.Duration

	// Ancestors are nearest first: the parent at the birth of the process, the
	// parent of that at its birth, and so on. End says why there are no more.
	Ancestors []Ancestor
	End       End
}

// Image is the last one.
func (p *Process) Image() *Image { return &p.Images[len(p.Images)-1] }

// Complete reports whether no event of the process's life was lost.
func (p *Process) Complete() bool { return p.Born != 0 && p.CompleteSince == p.Born }

// Ancestor is a process in the image that it had when it forked the one before it
// in the chain.
type Ancestor struct {
	PID   int
	Start uint64
	Born  time.Duration
	Image Image
	// Guess says that the one before it in the chain was found in /proc. So this one may be a
	// reaper, and the image is the one it had when /proc was read.
	Guess bool
	// Doubtful says that an exec before the fork may have been lost, so that it may
	// have been another image.
	Doubtful bool
	Exited   bool // its first thread has ended
}

// End says why a chain of ancestors ends.
type End uint8

const (
	// Unknown: the parent's fork was lost, or it ended before it was read.
	Unknown End = iota
	// Origin: the last one was started by the kernel, as init is.
	Origin
	// Truncated: the chain is longer than is told, or an ancestor had to make room.
	Truncated
)

var endNames = [...]string{Unknown: "unknown", Origin: "origin", Truncated: "truncated"}

func (e End) String() string { return endNames[e] }

// Mark is what changes when a process executes, ends, or when events are lost. A
// reading of /proc between two equal marks is of one image. Compare it with ==.
type Mark struct {
	Known  bool // the process is in the table; or else the rest says nothing
	Born   time.Duration
	Since  time.Duration // when the present image began: Image.Since
	Execs  int
	Exited bool
	Epoch  uint64
	// CompleteSince is that of Process.
	CompleteSince time.Duration
}

// Stats counts since Open.
type Stats struct {
	Forks, Execs, Exits uint64
	// Lost is the number of events that the kernel could not queue for us, in
	// Overruns occurrences; each begins a new Epoch and causes one of Rebuilds.
	Lost, Overruns uint64
	Epoch          uint64
	Rebuilds       uint64
	// Strangers are events of processes whose fork we do not know of.
	Strangers uint64
	// Foreign are messages that were not from the kernel, or not understood.
	Foreign uint64

	Processes int // in the table
	Evicted   uint64
	Refused   uint64 // not entered, because all the others were alive

	// Images that were read in time, that were left before they could be, and that
	// Options.Reads did not allow to be read.
	ImagesRead, ImagesMissed, ImagesOverBudget uint64
	// Unsent are calls of Options.Exec that were left out.
	Unsent uint64
	// Buffer is the receive buffer that the kernel gave, in bytes.
	Buffer int
}
