package ask

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Fork is fork(2), with more flags of clone(2) if need be, for the attacks in which
// it matters who forked whom and when. The child has one thread of Go's runtime,
// and what the others had locked stays locked, so that it runs no function of ours
// but makes the system calls that it was given, whatever they return, and ends.
// The garbage collector must be off.
func Fork(flags uintptr, calls ...Call) (pid int, err error) {
	return clone(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, calls)
}

// ForkAs forks a child with a pid that is free (clone3(2), set_tid).
func ForkAs(pid int, calls ...Call) error {
	as.pid = int32(pid)
	as.exitSignal = uint64(unix.SIGCHLD)
	as.setTID, as.setTIDSize = uint64(uintptr(unsafe.Pointer(&as.pid))), 1
	r, err := clone(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&as.cloneArgs)), unsafe.Sizeof(as.cloneArgs), calls)
	if err == nil && r != pid {
		err = fmt.Errorf("the child is %d, not %d", r, pid)
	}
	return err
}

// as is what the kernel is told by address, where no stack moves.
var as struct {
	cloneArgs
	pid int32
}

// cloneArgs is struct clone_args of linux/sched.h.
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// A Call is one system call of a child.
type Call struct{ Trap, A1, A2, A3 uintptr }

// Again forks again: what follows is done by the child, and the parent ends.
var Again = Call{Trap: ^uintptr(0)}

func clone(trap, a1, a2 uintptr, calls []Call) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	r, errno := forkAndCall(trap, a1, a2, calls)
	if errno != 0 {
		return 0, fmt.Errorf("clone: %w", errno)
	}
	return int(r), nil
}

// forkAndCall does not look whether its stack is large enough, which is where the
// runtime stops a goroutine.
//
//go:nosplit
func forkAndCall(trap, a1, a2 uintptr, calls []Call) (uintptr, syscall.Errno) {
	r, _, errno := syscall.RawSyscall6(trap, a1, a2, 0, 0, 0, 0)
	if errno != 0 || r != 0 {
		return r, errno
	}
	for i := range calls {
		c := &calls[i]
		if c.Trap == Again.Trap {
			r, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if errno != 0 || r != 0 {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0)
			}
			continue
		}
		syscall.RawSyscall(c.Trap, c.A1, c.A2, c.A3)
	}
	syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	return 0, 0
}

// Close, Dup, ReadByte and Write are calls about descriptors. ReadByte throws away
// what it reads; the memory of Write must be on the heap.
func Close(fd int) Call     { return Call{unix.SYS_CLOSE, uintptr(fd), 0, 0} }
func Dup(from, to int) Call { return Call{unix.SYS_DUP3, uintptr(from), uintptr(to), 0} }
func ReadByte(fd int) Call {
	return Call{unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&waste)), 1}
}
func Write(fd int, b []byte) Call {
	return Call{unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b))}
}

var waste byte

// Become are the calls that make root another user, without groups.
func Become(uid int) []Call {
	id := uintptr(uid)
	return []Call{{unix.SYS_SETGROUPS, 0, 0, 0}, {unix.SYS_SETRESGID, id, id, id}, {unix.SYS_SETRESUID, id, id, id}}
}

// Execute is the call that executes a program with the arguments after its name and
// the environment of this one.
func Execute(path string, args ...string) (Call, error) {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return Call{}, err
	}
	argv, err := syscall.SlicePtrFromStrings(append([]string{path}, args...))
	if err != nil {
		return Call{}, err
	}
	envv, err := syscall.SlicePtrFromStrings(os.Environ())
	if err != nil {
		return Call{}, err
	}
	return Call{unix.SYS_EXECVE, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0]))}, nil
}

// Exec executes a program at once. It is not syscall.Exec, which waits until no
// thread is being started.
func Exec(path string, args ...string) error {
	c, err := Execute(path, args...)
	if err != nil {
		return err
	}
	return c.Do()
}

// Do makes the call for the calling thread.
func (c Call) Do() error {
	if _, _, errno := syscall.RawSyscall(c.Trap, c.A1, c.A2, c.A3); errno != 0 {
		return errno
	}
	return nil
}

// Wait waits for a child of Fork.
func Wait(pid int) error {
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &status, 0, nil); !errors.Is(err, unix.EINTR) {
			if err == nil && status != 0 {
				err = fmt.Errorf("child ended with %#x", uint32(status))
			}
			return err
		}
	}
}
