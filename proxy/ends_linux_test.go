package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// another is a second endpoint of a rig, from which the same local port leads to another connection.
var another = netip.MustParseAddrPort("169.254.169.254:81")

const askOnce = "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"

func (r *rig) serveAnother() {
	r.t.Helper()
	r.proxy.options.Endpoints = append(slices.Clone(imds.Endpoints), another)
	run(r.t, "iptables", "-t", "nat", "-A", "OUTPUT", "-d", another.Addr().String(), "-p", "tcp", "--dport", "81",
		"-m", "mark", "!", "--mark", fmt.Sprint(testMark), "-j", "REDIRECT", "--to-ports", "254")
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

// keeps is a client from a port that has an answer and keeps its connection.
func keeps(t *testing.T, port int, endpoint netip.AddrPort) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP("172.31.0.10"), Port: port}}
	c, err := d.Dial("tcp", endpoint.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	io.WriteString(c, askA)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Two connections of ours that begin at the same port and lead to two endpoints are told apart.
func TestTwoFromOnePort(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}})
	r.serveAnother()
	const port = 20201
	defer ports(t, port)()
	near := netip.MustParseAddrPort(fmt.Sprint("172.31.0.10:", port))
	first, second := keeps(t, 25101, imds.Endpoints[0]), keeps(t, 25102, another)
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
			keeps(t, 25103, imds.Endpoints[0])
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
			r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, ahead: 1})
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

// A client from the port of a self-test that leads to another endpoint is not taken for that.
func TestClientFromSelfTestsPort(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	r.serveAnother()
	goOn := r.hold()
	undo := ports(t, 20203)
	client := r.dialTo(another.String(), false) // accepted first
	fd, at, err := r.proxy.selfTests.dial(imds.Endpoints[0], 0, 0, selfTest{"ask", "answer"})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	undo()
	goOn()
	if got, end := talk(t, client, askOnce, 3*time.Second); !strings.HasSuffix(got, "of another") || end != "FIN" {
		t.Errorf("%q, %s", got, end)
	}
	if _, waits := r.proxy.selfTests.take(at); !waits {
		t.Error("the self-test was taken for another")
	}
}
