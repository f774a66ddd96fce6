package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// hidden is a descriptor that is in a message in flight, and so in no table. An
// epoll instance still tells when there is something to read.
type hidden struct {
	pair  [2]int
	epoll int
}

// hide takes the descriptor away.
func hide(fd int) (*hidden, error) {
	h := &hidden{}
	var err error
	if h.pair, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if h.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	if err := unix.EpollCtl(h.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return nil, err
	}
	if err := unix.Sendmsg(h.pair[0], []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
		return nil, err
	}
	return h, unix.Close(fd)
}

// readable waits until there is something to read.
func (h *hidden) readable() error {
	for {
		n, err := unix.EpollWait(h.epoll, make([]unix.EpollEvent, 1), 5000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("no answer while it was hidden")
		}
		return err
	}
}

func (h *hidden) back() (int, error) {
	oob := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(h.pair[1], make([]byte, 1), oob, 0)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// flight hides its descriptor in a message while its request is judged.
func flight([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	return inFlight(fd)
}

// inFlight asks on a descriptor that is hidden when the request is complete.
func inFlight(fd int) error {
	request := ask.Mine()
	last := len(request) - 2
	if _, err := unix.Write(fd, request[:last]); err != nil {
		return err
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		return err
	}
	h, err := hide(fd)
	if err != nil {
		return err
	}
	ready()
	if _, err := unix.Write(dup, request[last:]); err != nil {
		return err
	}
	unix.Close(dup)
	if err := h.readable(); err != nil {
		return err
	}
	if fd, err = h.back(); err != nil {
		return err
	}
	ask.Read(fd).Tell()
	return nil
}

// uring has a connection that was never in any descriptor table.
func uring([]string) error {
	r, err := newRing(-1)
	if err != nil {
		return err
	}
	if err := r.socket(); err != nil {
		return err
	}
	if err := r.connect(); err != nil {
		return err
	}
	ready()
	return r.exchange(ask.Mine())
}

// thread asks in a thread that left the process's descriptor table.
func thread([]string) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FILES)
		if err == nil {
			err = plain(nil)
		}
		done <- err
	}()
	return <-done
}

// leader ends the first thread of the process, and asks in another one.
func leader([]string) error {
	go func() {
		runtime.LockOSThread()
		err := errors.New("the first thread is still there")
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", os.Getpid()))
			if _, rest, _ := strings.Cut(string(b), ") "); strings.HasPrefix(rest, "Z") {
				err = plain(nil)
				break
			}
		}
		if err != nil {
			fmt.Println("failed leader:", err)
		}
		unix.Exit(0) // all threads
	}()
	_, _, errno := unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
	return errno
}

// pass gives its connection to a program with a grant that has been running all
// the time, and keeps nothing.
func pass(args []string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	g, err := give(args[0], fd)
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	return g.ask()
}

// passUring gives it a socket, and connects that afterwards.
func passUring(args []string) error {
	fd, err := ask.Client{}.Socket()
	if err != nil {
		return err
	}
	g, err := give(args[0], fd)
	if err != nil {
		return err
	}
	r, err := newRing(fd)
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	if err := r.connect(); err != nil {
		return err
	}
	return g.ask()
}

// given is the way to a program that was given a socket.
type given int

func give(path string, fd int) (given, error) {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: path}); err != nil {
		return -1, err
	}
	if err := unix.Sendmsg(s, []byte(os.Getenv(ask.Name)), unix.UnixRights(fd), nil, 0); err != nil {
		return -1, err
	}
	said := make([]byte, 1)
	if _, err := unix.Read(int(s), said); err != nil || said[0] != 'r' {
		return -1, fmt.Errorf("it said %q: %v", said, err)
	}
	return given(s), nil
}

// ask makes it ask on the socket, and says what it got.
func (g given) ask() error {
	ready()
	if _, err := unix.Write(int(g), []byte{'g'}); err != nil {
		return err
	}
	answer := make([]byte, 200)
	n, err := unix.Read(int(g), answer)
	fmt.Println("result", string(answer[:max(n, 0)]))
	return err
}
