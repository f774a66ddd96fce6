package witness_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution/witness"
)

// The tests attach to a cgroup of their own: what the programs do reaches no other
// process of the machine. They run in it, and in a network namespace of their own, whose
// loopback device has the addresses of the metadata service.
const (
	inCgroup = "WITNESS_TEST_CGROUP"
	asClient = "WITNESS_TEST_CLIENT"
)

var (
	endpoint4 = netip.MustParseAddrPort("169.254.169.254:80")
	endpoint6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
	endpoints = []netip.AddrPort{endpoint4, endpoint6}
	other4    = netip.MustParseAddrPort("127.0.0.1:80") // the same port
)

func TestMain(m *testing.M) {
	if name := os.Getenv(asClient); name != "" {
		client(name, os.Args[1:])
		return
	}
	if os.Getenv(inCgroup) != "" {
		if err := addresses(); err != nil {
			fmt.Fprintln(os.Stderr, "give the loopback device its addresses:", err)
			os.Exit(1)
		}
		code := m.Run()
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // each test says what is missing
	}
	code, err := runInCgroup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in a cgroup and a network namespace of their own:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func runInCgroup() (code int, err error) {
	dir, err := makeCgroup()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inCgroup+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET, UseCgroupFD: true, CgroupFD: int(f.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func makeCgroup() (string, error) {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			dir, err := os.MkdirTemp(root, "imdsgate-witness-test-")
			if err != nil {
				return "", err
			}
			return dir, os.Chmod(dir, 0o755) // as cgroup2 itself is: a test is an ordinary user
		}
	}
	return "", errors.New("no cgroup2 is mounted")
}

// addresses are put on lo of the current network namespace, which must not be that of
// whoever set the environment variable by hand.
func addresses() error {
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	if outside, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getppid())); err != nil || ours == outside {
		return fmt.Errorf("we are in the network namespace of our parent, %s (%v)", ours, err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range []string{"169.254.169.254/32", "fd00:ec2::254/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(lo, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", a, err)
		}
	}
	return nil
}

// requireRoot skips, or fails where the environment variable CI is set.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(inCgroup) != "" {
		return
	}
	const missing = "needs root: CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN, for BPF programs, a cgroup and network namespaces"
	if os.Getenv("CI") != "" {
		t.Fatal(missing)
	}
	t.Skip(missing)
}

// open opens a Witness for the cgroup of the tests, which is closed with the test.
func open(t testing.TB, o witness.Options) *witness.Witness {
	t.Helper()
	requireRoot(t)
	o.Cgroup = os.Getenv(inCgroup)
	if o.Endpoints == nil {
		o.Endpoints = endpoints
	}
	w, err := witness.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// serve accepts on an endpoint in the current network namespace and gives each
// connection to the test.
func serve(t testing.TB, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}
