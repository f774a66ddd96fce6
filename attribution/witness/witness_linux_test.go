package witness_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/attribution/witness"
)

func tupleOf(c net.Conn) diag.Tuple {
	local := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	remote := c.LocalAddr().(*net.TCPAddr).AddrPort()
	return diag.Tuple{
		Local:  netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
		Remote: netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()),
	}
}

// from is the tuple of a client of endpoint4 on this machine.
func from(port int) diag.Tuple {
	return diag.Tuple{Local: netip.AddrPortFrom(endpoint4.Addr(), uint16(port)), Remote: endpoint4}
}

func accept(t testing.TB, ln *net.TCPListener) (net.Conn, diag.Tuple) {
	t.Helper()
	ln.SetDeadline(time.Now().Add(5 * time.Second))
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, tupleOf(c)
}

// drain accepts whatever comes, until the test ends.
func drain(t testing.TB, ln *net.TCPListener) {
	var wg sync.WaitGroup
	wg.Go(func() {
		var all []net.Conn
		for {
			c, err := ln.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				break
			}
			all = append(all, c)
			if len(all) == 1000 { // the first of them ended long ago, or is still queued
				all[0].Close()
				all = all[1:]
			}
		}
		for _, c := range all {
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
}

// one is the only connector of a tuple.
func one(t testing.TB, w *witness.Witness, tuple diag.Tuple, forwarded bool) attribution.Connector {
	t.Helper()
	found, err := w.Connectors(tuple, forwarded)
	if err != nil {
		t.Fatalf("%v: %v", tuple, err)
	}
	if len(found) != 1 {
		t.Fatalf("%v has the connectors %+v", tuple, found)
	}
	return found[0]
}

func none(t testing.TB, w *witness.Witness, tuple diag.Tuple, forwarded bool) {
	t.Helper()
	if found, err := w.Connectors(tuple, forwarded); !errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("%v has the connectors %+v, %v", tuple, found, err)
	}
}

// soon waits until something is so. A record ends with its connection, which the other end
// may acknowledge 40 ms after the socket is gone.
func soon(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// Before Linux 6.16 the function has to do.
const sendTracepoint, sendFunction = "tp_btf/tcp_sendmsg_locked", "fentry/tcp_sendmsg_locked"

func TestHooks(t *testing.T) {
	w := open(t, witness.Options{})
	hooks := w.Hooks()
	for _, h := range hooks {
		instead := h.Name == sendTracepoint && slices.ContainsFunc(hooks, func(h witness.Hook) bool { return h.Name == sendFunction && h.Attached })
		if (!h.Attached || h.Err != nil) && !instead {
			t.Errorf("%s: %v", h.Name, h.Err)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				if err := w.Check(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_ = w.Check(ctx) // has an answer, whichever
	if live := w.Stats().Live; live != 0 {
		t.Errorf("%d records are left", live)
	}
}

func TestClients(t *testing.T) {
	w := open(t, witness.Options{})
	for _, mode := range []string{"plain4", "plain6", "mapped", "mptcp", "fastopen", "deferred", "io_uring", "thread"} {
		t.Run(mode, func(t *testing.T) {
			at := endpoint4
			if mode == "plain6" {
				at = endpoint6
			}
			ln := serve(t, at)
			before := time.Now()
			c := start(t, mode)
			tid := 0 // whichever thread of the runtime's it was
			if mode == "thread" {
				tid = c.numbers()[0]
			}
			conn, tuple := accept(t, ln)
			got := one(t, w, tuple, false)
			if got.PID != c.pid() || got.UID != 4321 || got.GID != 4321 || got.Tuple != tuple || got.Unbound {
				t.Errorf("got %+v, want process %d and %v", got, c.pid(), tuple)
			}
			if tid != 0 && got.TID != tid {
				t.Errorf("thread %d, want %d", got.TID, tid)
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", got.PID, got.TID)); err != nil && mode != "io_uring" {
				t.Errorf("thread %d is none of process %d", got.TID, got.PID)
			}
			if got.Parent != os.Getpid() || got.CgroupID == 0 || got.NetnsCookie == 0 || got.SocketCookie == 0 || got.ExecID == 0 || got.Comm == "" {
				t.Errorf("%+v lacks something", got)
			}
			if age := now() - got.At; age < 0 || age > time.Since(before) {
				t.Errorf("connected %v ago", age)
			}
			if ticks := startTicks(t, c.pid()); uint64(got.Start/(10*time.Millisecond)) != ticks {
				t.Errorf("began %v after boot, and /proc says %d ticks", got.Start, ticks)
			}
			if ticks := startTicks(t, os.Getpid()); uint64(got.ParentStart/(10*time.Millisecond)) != ticks {
				t.Errorf("parent began %v after boot, and /proc says %d ticks", got.ParentStart, ticks)
			}
			if mode != "mptcp" { // whose visible socket has another cookie than the subflow
				d, err := diag.Open()
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				if s, err := d.Find(tuple, got.SocketCookie); err != nil {
					t.Errorf("sock_diag: %+v, %v", s, err)
				}
			}
			none(t, w, tuple, true)
			none(t, w, diag.Tuple{Local: tuple.Remote, Remote: tuple.Local}, false)
			writers, err := w.Writers(got.SocketCookie)
			if mode == "mptcp" && !errors.Is(err, errors.ErrUnsupported) || mode != "mptcp" && (err != nil || len(writers) != 0) {
				t.Errorf("writers %+v, %v", writers, err)
			}
			c.stop()
			if mode == "mptcp" { // the subflow ends when it is closed at both ends
				conn.Close()
			} else {
				none(t, w, tuple, false)
			}
			soon(t, "the end of the client left records", func() bool { return w.Stats().Live == 0 })
			none(t, w, tuple, false)
		})
	}
}

func now() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// startTicks is field 22 of stat (proc_pid_stat(5)).
func startTicks(t testing.TB, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), ") ")
	ticks, err := strconv.ParseUint(strings.Fields(after)[22-3], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return ticks
}

func TestReconnect(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	c := start(t, "twice")
	_, tuple := accept(t, ln)
	first := one(t, w, tuple, false)
	c.tell()
	c.line()
	none(t, w, tuple, false)
	c.tell()
	_, again := accept(t, ln)
	second := one(t, w, again, false)
	if second.SocketCookie != first.SocketCookie || second.At <= first.At || again == tuple {
		t.Errorf("first %+v, then %+v", first, second)
	}
	none(t, w, tuple, false)
	if live := w.Stats().Live; live != 1 {
		t.Errorf("%d records for one socket", live)
	}
	c.stop()
	soon(t, "the end of the client left records", func() bool { return w.Stats().Live == 0 })
}

func TestRefusedConnect(t *testing.T) {
	w := open(t, witness.Options{})
	// Nobody listens: the record ends with the socket.
	for range 10 {
		if _, err := dial(unix.AF_INET, 0, sockaddr4); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	if s := w.Stats(); s.Connects != 2 || s.Live != 0 {
		t.Errorf("%+v; our own connects are not recorded", s) // 2: of Check
	}
	cmd := startAs(t, user, "marked", "0")
	for range 10 {
		if got := cmd.line(); got != unix.ECONNREFUSED.Error() {
			t.Fatal(got)
		}
		cmd.tell()
	}
	cmd.line()
	soon(t, "failed connects left records", func() bool { return w.Stats().Live == 0 })
	if s := w.Stats(); s.Connects != 2+11 {
		t.Errorf("%+v", s)
	}
}

func TestSamePort(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	port := strconv.Itoa(45678)
	var pids = map[string]int{}
	for _, addr := range []string{"127.0.0.1", "127.0.0.2", "169.254.169.254"} {
		pids[addr] = start(t, "from", addr, port).pid()
	}
	for range 3 {
		_, tuple := accept(t, ln)
		if got := one(t, w, tuple, false); got.PID != pids[tuple.Local.Addr().String()] {
			t.Errorf("%v: process %d, want %d", tuple, got.PID, pids[tuple.Local.Addr().String()])
		}
	}
}

// The kernel lets only a client with CAP_NET_RAW be unbound (sock_bindtoindex_locked in
// net/core/sock.c asks for it of the current process, a BPF program notwithstanding).
func TestUnbound(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	for _, c := range []struct {
		attr    *syscall.SysProcAttr
		device  string
		unbound bool
	}{
		{nil, `""`, true},
		{user, `"lo"`, false},
	} {
		still := w.Stats().StillBound
		p := startAs(t, c.attr, "bound")
		_, tuple := accept(t, ln)
		got := one(t, w, tuple, false)
		if device := p.line(); device != c.device || got.Unbound != c.unbound || w.Stats().StillBound-still == 1 == c.unbound {
			t.Errorf("as %+v: bound to %s, %+v, %+v", c.attr, device, got, w.Stats())
		}
	}
}

func TestShare(t *testing.T) {
	const share = 10
	w := open(t, witness.Options{MaxSockets: 4 * share})
	ln := serve(t, endpoint4)
	drain(t, ln)
	count := func(p *process, n int) (seen int) {
		t.Helper()
		for range n {
			found, err := w.Connectors(from(p.numbers()[0]), false)
			switch {
			case err == nil && len(found) == 1 && found[0].PID == p.pid():
				seen++
			case !errors.Is(err, attribution.ErrNoWitness):
				t.Errorf("%+v, %v", found, err)
			}
		}
		return seen
	}
	// The first has all connected before the second begins.
	greedy := start(t, "many", "25")
	if seen := count(greedy, 25); seen != share {
		t.Errorf("%d of a greedy user's sockets have a witness, want %d", seen, share)
	}
	if s := w.Stats(); s.OverShare != 25-share || s.Full != 0 {
		t.Errorf("%+v", s)
	}
	other := startAs(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4322, Gid: 4322}}, "many", "5")
	if seen := count(other, 5); seen != 5 {
		t.Errorf("%d of another's 5 sockets have a witness", seen)
	}
	greedy.stop()
	again := start(t, "many", "12")
	if seen := count(again, 12); seen != share {
		t.Errorf("%d sockets have a witness after others ended, want %d", seen, share)
	}
	// Only root can fill the rest.
	root := startAs(t, nil, "many", "50")
	if seen := count(root, 50); seen != 4*share-share-5 {
		t.Errorf("%d of root's sockets have a witness", seen)
	}
	if s := w.Stats(); s.Full != 50-25 || s.Live != s.MaxSockets {
		t.Errorf("%+v", s)
	}
	if err := w.Check(t.Context()); err == nil {
		t.Error("a full witness says that all is well")
	}
	root.stop()
	again.stop()
	other.stop()
	soon(t, "the end of the clients left records", func() bool { return w.Stats().Live == 0 })
	if err := w.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFlood(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	victim := start(t, "plain4")
	_, tuple := accept(t, ln)
	drain(t, ln)
	flood := startAs(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4322, Gid: 4322}}, "flood", "20000")
	done := make(chan struct{})
	go func() { flood.line(); close(done) }()
	for others := 0; ; others++ {
		if got := one(t, w, tuple, false); got.PID != victim.pid() {
			t.Fatalf("%+v", got)
		}
		p := start(t, "many", "1")
		if got := one(t, w, from(p.numbers()[0]), false); got.PID != p.pid() {
			t.Fatalf("%+v", got)
		}
		p.stop()
		select {
		case <-done:
		default:
			continue
		}
		flood.stop()
		t.Logf("%d others connected meanwhile", others)
		break
	}
	soon(t, "the end of the others left records", func() bool { return w.Stats().Live == 1 })
	if s := w.Stats(); s.Full != 0 || s.OverShare != 0 || s.Connects < 20000 {
		t.Errorf("%+v", s)
	}
}

func TestForwarded(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	here := start(t, "plain4")
	_, tuple := accept(t, ln)
	// One after the other: two namespaces may give out the same port at the same time.
	a := elsewhere(t, "elsewhere")
	first := one(t, w, from(a.numbers()[0]), true)
	b := elsewhere(t, "elsewhere")
	second := one(t, w, from(b.numbers()[0]), true)
	if first.PID != a.pid() || second.PID != b.pid() || first.NetnsCookie == second.NetnsCookie {
		t.Errorf("%+v, %+v", first, second)
	}
	none(t, w, first.Tuple, false)
	none(t, w, tuple, true)
	if got := one(t, w, tuple, false); got.PID != here.pid() || got.NetnsCookie == first.NetnsCookie {
		t.Errorf("%+v", got)
	}
	a.stop()
	none(t, w, first.Tuple, true)
}

// Two namespaces with the same tuple: both are answers.
func TestSameTupleElsewhere(t *testing.T) {
	w := open(t, witness.Options{})
	a, b := elsewhere(t, "elsewhere from", "45679"), elsewhere(t, "elsewhere from", "45679")
	a.line()
	b.line()
	found, err := w.Connectors(from(45679), true)
	if err != nil || len(found) != 2 || found[0].PID+found[1].PID != a.pid()+b.pid() {
		t.Errorf("%+v, %v", found, err)
	}
}

// Two sockets of one namespace with the same tuple: nobody's.
func TestTwins(t *testing.T) {
	w := open(t, witness.Options{})
	c := elsewhere(t, "twins")
	tuple := diag.Tuple{Local: netip.MustParseAddrPort("10.9.9.9:5555"), Remote: endpoint4}
	c.line()
	c.tell()
	c.line()
	none(t, w, tuple, true)
	if s := w.Stats(); s.Ambiguous != 1 {
		t.Errorf("%+v", s)
	}
	c.stop()
	soon(t, "the twins left records", func() bool { return w.Stats().Live == 0 })
}

func TestMarked(t *testing.T) {
	sightings := make(chan witness.Sighting, 16)
	w := open(t, witness.Options{Mark: 0x1234, Report: func(s witness.Sighting) { sightings <- s }})
	drain(t, serve(t, endpoint4))
	innocent := startAs(t, nil, "marked", strconv.Itoa(0x1235))
	innocent.line()
	forger := startAs(t, nil, "marked", strconv.Itoa(0x1234))
	if got := forger.line(); got != "ok" {
		t.Errorf("without denying: %s", got)
	}
	s := <-sightings
	if s.Kind != witness.Marked || s.Refused || s.Connector.PID != forger.pid() || s.Connector.Tuple.Remote != endpoint4 {
		t.Errorf("%+v, want process %d", s, forger.pid())
	}
	connects := w.Stats().Connects
	w.SetDeny(true)
	forger.tell()
	if got := forger.line(); got != unix.EPERM.Error() {
		t.Errorf("denying: %s", got)
	}
	if s := <-sightings; s.Kind != witness.Marked || !s.Refused || s.Connector.PID != forger.pid() {
		t.Errorf("%+v", s)
	}
	if w.Stats().Connects != connects {
		t.Error("a refused connect was recorded")
	}
	innocent.tell()
	if got := innocent.line(); got != "ok" {
		t.Errorf("another mark: %s", got)
	}
	w.SetDeny(false)
	forger.tell()
	if got := forger.line(); got != "ok" {
		t.Errorf("no longer denying: %s", got)
	}
	// One user may have it, and nobody else.
	w.SetDeny(true)
	if s := <-sightings; s.Refused {
		t.Errorf("%+v", s)
	}
	w.SetMarkUser(4323)
	forger.tell()
	if got := forger.line(); got != unix.EPERM.Error() {
		t.Errorf("root, where another user may: %s", got)
	}
	caps := []uintptr{unix.CAP_NET_ADMIN}
	may := startAs(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4323, Gid: 4321}, AmbientCaps: caps}, "marked", strconv.Itoa(0x1234))
	if got := may.line(); got != "ok" {
		t.Errorf("the user who may: %s", got)
	}
	w.SetMarkUser(0)
	may.tell()
	if got := may.line(); got != unix.EPERM.Error() {
		t.Errorf("the user who might: %s", got)
	}
	for _, pid := range []int{forger.pid(), may.pid()} {
		if s := <-sightings; !s.Refused || s.Connector.PID != pid {
			t.Errorf("%+v, want process %d", s, pid)
		}
	}
	w.SetDeny(false)
	forger.tell()
	if got := forger.line(); got != "ok" {
		t.Errorf("no longer denying: %s", got)
	}
	// Our own upstream sockets have it.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x1234), unix.Connect(fd, sockaddr4), unix.Close(fd))
	}
	if err != nil {
		t.Error(err)
	}
	if s := <-sightings; s.Connector.PID != forger.pid() {
		t.Errorf("%+v", s)
	}
	select {
	case s := <-sightings:
		t.Errorf("one too many: %+v", s)
	default:
	}
}

