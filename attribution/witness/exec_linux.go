package witness

import (
	"fmt"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/asm"

	"github.com/imdsgate/imdsgate/attribution"
)

// maxProcesses bounds the processes whose last execve is known. Beyond it, an execve is
// counted as lost, and from then on Executed says ErrTooMany of every process that it
// does not know: it cannot tell those that executed nothing from those that were lost.
const maxProcesses = 65536

// maxFormer bounds the processes whose former execve is known: that before the present
// one, or the last one of a process that has ended. It is asked for when nobody has
// read in time which program that was. Who executes faster than that pushes others out,
// and they are unknown then.
const maxFormer = 8192

// execution is one execve, as exec_linux.go's programs store it under the pid.
type execution struct {
	at, exec      uint64
	device, inode uint64
	links         uint32
	_             uint32
	name          [128]byte
}

const (
	executionSize = int16(unsafe.Sizeof(execution{}))

	stackPID       = -8
	stackExecution = stackPID - executionSize
	stackCreator   = stackPID - int16(unsafe.Sizeof(writer{}))
)

// execve is the program of tp_btf/sched_process_exec(task, old_pid, binprm). By then
// the thread that called execve is the leader, and self_exec_id is new
// (begin_new_exec in fs/exec.c).
func (p *plan) execve(l *layout) asm.Instructions {
	c := &code{}
	c.emit(
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R7, asm.R1, 16, asm.DWord),
	)
	c.clear(stackExecution, unsafe.Sizeof(execution{}))
	at := func(off uintptr, size asm.Size) {
		c.emit(asm.StoreMem(asm.RFP, stackExecution+int16(off), asm.R1, size))
	}
	var e execution
	c.emit(asm.FnKtimeGetNs.Call(), asm.Mov.Reg(asm.R1, asm.R0))
	at(unsafe.Offsetof(e.at), asm.DWord)
	c.emit(asm.LoadMem(asm.R1, asm.R6, l.exec, asm.DWord))
	at(unsafe.Offsetof(e.exec), asm.DWord)
	c.emit(
		asm.LoadMem(asm.R8, asm.R7, l.file, asm.DWord),
		asm.LoadMem(asm.R8, asm.R8, l.inode, asm.DWord),
		asm.LoadMem(asm.R1, asm.R8, l.number, asm.DWord),
	)
	at(unsafe.Offsetof(e.inode), asm.DWord)
	c.emit(asm.LoadMem(asm.R1, asm.R8, l.links, asm.Word))
	at(unsafe.Offsetof(e.links), asm.Word)
	c.emit(
		asm.LoadMem(asm.R8, asm.R8, l.super, asm.DWord),
		asm.LoadMem(asm.R1, asm.R8, l.device, asm.Word),
	)
	at(unsafe.Offsetof(e.device), asm.DWord)
	c.emit(asm.LoadMem(asm.R3, asm.R7, l.interp, asm.DWord))
	c.stack(asm.R1, stackExecution+int16(unsafe.Offsetof(e.name)))
	c.emit(asm.Mov.Imm(asm.R2, int32(len(e.name))), asm.FnProbeReadKernelStr.Call())
	c.emit(asm.LoadMem(asm.R1, asm.R6, l.tgid, asm.Word), asm.StoreMem(asm.RFP, stackPID, asm.R1, asm.Word))
	c.count(p.shared, unsafe.Offsetof(shared{}.execs), 1)
	c.retire(p, true)
	c.update(p.execs, stackPID, stackExecution, updateAny)
	c.emit(asm.JEq.Imm(asm.R0, 0, "kept"))
	c.count(p.shared, unsafe.Offsetof(shared{}.execsLost), 1)
	c.remove(p.execs, stackPID) // of what it executed before
	c.here("kept")
	c.exit(0)
	return c.ins
}

