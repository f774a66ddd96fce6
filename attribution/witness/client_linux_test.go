package witness_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution/witness"
)

// A process is a client in a process of its own: this binary again, as an ordinary user.
// It prints a line for each thing it did, and ends when its standard input does.
type process struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

var user = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4321, Gid: 4321}}

func start(t testing.TB, mode string, args ...string) *process {
	t.Helper()
	return startAs(t, user, mode, args...)
}

// elsewhere is a client in a network namespace of its own.
func elsewhere(t testing.TB, mode string, args ...string) *process {
	t.Helper()
	return startAs(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, mode, args...)
}

func startAs(t testing.TB, attr *syscall.SysProcAttr, mode string, args ...string) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.SysProcAttr = attr
	return run(t, cmd, mode)
}

func run(t testing.TB, cmd *exec.Cmd, mode string) *process {
	t.Helper()
	requireRoot(t)
	cmd.Env = []string{asClient + "=" + mode, "PATH=" + os.Getenv("PATH")}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t, cmd, stdin, bufio.NewReader(stdout)}
	t.Cleanup(p.stop)
	return p
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// line reads what the client printed.
func (p *process) line() string {
	p.t.Helper()
	s, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the client ended: %v", err)
	}
	return strings.TrimSpace(s)
}

// numbers reads a line of them.
func (p *process) numbers() []int {
	p.t.Helper()
	var all []int
	for _, s := range strings.Fields(p.line()) {
		n, err := strconv.Atoi(s)
		if err != nil {
			p.t.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

// tell lets the client go on.
func (p *process) tell() {
	p.t.Helper()
	if _, err := p.stdin.Write([]byte{'\n'}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) stop() {
	if p.cmd.ProcessState != nil {
		return
	}
	p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("client: %v", err)
	}
}

// client is the other end.
func client(mode string, args []string) {
	runtime.LockOSThread()
	if err := clients[mode](args); err != nil {
		fmt.Fprintf(os.Stderr, "client %s: %v\n", mode, err)
		os.Exit(1)
	}
}

var (
	sockaddr4 = &unix.SockaddrInet4{Port: int(endpoint4.Port()), Addr: endpoint4.Addr().As4()}
	sockaddr6 = &unix.SockaddrInet6{Port: int(endpoint6.Port()), Addr: endpoint6.Addr().As16()}
	mapped4   = &unix.SockaddrInet6{Port: int(endpoint4.Port()), Addr: endpoint4.Addr().As16()}
)

var clients = map[string]func(args []string) error{
	"wait":   func([]string) error { wait(); return nil },
	"plain4": func([]string) error { return connectAndWait(unix.AF_INET, 0, sockaddr4) },
	"plain6": func([]string) error { return connectAndWait(unix.AF_INET6, 0, sockaddr6) },
	"mapped": func([]string) error { return connectAndWait(unix.AF_INET6, 0, mapped4) },
	"mptcp":  func([]string) error { return connectAndWait(unix.AF_INET, unix.IPPROTO_MPTCP, sockaddr4) },

	// One connection after another, each until the other end closes it.
	"again": func([]string) error {
		over := make(chan struct{})
		go func() { wait(); close(over) }()
		for {
			select {
			case <-over:
				return nil
			default:
			}
			fd, err := dial(unix.AF_INET, 0, sockaddr4)
			switch {
			case errors.Is(err, unix.ECONNREFUSED):
				return nil
			case errors.Is(err, unix.ECONNRESET):
				continue
			case err != nil:
				return err
			}
			unix.Read(fd, make([]byte, 1)) // the reset that ends it
			unix.Close(fd)
		}
	},
	"fastopen": func([]string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, sockaddr4); err != nil {
			return err
		}
		wait()
		return nil
	},
	// The SYN is sent by the first write.
	"deferred": func([]string) error {
		fd, err := deferred()
		if err != nil {
			return err
		}
		if _, err := unix.Write(fd, []byte("hello")); err != nil {
			return err
		}
		wait()
		return nil
	},
	// And that is another's.
	"deferred, inherited": func([]string) error {
		fd, err := deferred()
		if err != nil {
			return err
		}
		cmd := exec.Command("/proc/self/exe", "3")
		cmd.Env = []string{asClient + "=write once"}
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "socket")}
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println(cmd.Process.Pid)
		return cmd.Wait()
	},
	"deferred, marked": func(args []string) error {
		fd, err := deferred()
		if err != nil {
			return err
		}
		mark, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
			return err
		}
		if _, err := unix.Write(fd, []byte("hello")); err != nil {
			return err
		}
		mark, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		if err != nil {
			return err
		}
		fmt.Println(mark)
		wait()
		return nil
	},
	"io_uring": func([]string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil {
			err = uringConnect(fd)
		}
		if err != nil {
			return err
		}
		wait()
		return nil
	},
	// A thread with a table of descriptors that nobody else has.
	"thread": func([]string) error {
		failed := make(chan error)
		go func() {
			runtime.LockOSThread()
			err := unix.Unshare(unix.CLONE_FILES)
			if err == nil {
				fmt.Println(unix.Gettid())
				err = connectAndWait(unix.AF_INET, 0, sockaddr4)
			}
			failed <- err
		}()
		return <-failed
	},
	"twice": func([]string) error {
		fd, err := dial(unix.AF_INET, 0, sockaddr4)
		if err != nil {
			return err
		}
		wait()
		unspec := make([]byte, unix.SizeofSockaddrInet4)
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec[0])), uintptr(len(unspec))); errno != 0 {
			return errno
		}
		fmt.Println("disconnected")
		wait()
		if err := unix.Connect(fd, sockaddr4); err != nil {
			return err
		}
		wait()
		return nil
	},
	// From a local address and port.
	"from": func(args []string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		port, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		from := &unix.SockaddrInet4{Port: port, Addr: [4]byte(net.ParseIP(args[0]).To4())}
		if err := errors.Join(unix.Bind(fd, from), unix.Connect(fd, sockaddr4)); err != nil {
			return err
		}
		wait()
		return nil
	},
	"bound": func([]string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "lo"), unix.Connect(fd, sockaddr4)); err != nil {
			return err
		}
		device, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
		if err != nil {
			return err
		}
		fmt.Printf("%q\n", device)
		wait()
		return nil
	},
	// With a mark, each time that it is told to.
	"marked": func(args []string) error {
		mark, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		for {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			if mark != 0 { // which needs privileges
				err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
			}
			if err != nil {
				return err
			}
			fmt.Println(answer(unix.Connect(fd, sockaddr4)))
			unix.Close(fd)
			if wait(); ended {
				return nil
			}
		}
	},
	// Many at once, of which each is printed.
	"many": func(args []string) error {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		for range n {
			fd, err := dial(unix.AF_INET, 0, sockaddr4)
			if err != nil {
				return err
			}
			at, err := unix.Getsockname(fd)
			if err != nil {
				return err
			}
			fmt.Println(at.(*unix.SockaddrInet4).Port)
		}
		wait()
		return nil
	},
	// One after the other.
	"flood": func(args []string) error {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		for range n {
			fd, err := dial(unix.AF_INET, 0, sockaddr4)
			if err != nil {
				return err
			}
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			unix.Close(fd)
		}
		fmt.Println("done")
		wait()
		return nil
	},
	// In a network namespace of its own, with a service of its own.
	"elsewhere": func([]string) error {
		if err := addresses(); err != nil {
			return err
		}
		listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(listener, sockaddr4), unix.Listen(listener, 16)); err != nil {
			return err
		}
		for {
			fd, err := dial(unix.AF_INET, 0, sockaddr4)
			if err != nil {
				fmt.Println(answer(err))
			} else {
				at, err := unix.Getsockname(fd)
				if err != nil {
					return err
				}
				fmt.Println(at.(*unix.SockaddrInet4).Port)
			}
			if wait(); ended {
				return nil
			}
		}
	},
	"elsewhere from": func(args []string) error {
		if err := addresses(); err != nil {
			return err
		}
		port, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: sockaddr4.Addr})
		}
		if err != nil {
			return err
		}
		listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil {
			err = errors.Join(unix.Bind(listener, sockaddr4), unix.Listen(listener, 1))
		}
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr4); err != nil && err != unix.EINPROGRESS {
			return err
		}
		fmt.Println("connected")
		wait()
		return nil
	},
	// Two sockets with the same tuple, bound to different devices.
	"twins": func([]string) error {
		if err := addresses(); err != nil {
			return err
		}
		twin := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "twin"}, PeerName: "peer"}
		addr, _ := netlink.ParseAddr("10.9.9.9/24")
		if err := netlink.LinkAdd(twin); err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetUp(twin), netlink.AddrAdd(twin, addr)); err != nil {
			return err
		}
		for _, device := range []string{"lo", "twin"} {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			err = errors.Join(
				unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, device),
				unix.Bind(fd, &unix.SockaddrInet4{Port: 5555, Addr: [4]byte{10, 9, 9, 9}}),
			)
			// On lo nobody listens.
			if cErr := unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: endpoint4.Addr().As4()}); cErr != unix.EINPROGRESS {
				err = errors.Join(err, cErr)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", device, err)
			}
			fmt.Println(device)
			wait()
		}
		return nil
	},
	"clone": func([]string) error {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{asClient + "=wait"}
		cmd.Stdin = os.Stdin
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT}
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println(cmd.Process.Pid)
		wait()
		return nil
	},
	"thread execs": func([]string) error {
		failed := make(chan error)
		go func() {
			runtime.LockOSThread()
			fmt.Println(unix.Gettid())
			wait()
			failed <- unix.Exec("/proc/self/exe", []string{"x"}, []string{asClient + "=say"})
		}()
		return <-failed
	},
	"say": func([]string) error { fmt.Println(unix.Getpid()); wait(); return nil },
	// Connect, and give the socket to whoever asks for it.
	"give": func(args []string) error {
		fd, err := dial(unix.AF_INET, 0, sockaddr4)
		if err != nil {
			return err
		}
		ln, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(ln, &unix.SockaddrUnix{Name: args[0]}), unix.Listen(ln, 16)); err != nil {
			return err
		}
		fmt.Println(fd)
		if wait(); ended {
			return nil
		}
		if _, err := unix.Write(fd, []byte("mine")); err != nil {
			return err
		}
		fmt.Println("wrote")
		for {
			to, _, err := unix.Accept(ln)
			if err != nil {
				return err
			}
			if err := unix.Sendmsg(to, []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
				return err
			}
			if wait(); ended {
				return nil
			}
		}
	},
	"take": func(args []string) error {
		from, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(from, &unix.SockaddrUnix{Name: args[0]}); err != nil {
			return err
		}
		oob := make([]byte, 64)
		_, n, _, _, err := unix.Recvmsg(from, make([]byte, 1), oob, 0)
		if err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			return err
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return err
		}
		return writeTwice(fds[0])
	},
	"steal": func(args []string) error {
		pid, _ := strconv.Atoi(args[0])
		theirs, _ := strconv.Atoi(args[1])
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		fd, err := unix.PidfdGetfd(pidfd, theirs, 0)
		if err != nil {
			return err
		}
		return writeTwice(fd)
	},
	// Connect, then write as another program of the same process.
	"connect, exec": func([]string) error {
		fd, err := dial(unix.AF_INET, 0, sockaddr4)
		if err != nil {
			return err
		}
		return unix.Exec("/proc/self/exe", []string{"x", strconv.Itoa(fd)}, []string{asClient + "=write"})
	},
	"write": func(args []string) error {
		fd, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return writeTwice(fd)
	},
	"write once": func([]string) error {
		if _, err := unix.Write(3, []byte("x")); err != nil {
			return err
		}
		fmt.Println("wrote")
		wait()
		return nil
	},
	// Three descriptors, then one more under way in a message, then none but that;
	// and a child that has one.
	"hold": func([]string) error {
		fd, err := dial(unix.AF_INET, 0, sockaddr4)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		all := []int{fd}
		for range 2 {
			other, err := unix.Dup(fd)
			if err != nil {
				return err
			}
			unix.CloseOnExec(other)
			all = append(all, other)
		}
		unix.CloseOnExec(fd)
		fmt.Println(st.Ino, all[0], all[1], all[2])
		wait()
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		fmt.Println("sent")
		wait()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{asClient + "=wait"}
		cmd.Stdin = os.Stdin
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "socket")}
		if err := cmd.Start(); err != nil {
			return err
		}
		for _, fd := range all {
			unix.Close(fd)
		}
		fmt.Println(cmd.Process.Pid)
		wait()
		return nil
	},
	// As many descriptors as it may have, in several tables.
	"crowd": func([]string) error {
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return err
		}
		limit.Cur = limit.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return err
		}
		n := 0
		for ; n < 1_000_000; n++ {
			if _, err := unix.Dup(0); err != nil {
				break
			}
		}
		for range 4_000_000 / n {
			done := make(chan error)
			go func() {
				runtime.LockOSThread()
				done <- unix.Unshare(unix.CLONE_FILES)
				select {}
			}()
			if err := <-done; err != nil {
				return err
			}
		}
		fmt.Println(n)
		wait()
		return nil
	},
	"measure": func(args []string) error { return measure(args[0]) },
	"privileges": func(args []string) error {
		w, err := witness.Open(witness.Options{Endpoints: endpoints, Cgroup: args[0]})
		if err != nil {
			fmt.Printf("permission %v, unsupported %v: %v\n", errors.Is(err, os.ErrPermission), errors.Is(err, errors.ErrUnsupported), err)
			return nil
		}
		for _, h := range w.Hooks() {
			fmt.Println(h.Attached, h.Name)
		}
		fmt.Println(answer(w.Check(context.Background())))
		return w.Close()
	},
}

