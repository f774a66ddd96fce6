package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Namespace is an anonymous network namespace: it has no name under /run/netns and exists as long as a
// descriptor, a process or a socket holds it. Its methods may be called from any goroutine; its [Lab] closes it.
type Namespace struct {
	name   string
	inode  uint64
	cgroup *Cgroup // in which its processes begin

	mu     sync.Mutex     // guards handle, also against being closed between its reading and setns
	handle netns.NsHandle // -1 once closed
}

// newNamespace makes a namespace without entering it.
func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{name: name, handle: netns.None()}
	err := onThread(func() error {
		var err error
		n.handle, err = netns.New()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	return n.stat()
}

func (n *Namespace) stat() (*Namespace, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.handle), &st); err != nil {
		return nil, errors.Join(fmt.Errorf("stat namespace %s: %w", n.name, err), n.close())
	}
	n.inode = st.Ino
	return n, nil
}

// Private is set in the environment of a process that labtest.Main has started in a network namespace of its own.
const Private = "IMDSGATE_LAB_PRIVATE"

// thisNamespace is the one that the process is in.
func thisNamespace(name string) (*Namespace, error) {
	if os.Getenv(Private) == "" {
		return nil, fmt.Errorf("namespace %s would be the machine's own: run in one of your own, as labtest.Main does", name)
	}
	h, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", name, err)
	}
	return (&Namespace{name: name, handle: h}).stat()
}

// String returns the namespace's role in the lab: "instance", "metadata", "bridged" or "routed".
func (n *Namespace) String() string { return n.name }

// Inode returns the number in the "net:[…]" that /proc/PID/ns/net shows for processes inside.
func (n *Namespace) Inode() uint64 { return n.inode }

// Path returns a path under /proc for nsenter(1) --net=PATH. It is valid until the lab is closed.
func (n *Namespace) Path() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.handle))
}

// Do runs fn on a locked operating system thread inside the namespace and returns its error.
//
// What fn does on its own goroutine happens inside: sockets it opens (they stay usable outside), processes it
// starts, and what it reads and writes under /proc/sys/net and /proc/thread-self/net. Goroutines started by fn run
// outside, and /proc/self/net is that of the main thread, which is outside too. fn runs on a goroutine of its own
// and so must not call t.Fatal.
func (n *Namespace) Do(fn func() error) error {
	return onThread(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		return fn()
	})
}

func (n *Namespace) enter() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.handle.IsOpen() {
		return fmt.Errorf("enter namespace %s: %w", n.name, os.ErrClosed)
	}
	if err := netns.Set(n.handle); err != nil {
		return fmt.Errorf("enter namespace %s: %w", n.name, err)
	}
	return nil
}

func (n *Namespace) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.handle.IsOpen() {
		return nil
	}
	if err := n.handle.Close(); err != nil {
		return fmt.Errorf("close namespace %s: %w", n.name, err)
	}
	return nil
}

// ProcConnector opens a socket of the proc connector in the machine's initial network namespace, as systemd would
// (ListenNetlink=connector of systemd.socket(5)). It hears nothing yet.
func ProcConnector() (*os.File, error) {
	fd := -1
	err := onThread(func() error {
		initial, err := netns.GetFromPath("/proc/2/ns/net") // of kthreadd
		if err != nil {
			return err
		}
		defer initial.Close()
		if err := netns.Set(initial); err != nil {
			return err
		}
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a socket of the proc connector: %w", err)
	}
	return os.NewFile(uintptr(fd), "proc-connector"), nil
}

// onThread runs fn, which may change its thread's network namespace, and puts the thread back where it was.
//
// The thread is given back rather than thrown away because a child's Pdeathsig fires when the thread that started
// it ends (prctl(2), PR_SET_PDEATHSIG). Only a thread that cannot be put back ends with its goroutine.
func onThread(fn func() error) error {
	err := errors.New("function ended its goroutine")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, homeErr := netns.Get()
		if homeErr != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("open this thread's namespace: %w", homeErr)
			return
		}
		defer func() {
			if netns.Set(home) == nil {
				runtime.UnlockOSThread()
			}
			home.Close()
		}()
		err = fn()
	}()
	<-done
	return err
}

// Start starts cmd inside the namespace, in the lab's cgroup. Waiting for it is the caller's; [Lab.Close] kills it if it is still there.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = n.cgroup.put(cmd.SysProcAttr)
	return n.Do(cmd.Start)
}

// Run starts cmd inside the namespace and waits for it, with the errors of [exec.Cmd.Run].
func (n *Namespace) Run(cmd *exec.Cmd) error {
	if err := n.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// Listen listens inside the namespace; a nil lc stands for plain TCP: no MPTCP, no keep-alive probes. The listener
// stays usable outside. Addresses are literal: a name would be looked up outside.
func (n *Namespace) Listen(ctx context.Context, lc *net.ListenConfig, network, address string) (net.Listener, error) {
	if lc == nil {
		lc = &net.ListenConfig{KeepAlive: -1}
		lc.SetMultipathTCP(false)
	}
	if err := literal(address); err != nil {
		return nil, err
	}
	var ln net.Listener
	err := n.Do(func() (err error) {
		ln, err = lc.Listen(ctx, network, address)
		return err
	})
	return ln, err
}

// Dial connects from inside the namespace; a nil d is a zero Dialer. The connection stays usable outside.
// Addresses are literal: a name would be looked up outside.
func (n *Namespace) Dial(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) {
	if d == nil {
		d = new(net.Dialer)
	}
	if err := literal(address); err != nil {
		return nil, err
	}
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

func literal(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if host == "" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("address %q is not a literal one: %w", address, err)
	}
	return nil
}
