package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const slow, silent = "/latest/meta-data/ami-id", "/latest/meta-data/hostname"

// takesTime keeps connections, and takes longer over some answers than it takes to say that the daemon shall end.
func takesTime() netlab.Options {
	return netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep, Fault: func(r *imdstest.Request) imdstest.Fault {
		switch r.Target {
		case slow:
			return imdstest.Fault{Delay: 2 * time.Second}
		case silent:
			return imdstest.Fault{Outcome: imdstest.Silence}
		}
		return imdstest.Fault{}
	}}}
}

// keeper is a client with a kept connection.
type keeper struct {
	net.Conn
	in *bufio.Reader
}

func (h *host) keep() *keeper {
	h.t.Helper()
	conn, err := h.dial("169.254.169.254:80")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &keeper{conn, bufio.NewReader(conn)}
}

func (k *keeper) send(path string) {
	fmt.Fprintf(k, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", path)
}

// answer reads one answer to its last byte.
func (k *keeper) answer() (body string, err error) {
	r, err := http.ReadResponse(k.in, nil)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// seen waits until the service has a request.
func (h *host) seen(path string) {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		for _, c := range h.IMDS.Transcript().Connections {
			if strings.Contains(string(c.Received()), path) {
				return
			}
		}
		if time.Now().After(end) {
			h.t.Fatalf("%s has not reached the service", path)
		}
	}
}

// A daemon that is told to end lets answers that are under way come to their ends, and ends idle connections as the
// service would. New connections find what the mode says: the service itself, or nobody.
func TestStopDrains(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ mode, backend, then string }{{"audit", "nft", "200"}, {"audit", "legacy", "200"}, {"enforce", "nft", "000"}} {
		h := prepare(t, takesTime())
		if c.backend == "legacy" {
			xtablesLock(t)
		}
		h.start("mode: " + c.mode + "\nredirect: {backend: " + c.backend + "}\n")
		mode := c.mode + ", " + c.backend
		idle := h.keep()
		idle.send(instanceID)
		if _, err := idle.answer(); err != nil {
			t.Fatal(err)
		}
		asks := h.keep()
		asks.send(slow)
		h.seen(slow)
		told := time.Now()
		h.Signal(syscall.SIGTERM)
		if b, err := idle.in.ReadByte(); err != io.EOF || time.Since(told) > 1500*time.Millisecond {
			t.Errorf("%s: the idle connection ended after %v with %q, %v", mode, time.Since(told), b, err)
		}
		if got := h.curl(client{}, instanceID); got != c.then {
			t.Errorf("%s: a new connection: %s", mode, got)
		}
		if body, err := asks.answer(); err != nil || !strings.HasPrefix(body, "ami-") {
			t.Errorf("%s: the answer that was under way: %q, %v", mode, body, err)
		}
		if _, err := asks.in.ReadByte(); err != io.EOF {
			t.Errorf("%s: its connection ended with %v", mode, err)
		}
		if code := h.Wait(); code != 0 || time.Since(told) > 4*time.Second {
			t.Errorf("%s: exit %d after %v\n%s", mode, code, time.Since(told), h.Log())
		}
		if d := h.decided(slow, ""); d.At("http.response.status_code") != 200.0 || d.At("imdsgate.response.failure") != nil {
			t.Errorf("%s: %v", mode, d)
		}
		if got := strings.Contains(h.output("iptables-"+c.backend+"-save"), "IMDSGATE"); got != (c.mode == "enforce") {
			t.Errorf("%s: the redirect is there: %v", mode, got)
		}
	}
}

// What the service does not answer is waited for no longer than five seconds, and not at all if the daemon is told
// twice. What is cut off does not look like an end.
func TestStopDoesNotWait(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		twice       bool
		least, most time.Duration
	}{{true, 0, 3 * time.Second}, {false, 4500 * time.Millisecond, 8 * time.Second}} {
		h := start(t, takesTime(), "mode: enforce\n")
		idle, asks := h.keep(), h.keep()
		idle.send(instanceID)
		if _, err := idle.answer(); err != nil {
			t.Fatal(err)
		}
		asks.send(silent)
		h.seen(silent)
		told := time.Now()
		h.Signal(syscall.SIGTERM)
		idle.in.ReadByte() // until it drains
		idle.Close()
		if c.twice {
			h.Signal(syscall.SIGTERM)
		}
		if body, err := asks.answer(); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("twice %v: the client got %q, %v", c.twice, body, err)
		}
		if code, took := h.Wait(), time.Since(told); code != 0 || took < c.least || took > c.most {
			t.Errorf("twice %v: exit %d after %v\n%s", c.twice, code, took, h.Log())
		}
		if !strings.Contains(h.Log(), "closed 1 connections whose answer had not come") {
			t.Errorf("twice %v: the log says\n%s", c.twice, h.Log())
		}
		if _, err := h.Await("what was cut off", func(d gate.Document) bool {
			return d.At("url.path") == silent && d.At("imdsgate.response.failure") == "the proxy closed the connection"
		}); err != nil {
			t.Error(err)
		}
	}
}