// A mark that comes after connect(2), before the SYN.
func TestMarkedLate(t *testing.T) {
	sightings := make(chan witness.Sighting, 16)
	w := open(t, witness.Options{Mark: 0x1234, Report: func(s witness.Sighting) { sightings <- s }})
	drain(t, serve(t, endpoint4))
	for _, c := range []struct{ mark, want int }{{0x1234, 0x1234}, {0x1234, 0}, {0x1235, 0x1235}} {
		p := startAs(t, nil, "deferred, marked", strconv.Itoa(c.mark))
		if got := p.numbers()[0]; got != c.want {
			t.Errorf("mark %#x became %#x", c.mark, got)
		}
		if c.mark == 0x1234 {
			if s := <-sightings; s.Kind != witness.Marked || s.Refused != (c.want == 0) || s.Connector.PID != p.pid() {
				t.Errorf("%+v", s)
			}
		}
		w.SetDeny(true)
	}
	if len(sightings) > 0 {
		t.Errorf("one too many: %+v", <-sightings)
	}
}

func TestUncovered(t *testing.T) {
	sightings := make(chan witness.Sighting, 16)
	w := open(t, witness.Options{Deny: true, DenyUncovered: true, Report: func(s witness.Sighting) { sightings <- s }})
	early := elsewhere(t, "elsewhere") // nothing leads here yet
	early.numbers()
	w.SetRedirected(true)
	covered := elsewhere(t, "elsewhere")
	tuple := from(covered.numbers()[0])
	direct := elsewhere(t, "elsewhere")
	w.Arrived(tuple, []attribution.Connector{one(t, w, tuple, true)})
	port := direct.numbers()[0]
	s := <-sightings
	if s.Kind != witness.Uncovered || s.Refused || s.Connector.PID != direct.pid() || s.Connector.Tuple != from(port) {
		t.Errorf("%+v, want process %d", s, direct.pid())
	}
	direct.tell()
	if got := direct.line(); got != unix.EPERM.Error() {
		t.Errorf("from an uncovered namespace: %s", got)
	}
	if s := <-sightings; s.Kind != witness.Uncovered || !s.Refused || s.Connector.PID != direct.pid() {
		t.Errorf("%+v", s)
	}
	for range 20 { // a second has not passed
		direct.tell()
		if got := direct.line(); got != unix.EPERM.Error() {
			t.Fatal(got)
		}
	}
	covered.tell()
	covered.numbers()
	w.SetDeny(false)
	direct.tell()
	direct.numbers()
	w.SetDeny(true)
	refused := func(want bool) {
		t.Helper()
		direct.tell()
		if got := direct.line(); (got == unix.EPERM.Error()) != want {
			t.Errorf("%s, refused should be %t", got, want)
		}
	}
	w.Arrived(from(port-1), nil) // somebody else's
	refused(true)
	w.Arrived(from(port), nil) // late, and it had ended
	refused(false)
	w.Arrived(from(port), []attribution.Connector{s.Connector})
	refused(false)
	select {
	case s := <-sightings:
		t.Errorf("one too many: %+v", s)
	case <-time.After(400 * time.Millisecond):
	}
}

