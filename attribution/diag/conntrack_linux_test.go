package diag

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

var (
	endpoint4 = netip.MustParseAddrPort("169.254.169.254:80")
	endpoint6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
)

// redirected listens for both families, leads the connections to the endpoints there,
// and accepts them.
func redirected(t testing.TB) net.Listener {
	t.Helper()
	labtest.RequireRoot(t)
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := ln.Addr().(*net.TCPAddr).Port
	rules := []string{
		fmt.Sprintf("iptables -w -t nat %%s OUTPUT -p tcp -d 169.254.169.254 --dport 80 --syn -j REDIRECT --to-ports %d", port),
		fmt.Sprintf("ip6tables -w -t nat %%s OUTPUT -p tcp -d fd00:ec2::254 --dport 80 --syn -j REDIRECT --to-ports %d", port),
	}
	for _, rule := range rules {
		if err := run(fmt.Sprintf(rule, "-A")); err != nil {
			t.Fatal(err)
		}
	}
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(io.Discard, conn); conn.Close() }()
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-accepted
		for _, rule := range rules {
			if err := run(fmt.Sprintf(rule, "-D")); err != nil {
				t.Error(err)
			}
		}
	})
	return ln
}

func openConntrack(t testing.TB) *Conntrack {
	t.Helper()
	c, err := OpenConntrack()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func timestamps(t testing.TB, on string) {
	t.Helper()
	if err := os.WriteFile(timestampFile, []byte(on), 0); err != nil {
		t.Fatal(err)
	}
}

func monotonic() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

func dial(t testing.TB, d net.Dialer, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

func TestBegan(t *testing.T) {
	redirected(t)
	c := openConntrack(t)
	if err := EnableTimestamps(); err != nil {
		t.Fatal(err)
	}
	for _, endpoint := range []netip.AddrPort{endpoint4, endpoint6} {
		before := monotonic()
		client := dial(t, net.Dialer{}, endpoint)
		after := monotonic()
		tup := tuple(client)
		began, err := c.Began(tup)
		if err != nil {
			t.Fatal(err)
		}
		if began < before-time.Microsecond || began > after+time.Microsecond {
			t.Errorf("%v began at %v, want between %v and %v", tup, began, before, after)
		}
		// conntrack knows the connection by its answers, too.
		back := Tuple{Local: tup.Remote, Remote: tup.Local}
		if _, err := c.Began(back); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v, want ErrNotFound", back, err)
		}
		tup.Remote = netip.AddrPortFrom(tup.Remote.Addr(), 81)
		if _, err := c.Began(tup); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v, want ErrNotFound", tup, err)
		}
	}
}

// Without a redirect the entry is found by the direction of its answers, which is
// the tuple of a connection in the other direction.
func TestBeganAnotherWay(t *testing.T) {
	redirected(t)
	c := openConntrack(t)
	timestamps(t, "1")
	client, _ := pair(t, "tcp4", "127.0.0.1:0", nil)
	tup := tuple(client)
	if _, err := c.Began(tup); err != nil {
		t.Fatal(err)
	}
	tup.Local, tup.Remote = tup.Remote, tup.Local
	if began, err := c.Began(tup); !errors.Is(err, ErrMismatch) {
		t.Errorf("%v, %v, want ErrMismatch", began, err)
	}
}

// A socket that is disconnected and connects again keeps its inode and its cookie,
// and gets an entry of its own, also with the same port.
func TestBeganReconnected(t *testing.T) {
	redirected(t)
	timestamps(t, "1")
	c, d := openConntrack(t), open(t)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 3, 16}, Port: 45678}); err != nil {
		t.Fatal(err)
	}
	tup := Tuple{Local: netip.MustParseAddrPort("10.0.3.16:45678"), Remote: endpoint4}
	var sockets [2]Socket
	var began [2]time.Duration
	for i := range 2 {
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: endpoint4.Addr().As4(), Port: 80}); err != nil {
			t.Fatal(err)
		}
		if sockets[i], err = d.Find(tup, 0); err != nil {
			t.Fatal(err)
		}
		if began[i], err = c.Began(tup); err != nil {
			t.Fatal(err)
		}
		var unspec [16]byte // AF_UNSPEC: connect(2) ends the association
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(ptr(&unspec)), uintptr(len(unspec))); errno != 0 {
			t.Fatal(errno)
		}
	}
	if sockets[0] != sockets[1] {
		t.Errorf("%+v, then %+v", sockets[0], sockets[1])
	}
	if began[0] >= began[1] {
		t.Errorf("began at %v, then at %v", began[0], began[1])
	}
}