func answer(err error) string {
	if err != nil {
		return err.Error()
	}
	return "ok"
}

func writeTwice(fd int) error {
	for range 2 {
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			return err
		}
	}
	fmt.Println("wrote")
	wait()
	return nil
}

// ended says that the test does not want more.
var ended bool

// wait returns when the test says so, or is gone.
func wait() {
	var b [1]byte
	n, _ := os.Stdin.Read(b[:])
	ended = n == 0
}

func dial(family, proto int, to unix.Sockaddr) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM, proto)
	if err != nil {
		return 0, err
	}
	if err := unix.Connect(fd, to); err != nil {
		unix.Close(fd)
		return 0, err
	}
	return fd, nil
}

// deferred is a socket whose connect does nothing: TCP_FASTOPEN_CONNECT of tcp(7), and
// no cookie of the server is needed.
func deferred() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return 0, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1),
		unix.Connect(fd, sockaddr4),
	)
	if err != nil {
		return 0, err
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && info.Total_retrans+uint32(info.State) != 2 { // TCP_SYN_SENT
		err = fmt.Errorf("state %d", info.State)
	}
	return fd, err
}

func connectAndWait(family, proto int, to unix.Sockaddr) error {
	if _, err := dial(family, proto, to); err != nil {
		return err
	}
	wait()
	return nil
}