// What passed by the redirect while it was not there is forgotten.
func TestRedirectedAgain(t *testing.T) {
	sightings := make(chan witness.Sighting, 16)
	w := open(t, witness.Options{Deny: true, DenyUncovered: true, Report: func(s witness.Sighting) { sightings <- s }})
	w.SetRedirected(true)
	direct := elsewhere(t, "elsewhere")
	direct.numbers()
	<-sightings
	direct.tell()
	if got := direct.line(); got != unix.EPERM.Error() {
		t.Fatal(got)
	}
	<-sightings
	elsewhere(t, "elsewhere").numbers() // and is waited for
	w.SetRedirected(true)
	time.Sleep(time.Second) // for which a namespace is not asked about again
	direct.tell()
	port := direct.numbers()[0]
	if s := <-sightings; s.Refused || s.Connector.Tuple != from(port) {
		t.Errorf("%+v", s)
	}
	if len(sightings) > 0 {
		t.Errorf("one too many: %+v", <-sightings)
	}
}

// A connection may have ended and arrived before its establishment is read.
func TestArrivedBeforeRead(t *testing.T) {
	reading, stop := make(chan witness.Sighting), make(chan struct{})
	w := open(t, witness.Options{Report: func(s witness.Sighting) { reading <- s; <-stop }})
	w.SetRedirected(true)
	direct := elsewhere(t, "elsewhere")
	direct.numbers()
	<-reading // and nothing more is read
	absent := elsewhere(t, "elsewhere")
	w.Arrived(from(absent.numbers()[0]-1), nil)
	probing := elsewhere(t, "elsewhere")
	w.Arrived(from(probing.numbers()[0]), nil)
	close(stop)
	if s := <-reading; s.Connector.PID != absent.pid() {
		t.Errorf("%+v", s)
	}
	select {
	case s := <-reading:
		t.Errorf("one too many: %+v", s)
	case <-time.After(400 * time.Millisecond):
	}
}

