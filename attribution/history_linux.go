package attribution

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"golang.org/x/sys/unix"
)

// lineage names the process that forked one that was read, and the present parent
// if that is another. Without the table both are the present one.
func (h *host) lineage(proc *Process, st stat, depth int) {
	if depth == 0 {
		return
	}
	if h.table == nil {
		proc.Parent, proc.Ancestry = h.parent(st.ppid, st.start, depth), Present
		return
	}
	rec, ok := h.table.Process(proc.PID, st.start)
	if !ok {
		proc.Parent = h.parent(st.ppid, st.start, depth)
		return
	}
	proc.Executed = h.executedAt(rec.Image())
	proc.Parent, proc.Ancestry = h.chain(rec, depth)
	if creator, ok := h.creator(proc.PID); ok {
		proc.Parent, proc.ParentNow = creator, proc.Parent
		return
	}
	if proc.Parent == nil || proc.Parent.PID != st.ppid {
		proc.ParentNow = h.parent(st.ppid, st.start, depth)
	}
}

// chain builds the ancestors of a process as they were when each forked the next.
func (h *host) chain(rec procwatch.Process, depth int) (*Process, Ancestry) {
	parent := h.ancestors(rec.Ancestors, rec.End, depth)
	switch {
	case rec.FromSnapshot:
		return parent, Snapshot
	case parent == nil && rec.End != procwatch.Origin, parent != nil && rec.Ancestors[0].Doubtful:
		return parent, Unknown
	case parent != nil && parent.Executable.Inode == 0 && !parent.Denied && !rec.Ancestors[0].Image.Kernel:
		return parent, Unknown // nobody saw which program it was
	}
	return parent, Birth
}

// told reports whether it is known which program an ancestor was.
func (h *host) told(a *procwatch.Ancestor) bool {
	if a.Doubtful {
		return false
	}
	if _, ok := h.seen(a.PID, &a.Image); ok {
		return true
	}
	return a.Image.Read || a.Image.Kernel || a.Image.Denied
}

// seen is what the kernel was seen to execute, when an image ended before it was read.
func (h *host) seen(pid int, i *procwatch.Image) (Execution, bool) {
	if i.Read || i.Seq == 0 || h.witness == nil {
		return Execution{}, false
	}
	for _, ask := range []func(int) (Execution, error){h.witness.Executed, h.witness.Former} {
		if e, err := ask(pid); err == nil && e.At <= i.Since && i.Since-e.At < sameExecve {
			return e, true
		}
	}
	return Execution{}, false
}

// sameExecve is how far apart two reports of one execve may be. The tracepoint comes
// first and the event of the proc connector after it, in the same system call
// (exec_binprm in fs/exec.c), so that the last tracepoint before an event is its own.
const sameExecve = 10 * time.Millisecond

func (h *host) ancestors(list []procwatch.Ancestor, end procwatch.End, depth int) *Process {
	if len(list) == 0 || depth == 0 {
		return nil
	}
	a := &list[0]
	complete := func(p *Process) {
		p.Parent = h.ancestors(list[1:], end, depth-1)
		switch {
		case a.Guess:
			p.Ancestry = Snapshot
		case len(list) > 1 && h.told(&list[1]), len(list) == 1 && end == procwatch.Origin:
			p.Ancestry = Birth
		}
	}
	p := h.alive(a.PID, a.Start, a.Image.Seq, complete)
	if p == nil {
		p = h.former(a.PID, a.Start, &a.Image)
		complete(p)
	}
	return p
}

// alive reads a process that still runs the image with this number, or takes what
// was read of it a moment ago. What it reads anew gets its parents from complete, before
// others can see it.
func (h *host) alive(pid int, start uint64, seq int, complete func(*Process)) *Process {
	if last := h.readBefore(pid, start, seq); last != nil {
		return last
	}
	p, st, err := h.pin(pid)
	if err != nil {
		return nil
	}
	defer h.unpin(p)
	if h.identify(p, &st.image) != nil || start != 0 && st.start != start || st.image.mark.Execs != seq {
		return nil
	}
	proc, err := h.readImage(p, st)
	if err != nil {
		return nil // also a zombie, of which the table knows more
	}
	complete(proc)
	h.mu.Lock()
	p.last, p.stat, p.at, p.same = proc, st, time.Now(), false
	h.mu.Unlock()
	return proc
}

// readBefore is what was read of a process a moment ago, if it runs the same image
// since. It asks no more than the table.
func (h *host) readBefore(pid int, start uint64, seq int) *Process {
	h.mu.Lock()
	p := h.pins[pid]
	if p == nil || p.last == nil || start != 0 && p.start != start || time.Since(p.at) > ancestorFor {
		h.mu.Unlock()
		return nil
	}
	last, mark, began := p.last, p.stat.image.mark, p.start
	h.tick++
	p.used = h.tick
	h.mu.Unlock()
	if m, ok := h.table.Mark(pid, began); ok && m == mark && m.Execs == seq && !m.Exited {
		return last
	}
	return nil
}