func TestTimestampsOff(t *testing.T) {
	redirected(t)
	timestamps(t, "0")
	c := openConntrack(t)
	client := dial(t, net.Dialer{}, endpoint4)
	if _, err := c.Began(tuple(client)); !errors.Is(err, ErrTimestampsOff) {
		t.Errorf("%v, want ErrTimestampsOff", err)
	}
	if on, err := c.Timestamps(); on || err != nil {
		t.Errorf("%v, %v", on, err)
	}
	timestamps(t, "1")
	if on, err := c.Timestamps(); !on || err != nil {
		t.Errorf("%v, %v", on, err)
	}
	if _, err := c.Began(tuple(client)); !errors.Is(err, ErrUntimed) {
		t.Errorf("older than the setting: %v, want ErrUntimed", err)
	}
	if _, err := c.Began(tuple(dial(t, net.Dialer{}, endpoint4))); err != nil {
		t.Error(err)
	}
}

// An entry in a zone is a connection of somebody else, as far as we are asked.
func TestBeganZone(t *testing.T) {
	redirected(t)
	timestamps(t, "1")
	rules := []string{
		"iptables -w -t raw %s OUTPUT -p tcp -d 127.0.0.5 -j CT --zone 7",
		"iptables -w -t raw %s OUTPUT -p tcp -s 127.0.0.5 -j CT --zone 7",
	}
	for _, rule := range rules {
		if err := run(fmt.Sprintf(rule, "-A")); err != nil {
			t.Fatal(err)
		}
		defer run(fmt.Sprintf(rule, "-D"))
	}
	ln, err := net.Listen("tcp4", "127.0.0.5:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client := dial(t, net.Dialer{}, ln.Addr().(*net.TCPAddr).AddrPort())
	if began, err := openConntrack(t).Began(tuple(client)); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v, %v, want ErrNotFound", began, err)
	}
	e := entry{tuple: tuple(client), protocol: protoTCP, zone: true}
	if err := e.check(tuple(client)); !errors.Is(err, ErrMismatch) {
		t.Errorf("%v, want ErrMismatch", err)
	}
}

// unprivileged is set in the environment of a test that runs as an ordinary user.
const unprivileged = "IMDSGATE_TEST_UNPRIVILEGED"

// The daemon is an ordinary user with CAP_NET_ADMIN.
func TestConntrackWithoutRoot(t *testing.T) {
	if os.Getenv(unprivileged) != "" {
		fmt.Println("enable:", EnableTimestamps())
		c, err := OpenConntrack()
		fmt.Println("open:", err)
		if err == nil {
			_, err = c.Began(Tuple{endpoint4, endpoint4})
			fmt.Println("ask:", err)
		}
		return
	}
	redirected(t)
	for _, test := range []struct {
		name string
		caps []uintptr
		want []string
	}{
		{"CAP_NET_ADMIN", []uintptr{unix.CAP_NET_ADMIN}, []string{"enable: <nil>", "open: <nil>", "ask: no such connection"}},
		{"no capability", nil, []string{"enable: make conntrack note times: open " + timestampFile + ": permission denied (it needs CAP_NET_ADMIN)",
			"open: ask conntrack for 127.0.0.1:0->127.0.0.1:0: operation not permitted (it needs CAP_NET_ADMIN)"}},
	} {
		timestamps(t, "0")
		cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), unprivileged+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4321, Gid: 4321}, AmbientCaps: test.caps}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", test.name, err, out)
		}
		for _, line := range test.want {
			if !strings.Contains(string(out), line) {
				t.Errorf("%s: want %q in\n%s", test.name, line, out)
			}
		}
	}
}