func TestPrivileges(t *testing.T) {
	requireRoot(t)
	const netAdmin, bpf, perfmon = unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON
	as := func(caps ...uintptr) *process {
		return startAs(t, &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: caps,
		}, "privileges", os.Getenv(inCgroup))
	}
	level2 := []string{"cgroup/sock_release", "sockops", "cgroup/connect4", "cgroup/connect6"}
	hooks := func(p *process) map[string]bool {
		attached := map[string]bool{}
		for {
			line := p.line()
			yes, name, ok := strings.Cut(line, " ")
			if line == "ok" {
				return attached
			}
			if b, err := strconv.ParseBool(yes); ok && err == nil {
				attached[name] = b
			} else {
				t.Fatal(line)
			}
		}
	}
	little := hooks(as(netAdmin, bpf))
	for _, name := range level2 {
		if !little[name] {
			t.Errorf("%s is not attached with CAP_BPF and CAP_NET_ADMIN", name)
		}
		delete(little, name)
	}
	for name, attached := range little {
		if attached {
			t.Errorf("%s is attached without CAP_PERFMON", name)
		}
	}
	all := hooks(as(netAdmin, bpf, perfmon))
	for name, attached := range all {
		if !attached && !(name == sendTracepoint && all[sendFunction]) {
			t.Errorf("%s is not attached with CAP_PERFMON", name)
		}
	}
	for _, caps := range [][]uintptr{nil, {netAdmin}, {bpf}} {
		if got := as(caps...).line(); !strings.HasPrefix(got, "permission true") || !strings.Contains(got, "CAP_BPF and CAP_NET_ADMIN") {
			t.Errorf("with capabilities %v: %s", caps, got)
		}
	}
}

