package diag

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// loopback is the index of lo in every namespace.
const loopback = 1

func bindTo(device string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		controlErr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device) })
		return errors.Join(err, controlErr)
	}
}

// A socket is anybody's to bind to an interface. The first question then does not
// find it.
func TestFindBound(t *testing.T) {
	c := open(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		client := dial(t, net.Dialer{Control: bindTo("lo")}, ln.Addr().(*net.TCPAddr).AddrPort())
		tup := tuple(client)
		if s, err := c.exact(tup, 0, 0); !errors.Is(err, ErrNotFound) {
			t.Fatalf("on no interface: %+v, %v: the kernel has changed", s, err)
		}
		s, err := c.Find(tup, 0)
		if err != nil {
			t.Fatal(err)
		}
		if s.Inode != inode(t, client) || s.Interface != loopback {
			t.Errorf("%+v, want inode %d on interface %d", s, inode(t, client), loopback)
		}
		for name, again := range map[string]func() (Socket, error){
			"Again": func() (Socket, error) { return c.Again(s) },
			"Find":  func() (Socket, error) { return c.Find(tup, s.Cookie) },
		} {
			if got, err := again(); err != nil || got != s {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
		}
		if _, err := c.Find(tup, s.Cookie+1); !errors.Is(err, ErrNotFound) {
			t.Errorf("another cookie: %v, want ErrNotFound", err)
		}
	}
}

// A socket is bound to an interface only after it was found, and unbound again.
func TestAgainBoundSince(t *testing.T) {
	labtest.RequireRoot(t) // to unbind
	client, _ := pair(t, "tcp4", "127.0.0.1:0", nil)
	c := open(t)
	s, err := c.Find(tuple(client), 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		device string
		want   uint32
	}{{"lo", loopback}, {"", 0}} {
		if err := bindTo(step.device)("", "", raw); err != nil {
			t.Fatal(err)
		}
		now, err := c.Again(s)
		if err != nil || now.Inode != s.Inode || now.Interface != step.want {
			t.Errorf("bound to %q: %+v, %v", step.device, now, err)
		}
		s = now
	}
}

// Somebody listens on the port of a bound client. The kernel answers with the
// listener when it is asked for no interface.
func TestFindBoundBehindListener(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	reuse := func(then func(string, string, syscall.RawConn) error) func(string, string, syscall.RawConn) error {
		return func(network, address string, c syscall.RawConn) error {
			c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
			return then(network, address, c)
		}
	}
	client := dial(t, net.Dialer{Control: reuse(bindTo("lo")), LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}, ln.Addr().(*net.TCPAddr).AddrPort())
	lc := net.ListenConfig{Control: reuse(func(string, string, syscall.RawConn) error { return nil })}
	other, err := lc.Listen(t.Context(), "tcp4", client.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	c := open(t)
	if s, err := c.exact(tuple(client), 0, 0); !errors.Is(err, ErrMismatch) {
		t.Fatalf("on no interface: %+v, %v, want ErrMismatch", s, err)
	}
	s, err := c.Find(tuple(client), 0)
	if err != nil || s.Inode != inode(t, client) {
		t.Errorf("%+v, %v, want inode %d", s, err, inode(t, client))
	}
}

// abandoned makes a connection over loopback that the server has closed long ago,
// and whose client does not care.
func abandoned(t *testing.T, d net.Dialer, ln net.Listener) *net.TCPConn {
	t.Helper()
	client := dial(t, d, ln.Addr().(*net.TCPAddr).AddrPort())
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	server.(*net.TCPConn).CloseWrite()
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	// A client that acknowledges the FIN after the server's end is gone is reset for it.
	if !comesTo(t, server.(*net.TCPConn), FinWait2) {
		t.Fatal("the client has not acknowledged the FIN within two seconds")
	}
	// The server's end is gone after a minute; a lost reset is quicker.
	const rule = "iptables -w %s OUTPUT -o lo -p tcp --tcp-flags RST RST -j DROP"
	if err := run(fmt.Sprintf(rule, "-A")); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := run(fmt.Sprintf(rule, "-D")); err != nil {
			t.Error(err)
		}
	}()
	server.(*net.TCPConn).SetLinger(0)
	server.Close()
	return client
}

// comesTo waits two seconds at most for a state.
func comesTo(t *testing.T, conn *net.TCPConn, want State) bool {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		var info *unix.TCPInfo
		gone := raw.Control(func(fd uintptr) {
			info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
		})
		if err := errors.Join(gone, err); err != nil {
			t.Fatal(err)
		}
		if State(info.State) == want {
			return true
		}
	}
	return false
}

