package procwatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	mcastListen = 1 // PROC_CN_MCAST_LISTEN
	mcastIgnore = 2 // PROC_CN_MCAST_IGNORE

	// ackTimeout bounds the wait for the kernel's word that it sends events. It
	// answers inside the write call.
	ackTimeout = time.Second

	defaultBuffer = 16 << 20

	// batch is how many messages one system call reads. Beyond 32 it saves nothing
	// more; the buffers are 4 KiB then.
	batch = 32
	// sizeofMessage is more than any message of the proc connector has: 76 bytes, 84
	// for a change of comm.
	sizeofMessage = 128
)

// conn is one socket that listens. It is not safe for concurrent use.
type conn struct {
	fd     int
	buffer int

	buf   [batch][sizeofMessage]byte
	names [batch]unix.RawSockaddrNetlink
	iovs  [batch]unix.Iovec
	hdrs  [batch]mmsghdr
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	n uint32
	_ [4]byte
}

// dial opens a socket in the initial network namespace and joins the group of the
// proc connector.
func dial(proc string, given *os.File, buffer int) (*conn, error) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return nil, fmt.Errorf("proc connector on %s, which is big endian: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	if err := initial(proc); err != nil {
		return nil, err
	}
	fd, err := -1, error(nil)
	if given != nil {
		fd, err = takeOver(given)
	} else {
		fd, err = socket(proc)
	}
	if err != nil {
		return nil, err
	}
	c := &conn{fd: fd}
	for i := range c.hdrs {
		c.iovs[i] = unix.Iovec{Base: &c.buf[i][0], Len: sizeofMessage}
		c.hdrs[i].Iov, c.hdrs[i].Iovlen = &c.iovs[i], 1
		c.hdrs[i].Name = (*byte)(unsafe.Pointer(&c.names[i]))
	}
	if buffer == 0 {
		buffer = defaultBuffer
	}
	// The kernel doubles what it is given, to pay for its own overhead, and charges
	// about 800 bytes for an event.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer/2) != nil {
		// Without CAP_NET_ADMIN, up to net.core.rmem_max. Stats.Buffer tells.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer/2)
	}
	if err == nil {
		c.buffer, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	}
	if err == nil {
		err = attachFilter(fd, uint32(os.Getpid()))
	}
	if err == nil {
		// Not by bind(2): a socket that was given is bound already.
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, cnIdxProc)
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("needs CAP_NET_ADMIN: %w", err)
		}
	}
	if err == nil {
		err = c.listen()
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen to the proc connector: %w", err)
	}
	return c, nil
}

// The numbers of the initial namespaces' inodes (include/linux/proc_ns.h:
// PROC_USER_INIT_INO, PROC_PID_INIT_INO). That of the first network namespace is not
// fixed.
const (
	initialUser = "user:[4026531837]"
	initialPID  = "pid:[4026531836]"
)

// initial looks whether this process is where the kernel answers at all:
// cn_proc_mcast_ctl returns without a word outside the initial user and pid namespaces.
func initial(proc string) error {
	for _, ns := range []struct{ file, want, name, hint string }{
		{"user", initialUser, "user", "run it without a user namespace of its own"},
		{"pid", initialPID, "pid", "run it in the host's (docker run --pid=host, hostPID: true)"},
	} {
		link, err := os.Readlink(filepath.Join(proc, "self/ns", ns.file))
		if err != nil {
			return fmt.Errorf("name our own %s namespace: %w", ns.name, err)
		}
		if link != ns.want {
			return fmt.Errorf("the proc connector answers in the initial %s namespace only, and this process is in %s; %s: %w", ns.name, link, ns.hint, errors.ErrUnsupported)
		}
	}
	// Also /proc has to be that of the initial pid namespace, where 2 is kthreadd.
	comm, err := os.ReadFile(filepath.Join(proc, "2/comm"))
	if err != nil || strings.TrimSpace(string(comm)) != "kthreadd" {
		return fmt.Errorf("%s does not show the initial pid namespace, whose process 2 is kthreadd: %w", proc, errors.ErrUnsupported)
	}
	return nil
}

// takeOver makes a descriptor of ours out of a file, and closes that.
func takeOver(file *os.File) (int, error) {
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return -1, fmt.Errorf("take over the socket of the proc connector: %w", err)
	}
	if protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || protocol != unix.NETLINK_CONNECTOR {
		unix.Close(fd)
		return -1, errors.New("the socket that was given for the proc connector is none of NETLINK_CONNECTOR")
	}
	return fd, nil
}

// socket opens the netlink socket in the initial network namespace, the only one
// in which there is a connector (cn_init in drivers/connector/connector.c). In
// others sendto(2) says ECONNREFUSED, and no event ever comes.
func socket(proc string) (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		fd, back, err := socketHere(proc)
		if back {
			runtime.UnlockOSThread()
		} // else the thread is in the wrong namespace, and ends with this goroutine
		done <- result{fd, err}
	}()
	r := <-done
	return r.fd, r.err
}

