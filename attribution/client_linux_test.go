package attribution

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// The test binary is also the client program: real processes, run as an
// ordinary user, each of which connects in its own way.
const actAs = "IMDSGATE_TEST_ACT_AS"

func init() {
	if os.Getenv(actAs) != "" {
		runtime.LockOSThread() // main is the first thread
	}
}

func TestMain(m *testing.M) {
	if how := os.Getenv(actAs); how != "" {
		if err := act(how, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, how+":", err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(netlab.Private) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "bring up loopback: %v\n%s", err, out)
			os.Exit(1)
		}
	}
	labtest.Main(m) // in a network namespace whose connections may be tracked
}

// act connects to args[0], says so on standard output, and stays until standard
// input ends.
func act(how string, args []string) error {
	address, err := net.ResolveTCPAddr("tcp", args[0])
	if err != nil {
		return err
	}
	connected := func() error {
		fmt.Println("connected")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	switch how {
	case "self": // both ends, in a network namespace of its own
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		ln, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		fmt.Println(c.LocalAddr(), c.RemoteAddr())
		return connected()
	case "crowd": // likewise, many times
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		ln, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		var all []net.Conn
		defer func() { runtime.KeepAlive(all) }()
		for range crowd {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				return err
			}
			other, err := ln.Accept()
			if err != nil {
				return err
			}
			all = append(all, c, other)
			fmt.Println(c.LocalAddr(), c.RemoteAddr())
		}
		return connected()
	case "plain":
		if _, err := dialRaw(address); err != nil {
			return err
		}
		return connected()
	case "mapped":
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet6{Port: address.Port, Addr: [16]byte(address.IP.To16())}); err != nil {
			return err
		}
		return connected()
	case "exec": // connects, then becomes another program, which has the socket
		if _, err := dialRaw(address); err != nil {
			return err
		}
		fmt.Println("connected")
		if _, err := bufio.NewReader(os.Stdin).ReadByte(); err != nil {
			return err
		}
		return unix.Exec(args[1], args[1:], os.Environ())
	case "swap": // becomes another program whose address space looks the same
		if _, err := dialRaw(address); err != nil {
			return err
		}
		fmt.Println("connected")
		if _, err := bufio.NewReader(os.Stdin).ReadByte(); err != nil {
			return err
		}
		argv := append([]string{args[1]}, args...)
		env := os.Environ()
		env[slices.Index(env, actAs+"=swap")] = actAs + "=stay"
		return unix.Exec(args[1], argv, env)
	case "stay":
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	case "rename": // writes itself another command line
		if _, err := dialRaw(address); err != nil {
			return err
		}
		fmt.Println("connected")
		if _, err := bufio.NewReader(os.Stdin).ReadByte(); err != nil {
			return err
		}
		// The runtime does not copy the arguments.
		copy(unsafe.Slice(unsafe.StringData(os.Args[2]), len(os.Args[2])), "another")
		return connected()
	case "user": // connects as root, and as another user with a socket that it made before and with one that it makes then
		if _, err := dialRaw(address); err != nil {
			return err
		}
		before, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		fmt.Println("connected")
		in := bufio.NewReader(os.Stdin)
		if _, err := in.ReadByte(); err != nil {
			return err
		}
		if err := errors.Join(syscall.Setresgid(ordinaryUser, ordinaryUser, ordinaryUser), syscall.Setresuid(ordinaryUser, ordinaryUser, ordinaryUser)); err != nil {
			return err
		}
		if err := unix.Connect(before, &unix.SockaddrInet4{Port: address.Port, Addr: [4]byte(address.IP.To4())}); err != nil {
			return err
		}
		fmt.Println("connected")
		if _, err := in.ReadByte(); err != nil {
			return err
		}
		if _, err := dialRaw(address); err != nil {
			return err
		}
		return connected()
	case "fork": // connects, and starts a child that has the socket, too
		fd, err := dialRaw(address)
		if err != nil {
			return err
		}
		cmd := exec.Command(args[1], args[2:]...)
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "socket")}
		cmd.Stdin = os.Stdin
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println("connected", cmd.Process.Pid)
		return cmd.Wait()
	case "thread": // a thread that left the process's descriptor table
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			if err := unix.Unshare(unix.CLONE_FILES); err != nil {
				done <- err
				return
			}
			if _, err := dialRaw(address); err != nil {
				done <- err
				return
			}
			done <- nil
			select {}
		}()
		if err := <-done; err != nil {
			return err
		}
		return connected()
	case "flight": // the only descriptor is in a message that nobody has received
		fd, err := dialRaw(address)
		if err != nil {
			return err
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		unix.Close(fd)
		return connected()
	case "locked": // keeps its address space locked, with a page that it waits for and a thread that wants to change it
		if _, err := dialRaw(address); err != nil {
			return err
		}
		file, err := unix.Open(args[1], unix.O_RDONLY|unix.O_CLOEXEC, 0) // package os would ask whether it is ready
		if err != nil {
			return err
		}
		if err := unix.Fstat(file, new(unix.Stat_t)); err != nil { // the kernel asks for its length and number
			return err
		}
		page, err := unix.Mmap(file, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		memory, err := os.Open("/proc/self/mem")
		if err != nil {
			return err
		}
		fmt.Println("connected")
		go unix.Pread(int(memory.Fd()), make([]byte, 8), int64(uintptr(unsafe.Pointer(&page[0]))))
		time.Sleep(100 * time.Millisecond)
		unix.RawSyscall6(unix.SYS_MMAP, 0, uintptr(os.Getpagesize()), unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
		return connected()
	case "polling": // keeps an epoll descriptor locked, with a file that does not say whether it is ready
		if _, err := dialRaw(address); err != nil {
			return err
		}
		file, err := unix.Open(args[1], unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		ep, err := unix.EpollCreate1(0)
		if err != nil {
			return err
		}
		fmt.Println("connected", ep)
		return unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, file, &unix.EpollEvent{Events: unix.EPOLLIN})
	case "closing": // becomes another program, and closes a file meanwhile that does not let it
		if _, err := dialRaw(address); err != nil {
			return err
		}
		if _, err := unix.Open(args[1], unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		fmt.Println("connected")
		return unix.Exec("/bin/true", []string{"true"}, nil)
	case "lie": // everything that a process may write about itself
		if _, err := dialRaw(address); err != nil {
			return err
		}
		runtime.LockOSThread()
		if err := os.WriteFile("/proc/self/comm", []byte("amazon-ssm-agen"), 0); err != nil {
			return err
		}
		if err := os.Chdir("/"); err != nil {
			return err
		}
		return connected()
	}
	return fmt.Errorf("no such way")
}

// crowd is how many connections a client has that has many.
const crowd = 3000

// dialRaw connects without CLOEXEC.
func dialRaw(a *net.TCPAddr) (int, error) {
	if v4 := a.IP.To4(); v4 != nil {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return -1, err
		}
		return fd, unix.Connect(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(v4)})
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrInet6{Port: a.Port, Addr: [16]byte(a.IP)})
}

// client is a running client program.
type client struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// ordinaryUser is a uid that no account has.
const ordinaryUser = 4321

// install copies the client program to where an ordinary user may run it.
func install(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "imdsgate-attribution")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	copyFile(t, "/proc/self/exe", path)
	return path
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// start runs a client program as an ordinary user and waits until it has
// connected.
func start(t testing.TB, cmd *exec.Cmd, how string) *client {
	t.Helper()
	cmd.Env = append(cmd.Environ(), actAs+"="+how)
	cmd.Stderr = os.Stderr
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = true
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its children, too
		cmd.Wait()
	})
	return &client{Cmd: cmd, in: in, out: bufio.NewReader(out)}
}

func (c *client) line(t testing.TB) []string {
	t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("client said %q: %v", line, err)
	}
	return strings.Fields(line)
}

// pidIn reads a number that a client printed.
func pidIn(t testing.TB, fields []string) int {
	t.Helper()
	pid, err := strconv.Atoi(fields[len(fields)-1])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