// fromPort makes connect(2) take that port, without bind(2), which the first socket
// on it would not let through.
func fromPort(port int, device string) net.Dialer {
	const ipLocalPortRange = 51 // IP_LOCAL_PORT_RANGE, Linux 6.3
	return net.Dialer{Control: func(network, address string, c syscall.RawConn) error {
		var err error
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, ipLocalPortRange, port|port<<16) })
		if device != "" {
			err = errors.Join(err, bindTo(device)(network, address, c))
		}
		return err
	}}
}

// Who keeps an abandoned connection is not named for another one with the same
// tuple.
func TestFindTwoWithOneTuple(t *testing.T) {
	labtest.RequireRoot(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	to := ln.Addr().(*net.TCPAddr).AddrPort()
	c := open(t)

	unbound := abandoned(t, net.Dialer{}, ln)
	if s, err := c.Find(tuple(unbound), 0); err != nil || s.State != CloseWait || s.Inode != inode(t, unbound) {
		t.Errorf("%+v, %v, want the abandoned one", s, err)
	}
	d := fromPort(unbound.LocalAddr().(*net.TCPAddr).Port, "lo")
	if second, err := d.Dial("tcp4", to.String()); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("%v, %v beside an unbound one: the kernel has changed", second, err)
	}

	victim := abandoned(t, net.Dialer{Control: bindTo("lo")}, ln)
	tup := tuple(victim)
	kept, err := c.exact(tup, 0, loopback)
	if err != nil || kept.Inode != inode(t, victim) {
		t.Fatalf("%+v, %v", kept, err)
	}
	if s, err := c.Find(tup, 0); !errors.Is(err, ErrMismatch) {
		t.Errorf("alone: %+v, %v, want ErrMismatch", s, err)
	}
	if s, err := c.Again(kept); err != nil || s != kept {
		t.Errorf("by cookie: %+v, %v", s, err)
	}
	attacker := dial(t, fromPort(int(tup.Local.Port()), ""), to)
	if tuple(attacker) != tup {
		t.Fatalf("%v and %v", tuple(attacker), tup)
	}
	if s, err := c.Find(tup, 0); err != nil || s.Inode != inode(t, attacker) {
		t.Errorf("%+v, %v, want the second", s, err)
	}
	raw, err := attacker.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := bindTo("lo")("", "", raw); err != nil {
		t.Fatal(err)
	}
	s, err := c.Find(tup, 0)
	if err == nil && s.Inode != inode(t, attacker) || err != nil && !errors.Is(err, ErrMismatch) {
		t.Errorf("%+v, %v, want the second or ErrMismatch", s, err)
	}
	t.Logf("two on one interface: %+v, %v", s, err)
}

// Destroy ends the connection that it is given, whatever its socket speaks and is
// bound to, and no other with the same ports.
func TestDestroy(t *testing.T) {
	labtest.RequireRoot(t)
	for _, test := range []struct {
		name, listen string
		family       int
		device       string
	}{
		{"IPv4", "127.0.0.1:0", unix.AF_INET, ""},
		{"IPv6", "[::1]:0", unix.AF_INET6, ""},
		{"mapped", "127.0.0.1:0", unix.AF_INET6, ""},
		{"IPv4, bound", "127.0.0.1:0", unix.AF_INET, "lo"},
		{"IPv6, bound", "[::1]:0", unix.AF_INET6, "lo"},
		{"mapped, bound", "127.0.0.1:0", unix.AF_INET6, "lo"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", test.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			to := ln.Addr().(*net.TCPAddr).AddrPort()
			fd, err := dialFamily(test.family, test.device, to)
			if err != nil {
				t.Fatal(err)
			}
			defer closeFD(fd)
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			tup := tuple(server.(*net.TCPConn))
			tup.Local, tup.Remote = tup.Remote, tup.Local

			c := open(t)
			s, err := c.Find(tup, 0)
			if err != nil {
				t.Fatal(err)
			}
			listed, err := c.Connected([]netip.AddrPort{to})
			if err != nil || !slices.Contains(listed, s) {
				t.Errorf("listed %+v, %v, without %+v", listed, err, s)
			}
			wrong := s
			wrong.Cookie++
			if err := c.Destroy(wrong); err == nil {
				t.Error("destroyed with another cookie")
			}
			if _, err := c.Again(s); err != nil {
				t.Errorf("after that: %v", err)
			}
			if err := c.Destroy(s); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Read(fd, make([]byte, 1)); err != unix.ECONNABORTED {
				t.Errorf("the client reads %v, want ECONNABORTED", err)
			}
			server.SetReadDeadline(time.Now().Add(2 * time.Second))
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the server reads %v, want ECONNRESET", err)
			}
		})
	}
}

