package witness

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
)

// maxWanted bounds the inodes of one Holders.
const maxWanted = 4096

// iterators go through tables of descriptors inside of the kernel.
type iterators struct {
	all   *ebpf.Program
	turn  chan struct{} // one Holders at a time: it owns the map of wanted inodes
	one   *ebpf.Program
	slots chan int // of Holding: one owns shared.wanted and a buffer
	buf   []byte   // what was read, for Holders
	bufs  [holdings][]byte
	less  uint64 // what a number of references has too many
}

// holdings is how many processes can be asked about at the same time. One that has
// millions of descriptors takes as many tenths of a second.
const holdings = 4

// descriptor is what the iterators write.
type descriptor struct {
	pid, tid   uint32
	fd         uint32
	_          uint32
	inode      uint64
	table      uint64 // its address: threads may share one
	references uint64
}

const stackDescriptor = -int16(unsafe.Sizeof(descriptor{})) - 8

// taskFile is the program of iter/task_file. It writes the descriptors of sockets
// whose inode is wanted: one of a map or, for one process, the one in shared.
func (p *plan) taskFile(l *layout, one bool) asm.Instructions {
	c := &code{}
	c.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R8, asm.R6, 8, asm.DWord), asm.JEq.Imm(asm.R8, 0, "skip"),
		asm.LoadMem(asm.R7, asm.R6, 24, asm.DWord), asm.JEq.Imm(asm.R7, 0, "skip"),
		asm.LoadMem(asm.R1, asm.R7, l.inode, asm.DWord), asm.LoadMem(asm.R9, asm.R1, l.number, asm.DWord),
	)
	c.clear(stackDescriptor, unsafe.Sizeof(descriptor{}))
	at := func(off uintptr, reg asm.Register, size asm.Size) {
		c.emit(asm.StoreMem(asm.RFP, stackDescriptor+int16(off), reg, size))
	}
	var d descriptor
	at(unsafe.Offsetof(d.inode), asm.R9, asm.DWord)
	if one {
		for i := range uintptr(holdings) {
			c.setting(asm.R1, p.shared, unsafe.Offsetof(shared{}.wanted)+8*i)
			c.emit(asm.JEq.Reg(asm.R1, asm.R9, "wanted"))
		}
		c.emit(asm.Ja.Label("skip"))
		c.here("wanted")
	} else {
		c.lookup(p.wanted, stackDescriptor+int16(unsafe.Offsetof(d.inode)), "skip")
	}
	// A file of another file system may have the same number.
	c.emit(asm.Mov.Reg(asm.R1, asm.R7), asm.FnSockFromFile.Call(), asm.JEq.Imm(asm.R0, 0, "skip"))
	c.emit(asm.LoadMem(asm.R1, asm.R8, l.tgid, asm.Word))
	at(unsafe.Offsetof(d.pid), asm.R1, asm.Word)
	c.emit(asm.LoadMem(asm.R1, asm.R8, l.pid, asm.Word))
	at(unsafe.Offsetof(d.tid), asm.R1, asm.Word)
	c.emit(asm.LoadMem(asm.R1, asm.R6, 16, asm.Word))
	at(unsafe.Offsetof(d.fd), asm.R1, asm.Word)
	c.emit(asm.LoadMem(asm.R1, asm.R8, l.files, asm.DWord))
	at(unsafe.Offsetof(d.table), asm.R1, asm.DWord)
	c.emit(asm.LoadMem(asm.R1, asm.R7, l.references, asm.DWord))
	at(unsafe.Offsetof(d.references), asm.R1, asm.DWord)
	c.emit(asm.LoadMem(asm.R1, asm.R6, 0, asm.DWord), asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord))
	c.stack(asm.R2, stackDescriptor)
	c.emit(asm.Mov.Imm(asm.R3, int32(unsafe.Sizeof(d))), asm.FnSeqWrite.Call())
	c.here("skip")
	c.exit(0)
	return c.ins
}

// openIterators says why one or the other is not there.
func (w *Witness) openIterators(l *layout, load func(name string) (*ebpf.Program, error)) (noHolders, noHolding error) {
	it := &w.iterators
	it.turn, it.slots = make(chan struct{}, 1), make(chan int, holdings)
	it.buf = make([]byte, 32<<10)
	for i := range it.bufs {
		it.bufs[i] = make([]byte, 4<<10)
		it.slots <- i
	}
	// While the iterator looks at a file it has a reference to it of its own.
	it.less = 1
	if l.oneLess {
		it.less = 0
	}
	if it.all, noHolders = load("all"); noHolders == nil {
		var fd int
		if fd, noHolders = startIterator(it.all.FD(), 0); noHolders == nil {
			unix.Close(fd)
		}
	}
	if it.one, noHolding = load("one"); noHolding == nil {
		noHolding = w.tryHolding()
	}
	return noHolders, noHolding
}

func (it *iterators) close() error {
	var errs []error
	if it.all != nil {
		errs = append(errs, it.all.Close())
	}
	if it.one != nil {
		errs = append(errs, it.one.Close())
	}
	return errors.Join(errs...)
}

// tryHolding looks for a socket of ours. An older kernel would ignore or refuse that
// only one process is asked about.
func (w *Witness) tryHolding() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	return w.checkHolding(fd)
}

// checkHolding looks for one of our sockets in our own table.
func (w *Witness) checkHolding(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("name our own socket: %w", err)
	}
	h, err := w.Holding(context.Background(), w.plan.pid, uint32(st.Ino))
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err == nil && (h.Descriptors < 1 || h.References < 1) {
		err = fmt.Errorf("iter/task_file counts %+v for a socket of ours: %w", h, errors.ErrUnsupported)
	}
	return err
}

