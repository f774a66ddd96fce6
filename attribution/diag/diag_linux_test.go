package diag

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func open(t testing.TB) *Conn {
	t.Helper()
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// pair makes a connection over loopback and returns both ends.
func pair(t testing.TB, network, address string, local *net.TCPAddr) (client, server *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return connect(t, ln, local)
}

func connect(t testing.TB, ln net.Listener, local *net.TCPAddr) (client, server *net.TCPConn) {
	t.Helper()
	d := net.Dialer{}
	if local != nil {
		d.LocalAddr = local
	}
	c, err := d.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func tuple(c *net.TCPConn) Tuple {
	unmap := func(a net.Addr) netip.AddrPort {
		ap := a.(*net.TCPAddr).AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return Tuple{Local: unmap(c.LocalAddr()), Remote: unmap(c.RemoteAddr())}
}

func inode(t testing.TB, c *net.TCPConn) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n uint32
	raw.Control(func(fd uintptr) { n, err = socketInode(int(fd)) })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestFind(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			client, server := pair(t, "tcp", address, nil)
			c := open(t)
			for end, conn := range map[string]*net.TCPConn{"client": client, "server": server} {
				s, err := c.Find(tuple(conn), 0)
				if err != nil {
					t.Fatalf("%s: %v", end, err)
				}
				if want := inode(t, conn); s.Inode != want {
					t.Errorf("%s: inode %d, want %d", end, s.Inode, want)
				}
				if s.State != Established || s.Cookie == 0 {
					t.Errorf("%s: %+v", end, s)
				}
				if again, err := c.Find(tuple(conn), s.Cookie); err != nil || again != s {
					t.Errorf("%s: with its cookie %+v, %v", end, again, err)
				}
				if _, err := c.Find(tuple(conn), s.Cookie+1); !errors.Is(err, ErrNotFound) {
					t.Errorf("%s: with another cookie: %v, want ErrNotFound", end, err)
				}
			}
		})
	}
}

// A client that speaks IPv4 through an AF_INET6 socket, as Java does, is found
// under its IPv4 addresses.
func TestFindMapped(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	fd, err := dialMapped(ln.Addr().(*net.TCPAddr).AddrPort())
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
	s, err := open(t).Find(tup, 0)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := socketInode(fd); s.Inode != want || !s.Mapped {
		t.Errorf("%+v, want inode %d of a mapped socket", s, want)
	}
}

// Two sockets with the same ports and different local addresses: a search by
// ports names either of them.
func TestFindSamePorts(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	first, _ := connect(t, ln, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)})
	port := first.LocalAddr().(*net.TCPAddr).Port
	second, _ := connect(t, ln, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3), Port: port})
	c := open(t)
	for range 20 {
		for _, conn := range []*net.TCPConn{first, second} {
			s, err := c.Find(tuple(conn), 0)
			if err != nil {
				t.Fatal(err)
			}
			if want := inode(t, conn); s.Inode != want {
				t.Fatalf("%v: inode %d, want %d", tuple(conn), s.Inode, want)
			}
		}
	}
}