// The kernel's pids are not ours then.
func TestPidNamespace(t *testing.T) {
	p := startAs(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, "privileges", os.Getenv(inCgroup))
	if got := p.line(); !strings.HasPrefix(got, "permission false, unsupported true") || !strings.Contains(got, "initial pid namespace") {
		t.Error(got)
	}
}

// What was loaded is gone after Close, and Close may come while others ask.
func TestClose(t *testing.T) {
	requireRoot(t)
	w := open(t, witness.Options{})
	ours, all := held(t), loaded(t)
	for id := range ours {
		if !all[id] {
			t.Fatalf("%v is held and not loaded", id)
		}
	}
	if len(ours) < 20 { // 11 maps, 8 links and their programs
		t.Fatalf("an open witness has %v", ours)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				w.Connectors(from(1), true)
				w.Stats()
				w.Arrived(from(1), []attribution.Connector{{NetnsCookie: 7}})
				w.SetRedirected(true)
				w.Executed(1)
				w.Holding(t.Context(), os.Getpid(), 1)
			}
		})
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if _, err := w.Connectors(from(1), false); err == nil || errors.Is(err, attribution.ErrNoWitness) {
		t.Errorf("a closed witness says %v", err)
	}
	if err := w.Check(t.Context()); err == nil {
		t.Error("a closed witness says that all is well")
	}
	soon(t, "programs, maps or links are left", func() bool {
		all := loaded(t)
		for id := range ours {
			if all[id] {
				return false
			}
		}
		return true
	})
}

