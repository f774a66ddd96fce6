package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { labtest.Main(m) }

const testMark = 0x7fff0815

var testHost = &event.Host{ID: "host"}

// rig is a Proxy in this process, with the real service's stand-in behind it
// and a real redirect before it.
type rig struct {
	t      testing.TB
	lab    *netlab.Lab
	proxy  *Proxy
	engine *policy.Engine

	mu     sync.Mutex // guards events
	events []*event.Event
}

type setting struct {
	policy policy.Config
	lab    netlab.Options
	conns  int
	rate   int
	ahead  int
	// endpoints are more than the service's own; nil for those.
	endpoints []netip.AddrPort
	// silence bounds the silence of either side; 0 is as long as outside of tests.
	silence time.Duration
	// half bounds the wait for a client that sends no more; likewise.
	half time.Duration
	// pace changes what holds outside of tests.
	pace func(*pace)
	// witness is the kernel's; nil for none.
	witness attribution.Witness
}

func newRig(t testing.TB, s setting) *rig {
	t.Helper()
	s.lab.Here = true
	r := &rig{t: t, lab: labtest.Start(t, s.lab)}
	// What conntrack knows of the connections of an earlier lab decides about those
	// of this one that happen to have the same ports.
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Fatal(err)
	}
	if s.endpoints == nil {
		s.endpoints = imds.Endpoints
	}
	finder, err := attribution.New(attribution.Options{Witness: s.witness, Endpoints: s.endpoints})
	if err != nil {
		t.Fatal(err)
	}
	var classes []string
	for _, c := range imds.Classes() {
		classes = append(classes, c.String())
	}
	p, err := policy.Compile(s.policy, classes)
	if err != nil {
		t.Fatal(err)
	}
	r.engine = policy.NewEngine(p)
	r.proxy = New(Options{
		Endpoints: s.endpoints, Mark: testMark, MaxConns: s.conns, Rate: s.rate, DialAhead: s.ahead, Host: func() *event.Host { return testHost },
		Forwardable: func(_, _ netip.AddrPort) error { return nil },
		Record: func(ev *event.Event) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.events = append(r.events, ev)
		},
	}, finder, r.engine)
	if s.silence > 0 {
		r.proxy.silence = s.silence
	}
	if s.half > 0 {
		r.proxy.half = s.half
	}
	if s.pace != nil {
		s.pace(&r.proxy.pace)
	}
	var serving sync.WaitGroup
	serve := func(addr string, forwarded bool) {
		ln, err := Listen(context.Background(), netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		serving.Go(func() {
			if err := r.proxy.Serve(ln, forwarded); err != nil {
				t.Error(err)
			}
		})
	}
	serve("127.0.0.1:254", false)
	serve("[::1]:254", false)
	if s.lab.Containers {
		serve("172.17.0.1:254", true)
		run(t, "iptables", "-t", "nat", "-F", "PREROUTING")
		run(t, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80",
			"-j", "DNAT", "--to-destination", "172.17.0.1:254")
	}
	for tool, dst := range map[string]string{"iptables": "169.254.169.254", "ip6tables": "fd00:ec2::254"} {
		run(t, tool, "-t", "nat", "-F", "OUTPUT")
		run(t, tool, "-t", "nat", "-A", "OUTPUT", "-d", dst, "-p", "tcp", "--dport", "80",
			"-m", "mark", "!", "--mark", fmt.Sprint(testMark), "-j", "REDIRECT", "--to-ports", "254")
	}
	t.Cleanup(func() {
		r.proxy.Shutdown(context.Background())
		serving.Wait()
		for _, h := range []*slots{r.proxy.local, r.proxy.forwarded} {
			if len(h.sessions) != 0 || len(h.held) != 0 || h.arriving != 0 {
				t.Errorf("%d sessions of %d owners are left, and %d without a slot", len(h.sessions), len(h.held), h.arriving)
			}
		}
		if err := finder.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// dial connects to the service: through the proxy, or past it as the proxy
// itself does.
func (r *rig) dial(direct bool) *net.TCPConn {
	r.t.Helper()
	return r.dialTo("169.254.169.254:80", direct)
}

func (r *rig) dialTo(address string, direct bool) *net.TCPConn {
	r.t.Helper()
	d := net.Dialer{Timeout: 5 * time.Second}
	if direct {
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, testMark) })
			return errors.Join(ctl, err)
		}
	}
	c, err := d.Dial("tcp", address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// dialAs connects through the proxy with a socket that another user created.
func (r *rig) dialAs(uid int) *net.TCPConn {
	r.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The owner of a socket is the fsuid of the thread that creates it.
	if err := unix.Setfsuid(uid); err != nil {
		r.t.Fatal(err)
	}
	defer unix.Setfsuid(0)
	return r.dial(false)
}

// dialFrom connects from a container, through the proxy.
func (r *rig) dialFrom(in *netlab.Namespace) *net.TCPConn {
	r.t.Helper()
	c, err := in.Dial(context.Background(), &net.Dialer{Timeout: 5 * time.Second}, "tcp", "169.254.169.254:80")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// talk sends bytes and reads until the other end closes, or is silent for long.
func talk(t testing.TB, c *net.TCPConn, send string, pause time.Duration) (got string, end string) {
	t.Helper()
	if _, err := c.Write([]byte(send)); err != nil {
		return "", outcome(err)
	}
	c.SetReadDeadline(time.Now().Add(pause))
	b, err := io.ReadAll(c)
	return string(b), outcome(err)
}

// outcome names the way in which a connection ended.
func outcome(err error) string {
	switch {
	case err == nil:
		return "FIN"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "RST"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "open"
	}
	return err.Error()
}

// received is what the service got on its connections, one string for each.
func (r *rig) received() []string {
	var all []string
	for _, c := range r.lab.IMDS.Transcript().Connections {
		all = append(all, string(c.Received()))
	}
	return all
}

// recorded waits for so many events.
func (r *rig) recorded(n int) []*event.Event {
	r.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		r.mu.Lock()
		events := r.events
		r.mu.Unlock()
		if len(events) >= n {
			return events
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%d events, want %d", len(events), n)
		}
		time.Sleep(time.Millisecond)
	}
}

var (
	anyToken  = regexp.MustCompile(`[A-Za-z0-9_-]{54}==`)
	countdown = regexp.MustCompile(`(Token-Ttl-Seconds: )\d+`)
)

// masked is an answer without what differs from one to the next.
func masked(s string) string {
	return countdown.ReplaceAllString(anyToken.ReplaceAllString(s, "TOKEN"), "${1}N")
}

var fixed = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func emulator() *imdstest.Config {
	return &imdstest.Config{Now: func() time.Time { return fixed }}
}

// token asks the service itself.
func (r *rig) token() string {
	r.t.Helper()
	got, _ := talk(r.t, r.dial(true), "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n", 2*time.Second)
	_, body, _ := strings.Cut(got, "\r\n\r\n")
	if len(body) != 56 {
		r.t.Fatalf("token %q", got)
	}
	return body
}
