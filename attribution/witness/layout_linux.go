package witness

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// layout says where the running kernel keeps what the programs read: byte offsets,
// from the type information that the kernel has about itself. It is a few numbers;
// the type information itself is given back.
type layout struct {
	// struct task_struct
	leader, parent, tgid, pid, start, exec, signal, files, cred int16
	live                                                        int16 // of signal_struct, threads that run

	uid, gid int16 // of struct cred, real ones as those of bpf_get_current_uid_gid

	mptcp int16 // struct tcp_sock, bool is_mptcp; 0: this kernel has none

	// struct sock
	cookie int16

	// struct linux_binprm, file, inode, super_block
	file, interp, inode, number, links, super, device int16

	references int16 // struct file
	oneLess    bool  // the number there is one less than there are (6.13, include/linux/file_ref.h)
}

// readLayout reads the kernel's types.
func readLayout() (*layout, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		if errors.Is(err, btf.ErrNotSupported) {
			err = errors.Join(err, errors.ErrUnsupported)
		}
		return nil, fmt.Errorf("read the kernel's type information: %w", err)
	}
	l := &layout{}
	for _, want := range []struct {
		to            *int16
		where, member string
	}{
		{&l.leader, "task_struct", "group_leader"},
		{&l.parent, "task_struct", "real_parent"},
		{&l.tgid, "task_struct", "tgid"},
		{&l.pid, "task_struct", "pid"},
		{&l.start, "task_struct", "start_boottime"},
		{&l.exec, "task_struct", "self_exec_id"},
		{&l.signal, "task_struct", "signal"},
		{&l.files, "task_struct", "files"},
		{&l.cred, "task_struct", "cred"},
		{&l.uid, "cred", "uid"},
		{&l.gid, "cred", "gid"},
		{&l.live, "signal_struct", "live"},
		{&l.cookie, "sock_common", "skc_cookie"},
		{&l.file, "linux_binprm", "file"},
		{&l.interp, "linux_binprm", "interp"},
		{&l.inode, "file", "f_inode"},
		{&l.number, "inode", "i_ino"},
		{&l.links, "inode", "__i_nlink"},
		{&l.super, "inode", "i_sb"},
		{&l.device, "super_block", "s_dev"},
	} {
		if *want.to, err = offset(spec, want.where, want.member); err != nil {
			return nil, err
		}
	}
	if l.references, err = offset(spec, "file", "f_ref"); err == nil {
		l.oneLess = true
	} else if l.references, err = offset(spec, "file", "f_count"); err != nil {
		return nil, err
	}
	if l.mptcp, err = offset(spec, "tcp_sock", "is_mptcp"); err != nil {
		l.mptcp = 0
	}
	return l, nil
}

// offset finds a member, also inside of unnamed structs and unions.
func offset(spec *btf.Spec, where, member string) (int16, error) {
	var s *btf.Struct
	if err := spec.TypeByName(where, &s); err != nil {
		return 0, fmt.Errorf("struct %s in the kernel's type information: %w", where, err)
	}
	bits, ok := find(s.Members, member)
	if !ok {
		return 0, fmt.Errorf("struct %s has no member %s in this kernel: %w", where, member, errors.ErrUnsupported)
	}
	if bits%8 != 0 || bits/8 > 1<<15-1 {
		return 0, fmt.Errorf("member %s.%s at bit %d: %w", where, member, bits, errors.ErrUnsupported)
	}
	return int16(bits / 8), nil
}