// uringConnect lets a worker of io_uring connect (io_uring(7)); no library is worth one
// request.
func uringConnect(fd int) error {
	const connect, async, getEvents, sqesOffset = 16, 1 << 4, 1, 0x10000000
	type offsets struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		addr                                                uint64
	}
	var params struct {
		sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
		_                                                    [3]uint32
		sq                                                   offsets
		cq                                                   [10]uint32
	}
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_setup: %w", errno)
	}
	rings, err := unix.Mmap(int(ring), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	sqes, err := unix.Mmap(int(ring), sqesOffset, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	to := &unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: sockaddr4.Addr}
	*(*[2]byte)(unsafe.Pointer(&to.Port)) = [2]byte{byte(sockaddr4.Port >> 8), byte(sockaddr4.Port)}
	sqe := unsafe.Pointer(&sqes[0])
	*(*[2]byte)(sqe) = [2]byte{connect, async}
	*(*int32)(unsafe.Add(sqe, 4)) = int32(fd)
	*(*uint64)(unsafe.Add(sqe, 8)) = uint64(unsafe.Sizeof(*to))
	*(*uintptr)(unsafe.Add(sqe, 16)) = uintptr(unsafe.Pointer(to))
	*(*uint32)(unsafe.Pointer(&rings[params.sq.array])) = 0
	*(*uint32)(unsafe.Pointer(&rings[params.sq.tail]))++
	_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, getEvents, 0, 0)
	runtime.KeepAlive(to)
	if errno != 0 {
		return fmt.Errorf("io_uring_enter: %w", errno)
	}
	cqes := params.cq[5] // head, tail, mask, entries, overflow, cqes
	if res := *(*int32)(unsafe.Pointer(&rings[cqes+8])); res != 0 {
		return fmt.Errorf("connect by io_uring: %w", unix.Errno(-res))
	}
	return nil
}