// When the client has gone, the kernel answers an exact question with a
// listener on the client's port, if there is one. That is somebody else's.
func TestFindListenerInPlaceOfClient(t *testing.T) {
	client, server := pair(t, "tcp4", "127.0.0.1:0", nil)
	tup := tuple(client)
	client.SetLinger(0)
	client.Close()
	server.Close()
	ln, err := net.Listen("tcp4", tup.Local.String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s, err := open(t).Find(tup, 0)
	if err == nil {
		t.Fatalf("found %+v, which is not the client", s)
	}
	if !errors.Is(err, ErrMismatch) && !errors.Is(err, ErrNotFound) {
		t.Errorf("%v, want ErrMismatch or ErrNotFound", err)
	}
}

func TestFindClosed(t *testing.T) {
	client, server := pair(t, "tcp4", "127.0.0.1:0", nil)
	tup := tuple(client)
	c := open(t)
	client.Close() // FIN_WAIT2 without an inode, until the server closes
	if _, err := c.Find(tup, 0); !errors.Is(err, ErrGone) {
		t.Errorf("half closed: %v, want ErrGone", err)
	}
	server.Close()
	if _, err := c.Find(tup, 0); !errors.Is(err, ErrGone) {
		t.Errorf("TIME_WAIT: %v, want ErrGone", err)
	}
	tup.Local = netip.AddrPortFrom(tup.Local.Addr(), tup.Local.Port()^1)
	if _, err := c.Find(tup, 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("no such tuple: %v, want ErrNotFound", err)
	}
}

func TestConnectedAndDestroy(t *testing.T) {
	ln4, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln4.Close()
	ln6, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln6.Close()
	old4, _ := connect(t, ln4, nil)
	old6, _ := connect(t, ln6, nil)
	other, _ := pair(t, "tcp4", "127.0.0.1:0", nil)

	c := open(t)
	found, err := c.Connected([]netip.AddrPort{tuple(old4).Remote, tuple(old6).Remote})
	if err != nil {
		t.Fatal(err)
	}
	got := map[Tuple]Socket{}
	for _, s := range found {
		got[s.Tuple] = s
	}
	for _, conn := range []*net.TCPConn{old4, old6} {
		s, ok := got[tuple(conn)]
		if !ok || s.Inode != inode(t, conn) {
			t.Fatalf("%v: listed as %+v, %v", tuple(conn), s, ok)
		}
		if err := c.Destroy(s); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%v: read after Destroy: %v, want that it was aborted", tuple(conn), err)
		}
	}
	if _, ok := got[tuple(other)]; ok {
		t.Errorf("listed %v, which goes elsewhere", tuple(other))
	}
	if _, err := c.Find(tuple(other), 0); err != nil {
		t.Errorf("the other connection: %v", err)
	}
}

func TestAfterClose(t *testing.T) {
	c := open(t)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := c.Find(Tuple{Local: netip.MustParseAddrPort("127.0.0.1:1"), Remote: netip.MustParseAddrPort("127.0.0.1:2")}, 0); err == nil {
		t.Error("Find after Close answered")
	}
}

// recorded is the answer of Linux 6.18 about a v4-mapped client, taken from the
// wire: struct inet_diag_msg with the attributes that come unasked.
const recorded = `
0a010000 b30e 8a33
00000000000000000000ffff7f000001 00000000000000000000ffff7f000001
00000000 0910000000000000
00000000 00000000 00000000 00000000 9a730000
0500080000000000 08000f0000000000 0c0015000100000000000000 0600160012000000`

func TestParseMsg(t *testing.T) {
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "").Replace(recorded))
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseMsg(b)
	if err != nil {
		t.Fatal(err)
	}
	want := Socket{
		Tuple: Tuple{netip.MustParseAddrPort("127.0.0.1:45838"), netip.MustParseAddrPort("127.0.0.1:35379")},
		State: Established, Inode: 0x739a, Cookie: 0x1009, CgroupID: 1, Mapped: true,
	}
	if s != want {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
	for n := range b {
		parseMsg(b[:n]) // a cut answer is an error, not a panic
	}
}

func FuzzParseMsg(f *testing.F) {
	b, _ := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "").Replace(recorded))
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseMsg(b)
		if err != nil {
			return
		}
		if !s.Local.IsValid() || !s.Remote.IsValid() {
			t.Errorf("accepted without addresses: %+v", s)
		}
	})
}

func FuzzNext(f *testing.F) {
	f.Add([]byte{16, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			_, _, payload, rest, err := next(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) || len(payload) > len(b) {
				t.Fatalf("no progress in %x", b)
			}
			b = rest
		}
	})
}

func TestSockidLayout(t *testing.T) {
	b := appendSockid(nil, Tuple{netip.MustParseAddrPort("10.0.3.16:50000"), netip.MustParseAddrPort("169.254.169.254:80")}, 3, 7)
	if len(b) != sizeofID {
		t.Fatalf("struct inet_diag_sockid of %d bytes, want %d", len(b), sizeofID)
	}
	if !bytes.Equal(b[:4], []byte{0xc3, 0x50, 0, 80}) || !bytes.Equal(b[4:8], []byte{10, 0, 3, 16}) || !bytes.Equal(b[20:24], []byte{169, 254, 169, 254}) {
		t.Errorf("%x", b)
	}
}

func BenchmarkFind(b *testing.B) {
	client, _ := pair(b, "tcp4", "127.0.0.1:0", nil)
	c := open(b)
	tup := tuple(client)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Find(tup, 0); err != nil {
			b.Fatal(err)
		}
	}
}