// object names a BPF object as fdinfo does.
type object struct {
	kind string
	id   uint32
}

// held are the BPF objects that our own descriptors refer to.
func held(t testing.TB) map[object]bool {
	t.Helper()
	all := map[object]bool{}
	files, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, _ := os.ReadFile(file) // a descriptor may be closed by now
		for line := range strings.Lines(string(b)) {
			kind, value, _ := strings.Cut(line, ":")
			switch kind {
			case "prog_id", "map_id", "link_id":
				id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
				if err != nil {
					t.Fatal(err)
				}
				all[object{kind, uint32(id)}] = true
			}
		}
	}
	return all
}

// loaded are the ids of all BPF objects of the host.
func loaded(t testing.TB) map[object]bool {
	t.Helper()
	all := map[object]bool{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			break
		}
		id = next
		all[object{"prog_id", uint32(id)}] = true
	}
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if err != nil {
			break
		}
		id = next
		all[object{"map_id", uint32(id)}] = true
	}
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		all[object{"link_id", uint32(links.ID)}] = true
	}
	if err := links.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func inodeOf(t testing.TB, tuple diag.Tuple) uint32 {
	t.Helper()
	d, err := diag.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s, err := d.Find(tuple, 0)
	if err != nil {
		t.Fatal(err)
	}
	return s.Inode
}

// The kernel's types are 5 MB as a file and several times that when parsed.
func TestMemory(t *testing.T) {
	resident := func() int {
		b, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			t.Fatal(err)
		}
		pages, err := strconv.Atoi(strings.Fields(string(b))[1])
		if err != nil {
			t.Fatal(err)
		}
		return pages * os.Getpagesize() >> 10
	}
	debug.FreeOSMemory()
	before := resident()
	open(t, witness.Options{})
	after := resident()
	t.Logf("%d KiB before, %d KiB with a witness", before, after)
	if after-before > 6<<10 {
		t.Errorf("the witness takes %d KiB of resident memory", after-before)
	}
}