// A Conntrack answers for the namespace in which it was opened, and so does the
// setting.
func TestConntrackElsewhere(t *testing.T) {
	redirected(t)
	timestamps(t, "1")
	lab := labtest.Start(t, netlab.Options{NoIMDS: true})
	var there *Conntrack
	err := lab.Metadata.Do(func() (err error) {
		there, err = OpenConntrack()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	if on, err := there.Timestamps(); on || err != nil {
		t.Errorf("there: %v, %v", on, err)
	}
	client := tuple(dial(t, net.Dialer{}, endpoint4))
	if _, err := openConntrack(t).Began(client); err != nil {
		t.Errorf("here: %v", err)
	}
	if began, err := there.Began(client); !errors.Is(err, ErrNotFound) {
		t.Errorf("there: %v, %v, want ErrNotFound", began, err)
	}
	if err := lab.Metadata.Do(EnableTimestamps); err != nil {
		t.Fatal(err)
	}
	if on, err := there.Timestamps(); !on || err != nil {
		t.Errorf("there: %v, %v", on, err)
	}
}

func TestConntrackAfterClose(t *testing.T) {
	labtest.RequireRoot(t)
	c := openConntrack(t)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Began(Tuple{endpoint4, endpoint4}); err == nil {
		t.Error("Began after Close answered")
	}
	if _, err := c.Timestamps(); err == nil {
		t.Error("Timestamps after Close answered")
	}
}

// What is known of times after the clock was set. Each line is one look at the
// clock: when, on CLOCK_MONOTONIC, and by how much CLOCK_REALTIME is ahead of it.
func TestClockSteps(t *testing.T) {
	const hour = time.Hour
	type look struct{ now, ahead time.Duration }
	for _, test := range []struct {
		name  string
		looks []look
		start time.Duration // of the entry, on CLOCK_REALTIME
		want  time.Duration // 0 is ErrClockStepped
	}{
		{"no step", []look{{1 * hour, 100 * hour}, {2 * hour, 100 * hour}}, 101*hour + 5, hour + 5},
		{"older than the first look", []look{{1 * hour, 100 * hour}}, 100*hour + 7, 7},
		{"less than the slack", []look{{1 * hour, 100 * hour}, {2 * hour, 100*hour + 500}}, 101 * hour, hour - 500},
		{"forward, before it", []look{{1 * hour, 100 * hour}, {2 * hour, 103 * hour}}, 101*hour + 5, 0},
		{"forward, after it and before it was seen", []look{{1 * hour, 100 * hour}, {2 * hour, 103 * hour}}, 105*hour - 5, 0},
		{"forward, after it was seen", []look{{1 * hour, 100 * hour}, {2 * hour, 103 * hour}, {3 * hour, 103 * hour}}, 105*hour + 5, 2*hour + 5},
		{"back, before it", []look{{1 * hour, 100 * hour}, {2 * hour, 99 * hour}}, 101*hour + 5, 0},
		{"back, in the time that was twice", []look{{1 * hour, 100 * hour}, {2 * hour, 99 * hour}, {4 * hour, 99 * hour}}, 101*hour + 5, 0},
		{"back, after that", []look{{1 * hour, 100 * hour}, {2 * hour, 99 * hour}, {4 * hour, 99 * hour}}, 102*hour + 1e6, 3*hour + 1e6},
		{"back twice", []look{{1 * hour, 100 * hour}, {2 * hour, 99 * hour}, {2*hour + 1, 98 * hour}, {9 * hour, 98 * hour}}, 102 * hour, 0},
		{"there and back", []look{{1 * hour, 100 * hour}, {2 * hour, 101 * hour}, {3 * hour, 100 * hour}, {9 * hour, 100 * hour}}, 103*hour + 5, 0},
		{"in the future", []look{{1 * hour, 100 * hour}}, 101*hour + 1e6, 0},
		{"before the boot", []look{{1 * hour, 100 * hour}}, 99 * hour, 0},
		{"no clock reads so", []look{{1 * hour, 100 * hour}}, -1, 0},
	} {
		var s steps
		for _, l := range test.looks {
			s.look(clock{now: l.now, low: l.ahead - 50, high: l.ahead + 50})
		}
		began, err := s.began(uint64(test.start))
		if began != test.want || (err == nil) != (test.want != 0) || err != nil && !errors.Is(err, ErrClockStepped) {
			t.Errorf("%s: %v, %v, want %v", test.name, began, err, test.want)
		}
	}
}

// A step is noticed on the way to a real answer.
func TestBeganAfterStep(t *testing.T) {
	redirected(t)
	timestamps(t, "1")
	c := openConntrack(t)
	tup := tuple(dial(t, net.Dialer{}, endpoint4))
	if _, err := c.Began(tup); err != nil {
		t.Fatal(err)
	}
	ahead := 2 * time.Second
	c.clock = func() clock {
		now := newClock()()
		now.low, now.high = now.low+ahead, now.high+ahead
		return now
	}
	if _, err := c.Began(tup); !errors.Is(err, ErrClockStepped) {
		t.Errorf("%v, want ErrClockStepped", err)
	}
}

// recordedEntries are answers of Linux 6.18 about redirected clients, from the wire:
// struct nfgenmsg with the attributes.
var recordedEntries = []struct {
	bytes string
	want  entry
}{
	{`02000000
	3400018014000180080001000a00031008000200a9fea9fe1c000280050001000600000006000200e57e00000600030000500000
	3400028014000180080001007f000001080002000a0003101c00028005000100060000000600020092ab000006000300e57e0000
	08000300000001ae 0800080000000000 08000c0092aa4b84 08000b0000000002 0800070000069780
	300004802c0001800500010003000000050002000a000000050003000a00000006000400230000000600050023000000
	100014800c00010018eb68890eb77c4c`,
		entry{Tuple{netip.MustParseAddrPort("10.0.3.16:58750"), endpoint4},
			Tuple{netip.MustParseAddrPort("127.0.0.1:37547"), netip.MustParseAddrPort("10.0.3.16:58750")}, protoTCP, false, 0x18eb68890eb77c4c}},
	{`0a000000
	4c0001802c00018014000300fd000ec200010000000000000000001014000400fd000ec20000000000000000000002541c00028005000100060000000600020080ea00000600030000500000
	4c0002802c000180140003000000000000000000000000000000000114000400fd000ec20001000000000000000000101c00028005000100060000000600020092ab00000600030080ea0000
	08000300000001ae 0800080000000000 08000c007261b37c 08000b0000000002 0800070000069780
	300004802c0001800500010003000000050002000a000000050003000a00000006000400230000000600050023000000
	100014800c00010018eb68890ebc4335`,
		entry{Tuple{netip.MustParseAddrPort("[fd00:ec2:1::10]:33002"), endpoint6},
			Tuple{netip.MustParseAddrPort("[::1]:37547"), netip.MustParseAddrPort("[fd00:ec2:1::10]:33002")}, protoTCP, false, 0x18eb68890ebc4335}},
}

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseEntry(t *testing.T) {
	for _, test := range recordedEntries {
		b := unhex(t, test.bytes)
		e, err := parseEntry(b)
		if err != nil || e != test.want {
			t.Errorf("got  %+v, %v\nwant %+v", e, err, test.want)
		}
		for n := range b {
			parseEntry(b[:n]) // a cut answer is an error, not a panic
		}
	}
}

// The question has the bytes of the answer: nfgenmsg and the original tuple.
func TestConntrackGetLayout(t *testing.T) {
	for _, test := range recordedEntries {
		want := unhex(t, test.bytes)[:sizeofGet(test.want.tuple)]
		if got := appendConntrackGet(nil, test.want.tuple); !bytes.Equal(got, want) {
			t.Errorf("got  %x\nwant %x", got, want)
		}
	}
}

// Whatever the bytes, an entry that passes for the answer to a question has the
// tuple that was asked for, in the original direction.
func FuzzParseEntry(f *testing.F) {
	for _, test := range recordedEntries {
		f.Add(unhex(f, test.bytes))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseEntry(b)
		if err != nil {
			return
		}
		for _, test := range recordedEntries {
			if e.check(test.want.tuple) == nil && (e.tuple != test.want.tuple || e.zone) {
				t.Errorf("%+v passes for %v", e, test.want.tuple)
			}
		}
		if !e.tuple.Local.IsValid() || e.tuple.Local.Addr().BitLen() != e.tuple.Remote.Addr().BitLen() {
			return
		}
		// Asking for what was parsed gives what was parsed.
		again, err := parseEntry(appendConntrackGet(nil, e.tuple))
		if err != nil || again.tuple.String() != e.tuple.String() || again.protocol != protoTCP {
			t.Errorf("%v: asked for as %+v, %v", e.tuple, again, err)
		}
	})
}

func BenchmarkBegan(b *testing.B) {
	redirected(b)
	timestamps(b, "1")
	c := openConntrack(b)
	tup := tuple(dial(b, net.Dialer{}, endpoint4))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Began(tup); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBeganNotFound(b *testing.B) {
	labtest.RequireRoot(b)
	c := openConntrack(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Began(Tuple{endpoint4, endpoint4}); !errors.Is(err, ErrNotFound) {
			b.Fatal(err)
		}
	}
}

func BenchmarkClock(b *testing.B) {
	read := newClock()
	b.ReportAllocs()
	var c clock
	for b.Loop() {
		c = read()
	}
	b.ReportMetric(float64(c.high-c.low), "ns-apart")
}