// HEAD and OPTIONS of what is denied get the refusal, without a body that curl would wait for.
func TestRefusalWithoutBody(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	token := h.token()
	for _, c := range []struct {
		args   []string
		status string
	}{
		{[]string{"-I", service + role}, "403"},
		{[]string{"-I", service6 + role}, "403"},
		{[]string{"-X", "OPTIONS", service + role}, "403"},
		{[]string{"-X", "OPTIONS", service + "/latest/user-data"}, "403"},
		{[]string{"-I", service + instanceID}, "200"},
		{[]string{"-X", "OPTIONS", service + "/latest/api/token"}, "200"},
		{[]string{service + role}, "403"},
	} {
		begin := time.Now()
		out, code := h.run(client{uid: ordinaryUser, args: append([]string{"curl", "-s", "-g", "-i", "-m", "3",
			"-H", "X-aws-ec2-metadata-token: " + token, "-w", "\n%{http_code} %{size_download} %{num_connects}"}, c.args...)})
		head, _, _ := strings.Cut(out, "\r\n\r\n")
		if code != 0 || !strings.HasSuffix(out, "\n"+c.status+" 0 1") || time.Since(begin) > 2*time.Second {
			t.Errorf("%v: %d after %v\n%s", c.args, code, time.Since(begin), out)
		}
		if c.status == "403" && (!strings.Contains(head, "\r\nContent-Length: 0") || !strings.Contains(head, "\r\nConnection: close") ||
			!strings.Contains(head, "\r\nServer: EC2ws")) {
			t.Errorf("%v:\n%s", c.args, out)
		}
	}
	for _, c := range h.IMDS.Transcript().Connections {
		if seen := string(c.Received()); strings.Contains(seen, "credentials") || strings.Contains(seen, "user-data") {
			t.Errorf("the service saw %q", seen)
		}
	}
}

// The host was suspended while there was no daemon: the event about that time counts it.
// Processes are as old as they are, and known as ever, by a clock that has stood still and
// one that has not.
func TestSuspended(t *testing.T) {
	t.Parallel()
	const lasted = time.Hour
	if out, err := exec.Command("unshare", "--time", "--boottime=3600", "--", "cat", "/proc/self/timens_offsets").CombinedOutput(); err != nil || !strings.Contains(string(out), "3600") {
		missing := fmt.Sprintf("needs a time namespace that execve enters (Linux 6.1, CONFIG_TIME_NS), and an unshare that makes one: %v, %s", err, out)
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	h := start(t, netlab.Options{}, "mode: enforce\n")
	if code := h.Stop(); code != 0 {
		t.Fatalf("%d\n%s", code, h.Log())
	}
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir, Suspended: lasted, Lacks: attribution.Level3})
	d, err := h.Await("the time without a daemon", func(d gate.Document) bool { return d.At("event.action") == "requests-held" })
	if err != nil {
		t.Fatal(err)
	}
	if ns, _ := d.At("event.duration").(float64); time.Duration(ns) < lasted || time.Duration(ns) > lasted+time.Minute {
		t.Errorf("it lasted %v: %v", time.Duration(ns), d.At("message"))
	}
	s, err := h.Status()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Errorf("a thief got %s", got)
	}
	d = h.decided(role, "curl")
	at, err := time.Parse(time.RFC3339, fmt.Sprint(d.At("process.start")))
	if err != nil || at.Before(began.Add(-time.Second)) || at.After(time.Now()) {
		t.Errorf("it began at %v, %v, and before %v", d.At("process.start"), err, began)
	}
	if s.Attribution.Level != attribution.Level2.String() || d.At("imdsgate.attribution.via") != "sock_diag,witness" || d.At("imdsgate.attribution.confidence") != attribution.Medium.String() {
		t.Errorf("level %s: %v", s.Attribution.Level, d.At("imdsgate.attribution"))
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" {
		t.Errorf("who may got %s", got)
	}
}
