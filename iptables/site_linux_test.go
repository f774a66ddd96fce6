package iptables

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// In a process started by a test, role says what to do instead of testing.
const role = "IMDSGATE_IPTABLES_ROLE"

func TestMain(m *testing.M) {
	if r := os.Getenv(role); r != "" {
		if err := play(r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

var backends = []Backend{BackendNFT, BackendLegacy}

// uid is the daemon's.
const uid = 990

var endpoint = [...]netip.AddrPort{
	IPv4: netip.MustParseAddrPort("169.254.169.254:80"),
	IPv6: netip.MustParseAddrPort("[fd00:ec2::254]:80"),
}

// A site is an instance with the metadata service behind it, and two containers. The service says "metadata" to
// who connects and then echoes, "later" a second after it, until it hears "bye" or "reset"; the listeners of a daemon, once they are there, say "host" or "forwarded" and the
// original destination.
type site struct {
	*testing.T
	lab *netlab.Lab
}

func newSite(t *testing.T) *site {
	s := &site{t, labtest.Start(t, netlab.Options{Containers: true, NoIMDS: true})}
	for _, e := range endpoint {
		s.serve(s.lab.Metadata, e, "metadata")
	}
	return s
}

// do calls fn inside the instance.
func (s *site) do(fn func() error) {
	s.Helper()
	if err := s.lab.Instance.Do(fn); err != nil {
		s.Fatal(err)
	}
}

func (s *site) sh(script string) string {
	s.Helper()
	return s.shIn(s.lab.Instance, script)
}

func (s *site) shIn(ns *netlab.Namespace, script string) string {
	s.Helper()
	var out bytes.Buffer
	cmd := exec.Command("sh", "-ec", script)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Run(cmd); err != nil {
		s.Fatalf("%s: %v\n%s", script, err, out.String())
	}
	return out.String()
}

func (s *site) open(c Config) *Redirect {
	s.Helper()
	var r *Redirect
	s.do(func() (err error) {
		r, err = Open(context.Background(), c)
		return err
	})
	s.Cleanup(r.Close)
	return r
}

func (s *site) install(r *Redirect) Report {
	s.Helper()
	var report Report
	s.do(func() (err error) {
		report, err = r.Install(context.Background())
		return err
	})
	return report
}

func (s *site) status(r *Redirect) Report {
	s.Helper()
	var report Report
	s.do(func() (err error) {
		report, err = r.Status(context.Background())
		return err
	})
	return report
}

func (s *site) verify(r *Redirect) []Difference {
	s.Helper()
	var differences []Difference
	s.do(func() (err error) {
		differences, err = r.Verify(context.Background())
		return err
	})
	return differences
}

func (s *site) remove() (removed bool) {
	s.Helper()
	s.do(func() (err error) {
		removed, err = Remove(context.Background())
		return err
	})
	return removed
}

// daemon opens the listeners of all families.
func (s *site) daemon(r *Redirect) {
	s.Helper()
	s.do(r.EnsureLink)
	for _, f := range Families {
		s.serve(s.lab.Instance, netip.AddrPortFrom(f.localhost(), r.config.HostPort), "host")
		s.serve(s.lab.Instance, netip.AddrPortFrom(r.config.forwarded(f)[0], r.config.ForwardedPort), "forwarded")
	}
}

// serve answers connections until the test ends.
func (s *site) serve(ns *netlab.Namespace, at netip.AddrPort, name string) {
	s.Helper()
	lc := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { // as the daemon, where IPv6 is off
			if at.Addr().Is6() {
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
			}
		})
	}}
	lc.SetMultipathTCP(false)
	ln, err := ns.Listen(context.Background(), lc, "tcp", at.String())
	if err != nil {
		s.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() {
				greeting := name
				if name != "metadata" {
					greeting += " " + originalDestination(conn.(*net.TCPConn))
				}
				fmt.Fprintln(conn, greeting)
				lines := bufio.NewScanner(conn)
				for lines.Scan() && lines.Text() != "bye" && lines.Text() != "reset" {
					if lines.Text() == "later" {
						time.Sleep(time.Second)
					}
					fmt.Fprintln(conn, lines.Text())
				}
				if lines.Text() == "reset" {
					conn.(*net.TCPConn).SetLinger(0)
				}
				conn.Close()
			})
		}
	})
	s.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func originalDestination(conn *net.TCPConn) string {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err.Error()
	}
	var dst netip.AddrPort
	raw.Control(func(fd uintptr) {
		if conn.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
			var info *unix.IPv6MTUInfo
			if info, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST); err == nil {
				port := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, info.Addr.Port))
				dst = netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), port)
			}
			return
		}
		var sockaddr *unix.IPv6Mreq // 16 bytes for a struct sockaddr_in
		if sockaddr, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
			b := sockaddr.Multiaddr
			dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4]))
		}
	})
	if err != nil {
		return err.Error()
	}
	return dst.String()
}

// A client says how a socket is made.
type client struct {
	mark   int
	uid    int
	mapped bool // an IPv6 socket with an IPv4-mapped address

	protocol int                // 0 is plain TCP
	prepare  func(fd int) error // before it connects
}

