// Package labtest gives a test a lab of its own, and a way to see that nothing is left of it.
package labtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// RequireRoot skips the test, or fails it where the environment variable CI is set, unless it runs as root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	const missing = "needs root: CAP_SYS_ADMIN and CAP_NET_ADMIN make its network namespaces"
	if os.Getenv("CI") != "" {
		t.Fatal(missing)
	}
	t.Skip(missing)
}

// Main runs the tests of a package in a process that has a network namespace of its own, so that they can ask for
// netlab.Options.Here. It does not return. Without root the tests run where they are, and skip or fail one by one.
func Main(m *testing.M) {
	if os.Getenv(netlab.Private) != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), netlab.Private+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	err := cmd.Run()
	exit := (*exec.ExitError)(nil)
	switch {
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "run the tests in a network namespace of their own:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Start builds a lab that is closed when the test ends. The test fails if it left anything inside: it closes its own
// connections and listeners before that, at the latest with t.Cleanup.
func Start(t testing.TB, o netlab.Options) *netlab.Lab {
	t.Helper()
	RequireRoot(t)
	lab, err := netlab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	return lab
}

// Watch returns a function that fails the test unless the network namespace that path shows now, such as
// /proc/PID/ns/net, has been taken apart by the kernel within two seconds. Watching does not keep the namespace: it
// gives it an ID (ip-netns(8), set), which ends with it.
func Watch(t testing.TB, path string) (gone func()) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Another test may be watching it already: a namespace has one ID.
	if err := netlink.SetNetNsIdByFd(int(f.Fd()), -1); err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatalf("give %s an ID: %v", path, err)
	}
	id, err := netlink.GetNetNsIdByFd(int(f.Fd()))
	if err != nil || id < 0 || !exists(t, id) {
		t.Fatalf("ID %d of %s: %v", id, path, err)
	}
	return func() {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Second); exists(t, id); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the namespace that was %s is still there", path)
			}
		}
	}
}

// exists asks whether a namespace has this ID; netlink has no function for it.
func exists(t testing.TB, id int) bool {
	req := nl.NewNetlinkRequest(unix.RTM_GETNSID, 0)
	req.AddData(nl.NewRtGenMsg())
	req.AddData(nl.NewRtAttr(netlink.NETNSA_NSID, binary.NativeEndian.AppendUint32(nil, uint32(id))))
	_, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNSID)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatalf("look for namespace %d: %v", id, err)
	}
	return err == nil
}
