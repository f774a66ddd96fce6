package attribution

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// TestDirect has a connection that is older than a redirect, and redirected ones of which the proxy has the other
// half in each way that it may.
func TestDirect(t *testing.T) {
	for name, endpoint := range map[string]string{"IPv4": "169.254.169.254:80", "IPv6": "[fd00:ec2::254]:80"} {
		t.Run(name, func(t *testing.T) { testDirect(t, netip.MustParseAddrPort(endpoint)) })
	}
}

func testDirect(t *testing.T, endpoint netip.AddrPort) {
	l := labtest.Start(t, netlab.Options{})
	listener, tool := netip.MustParseAddrPort("127.0.0.1:254"), "iptables"
	if endpoint.Addr().Is6() {
		listener, tool = netip.MustParseAddrPort("[::1]:254"), "ip6tables"
	}
	var f *Finder
	if err := l.Instance.Do(func() (err error) {
		f, err = New(Options{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dial := func() net.Conn {
		t.Helper()
		c, err := l.Instance.Dial(context.Background(), nil, "tcp", endpoint.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		})
		return c
	}
	direct := func(uid uint32) (ports []uint16, making int) {
		t.Helper()
		found, still, err := f.Direct([]netip.AddrPort{endpoint}, []netip.AddrPort{listener}, uid)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range found {
			ports = append(ports, s.Local.Port())
		}
		return ports, len(still)
	}
	const nobody = 65534

	over := dial() // of which the client keeps its half
	if _, err := over.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, over); err != nil {
		t.Fatal(err)
	}
	older := dial().LocalAddr().(*net.TCPAddr).AddrPort().Port()
	if err := l.Instance.Do(func() error { return os.WriteFile("/proc/sys/net/core/somaxconn", []byte("1"), 0) }); err != nil {
		t.Fatal(err)
	}
	ln, err := l.Instance.Listen(context.Background(), nil, "tcp", listener.String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := l.Instance.Run(exec.Command(tool, "-t", "nat", "-A", "OUTPUT", "-d", endpoint.Addr().String(), "-p", "tcp",
		"--dport", "80", "-j", "REDIRECT", "--to-ports", "254")); err != nil {
		t.Fatal(err)
	}
	dial()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	dial()
	closed, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	dial() // is not accepted
	dial()
	// The backlog is full, and so the listener knows nothing of the next one.
	ctx, cancel := context.WithCancel(context.Background())
	given := make(chan error)
	go func() {
		_, err := l.Instance.Dial(ctx, nil, "tcp", endpoint.String())
		given <- err
	}()
	defer func() {
		cancel()
		<-given
	}()
	for end := time.Now().Add(5 * time.Second); connecting(t, l, endpoint) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no connection waits for the backlog")
		}
	}

	if got, making := direct(nobody); len(got) != 1 || got[0] != older || making != 1 {
		t.Errorf("direct: local ports %v, want %d; %d are being made", got, older, making)
	}
	if got, making := direct(uint32(os.Geteuid())); len(got) != 0 || making != 0 {
		t.Errorf("ours: local ports %v; %d are being made", got, making)
	}
}

// fromOnePort has a client of each of two endpoints that begin at one port. The first is redirected or leads to the service,
// and the second is redirected. It returns both ends of both, as they were made.
func fromOnePort(t *testing.T, port int, redirected bool) (f *Finder, endpoints []netip.AddrPort, listener netip.AddrPort, made [][2]net.Conn) {
	t.Helper()
	l := labtest.Start(t, netlab.Options{NoIMDS: true})
	listener = netip.MustParseAddrPort("127.0.0.1:254")
	endpoints = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("169.254.169.254:81")}
	if err := l.Instance.Do(func() (err error) {
		f, err = New(Options{Endpoints: endpoints})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	ours, err := l.Instance.Listen(t.Context(), nil, "tcp", listener.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	listeners := []net.Listener{ours, ours}
	if !redirected {
		if listeners[0], err = l.Metadata.Listen(t.Context(), nil, "tcp", endpoints[0].String()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listeners[0].Close() })
	}
	d := &net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Control: func(_, _ string, c syscall.RawConn) (err error) {
		ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(ctl, err)
	}}
	for i, ln := range listeners { // before any client, so that the tracker is at work
		if ln != ours {
			continue
		}
		if err := l.Instance.Run(exec.Command("iptables", "-t", "nat", "-A", "OUTPUT", "-d", endpoints[i].Addr().String(), "-p", "tcp",
			"--dport", strconv.Itoa(int(endpoints[i].Port())), "-j", "REDIRECT", "--to-ports", "254")); err != nil {
			t.Fatal(err)
		}
	}
	for i, ln := range listeners {
		c, err := l.Instance.Dial(t.Context(), d, "tcp4", endpoints[i].String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		accepted, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { accepted.Close() })
		made = append(made, [2]net.Conn{c, accepted})
	}
	return f, endpoints, listener, made
}

// Of two clients that begin at one port and lead to two endpoints the tracker leads the later one here from another port.
// It is redirected nevertheless.
func TestDirectFromOnePort(t *testing.T) {
	f, endpoints, listener, made := fromOnePort(t, 25120, true)
	for _, c := range made[0] {
		c.Close() // so that nothing is left of the other half
	}
	if a, b := made[0][1].RemoteAddr().String(), made[1][1].RemoteAddr().String(); a == b {
		t.Fatalf("both come from %s: the test tests nothing", a)
	}
	const nobody = 65534
	if found, making, err := f.Direct(endpoints, []netip.AddrPort{listener}, nobody); err != nil || len(found)+len(making) > 0 {
		t.Errorf("direct: %v, being made: %v, %v", found, making, err)
	}
}

// A connection that leads to the service is direct, also if another one that begins at its port is redirected.
func TestDirectBesideAnother(t *testing.T) {
	const port = 25121
	f, endpoints, listener, made := fromOnePort(t, port, false)
	for _, c := range made {
		if got := c[1].RemoteAddr().(*net.TCPAddr).Port; got != port {
			t.Fatalf("one comes from %d: the test tests nothing", got)
		}
	}
	const nobody = 65534
	found, making, err := f.Direct(endpoints, []netip.AddrPort{listener}, nobody)
	if err != nil || len(making) > 0 || len(found) != 1 || found[0].Tuple.Remote != endpoints[0] {
		t.Errorf("direct: %v, being made: %v, %v", found, making, err)
	}
}

// connecting counts the sockets in SYN-SENT.
func connecting(t *testing.T, l *netlab.Lab, endpoint netip.AddrPort) int {
	t.Helper()
	out := new(strings.Builder)
	cmd := exec.Command("ss", "-Htn", "state", "syn-sent", "dst", endpoint.String())
	cmd.Stdout = out
	if err := l.Instance.Run(cmd); err != nil {
		t.Fatal(err)
	}
	return strings.Count(out.String(), "\n")
}