func find(members []btf.Member, name string) (btf.Bits, bool) {
	for _, m := range members {
		if m.Name == name {
			return m.Offset, true
		}
		if m.Name != "" && !strings.HasPrefix(m.Name, "(") {
			continue
		}
		var inner []btf.Member
		switch t := btf.UnderlyingType(m.Type).(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if at, ok := find(inner, name); ok {
			return m.Offset + at, true
		}
	}
	return 0, false
}

// read copies size bytes of kernel memory, from an offset to the address in a
// register, to a place on the stack.
func (c *code) read(to int16, size int32, from asm.Register, offset int16) {
	c.emit(asm.Mov.Reg(asm.R3, from), asm.Add.Imm(asm.R3, int32(offset)))
	c.stack(asm.R1, to)
	c.emit(asm.Mov.Imm(asm.R2, size), asm.FnProbeReadKernel.Call())
}

// process completes the record on the stack from the task_struct of the caller. It
// uses up R7.
func (c *code) process(l *layout) {
	c.emit(asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R7, asm.R0))
	// A thread that makes system calls for another (io_uring) is of its process, too.
	c.read(stackRecord+offExec, 8, asm.R7, l.exec)
	c.read(stackTask, 8, asm.R7, l.leader)
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.read(stackRecord+offStart, 8, asm.R4, l.start)
	c.read(stackTask, 8, asm.R7, l.parent)
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.read(stackRecord+offParent, 4, asm.R4, l.tgid)
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.read(stackTask, 8, asm.R4, l.leader) // the parent may be a thread
	c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
	c.read(stackRecord+offParentStart, 8, asm.R4, l.start)
	if l.mptcp != 0 {
		plain := c.fresh("plain")
		// The verifier allows no arithmetic on the pointer to the socket. Read back as
		// plain memory it is a number.
		c.emit(asm.LoadMem(asm.R4, asm.R6, addrSock, asm.DWord), asm.StoreMem(asm.RFP, stackSock, asm.R4, asm.DWord))
		c.read(stackTask, 8, asm.RFP, stackSock)
		c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
		c.clear(stackTask, 8)
		c.read(stackTask, 1, asm.R4, l.mptcp)
		c.emit(
			asm.LoadMem(asm.R1, asm.RFP, stackTask, asm.DWord), asm.JEq.Imm(asm.R1, 0, plain),
			asm.StoreImm(asm.RFP, stackRecord+offFlags, flagMPTCP, asm.Word),
		)
		c.here(plain)
	}
}

// deferred stores whoever sends the SYN of the record at R7 as a foreign writer, unless
// that is the connector. With TCP_FASTOPEN_CONNECT (tcp(7)) it is whoever writes first, and
// what is written then does not pass the writer hook (tried: it saw nothing). A sock_ops
// program has no helpers for the current process, but the task.
func (c *code) deferred(p *plan, l *layout) {
	task := func(to int16, size int32, offsets ...int16) {
		from := asm.R9
		for i, offset := range offsets {
			if i == len(offsets)-1 {
				c.read(to, size, from, offset)
				break
			}
			c.read(stackTask, 8, from, offset)
			c.emit(asm.LoadMem(asm.R4, asm.RFP, stackTask, asm.DWord))
			from = asm.R4
		}
	}
	field := func(offset uintptr) int16 { return stackActor + int16(offset) }
	var w writer
	c.emit(asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R9, asm.R0))
	c.clear(stackActor, unsafe.Sizeof(w))
	task(field(unsafe.Offsetof(w.pid)), 4, l.tgid)
	task(field(unsafe.Offsetof(w.exec)), 8, l.exec)
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, field(unsafe.Offsetof(w.pid)), asm.Word),
		asm.LoadMem(asm.R2, asm.R7, offPID, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "deferred"),
		asm.LoadMem(asm.R1, asm.RFP, field(unsafe.Offsetof(w.exec)), asm.DWord),
		asm.LoadMem(asm.R2, asm.R7, offExec, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "usual"),
		asm.JEq.Reg(asm.R1, asm.R2, "usual"),
	)
	c.here("deferred")
	task(field(unsafe.Offsetof(w.tid)), 4, l.pid)
	task(field(unsafe.Offsetof(w.start)), 8, l.leader, l.start)
	task(field(unsafe.Offsetof(w.uid)), 4, l.cred, l.uid)
	task(field(unsafe.Offsetof(w.gid)), 4, l.cred, l.gid)
	c.emit(asm.LoadMem(asm.R1, asm.RFP, stackKey, asm.DWord), asm.StoreMem(asm.RFP, stackWriter, asm.R1, asm.DWord))
	c.clear(stackWriter+8, 8)
	c.update(p.writers, stackWriter, stackActor, updateAny)
	c.emit(
		asm.StoreImm(asm.R7, offWriters, 1, asm.Word),
		asm.JEq.Imm(asm.R0, 0, "usual"),
		asm.StoreImm(asm.R7, offWriters, 0, asm.Word),
		asm.LoadMem(asm.R1, asm.R7, offFlags, asm.Word), asm.Or.Imm(asm.R1, flagMoreWriters),
		asm.StoreMem(asm.R7, offFlags, asm.R1, asm.Word),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.writersLost), 1)
	c.here("usual")
}
