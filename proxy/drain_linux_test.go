package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// What was there before a change of the mode ends when it has its answer, a tunnel does
// not outlive audit mode, and who comes meanwhile is served as ever.
func TestDrain(t *testing.T) {
	const slow, silent, id = "/latest/meta-data/ami-id", "/latest/meta-data/hostname", "/latest/meta-data/instance-id"
	r := newRig(t, setting{policy: policy.Config{Mode: policy.Audit}, lab: netlab.Options{IMDS: &imdstest.Config{
		Persistence: imdstest.AlwaysKeep, Fault: func(r *imdstest.Request) imdstest.Fault {
			switch r.Target {
			case slow:
				return imdstest.Fault{Delay: time.Second}
			case silent:
				return imdstest.Fault{Outcome: imdstest.Silence}
			}
			return imdstest.Fault{}
		}}}})
	ask := func(c net.Conn, path string) {
		c.SetDeadline(time.Now().Add(15 * time.Second))
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", path)
	}
	answer := func(c net.Conn) (in *bufio.Reader) {
		t.Helper()
		in = bufio.NewReader(c)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		return in
	}
	idle, asking, tunnel := r.dial(false), r.dial(false), r.dial(false)
	ask(idle, id)
	kept := answer(idle)
	ask(asking, slow)
	tunnel.SetDeadline(time.Now().Add(15 * time.Second))
	fmt.Fprintf(tunnel, "GET %s HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", silent)
	seen := func(path string) int { return strings.Count(strings.Join(r.received(), ""), path) }
	for end := time.Now().Add(5 * time.Second); seen(silent) == 0 || seen(slow) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the requests have not come")
		}
	}
	r.engine.SetMode(policy.Enforce)
	drained := make(chan error, 1)
	go func() { drained <- r.proxy.Drain(context.Background()) }()
	if _, err := kept.ReadByte(); err != io.EOF {
		t.Errorf("the idle connection: %v", err)
	}
	later := r.dial(false)
	for range 2 { // and again on the same
		ask(later, id)
		answer(later)
	}
	_, sent := fmt.Fprintf(tunnel, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", id)
	n, got := io.Copy(io.Discard, tunnel)
	if err := errors.Join(sent, got); n > 0 || !errors.Is(err, syscall.ECONNRESET) { // told once, to whoever is first
		t.Errorf("the tunnel: %d bytes, %v", n, err)
	}
	if n := seen(id); n != 3 {
		t.Errorf("the service has seen %d requests, 3 of them readable", n)
	}
	if _, err := answer(asking).ReadByte(); err != io.EOF {
		t.Errorf("after the answer: %v", err)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	ask(later, id)
	answer(later)
}

// What cannot be read waits for a connection to the service since audit mode, and is not sent in enforce mode.
func TestTunnelBeginsTooLate(t *testing.T) {
	r := newRig(t, setting{policy: policy.Config{Mode: policy.Audit}, lab: netlab.Options{NoIMDS: true}})
	seen := make(chan string, 1)
	serve(t, r, func(_ int, c *net.TCPConn, _ func() error) {
		got, _ := io.ReadAll(c)
		seen <- string(got)
	})
	drop := []string{"OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "-m", "mark", "--mark", fmt.Sprint(testMark), "-j", "DROP"}
	run(t, "iptables", append([]string{"-I"}, drop...)...)
	undrop := sync.OnceFunc(func() { run(t, "iptables", append([]string{"-D"}, drop...)...) })
	t.Cleanup(undrop)
	c := r.dial(false)
	fmt.Fprintf(c, "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")
	until(t, "waiting", func() (waits bool) {
		r.each(func(s *session) { waits = s.unread })
		return waits
	})
	r.engine.SetMode(policy.Enforce)
	undrop()
	if got, end := talk(t, c, "", 10*time.Second); got != "" || end != "RST" { // a SYN is sent again after 1 s, 3 s and 7 s
		t.Errorf("the client got %q, %s", got, end)
	}
	select {
	case got := <-seen:
		if got != "" {
			t.Errorf("the service got %q", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("the service got no connection: the test tests nothing")
	}
}

// A client about whom the kernel is being asked has no slot yet, and perhaps an answer
// of audit mode on its way. That is waited for, and not for ever.
func TestDrainArriving(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint("late ", late), func(t *testing.T) {
			k := newSlowKernel(func(netip.Addr) bool { return true })
			r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, witness: k})
			t.Cleanup(k.all)
			goOn := r.hold()
			c := r.dial(false)
			io.WriteString(c, askA) // is there when the connection is accepted, and passed on at once
			goOn()
			until(t, "passed on", func() bool { return k.asked.Load() == 1 && len(r.received()) == 1 })
			r.engine.SetMode(policy.Enforce)
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			defer cancel()
			if !late {
				ctx = context.Background()
				time.AfterFunc(100*time.Millisecond, k.all)
			}
			begin := time.Now()
			err := r.proxy.Drain(ctx)
			if took := time.Since(begin); (err != nil) != late || took < 100*time.Millisecond || took > drainTimeout/2 {
				t.Errorf("%v after %v", err, took)
			}
			left := 0
			r.each(func(*session) { left++ })
			k.all()
			got, end := talk(t, c, "", 5*time.Second)
			if late && (got != "" || end != "RST") || !late && (left != 0 || !strings.HasPrefix(got, "HTTP/1.1 200 ") || end != "FIN") {
				t.Errorf("the client got %q, %s; %d sessions were left", got, end, left)
			}
		})
	}
}