// retire puts what the process at stackPID was so far among the former ones, or only if
// it was not born as that.
func (c *code) retire(p *plan, own bool) {
	c.lookup(p.execs, stackPID, "first")
	if own {
		c.emit(
			asm.LoadMem(asm.R1, asm.R0, int16(unsafe.Offsetof(execution{}.at)), asm.DWord),
			asm.JEq.Imm(asm.R1, 0, "first"),
		)
	}
	c.emit(asm.Mov.Reg(asm.R3, asm.R0), asm.LoadMapPtr(asm.R1, p.former))
	c.stack(asm.R2, stackPID)
	c.emit(asm.Mov.Imm(asm.R4, updateAny), asm.FnMapUpdateElem.Call())
	c.here("first")
}

// fork is the program of tp_btf/sched_process_fork(parent, child). A new process is the
// program that its creator is, and has that one's execve, at the time 0, so that it is
// no execve of its own. With CLONE_PARENT it has the parent of its creator, and /proc
// never says who created it.
func (p *plan) fork(l *layout) asm.Instructions {
	c := &code{}
	c.emit(
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R7, asm.R1, 8, asm.DWord),
		asm.LoadMem(asm.R8, asm.R7, l.tgid, asm.Word),
		asm.LoadMem(asm.R1, asm.R7, l.pid, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R8, "usual"), // a thread
		asm.LoadMem(asm.R9, asm.R6, l.tgid, asm.Word),
		asm.StoreMem(asm.RFP, stackPID, asm.R9, asm.Word),
	)
	c.lookup(p.execs, stackPID, "inherited")
	c.emit(asm.StoreMem(asm.RFP, stackPID, asm.R8, asm.Word), asm.Mov.Reg(asm.R3, asm.R0), asm.LoadMapPtr(asm.R1, p.execs))
	c.stack(asm.R2, stackPID)
	c.emit(asm.Mov.Imm(asm.R4, updateAny), asm.FnMapUpdateElem.Call(), asm.JEq.Imm(asm.R0, 0, "copied"))
	c.count(p.shared, unsafe.Offsetof(shared{}.execsLost), 1)
	c.emit(asm.Ja.Label("inherited"))
	c.here("copied")
	c.lookup(p.execs, stackPID, "inherited")
	c.emit(asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.R0, int16(unsafe.Offsetof(execution{}.at)), asm.R1, asm.DWord))
	c.here("inherited")
	c.emit(
		asm.StoreMem(asm.RFP, stackPID, asm.R8, asm.Word),
		asm.LoadMem(asm.R2, asm.R7, l.parent, asm.DWord),
		asm.LoadMem(asm.R2, asm.R2, l.tgid, asm.Word),
		asm.JEq.Reg(asm.R2, asm.R9, "usual"),
	)
	at := func(off uintptr, reg asm.Register, size asm.Size) {
		c.emit(asm.StoreMem(asm.RFP, stackCreator+int16(off), reg, size))
	}
	var w writer
	at(unsafe.Offsetof(w.pid), asm.R9, asm.Word)
	c.emit(asm.LoadMem(asm.R1, asm.R6, l.pid, asm.Word))
	at(unsafe.Offsetof(w.tid), asm.R1, asm.Word)
	c.emit(asm.LoadMem(asm.R1, asm.R6, l.exec, asm.DWord))
	at(unsafe.Offsetof(w.exec), asm.R1, asm.DWord)
	c.emit(asm.LoadMem(asm.R1, asm.R6, l.leader, asm.DWord), asm.LoadMem(asm.R1, asm.R1, l.start, asm.DWord))
	at(unsafe.Offsetof(w.start), asm.R1, asm.DWord)
	c.emit(asm.FnGetCurrentUidGid.Call())
	at(unsafe.Offsetof(w.uid), asm.R0, asm.Word)
	c.emit(asm.RSh.Imm(asm.R0, 32))
	at(unsafe.Offsetof(w.gid), asm.R0, asm.Word)
	c.count(p.shared, unsafe.Offsetof(shared{}.forks), 1)
	c.update(p.creators, stackPID, stackCreator, updateAny)
	c.emit(asm.JEq.Imm(asm.R0, 0, "usual"))
	c.count(p.shared, unsafe.Offsetof(shared{}.forksLost), 1)
	c.here("usual")
	c.exit(0)
	return c.ins
}