// Holding implements attribution.Witness. It takes some 20 µs, and calls take turns.
// A process that is not there is unix.ESRCH.
func (w *Witness) Holding(ctx context.Context, pid int, inode uint32) (attribution.Holding, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return attribution.Holding{}, errClosed
	}
	if w.noHolding != nil {
		return attribution.Holding{}, unsupported(w.noHolding)
	}
	return w.holding(ctx, pid, inode)
}

func (w *Witness) holding(ctx context.Context, pid int, inode uint32) (attribution.Holding, error) {
	it := &w.iterators
	slot := 0
	select {
	case slot = <-it.slots:
		defer func() { it.slots <- slot }()
	case <-ctx.Done():
		return attribution.Holding{}, attribution.ErrBusy
	}
	w.shared.set(&w.shared.wanted[slot], uint64(inode))
	defer w.shared.set(&w.shared.wanted[slot], 0)
	fd, err := startIterator(it.one.FD(), pid)
	if err != nil {
		return attribution.Holding{}, fmt.Errorf("go through the descriptors of process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	var h attribution.Holding
	var seen []descriptor
	err = readIterator(ctx, fd, it.bufs[slot], func(d *descriptor) error {
		if d.inode != uint64(inode) {
			return nil // wanted by another call
		}
		// The iterator leaves out threads that share the leader's table, but not
		// those that share another. Until Linux 6.7 it has the last thread, too, and leaves
		// out some that have a table of their own (task_group_seq_get_next in
		// kernel/bpf/task_iter.c): what they hold is missing beside the references.
		if d.tid != d.pid {
			for i := range seen {
				if seen[i].table == d.table && seen[i].fd == d.fd {
					return nil
				}
			}
		}
		seen = append(seen, *d)
		h.Descriptors++
		h.References, h.FD = int(d.references-it.less), int(d.fd)
		return nil
	})
	if err != nil {
		return attribution.Holding{}, fmt.Errorf("go through the descriptors of process %d: %w", pid, err)
	}
	return h, nil
}

// startIterator makes an iterator for the threads of one process, or with 0 of all.
// The package ebpf has no parameter for a process.
func startIterator(prog, pid int) (int, error) {
	type linkInfo struct{ tid, pid, pidfd uint32 } // union bpf_iter_link_info
	a := &struct {
		create struct { // union bpf_attr for BPF_LINK_CREATE
			prog, target, attach, flags uint32
			info                        uint64
			size                        uint32
			_                           uint32
		}
		iter struct{ link, flags uint32 } // and for BPF_ITER_CREATE
		info linkInfo
	}{info: linkInfo{pid: uint32(pid)}}
	a.create.prog, a.create.attach = uint32(prog), uint32(ebpf.AttachTraceIter)
	var pin runtime.Pinner // it holds an address of its own as a number
	pin.Pin(a)
	defer pin.Unpin()
	if pid != 0 {
		a.create.info, a.create.size = uint64(uintptr(unsafe.Pointer(&a.info))), uint32(unsafe.Sizeof(a.info))
	}
	at, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_LINK_CREATE, uintptr(unsafe.Pointer(&a.create)), unsafe.Sizeof(a.create))
	if errno != 0 {
		return 0, errno
	}
	defer unix.Close(int(at)) // the iterator keeps it
	a.iter.link = uint32(at)
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_ITER_CREATE, uintptr(unsafe.Pointer(&a.iter)), unsafe.Sizeof(a.iter))
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}

// readIterator calls f for each descriptor. One read goes through at most a million of
// them (bpf_seq_read in kernel/bpf/bpf_iter.c), and then says EAGAIN.
func readIterator(ctx context.Context, fd int, buf []byte, f func(*descriptor) error) error {
	const size = int(unsafe.Sizeof(descriptor{}))
	kept := 0
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Read(fd, buf[kept:])
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return nil
		}
		all := buf[:kept+n]
		for ; len(all) >= size; all = all[size:] {
			if err := f((*descriptor)(unsafe.Pointer(&all[0]))); err != nil {
				return err
			}
		}
		kept = copy(buf, all)
	}
}

// Holders implements attribution.Witness. Calls take turns. Descriptors come in no
// particular order; a table that several threads share is in it once or more.
func (w *Witness) Holders(ctx context.Context, inodes []uint32) (map[uint32][]attribution.Descriptor, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return nil, errClosed
	}
	if w.noHolders != nil {
		return nil, unsupported(w.noHolders)
	}
	if len(inodes) > maxWanted {
		return nil, fmt.Errorf("holders of %d sockets, want at most %d", len(inodes), maxWanted)
	}
	it := &w.iterators
	select {
	case it.turn <- struct{}{}:
		defer func() { <-it.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	wanted := w.maps["wanted"]
	found := make(map[uint32][]attribution.Descriptor, len(inodes))
	for _, inode := range inodes {
		if err := wanted.Put(uint64(inode), uint8(1)); err != nil {
			return nil, fmt.Errorf("look for socket %d: %w", inode, err)
		}
		defer wanted.Delete(uint64(inode))
		found[inode] = nil
	}
	fd, err := startIterator(it.all.FD(), 0)
	if err != nil {
		return nil, fmt.Errorf("go through all descriptors: %w", err)
	}
	defer unix.Close(fd)
	err = readIterator(ctx, fd, it.buf, func(d *descriptor) error {
		inode := uint32(d.inode)
		found[inode] = append(found[inode], attribution.Descriptor{PID: int(d.pid), TID: int(d.tid), FD: int(d.fd)})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("go through all descriptors: %w", err)
	}
	return found, nil
}
