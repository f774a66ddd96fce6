package netlab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	v4 = "169.254.169.254:80"
	v6 = "[fd00:ec2::254]:80"
)

// exchange sends a raw request from inside a namespace and returns the answer, "" if none came in time.
func exchange(t *testing.T, from *netlab.Namespace, to, request string, patience time.Duration) string {
	t.Helper()
	conn, err := from.Dial(context.Background(), &net.Dialer{Timeout: 5 * time.Second}, "tcp", to)
	if err != nil {
		t.Fatalf("from %s: %v", from, err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatalf("from %s: %v", from, err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	answer, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("from %s: %v", from, err)
	}
	return string(answer)
}

const (
	getID    = "GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n"
	putToken = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
)

func TestReach(t *testing.T) {
	l := labtest.Start(t, netlab.Options{Containers: true})
	for _, c := range []struct {
		from *netlab.Namespace
		to   string
		as   string // the address that the service sees
		hops int    // the least hop limit that lets a token arrive
	}{
		{l.Instance, v4, "172.31.0.10", 1},
		{l.Instance, v6, "fd00:ec2:1::10", 1},
		{l.Bridged, v4, "172.17.0.2", 2},
		{l.Bridged, v6, "fd00:ec2:17::2", 2},
		{l.Routed, v4, "172.31.0.77", 2},
		{l.Routed, v6, "fd00:ec2:1::77", 2},
	} {
		t.Run(c.from.String()+" to "+c.to, func(t *testing.T) {
			l.IMDS.Reset()
			if got := exchange(t, c.from, c.to, getID, 5*time.Second); !strings.HasSuffix(got, "\r\n\r\ni-0123456789abcdef0") {
				t.Errorf("GET: %q", got)
			}
			log := l.IMDS.Transcript()
			if len(log.Connections) != 1 || log.Connections[0].Remote.Addr().String() != c.as ||
				log.Connections[0].Local.String() != c.to {
				t.Errorf("the service saw %+v", log)
			}
			for limit := 1; limit <= 2; limit++ {
				l.IMDS.SetHopLimit(limit)
				want, patience := limit >= c.hops, 5*time.Second
				if !want {
					patience = 300 * time.Millisecond // a retransmission's worth
				}
				got := exchange(t, c.from, c.to, putToken, patience)
				if strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") != want || !want && got != "" {
					t.Errorf("PUT with hop limit %d: %q", limit, got)
				}
			}
		})
	}
}

// TestGone checks that the kernel has taken the namespaces apart after Close, connections and processes in them
// notwithstanding.
func TestGone(t *testing.T) {
	labtest.RequireRoot(t)
	l, err := netlab.New(netlab.Options{Containers: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	all := []*netlab.Namespace{l.Instance, l.Metadata, l.Bridged, l.Routed}
	var gone []func()
	for _, n := range all {
		gone = append(gone, labtest.Watch(t, n.Path()))
	}
	for _, n := range all[2:] {
		for _, to := range []string{v4, v6} {
			if got := exchange(t, n, to, putToken, 20*time.Millisecond); got != "" {
				t.Errorf("PUT from %s with hop limit 1: %q", n, got)
			}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	session := exec.CommandContext(ctx, "sh", "-c", "setsid sh -c 'trap : TERM HUP INT; sleep 1000' & sleep 1000")
	if err := l.Bridged.Start(session); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var exit *exec.ExitError
	if err := session.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("a process inside ended with %v, want SIGKILL", err)
	}
	for _, gone := range gone {
		gone()
	}
	if err := l.Instance.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
}

func TestOpenSocketIsAnError(t *testing.T) {
	labtest.RequireRoot(t)
	l, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Instance.Dial(context.Background(), nil, "tcp", v4)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	err = l.Close()
	want := fmt.Sprintf("namespace instance: descriptor %%d is still open: socket from %s to %s", conn.LocalAddr(), v4)
	var fd int
	if n, _ := fmt.Sscanf(fmt.Sprint(err), want, &fd); n != 1 {
		t.Errorf("Close with an open connection: %v", err)
	}
}

func TestWiring(t *testing.T) {
	l := labtest.Start(t, netlab.Options{Containers: true})
	plain := labtest.Start(t, netlab.Options{NoIMDS: true})
	if plain.IMDS != nil || plain.Bridged != nil || plain.Routed != nil {
		t.Errorf("without emulator and containers: %+v", plain)
	}
	for _, c := range []struct {
		in           *netlab.Namespace
		sysctl, want string
	}{
		{l.Instance, "ipv4/ip_forward", "1"},
		{l.Instance, "ipv6/conf/all/forwarding", "1"},
		{plain.Instance, "ipv4/ip_forward", "0"},
		{plain.Instance, "ipv6/conf/all/forwarding", "0"},
		{l.Metadata, "ipv4/ip_forward", "0"},
		{l.Bridged, "ipv4/ip_forward", "0"},
		{l.Instance, "ipv4/ip_unprivileged_port_start", "1024"},
		{l.Metadata, "ipv4/ip_unprivileged_port_start", "1024"},
	} {
		err := c.in.Do(func() error {
			got, err := os.ReadFile("/proc/sys/net/" + c.sysctl)
			if string(got) != c.want+"\n" {
				t.Errorf("%s: %s is %q, want %s", c.in, c.sysctl, got, c.want)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	err := l.Instance.Do(func() error {
		pod, err := netlink.LinkByName("pod0")
		if err != nil {
			return err
		}
		addresses, err := netlink.AddrList(pod, netlink.FAMILY_ALL)
		if len(addresses) > 0 {
			t.Errorf("the routed container's host device has addresses %v", addresses)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	err = l.Routed.Do(func() error {
		neighbours, err := netlink.NeighList(0, netlink.FAMILY_V4)
		if len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT || neighbours[0].IP.String() != "169.254.1.1" {
			t.Errorf("the routed container's neighbours are %v", neighbours)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestDo(t *testing.T) {
	l := labtest.Start(t, netlab.Options{IMDS: &imdstest.Config{TokensRequired: true}})
	here := func() string {
		link, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
		}
		return link
	}
	outside := here()
	inside := fmt.Sprintf("net:[%d]", l.Instance.Inode())
	cause := errors.New("cause")
	err := l.Instance.Do(func() error {
		if got := here(); got != inside {
			t.Errorf("inside is %s, want %s", got, inside)
		}
		err := l.Metadata.Do(func() error {
			if got := here(); got == inside || got == outside {
				t.Errorf("inside another is %s", got)
			}
			return cause
		})
		if got := here(); got != inside {
			t.Errorf("after another is %s, want %s", got, inside)
		}
		return err
	})
	if err != cause {
		t.Errorf("error %v, want %v", err, cause)
	}
	if err := l.Instance.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("a function that ended its goroutine succeeded")
	}
	// Every thread is back where it was.
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		link, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net")
		if err == nil && link != outside {
			t.Errorf("thread %s is in %s, want %s", task.Name(), link, outside)
		}
	}
	cmd := exec.Command("readlink", "/proc/self/ns/net")
	var out strings.Builder
	cmd.Stdout = &out
	if err := l.Instance.Run(cmd); err != nil || strings.TrimSpace(out.String()) != inside {
		t.Errorf("a process inside is in %q, %v", out.String(), err)
	}
	if got := exchange(t, l.Instance, v4, getID, 5*time.Second); !strings.HasPrefix(got, "HTTP/1.1 401 ") {
		t.Errorf("the emulator's configuration did not arrive: %q", got)
	}
}

// TestDeathSignal checks that a child outlives the thread pool's moods: its Pdeathsig must not fire after Start.
func TestDeathSignal(t *testing.T) {
	l := labtest.Start(t, netlab.Options{NoIMDS: true})
	cmd := exec.Command("sleep", "0.3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := l.Instance.Start(cmd); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if err := l.Instance.Do(func() error { return nil }); err != nil {
			t.Error(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("a child with Pdeathsig: %v", err)
	}
}

func TestListenAndDial(t *testing.T) {
	l := labtest.Start(t, netlab.Options{NoIMDS: true})
	ctx := context.Background()
	for _, address := range []string{v4, v6} {
		ln, err := l.Metadata.Listen(ctx, nil, "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Instance.Dial(ctx, nil, "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if accepted.RemoteAddr().String() != conn.LocalAddr().String() {
			t.Errorf("accepted %v, dialled from %v", accepted.RemoteAddr(), conn.LocalAddr())
		}
		accepted.Close()
		conn.Close()
		ln.Close()
	}
	if _, err := l.Instance.Dial(ctx, nil, "tcp", v4); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := l.Instance.Dial(ctx, nil, "tcp", "instance-data:80"); err == nil {
		t.Error("a name was looked up")
	}
	if _, err := l.Instance.Listen(ctx, nil, "tcp", "localhost:80"); err == nil {
		t.Error("a name was looked up")
	}
}