// socketHere is called on a locked thread. back says that the thread is where it was.
func socketHere(proc string) (fd int, back bool, err error) {
	open := func() (int, error) {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
		if err != nil {
			return -1, fmt.Errorf("open a socket of the proc connector (does the kernel have CONFIG_PROC_EVENTS?): %w", err)
		}
		return fd, nil
	}
	ours := filepath.Join(proc, "thread-self/ns/net")
	theirs := filepath.Join(proc, "2/ns/net")
	here, err := os.Readlink(ours)
	if err != nil {
		return -1, true, fmt.Errorf("name our own network namespace: %w", err)
	}
	there, err := os.Readlink(theirs)
	if err != nil || here == there {
		// Who may not look (CAP_SYS_PTRACE) is most likely in the initial namespace, and
		// is told by the kernel if not.
		fd, err = open()
		return fd, true, err
	}
	const enter = "enter the initial network namespace, the only one with a proc connector (needs CAP_SYS_ADMIN; or run this process in the host's: docker run --net=host, hostNetwork: true)"
	old, err := os.Open(ours)
	if err != nil {
		return -1, true, fmt.Errorf("%s: %w", enter, err)
	}
	defer old.Close()
	first, err := os.Open(theirs)
	if err != nil {
		return -1, true, fmt.Errorf("%s: %w", enter, err)
	}
	defer first.Close()
	if err := unix.Setns(int(first.Fd()), unix.CLONE_NEWNET); err != nil {
		return -1, true, fmt.Errorf("%s: %w", enter, err)
	}
	fd, err = open()
	back = unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil
	return fd, back, err
}

// attachFilter makes the kernel queue only what we use: forks of processes and not
// of threads, execs, the end of first threads, acknowledgements, and changes of our
// own comm, by which Check knows that events come.
//
// The price is that the sequence number of cn_msg, which counts all events of a
// CPU, has holes where nothing was lost. It is not needed: the kernel counts what it
// could not queue (SK_MEMINFO_DROPS), and what the filter rejects is not in that
// count (do_one_broadcast in net/netlink/af_netlink.c).
func attachFilter(fd int, self uint32) error {
	// A load gives the word in network order; the message is in that of the host.
	swap := func(n uint32) uint32 { return n<<24 | n<<8&0xff0000 | n>>8&0xff00 | n>>24 }
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		tax    = unix.BPF_MISC | unix.BPF_TAX
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		equalX = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_X
		ret    = unix.BPF_RET | unix.BPF_K
	)
	pass := unix.SockFilter{Code: ret, K: ^uint32(0)}
	drop := unix.SockFilter{Code: ret, K: 0}
	same := func(a, b uint32) []unix.SockFilter {
		return []unix.SockFilter{{Code: load, K: a}, {Code: tax}, {Code: load, K: b}, {Code: equalX, Jf: 1}, pass, drop}
	}
	prog := []unix.SockFilter{{Code: load, K: offWhat}}
	for _, kind := range []struct {
		what uint32
		then []unix.SockFilter
	}{
		{evAck, []unix.SockFilter{pass}},
		{evExec, []unix.SockFilter{pass}},
		{evFork, same(offChildPid, offChildTgid)},
		{evExit, same(offPid, offTgid)},
		{evComm, []unix.SockFilter{{Code: load, K: offTgid}, {Code: equal, K: swap(self), Jf: 1}, pass, drop}},
	} {
		prog = append(prog, unix.SockFilter{Code: equal, K: swap(kind.what), Jf: uint8(len(kind.then))})
		prog = append(prog, kind.then...)
	}
	prog = append(prog, drop)
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
	if err != nil {
		return fmt.Errorf("attach the filter: %w", err)
	}
	return nil
}

// listen switches the events on, and waits for the kernel's word. Events that come
// before it are of no use to anyone: what they tell is in /proc, which is read after.
func (c *conn) listen() error {
	ack := rand.Uint32()
	err := unix.Sendto(c.fd, appendRequest(nil, mcastListen, ack), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("there is none in this network namespace, or the kernel lacks CONFIG_PROC_EVENTS: %w", errors.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(ackTimeout); ; {
		n, err := c.recv()
		switch {
		case err == unix.EAGAIN:
			left := time.Until(deadline)
			if left <= 0 {
				return fmt.Errorf("no acknowledgement in %v; the kernel gives none outside the initial pid and user namespaces: %w", ackTimeout, errors.ErrUnsupported)
			}
			unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, int(left/time.Millisecond)+1)
		case err != nil && err != unix.ENOBUFS:
			return err
		}
		for i := range n {
			ev, ok, err := c.event(i)
			if !ok || err != nil || ev.what != evAck || ev.ack != ack+1 {
				continue
			}
			switch errno := unix.Errno(ev.errno); errno {
			case 0:
				return nil
			case unix.EPERM:
				return fmt.Errorf("needs CAP_NET_ADMIN: %w", errno)
			default:
				return errno
			}
		}
	}
}

// recv reads what is there, up to one batch. Errors are plain errno values: EAGAIN
// when there is nothing, ENOBUFS once after a loss.
func (c *conn) recv() (int, error) {
	for i := range c.hdrs {
		c.hdrs[i].Namelen = unix.SizeofSockaddrNetlink
	}
	for {
		// It never blocks, so the scheduler need not be told.
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.hdrs[0])), batch, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// event is message i of the last batch. It is not ok if it is not from the kernel:
// whoever has CAP_NET_ADMIN may write to our port.
func (c *conn) event(i int) (ev event, ok bool, err error) {
	h := &c.hdrs[i]
	if c.names[i].Pid != 0 || h.Flags&unix.MSG_TRUNC != 0 {
		return event{}, false, nil
	}
	ev, err = parseEvent(c.buf[i][:h.n])
	return ev, err == nil, err
}

// drops counts the events that the kernel could not queue.
func (c *conn) drops() (uint32, error) {
	var info [unix.SK_MEMINFO_VARS]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(c.fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return info[unix.SK_MEMINFO_DROPS], nil
}

// close tells the kernel that we listen no more: until Linux 6.6 it went on making
// events for a listener that had only closed its socket.
func (c *conn) close() error {
	unix.Sendto(c.fd, appendRequest(nil, mcastIgnore, 0), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	return unix.Close(c.fd)
}