func TestOpenIn(t *testing.T) {
	lab := labtest.Start(t, netlab.Options{NoIMDS: true})
	ns, err := os.Open(lab.Metadata.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	there, err := OpenIn(int(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	here := open(t)

	ln, err := lab.Metadata.Listen(t.Context(), nil, "tcp4", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := lab.Metadata.Dial(t.Context(), &net.Dialer{Control: bindTo("lo")}, "tcp4", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := conn.(*net.TCPConn)
	for range 8 { // from whatever thread
		runtime.Gosched()
		s, err := there.Find(tuple(client), 0)
		if err != nil || s.Inode != inode(t, client) || s.Interface != loopback {
			t.Errorf("there: %+v, %v, want inode %d", s, err, inode(t, client))
		}
	}
	if s, err := here.Find(tuple(client), 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("here: %+v, %v, want ErrNotFound", s, err)
	}

	cookies := map[uint64]bool{}
	for _, c := range []*Conn{here, there, open(t)} {
		cookie, err := c.NetnsCookie()
		if err != nil || cookie == 0 {
			t.Fatal(cookie, err)
		}
		cookies[cookie] = true
	}
	if len(cookies) != 2 {
		t.Errorf("cookies %v of two namespaces", cookies)
	}
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		want, err := unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if got, _ := there.NetnsCookie(); err != nil || got != want {
			t.Errorf("cookie %d, and %d of a TCP socket there: %v", got, want, err)
		}
	})
	if c, err := OpenIn(int(os.Stdin.Fd())); err == nil {
		c.Close()
		t.Error("entered what is no namespace")
	}
}

func TestOpenInWithoutRoot(t *testing.T) {
	if os.Getenv(unprivileged) != "" {
		ns, err := os.Open("/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		_, err = OpenIn(int(ns.Fd()))
		fmt.Println(err)
		return
	}
	labtest.RequireRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), unprivileged+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4321, Gid: 4321}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "operation not permitted (it needs CAP_SYS_ADMIN") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestLikelyLinks(t *testing.T) {
	var all []link
	for i := range uint32(1000) {
		all = append(all, link{index: 1000 - i, kind: "veth"})
	}
	all[3].kind, all[5].kind, all[999].kind = "", "vlan", "" // 997, 995 and lo
	got := likely(all)
	if len(got) != maxLinks || !slices.Equal(got[:5], []uint32{1, 997, 995, 2, 3}) {
		t.Errorf("%d: %v", len(got), got)
	}
	if got := likely(nil); got != nil {
		t.Errorf("no interfaces: %v", got)
	}
}

func TestLinks(t *testing.T) {
	labtest.RequireRoot(t)
	c := open(t)
	got, err := c.links.list()
	if err != nil {
		t.Fatal(err)
	}
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if !slices.Contains(got, uint32(i.Index)) {
			t.Errorf("%v has no %d: %s", got, i.Index, i.Name)
		}
	}
	if got[0] != loopback {
		t.Errorf("%v, want lo first", got)
	}
}

func FuzzParseLink(f *testing.F) {
	f.Add(append(make([]byte, sizeofIfinfo), 16, 0, 18, 0, 9, 0, 1, 0, 'v', 'e', 't', 'h', 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, err := parseLink(b); err == nil && len(l.kind) > len(b) {
			t.Errorf("%+v", l)
		}
	})
}

// A client that is gone, on a host with a thousand veths.
func BenchmarkFindGone(b *testing.B) {
	labtest.RequireRoot(b)
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprintf("%d veths", n), func(b *testing.B) {
			lab := labtest.Start(b, netlab.Options{NoIMDS: true})
			var batch strings.Builder
			for i := range n / 2 {
				fmt.Fprintf(&batch, "link add a%d type veth peer name b%d\n", i, i)
			}
			cmd := exec.Command("ip", "-batch", "-")
			cmd.Stdin = strings.NewReader(batch.String())
			if err := lab.Instance.Run(cmd); err != nil {
				b.Fatal(err)
			}
			var c *Conn
			if err := lab.Instance.Do(func() (err error) { c, err = Open(); return err }); err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			b.Run("list", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					c.links.read = time.Time{}
					if _, err := c.links.list(); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("Find", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := c.Find(Tuple{endpoint4, endpoint4}, 0); !errors.Is(err, ErrNotFound) {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

func BenchmarkOpenIn(b *testing.B) {
	labtest.RequireRoot(b)
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	b.ReportAllocs()
	for b.Loop() {
		c, err := OpenIn(int(ns.Fd()))
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

func BenchmarkFindBound(b *testing.B) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	tup := tuple(dial(b, net.Dialer{Control: bindTo("lo")}, ln.Addr().(*net.TCPAddr).AddrPort()))
	c := open(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Find(tup, 0); err != nil {
			b.Fatal(err)
		}
	}
}