// exit is the program of tp_btf/sched_process_exit(task). An entry belongs to the
// process and not to its first thread: a leader may end before others, and when
// another thread calls execve, the leader ends and its pid goes on. So it is the last
// thread that takes the entries with it. What the process was goes to the former ones.
func (p *plan) exit(l *layout) asm.Instructions {
	c := &code{}
	c.emit(
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R1, asm.R6, l.signal, asm.DWord),
		asm.LoadMem(asm.R1, asm.R1, l.live, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "others"),
		asm.LoadMem(asm.R1, asm.R6, l.tgid, asm.Word),
		asm.StoreMem(asm.RFP, stackPID, asm.R1, asm.Word),
	)
	c.retire(p, false)
	c.remove(p.execs, stackPID)
	c.remove(p.creators, stackPID)
	c.here("others")
	c.exit(0)
	return c.ins
}

// Executed implements attribution.Witness: one lookup. The file is the one that
// became the program: of a script, its interpreter. Device is what stat(2) says of it on
// ext4, xfs and tmpfs; on btrfs and on overlays of several file systems stat(2) invents
// a device, and the two never agree.
func (w *Witness) Executed(pid int) (attribution.Execution, error) {
	return w.execution(pid, w.plan.execs)
}

// Former implements attribution.Witness: one lookup.
func (w *Witness) Former(pid int) (attribution.Execution, error) {
	return w.execution(pid, w.plan.former)
}

func (w *Witness) execution(pid, in int) (attribution.Execution, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return attribution.Execution{}, errClosed
	}
	if w.noExec != nil {
		return attribution.Execution{}, unsupported(w.noExec)
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	l.pid = uint32(pid)
	for {
		ok, err := l.get(in, unsafe.Pointer(&l.pid), unsafe.Pointer(&l.execution))
		if err != nil {
			return attribution.Execution{}, err
		}
		if !ok {
			return attribution.Execution{}, absent(w.shared.count(&w.shared.execsLost))
		}
		// Read until it is the same twice, since elements are reused at once.
		first := l.execution
		if ok, _ = l.get(in, unsafe.Pointer(&l.pid), unsafe.Pointer(&l.execution)); ok && first == l.execution {
			break
		}
	}
	e := &l.execution
	return attribution.Execution{
		At: time.Duration(e.at), ExecID: e.exec, Device: statDevice(e.device), Inode: e.inode,
		Links: e.links, Name: text(e.name[:]),
	}, nil
}

// Creator implements attribution.Witness: one lookup.
func (w *Witness) Creator(pid int) (attribution.Actor, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return attribution.Actor{}, errClosed
	}
	if w.noFork != nil {
		return attribution.Actor{}, unsupported(w.noFork)
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	l.pid = uint32(pid)
	for {
		ok, err := l.get(w.plan.creators, unsafe.Pointer(&l.pid), unsafe.Pointer(&l.actor))
		if err != nil {
			return attribution.Actor{}, err
		}
		if !ok {
			return attribution.Actor{}, absent(w.shared.count(&w.shared.forksLost))
		}
		first := l.actor
		if ok, _ = l.get(w.plan.creators, unsafe.Pointer(&l.pid), unsafe.Pointer(&l.actor)); ok && first == l.actor {
			return first.attribution(), nil
		}
	}
}

// absent is what a missing entry means: nothing happened, unless something was lost.
func absent(lost uint64) error {
	if lost > 0 {
		return fmt.Errorf("%d were lost since the witness is there: %w", lost, attribution.ErrTooMany)
	}
	return attribution.ErrNoWitness
}

// statDevice turns the kernel's own dev_t into that of stat(2) (new_encode_dev in
// include/linux/kdev_t.h).
func statDevice(dev uint64) uint64 {
	major, minor := dev>>20, dev&(1<<20-1)
	return minor&0xff | major<<8 | minor&^0xff<<12
}
