package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// another is a second endpoint of a rig, from which the same local port leads to another connection.
var (
	another = netip.MustParseAddrPort("169.254.169.254:81")
	two     = append(slices.Clone(imds.Endpoints), another)
)

const askOnce = "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"

func (r *rig) serveAnother() {
	r.t.Helper()
	to := []string{"-d", another.Addr().String(), "-p", "tcp", "--dport", "81"}
	run(r.t, "iptables", slices.Concat([]string{"-t", "nat", "-A", "OUTPUT"}, to,
		[]string{"-m", "mark", "!", "--mark", fmt.Sprint(testMark), "-j", "REDIRECT", "--to-ports", "254"})...)
	if r.lab.Bridged != nil {
		run(r.t, "iptables", slices.Concat([]string{"-t", "nat", "-A", "PREROUTING"}, to, []string{"-j", "DNAT", "--to-destination", "172.17.0.1:254"})...)
	}
	ln, err := r.lab.Metadata.Listen(r.t.Context(), nil, "tcp", another.String())
	if err != nil {
		r.t.Fatal(err)
	}
	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "of another") })}
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(ln) })
	r.t.Cleanup(func() {
		s.Close()
		serving.Wait()
	})
}

// ports has all connections that are not bound begin at one port, until the function is called.
func ports(t *testing.T, port uint16) (undo func()) {
	t.Helper()
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	before, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, fmt.Appendf(nil, "%d %d", port, port), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	undo = sync.OnceFunc(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(undo)
	return undo
}

// unused is a port that no test has had: a connection that has ended keeps it for a minute.
func unused() uint16 { return uint16(21000 + rand.N(4000)) }

// keeps has a client get an answer, and its connection kept.
func keeps(t *testing.T, c net.Conn) {
	t.Helper()
	io.WriteString(c, askA)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Two connections of ours that begin at the same port and lead to two endpoints are told apart.
func TestTwoFromOnePort(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, endpoints: two})
	r.serveAnother()
	goOn := r.hold()
	first, second := r.dial(false), r.dialTo(another.String(), false)
	port := unused()
	undo := ports(t, port)
	goOn()
	keeps(t, first)
	keeps(t, second)
	undo()
	near := netip.MustParseAddrPort(fmt.Sprint("172.31.0.10:", port))
	whose := func(endpoint netip.AddrPort) string {
		client, ok := r.proxy.For(near, endpoint)
		if !ok {
			return ""
		}
		return client.String()
	}
	if a, b := whose(imds.Endpoints[0]), whose(another); a != first.LocalAddr().String() || b != second.LocalAddr().String() {
		t.Errorf("they are for %q and %q", a, b)
	}
	second.Close()
	for end := time.Now().Add(3 * time.Second); whose(another) != ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("one that has ended is known")
		}
	}
	if a := whose(imds.Endpoints[0]); a != first.LocalAddr().String() {
		t.Errorf("the other one is for %q afterwards", a)
	}
}

// A client may begin at the port from which a connection of ours leads to another endpoint, and is served as any other.
// (It is of our own user here, which alone is asked about.)
func TestClientFromOurPort(t *testing.T) {
	for _, c := range []struct {
		name string
		from func(t *testing.T, r *rig) uint16 // begins a connection of ours to the first endpoint
	}{
		{"of a session", func(t *testing.T, r *rig) (port uint16) {
			keeps(t, r.dial(false))
			r.each(func(s *session) { port = s.near.Port() })
			return port
		}},
		{"ready", func(t *testing.T, r *rig) uint16 {
			talk(t, r.dial(false), askOnce, 3*time.Second)
			r.settled()
			r.proxy.ahead.mu.Lock()
			defer r.proxy.ahead.mu.Unlock()
			return r.proxy.ahead.stocks[imds.Endpoints[0]].ready[0].near.Port()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, ahead: 1, endpoints: two})
			r.serveAnother()
			port := c.from(t, r)
			goOn := r.hold()
			undo := ports(t, port)
			client := r.dialTo(another.String(), false)
			undo()
			goOn()
			if got := client.LocalAddr().(*net.TCPAddr).AddrPort().Port(); got != port {
				t.Fatalf("the client began at %d, and ours at %d: the test tests nothing", got, port)
			}
			if got, end := talk(t, client, askOnce, 3*time.Second); !strings.HasSuffix(got, "of another") || end != "FIN" {
				t.Errorf("%q, %s", got, end)
			}
			if n := r.proxy.Stats().Looped.Load(); n != 0 {
				t.Errorf("%d are taken for ours", n)
			}
		})
	}
}

// A client from the port of a self-test that leads to another endpoint is not taken for that, and takes nothing from it.
func TestClientFromSelfTestsPort(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, endpoints: two})
	r.serveAnother()
	goOn := r.hold()
	undo := ports(t, unused())
	client := r.dialTo(another.String(), false) // accepted first
	fd, _, err := r.proxy.selfTests.dial(imds.Endpoints[0], 0, 0, selfTest{"ask", "answer"})
	if err != nil {
		t.Fatal(err)
	}
	test := os.NewFile(uintptr(fd), "self-test")
	defer test.Close()
	undo()
	goOn()
	if got, end := talk(t, client, askOnce, 3*time.Second); !strings.HasSuffix(got, "of another") || end != "FIN" {
		t.Errorf("the client: %q, %s", got, end)
	}
	test.SetDeadline(time.Now().Add(3 * time.Second))
	io.WriteString(test, "ask")
	if got, err := io.ReadAll(test); err != nil || string(got) != "answer" {
		t.Errorf("the self-test: %q, %v", got, err)
	}
}

// Of two clients that begin at one port and lead to two endpoints the tracker gives the later one another port, since both
// are led to the same place. It is known by its own.
func TestTwoClientsFromOnePort(t *testing.T) {
	for _, forwarded := range []bool{false, true} {
		t.Run(fmt.Sprint("forwarded ", forwarded), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep, HopLimit: 64}, Containers: forwarded}, endpoints: two})
			r.serveAnother()
			in := r.lab.Instance
			if forwarded {
				in = r.lab.Bridged
			}
			d := &net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{Port: int(unused())}, Control: reuse}
			for i, endpoint := range []netip.AddrPort{imds.Endpoints[0], another} {
				c, err := in.Dial(t.Context(), d, "tcp4", endpoint.String())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				keeps(t, c)
				ev := r.recorded(i + 1)[i]
				if near := unmap(c.LocalAddr().(*net.TCPAddr).AddrPort()); ev.Connection.Source != near || ev.Attribution.Reason == "no_socket" {
					t.Errorf("%v: from %v, and known as %v (%s)", endpoint, near, ev.Connection.Source, ev.Attribution.Reason)
				}
			}
			here, err := exec.Command("ss", "-Htn", "state", "established", "sport", "=", ":254").Output()
			port := fmt.Sprint(":", d.LocalAddr.(*net.TCPAddr).Port)
			if err != nil || strings.Count(string(here), "\n") != 2 || strings.Count(string(here), port) != 1 {
				t.Errorf("the test tests nothing: %v\n%s", err, here)
			}
		})
	}
}

// reuse lets several sockets be bound to one port.
func reuse(_, _ string, c syscall.RawConn) (err error) {
	ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(ctl, err)
}