// former renders an image that a process has left, or that it ended with.
func (h *host) former(pid int, start uint64, i *procwatch.Image) *Process {
	proc := &Process{PID: pid, StartTicks: start, Executed: h.executedAt(i), Ended: true, Denied: i.Denied}
	if start != 0 {
		proc.Start, proc.EntityID = h.wall(start), entityID(h.bootID, pid, start)
	}
	if e, ok := h.seen(pid, i); ok {
		h.became(proc, e)
		proc.UID[1], proc.GID[1] = NoID, NoID
		return proc
	}
	if !i.Read {
		proc.UID[1], proc.GID[1] = NoID, NoID
		return proc
	}
	proc.Executable = exeFile(i.Path, uint64(i.Links))
	proc.Executable.Device, proc.Executable.Inode = i.Device, i.Inode
	proc.Executable.Unproven = !proc.Executable.Deleted && h.sameFile(pid, &proc.Executable)
	proc.Name = filepath.Base(proc.Executable.Path)
	proc.Args = h.keepArgs([]byte(i.Cmdline))
	proc.UID[1], proc.GID[1] = i.UID, i.GID
	proc.UserName, proc.GroupName = h.names.userOf(i.UID), h.names.groupOf(i.GID)
	return proc
}

// became names the program that the kernel was seen to execute.
func (h *host) became(p *Process, e Execution) {
	p.Executable = exeFile(e.Name, uint64(e.Links))
	p.Executable.Device, p.Executable.Inode = e.Device, e.Inode
	p.Executable.Unproven = !p.Executable.Deleted && h.sameFile(p.PID, &p.Executable)
	p.Name = filepath.Base(e.Name)
}

// executedAt gives the wall-clock time of the execve that an image began with.
func (h *host) executedAt(i *procwatch.Image) time.Time {
	if i.Seq == 0 || i.Since == 0 {
		return time.Time{}
	}
	var mono unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)
	return time.Now().Add(i.Since - time.Duration(mono.Nano())).Round(0)
}

// started renders a program that was just executed, with the parents that the table
// has, and without another look at /proc.
func (h *host) started(rec procwatch.Process, i procwatch.Image) *Process {
	proc := h.former(rec.PID, rec.Start, &i)
	proc.Ended = false
	child := proc
	for k := range rec.Ancestors[:min(len(rec.Ancestors), 4)] {
		a := &rec.Ancestors[k]
		child.Parent = h.former(a.PID, a.Start, &a.Image)
		child = child.Parent
	}
	proc.Ancestry = Birth
	if rec.FromSnapshot {
		proc.Ancestry = Snapshot
	}
	return proc
}

// same reports whether a process still runs what it was read as. Call Drain before.
func (h *host) same(s *subject) bool {
	if h.table == nil {
		return false
	}
	m, ok := h.table.Mark(s.pid, s.pin.start)
	return ok && m == s.image.mark && !m.Exited
}

// unchanged reports whether a process that does not hold the socket any longer, or has
// ended, was what it was read as until then. Without the table nobody knows.
func (h *host) unchanged(s *subject) bool {
	if h.table == nil {
		return false
	}
	m, ok := h.table.Mark(s.pid, s.pin.start)
	return ok && m.Execs == s.image.mark.Execs && m.Epoch == s.image.mark.Epoch
}

// creator is who made a process the child of his own parent.
func (h *host) creator(pid int) (*Process, bool) {
	if h.witness == nil {
		return nil, false
	}
	a, err := h.witness.Creator(pid)
	if err != nil {
		return nil, false
	}
	rec, ok := h.table.Process(a.PID, ticks(a.Start))
	if !ok {
		return &Process{PID: a.PID, Ended: true}, true
	}
	complete := func(p *Process) { p.Parent, p.Ancestry = h.chain(rec, maxAncestors) }
	proc := h.alive(a.PID, rec.Start, rec.Image().Seq, complete)
	if proc == nil {
		proc = h.former(a.PID, rec.Start, rec.Image())
		complete(proc)
	}
	return proc, true
}

// executed compares the executable that /proc shows with the one that the kernel was
// seen to execute or, where that says nothing, with what /proc showed when the process
// became this program. A process may exchange it (prctl(2), PR_SET_MM_EXE_FILE), also
// one in our user namespace: by another that shares its memory and has one of its own.
func (h *host) executed(p *pin, proc *Process) {
	exe := &proc.Executable
	if exe.Inode == 0 {
		return
	}
	lost := false
	if h.witness != nil {
		e, err := h.witness.Executed(p.pid)
		switch {
		case err == nil && e.Inode == exe.Inode && e.Device == exe.Device:
			return
		case err == nil && (e.Inode != exe.Inode || unix.Major(exe.Device) != 0) && !h.layered(p):
			proc.Swapped = true
			*exe = exeFile(e.Name, uint64(e.Links))
			exe.Device, exe.Inode = e.Device, e.Inode
			proc.Name = filepath.Base(exe.Path)
			return
		}
		lost = errors.Is(err, ErrTooMany)
	}
	if h.table == nil {
		return
	}
	rec, ok := h.table.Process(p.pid, p.start)
	if !ok {
		return
	}
	proc.compare(rec.Image(), lost)
}

// compare is for what the table knows of the program. Nobody knows what was executed if it
// was locked then, or is lost.
func (p *Process) compare(i *procwatch.Image, lost bool) {
	exe := &p.Executable
	switch {
	case i.Read && !i.Denied && i.Inode != 0 && (i.Inode != exe.Inode || i.Device != exe.Device):
		p.Swapped = true
		*exe = exeFile(i.Path, uint64(i.Links))
		exe.Device, exe.Inode = i.Device, i.Inode
		p.Name = filepath.Base(exe.Path)
	case i.Locked, lost && (!i.Read || i.Denied || i.Inode == 0):
		p.Swapped = true
	}
}

// layered reports whether the executable is on a file system that shows other
// numbers to stat(2) than the kernel has for the file.
func (h *host) layered(p *pin) bool {
	is := false
	locked := h.lockable.Do(p.pid, func() {
		var st unix.Statfs_t
		fd, err := unix.Openat(p.dir, "exe", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		is = unix.Fstatfs(fd, &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC
	})
	return locked == nil && is
}