// connect connects from the calling thread's namespace within two seconds.
func (c client) connect(to netip.AddrPort) (net.Conn, error) {
	var address unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	family := unix.AF_INET6
	if to.Addr().Is4() && !c.mapped {
		address, family = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}, unix.AF_INET
	}
	// A socket belongs to the file system uid of the thread that makes it.
	if c.uid != 0 {
		unix.Setfsuid(c.uid)
		defer unix.Setfsuid(0)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, c.protocol)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	if c.mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, c.mark); err != nil {
			return nil, err
		}
	}
	if c.prepare != nil {
		if err := c.prepare(fd); err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
	}
	if err := unix.Connect(fd, address); err != nil && err != unix.EINPROGRESS {
		return nil, err
	}
	for deadline := time.Now().Add(2 * time.Second); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(max(0, time.Until(deadline).Milliseconds())))
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = os.ErrDeadlineExceeded
		}
		if err != nil {
			return nil, err
		}
		break
	}
	if number, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || number != 0 {
		return nil, cmp.Or(err, error(syscall.Errno(number)))
	}
	return net.FileConn(f)
}

// A dialogue is a connection with one who echoes.
type dialogue struct {
	net.Conn
	in *bufio.Reader
}

// dial connects and returns the greeting too. The connection is reset when the test ends, so that no orphan of it
// holds the namespace.
func (s *site) dial(ns *netlab.Namespace, c client, to netip.AddrPort) (*dialogue, string) {
	s.Helper()
	var conn net.Conn
	err := ns.Do(func() (err error) {
		conn, err = c.connect(to)
		return err
	})
	if err != nil {
		return nil, inShort(err)
	}
	s.Cleanup(func() {
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	})
	d := &dialogue{conn, bufio.NewReader(conn)}
	return d, d.hear()
}

// ask connects, and returns what the other end says.
func (s *site) ask(ns *netlab.Namespace, c client, to netip.AddrPort) string {
	s.Helper()
	d, greeting := s.dial(ns, c, to)
	if d != nil {
		d.Close()
	}
	return greeting
}

func (d *dialogue) hear() string {
	d.SetReadDeadline(time.Now().Add(2 * time.Second))
	line, err := d.in.ReadString('\n')
	if err != nil {
		return inShort(err)
	}
	return strings.TrimSuffix(line, "\n")
}

// alive says something and waits for its echo. It is acknowledged at once, so that nothing is on its way after that.
func (d *dialogue) alive() string {
	if _, err := io.WriteString(d, "alive\n"); err != nil {
		return inShort(err)
	}
	echo := d.hear()
	raw, err := d.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return inShort(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_QUICKACK, 1) })
	if err != nil {
		return inShort(err)
	}
	return echo
}

func inShort(err error) string {
	var number syscall.Errno
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	case errors.As(err, &number):
		return unix.ErrnoName(number)
	default:
		return err.Error()
	}
}

func (s *site) expect(what, got, want string) {
	s.Helper()
	if got != want {
		s.Errorf("%s: %q, want %q", what, got, want)
	}
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// rules returns what iptables-save prints in both families, without counters and without tables in which there is
// nothing.
func (s *site) rules(b Backend) string {
	s.Helper()
	text := s.sh(fmt.Sprintf("iptables-%s-save; ip6tables-%[1]s-save", b))
	var all strings.Builder
	for table := range strings.SplitSeq(text, "COMMIT\n") {
		_, table, _ = strings.Cut(table, "*")
		if strings.Contains(table, "\n-A ") || strings.Contains(table, " - [") || strings.Contains(table, "DROP [") {
			all.WriteString("*" + counters.ReplaceAllString(table, "[0:0]") + "COMMIT\n")
		}
	}
	return all.String()
}

// load adds rules of somebody else's.
func (s *site) load(b Backend, f Family, rules string) {
	s.Helper()
	cmd := exec.Command(map[Family]string{IPv4: "iptables-", IPv6: "ip6tables-"}[f]+b.String()+"-restore", "--noflush")
	cmd.Stdin = strings.NewReader(rules)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.lab.Instance.Run(cmd); err != nil {
		s.Fatalf("%v: %s", err, out.String())
	}
}

// eventually waits for a condition; it looks every 20 ms for as long as a slow machine may need.
func (s *site) eventually(what string, holds func() bool) {
	s.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("still not: %s", what)
		}
	}
}

func forBackends(t *testing.T, test func(s *site, b Backend)) {
	for _, b := range backends {
		t.Run(b.String(), func(t *testing.T) { test(newSite(t), b) })
	}
}

func hooksOf(r Report) string {
	var all []string
	for _, f := range r.Families {
		hooks := cmp.Or(f.Skipped, strings.TrimSpace(map[bool]string{true: "host "}[f.Hooks.Host]+
			map[bool]string{true: "admit "}[f.Hooks.Admit]+map[bool]string{true: "forwarded"}[f.Hooks.Forwarded]), "none")
		all = append(all, f.Family.String()+": "+hooks)
	}
	return strings.Join(all, "; ")
}

func inWords(differences []Difference) string {
	var all []string
	for _, d := range differences {
		all = append(all, d.String())
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}
