package witness

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
)

// writer is a process that did something to what another has: wrote on its socket,
// or cloned it.
type writer struct {
	pid, tid uint32
	uid, gid uint32
	start    uint64
	exec     uint64
}

func (a *writer) attribution() attribution.Actor {
	return attribution.Actor{
		PID: int(a.pid), TID: int(a.tid), UID: a.uid, GID: a.gid, Start: time.Duration(a.start), ExecID: a.exec,
	}
}

// writerKey names one writer of one socket.
type writerKey struct{ cookie, index uint64 }

// flags of a foreign writer's place on the stack, below what connect uses
const stackActor = stackWriter - int16(unsafe.Sizeof(writer{}))

// write is the program of tp_btf/tcp_sendmsg_locked(sk, ...). It runs under the lock
// of the socket, so that one socket's writers are counted by one thread at a time. The
// connector itself is a foreign writer, too, once it executed another program.
func (p *plan) write(l *layout) asm.Instructions {
	c := &code{}
	c.emit(
		asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R1, asm.R1, l.cookie, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "done"), // nobody ever asked for it
		asm.StoreMem(asm.RFP, stackKey, asm.R1, asm.DWord),
	)
	c.lookup(p.connectors, stackKey, "done")
	c.emit(
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.FnGetCurrentPidTgid.Call(), asm.Mov.Reg(asm.R9, asm.R0), asm.RSh.Imm(asm.R9, 32),
		asm.StoreMem(asm.RFP, stackActor+4, asm.R0, asm.Word),
		asm.StoreMem(asm.RFP, stackActor, asm.R9, asm.Word),
		asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R6, asm.R0),
	)
	c.clear(stackTask, 8)
	c.read(stackTask, 8, asm.R6, l.exec)
	c.emit(
		asm.LoadMem(asm.R8, asm.RFP, stackTask, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, offPID, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R9, "foreign"),
		asm.LoadMem(asm.R1, asm.R7, offExec, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "own"), // the connect hook could not read it
		asm.JNE.Reg(asm.R1, asm.R8, "foreign"),
	)
	// Nor somebody who has got the pid after him, and executed as often.
	c.read(stackTask, 8, asm.R6, l.leader)
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.clear(stackTask, 8)
	c.read(stackTask, 8, asm.R4, l.start)
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, stackTask, asm.DWord),
		asm.LoadMem(asm.R2, asm.R7, offStart, asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R2, "foreign"),
	)
	c.here("own")
	c.count(p.shared, unsafe.Offsetof(shared{}.writes), 1)
	c.here("done")
	c.exit(0)

	c.here("foreign")
	c.emit(
		asm.StoreMem(asm.RFP, stackActor+int16(unsafe.Offsetof(writer{}.exec)), asm.R8, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, stackKey, asm.DWord), asm.StoreMem(asm.RFP, stackWriter, asm.R1, asm.DWord),
	)
	for i := range int32(maxWriters) {
		next := c.fresh("other")
		c.emit(
			asm.Mov.Imm(asm.R1, i), asm.StoreMem(asm.RFP, stackWriter+8, asm.R1, asm.DWord),
			asm.LoadMem(asm.R1, asm.R7, offWriters, asm.Word),
			asm.JLE.Imm(asm.R1, i, "append"),
		)
		c.lookup(p.writers, stackWriter, "lost")
		c.emit(
			asm.LoadMem(asm.R1, asm.R0, int16(unsafe.Offsetof(writer{}.pid)), asm.Word),
			asm.JNE.Reg(asm.R1, asm.R9, next),
			asm.LoadMem(asm.R1, asm.R0, int16(unsafe.Offsetof(writer{}.exec)), asm.DWord),
			asm.JEq.Reg(asm.R1, asm.R8, "done"),
		)
		c.here(next)
	}
	c.here("lost")
	c.count(p.shared, unsafe.Offsetof(shared{}.writersLost), 1)
	c.emit(
		asm.LoadMem(asm.R1, asm.R7, offFlags, asm.Word), asm.Or.Imm(asm.R1, flagMoreWriters),
		asm.StoreMem(asm.R7, offFlags, asm.R1, asm.Word),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.foreign), 1)
	c.exit(0)

	c.here("append")
	c.emit(
		asm.FnGetCurrentUidGid.Call(),
		asm.StoreMem(asm.RFP, stackActor+int16(unsafe.Offsetof(writer{}.uid)), asm.R0, asm.Word),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, stackActor+int16(unsafe.Offsetof(writer{}.gid)), asm.R0, asm.Word),
	)
	c.read(stackTask, 8, asm.R6, l.leader)
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.clear(stackActor+int16(unsafe.Offsetof(writer{}.start)), 8)
	c.read(stackActor+int16(unsafe.Offsetof(writer{}.start)), 8, asm.R4, l.start)
	c.update(p.writers, stackWriter, stackActor, updateAny)
	c.emit(
		asm.JNE.Imm(asm.R0, 0, "lost"),
		asm.LoadMem(asm.R1, asm.R7, offWriters, asm.Word), asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R7, offWriters, asm.R1, asm.Word),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.foreign), 1)
	c.exit(0)
	return c.ins
}

// Writers implements attribution.Witness: one lookup, and one more for each that
// there is. Writes on an MPTCP socket pass another function: the error is
// errors.ErrUnsupported for those.
func (w *Witness) Writers(cookie uint64) ([]attribution.Actor, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return nil, errClosed
	}
	if w.noWriter != nil {
		return nil, unsupported(w.noWriter)
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	l.cookie = cookie
	ok, err := l.get(w.plan.connectors, unsafe.Pointer(&l.cookie), unsafe.Pointer(&l.record))
	switch {
	case err != nil:
		return nil, err
	case !ok || l.record.cookie != cookie:
		return nil, attribution.ErrNoWitness
	case l.record.flags&flagMPTCP != 0:
		return nil, fmt.Errorf("writers of an MPTCP socket: %w", errors.ErrUnsupported)
	}
	var all []attribution.Actor
	for i := range min(l.record.writers, maxWriters) {
		l.writer = writerKey{cookie, uint64(i)}
		ok, err := l.get(w.plan.writers, unsafe.Pointer(&l.writer), unsafe.Pointer(&l.actor))
		if err != nil {
			return all, err
		}
		if !ok {
			return nil, attribution.ErrNoWitness // closed meanwhile
		}
		all = append(all, l.actor.attribution())
	}
	if l.record.flags&flagMoreWriters != 0 {
		return all, fmt.Errorf("foreign writers of socket %#x: %w", cookie, attribution.ErrTooMany)
	}
	return all, nil
}

// checkWriter writes on a socket of ours and looks whether that was seen. Others may
// write meanwhile: what cannot happen is that nothing is counted.
func (w *Witness) checkWriter(fd int) error {
	if w.noWriter != nil {
		return nil
	}
	before := w.Stats().Writes
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return fmt.Errorf("write on our own connection: %w", err)
	}
	if w.Stats().Writes == before {
		return errors.New("the hook for writes did not see our own")
	}
	return nil
}
