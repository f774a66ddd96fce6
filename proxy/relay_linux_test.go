package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/proxy/loop"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const host = "Host: 169.254.169.254\r\n"

// The service sees the bytes that it would see without us, and the client gets
// the bytes, and the end, that it would get.
func TestTransparent(t *testing.T) {
	cfg := emulator()
	cfg.HTTP10 = []string{"meta-data/ami-id"}
	cfg.Pages = imdstest.XHTML
	r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}})
	token := "X-aws-ec2-metadata-token: " + r.token() + "\r\n"
	for _, c := range []struct{ name, send string }{
		{"curl", "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "User-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n"},
		{"token, no length", "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n"},
		{"token, length 0", "PUT /latest/api/token HTTP/1.1\r\n" + host + "Content-Length: 0\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n"},
		{"token, chunked", "PUT /latest/api/token HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n0\r\n\r\n"},
		{"token, wrong time to live", "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 0\r\n\r\n"},
		{"token, dated", "PUT /2021-03-23/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"},
		{"token, forwarded for", "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-Forwarded-For: 1.2.3.4\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"},
		{"with a token", "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\n" + host + token + "\r\n"},
		{"credentials", "GET /latest/meta-data/iam/security-credentials/imdsgate-lab-role HTTP/1.1\r\n" + host + token + "\r\n"},
		{"a wrong token", "GET /latest/meta-data/ HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token: wrong\r\n\r\n"},
		{"forwarded for, v1", "GET /latest/meta-data/ HTTP/1.1\r\n" + host + "X-Forwarded-For: 1.2.3.4\r\n\r\n"},
		{"HEAD", "HEAD /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"},
		{"HTTP/1.0", "GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n"},
		{"answered in HTTP/1.0", "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "\r\n"},
		{"no Host", "GET /latest/meta-data/instance-id HTTP/1.1\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"},
		{"two slashes", "GET //latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"},
		{"perl", "GET /latest/meta-data/instance-id HTTP/1.1\r\nTE: deflate,gzip;q=0.3\r\nConnection: TE, close\r\n" + host + "\r\n"},
		{"odd case and order", "GET /latest/meta-data/instance-id HTTP/1.1\r\nuser-agent:x\r\nHOST: \t169.254.169.254  \r\nX-Odd:\r\n\r\n"},
		{"not found", "GET /latest/meta-data/nothing HTTP/1.1\r\n" + host + "\r\n"},
		{"another method", "DELETE /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"},
		{"kept alive", strings.Repeat("GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"Connection: keep-alive\r\n\r\n", 3) +
			"GET /latest/user-data HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"},
		{"user data", "GET /latest/user-data HTTP/1.1\r\n" + host + "\r\n"},
		{"escaped", "GET /latest/meta%2ddata/instance-id HTTP/1.1\r\n" + host + "\r\n"},
		{"disguised", "GET /latest/meta-data/iam/../iam/security-credentials/?x HTTP/1.1\r\n" + host + "\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got, end, seen [2]string
			for i, direct := range []bool{true, false} {
				before := len(r.received())
				conn := r.dial(direct)
				got[i], end[i] = talk(t, conn, c.send, 2*time.Second)
				conn.Close()
				seen[i] = strings.Join(r.received()[before:], "\n--- another connection\n")
			}
			if masked(got[0]) != masked(got[1]) || end[0] != end[1] {
				t.Errorf("the client gets, directly, ending in %s:\n%s\nthrough us, ending in %s:\n%s", end[0], got[0], end[1], got[1])
			}
			if seen[0] != seen[1] {
				t.Errorf("the service sees, directly:\n%q\nthrough us:\n%q", seen[0], seen[1])
			}
			if got[0] == "" {
				t.Error("no answer, so nothing was compared")
			}
			if c.name == "credentials" && !strings.Contains(got[0], "SecretAccessKey") {
				t.Errorf("no credentials, so little was compared: %q", got[0])
			}
		})
	}
}

// expecting is a token request that waits for 100 Continue.
const expecting = "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nExpect: 100-continue\r\n"

// s3fs waits for 100 Continue before it sends its empty chunked body, though not
// for ever.
func TestExpect(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		for _, c := range []struct {
			name, head, body string
			fault            imdstest.Fault
		}{
			{"chunked", "Transfer-Encoding: chunked\r\n", http1.EmptyBody, imdstest.Fault{}},
			{"no body", "Content-Length: 0\r\n", "", imdstest.Fault{}},
			{"refused", "Transfer-Encoding: chunked\r\n", http1.EmptyBody, imdstest.Fault{Status: 417}},
			{"never told", "Transfer-Encoding: chunked\r\n", http1.EmptyBody, imdstest.Fault{NoContinue: true}},
		} {
			t.Run(mode.String()+" "+c.name, func(t *testing.T) {
				cfg := emulator()
				cfg.Fault = func(*imdstest.Request) imdstest.Fault { return c.fault }
				r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}, policy: policy.Config{Mode: mode}})
				var got, seen [2]string
				for i, direct := range []bool{true, false} {
					got[i], seen[i] = r.expect(direct, c.head, c.body)
				}
				if masked(got[0]) != masked(got[1]) || seen[0] != seen[1] {
					t.Errorf("directly %q, service sees %q\nthrough us %q, service sees %q", got[0], seen[0], got[1], seen[1])
				}
				if !strings.Contains(got[0], "\r\n\r\n") {
					t.Errorf("no answer, so nothing was compared: %q", got[0])
				}
			})
		}
	}
}

// expect sends a head, and the body when it is told to or has waited enough.
func (r *rig) expect(direct bool, head, body string) (got, seen string) {
	r.t.Helper()
	r.lab.IMDS.Reset()
	conn := r.dial(direct)
	defer conn.Close()
	if _, err := conn.Write([]byte(expecting + head + "\r\n")); err != nil {
		r.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(time.Second))
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	conn.SetDeadline(time.Time{})
	got = string(buf[:n])
	if strings.HasPrefix(got, "HTTP/1.1 100 ") || errors.Is(err, os.ErrDeadlineExceeded) {
		rest, end := talk(r.t, conn, body, 2*time.Second)
		got += rest + end
	}
	return got, strings.Join(r.received(), "|")
}

// A client that asks to wait, and then sends another body than the empty one,
// is refused when it is too late to refuse the head. In audit mode it is a tunnel
// from there on.
func TestBodyAfterContinue(t *testing.T) {
	const chunked, body = "Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: mode}})
			want, wantSeen := r.expect(true, chunked, body)
			if mode == policy.Enforce {
				want = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\n"
				wantSeen = expecting + chunked + "\r\n"
			}
			got, seen := r.expect(false, chunked, body)
			if mode == policy.Enforce {
				got = got[:min(len(got), len(want))]
			}
			if masked(got) != masked(want) || seen != wantSeen {
				t.Errorf("%q, service sees %q\nwant %q, service sees %q", got, seen, want, wantSeen)
			}
			odd := 0
			for _, ev := range r.recorded(2) {
				if ev.Request.Malformed != "" {
					odd++
				}
			}
			if odd != 1 {
				t.Errorf("%d of 2 events are of a malformed request", odd)
			}
		})
	}
}

// A client that waits for 100 Continue and may not ask gets the refusal alone.
func TestExpectRefused(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: policy.Enforce, Posture: policy.Strict}})
	head := strings.Replace(expecting, "/latest/api/token", "/latest/meta-data/iam/security-credentials/imdsgate-lab-role", 1)
	got, end := talk(t, r.dial(false), head+"Transfer-Encoding: chunked\r\n\r\n", 2*time.Second)
	if !strings.HasPrefix(got, "HTTP/1.1 403 ") || end != "FIN" {
		t.Errorf("%q, %s", got, end)
	}
	if seen := strings.Join(r.received(), ""); seen != "" {
		t.Errorf("the service saw %q", seen)
	}
}

// What goes wrong upstream goes wrong in the same way for the client.
func TestUpstreamFaults(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault imdstest.Fault
		end   string
	}{
		{"reset", imdstest.Fault{Outcome: imdstest.RST}, "RST"},
		{"closed", imdstest.Fault{Outcome: imdstest.FIN}, "FIN"},
		{"cut", imdstest.Fault{Outcome: imdstest.Truncated}, "FIN"},
		{"silent", imdstest.Fault{Outcome: imdstest.Silence}, "open"},
		{"slow", imdstest.Fault{Delay: 600 * time.Millisecond}, "FIN"},
		{"unavailable", imdstest.Fault{Status: 503}, "FIN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := emulator()
			cfg.Fault = func(*imdstest.Request) imdstest.Fault { return c.fault }
			r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}})
			var got, end [2]string
			for i, direct := range []bool{true, false} {
				conn := r.dial(direct)
				got[i], end[i] = talk(t, conn, "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"\r\n", time.Second)
				conn.Close()
			}
			if got[0] != got[1] || end[0] != end[1] || end[1] != c.end {
				t.Errorf("directly %q, %s; through us %q, %s; want %s", got[0], end[0], got[1], end[1], c.end)
			}
			r.settled()
		})
	}
}

// settled waits until no connection is served any more: neither a client that
// has left nor a service that is silent keeps one.
func (r *rig) settled() {
	r.t.Helper()
	for end := time.Now().Add(5 * time.Second); r.proxy.Open() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%d connections are still served", r.proxy.Open())
		}
	}
}

func TestUpstreamRefused(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	got, end := talk(t, r.dial(false), "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"\r\n", 2*time.Second)
	if got != "" || end != "RST" {
		t.Errorf("%q, %s; want a reset", got, end)
	}
	if ev := r.recorded(1)[0]; ev.Response.Failed == "" || ev.Decision.Verdict != event.Allow {
		t.Errorf("%+v", ev.Response)
	}
}

// A client that drips its head, says nothing, or leaves, holds up nobody and
// leaves nothing behind.
func TestSlowAndSilentClients(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: policy.Enforce}})
	zero := r.dial(false)
	zero.Close()
	r.settled()
	r.mu.Lock()
	if len(r.events) != 0 {
		t.Errorf("a connection without a byte is recorded: %+v", r.events[0])
	}
	r.mu.Unlock()

	silent := r.dial(false)
	drip := r.dial(false)
	begin := time.Now()
	for _, b := range []byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host) {
		if _, err := drip.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	got, end := talk(t, r.dial(false), "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"\r\n", 2*time.Second)
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") || end != "FIN" {
		t.Errorf("beside a slow client: %q, %s", got, end)
	}
	got, _ = talk(t, drip, "\r\n", 2*time.Second)
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Errorf("a head byte by byte, within %v: %q", time.Since(begin), got)
	}

	half := r.dial(false)
	if _, err := half.Write([]byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host)); err != nil {
		t.Fatal(err)
	}
	half.Close()
	silent.Close()
	r.settled()

	reset := r.dial(false)
	if _, err := reset.Write([]byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n")); err != nil {
		t.Fatal(err)
	}
	reset.SetLinger(0)
	reset.Close()
	r.settled()
}

// Clients that only say that they send no more get their answer.
func TestHalfClose(t *testing.T) {
	cfg := emulator()
	cfg.Fault = func(*imdstest.Request) imdstest.Fault { return imdstest.Fault{Delay: 700 * time.Millisecond} }
	r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}})
	conn := r.dial(false)
	if _, err := conn.Write([]byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n")); err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	var b bytes.Buffer
	if _, err := b.ReadFrom(conn); err != nil || !strings.HasPrefix(b.String(), "HTTP/1.1 200 ") {
		t.Errorf("%q, %v", b.String(), err)
	}
}

// The service closes an idle connection that the client keeps, who learns it at once.
func TestKeptConnectionEndsUpstream(t *testing.T) {
	cfg := emulator()
	r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}})
	conn := r.dial(false)
	ask := "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "Connection: keep-alive\r\n\r\n"
	if _, err := conn.Write([]byte(ask)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Read(buf); err != nil {
		t.Fatal(err)
	}
	r.each(func(s *session) { s.up.CloseWrite() }) // the emulator closes its end in answer
	begin := time.Now()
	if _, err := conn.Read(buf); err != io.EOF {
		t.Errorf("%v after %v, want its end", err, time.Since(begin))
	}
}

func (r *rig) loop() *loop.Loop {
	r.proxy.mu.Lock()
	defer r.proxy.mu.Unlock()
	return r.proxy.loop
}

// each calls a function with each session, on the loop.
func (r *rig) each(f func(*session)) {
	r.t.Helper()
	done := make(chan struct{})
	_, ok := r.loop().Start(func(*loop.Task) {
		defer close(done)
		r.proxy.mu.Lock()
		defer r.proxy.mu.Unlock()
		for s := range r.proxy.sessions() {
			f(s)
		}
	})
	if !ok {
		r.t.Fatal("the loop is closed")
	}
	<-done
}

// A connection that was not redirected, and one that was going elsewhere, are
// ended at once.
func TestNotRedirected(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	run(t, "iptables", "-t", "nat", "-A", "OUTPUT", "-d", "203.0.113.7", "-p", "tcp", "--dport", "80", "-j", "REDIRECT", "--to-ports", "254")
	run(t, "iptables", "-t", "nat", "-A", "OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "--dport", "8080", "-j", "REDIRECT", "--to-ports", "254")
	for i, address := range []string{"127.0.0.1:254", "[::1]:254", "203.0.113.7:80", "169.254.169.254:8080"} {
		got, end := "", ""
		if conn, err := net.Dial("tcp", address); err != nil {
			end = outcome(err) // the reset may come before Dial returns
		} else {
			got, end = talk(t, conn.(*net.TCPConn), "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"\r\n", 2*time.Second)
			conn.Close()
		}
		if got != "" || end != "RST" {
			t.Errorf("%s: %q, %s; want a reset", address, got, end)
		}
		if ev := r.recorded(i + 1)[i]; ev.Decision.Verdict != event.Deny || ev.Request.Malformed == "" {
			t.Errorf("%s: recorded %+v", address, ev.Decision)
		}
	}
	if seen := strings.Join(r.received(), ""); seen != "" {
		t.Errorf("the service saw %q", seen)
	}
}

func TestOverIPv6(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	got, _ := talk(t, r.dialTo("[fd00:ec2::254]:80", false), "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: [fd00:ec2::254]\r\n\r\n", 2*time.Second)
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Errorf("%q", got)
	}
	if ev := r.recorded(1)[0]; ev.Connection.Destination.String() != "[fd00:ec2::254]:80" || ev.Request.HostIsOdd {
		t.Errorf("%+v %+v", ev.Connection, ev.Request)
	}
}

// Our own connection may get a port that conntrack still leads to us, because our
// side has reset a client's connection there. The client does not notice. (The ports
// are not those of other tests.)
func TestOwnConnectionComesBack(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	from := func(port int) *net.TCPConn {
		d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP("172.31.0.10"), Port: port}}
		c, err := d.Dial("tcp", "169.254.169.254:80")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}
	for port := 20000; port < 20100; port++ {
		if port%8 > 1 { // a quarter of them, even ones too, with which the kernel begins
			continue
		}
		c := from(port)
		c.Write([]byte("GET / HTTP/1.1\r\nX"))
		for err := os.ErrDeadlineExceeded; errors.Is(err, os.ErrDeadlineExceeded); {
			r.proxy.mu.Lock()
			for s := range r.proxy.sessions() {
				if s.busy.Load() { // or else it is no reset
					s.task.Cancel()
				}
			}
			r.proxy.mu.Unlock()
			c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, err = c.Read(make([]byte, 1))
		}
		c.Close()
	}
	const ports = "/proc/sys/net/ipv4/ip_local_port_range"
	before, err := os.ReadFile(ports)
	if err == nil {
		err = os.WriteFile(ports, []byte("20000 20099"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(ports, before, 0) })
	for port := 0; port < 40 && r.proxy.Stats().Looped.Load() < 3; port++ {
		if got, end := talk(t, from(25000+port), ask, 2*time.Second); !strings.HasPrefix(got, "HTTP/1.1 200") {
			t.Errorf("%d: %q, %s, %d came back", port, got, end, r.proxy.Stats().Looped.Load())
		}
	}
	if r.proxy.Stats().Looped.Load() == 0 {
		t.Error("nothing came back: the test tests nothing")
	}
}

// What is sent again is what was judged: a body that arrives meanwhile, over the
// place where the request was, is not.
func TestComesBackWhileBodyArrives(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: policy.Enforce, Posture: policy.Strict}})
	token := r.token()
	c := r.dial(false)
	defer c.Close()
	if _, err := c.Write([]byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "Connection: keep-alive\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	accepting := func(n int) {
		r.proxy.mu.Lock()
		defer r.proxy.mu.Unlock()
		r.proxy.local.arriving += n
		for _, t := range r.proxy.local.accepting {
			t.Wake()
		}
	}
	accepting(maxArriving)
	r.dial(false).Close() // the last that is accepted for now
	loops := []string{"OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80", "-m", "mark", "--mark", fmt.Sprint(testMark), "-j", "REDIRECT", "--to-ports", "254"}
	run(t, "iptables", append([]string{"-t", "nat", "-I"}, loops...)...)
	const room = len(buffer{})
	r.each(func(s *session) { s.looped.Store(true) })
	head := "PUT /latest/api/token HTTP/1.1\r\n" + host + "Connection: keep-alive\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n" +
		"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\nX-Pad: "
	head += strings.Repeat("a", room-len(head)-4) + "\r\n\r\n" // to the buffer's end
	c.Write([]byte(head))
	time.Sleep(50 * time.Millisecond)
	c.Write([]byte("0"))
	run(t, "iptables", append([]string{"-t", "nat", "-D"}, loops...)...)
	time.Sleep(400 * time.Millisecond)
	accepting(-maxArriving)
	for end := time.Now().Add(3 * time.Second); r.proxy.Stats().Looped.Load() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing came back: the test tests nothing")
		}
	}
	evil := "GET /latest/meta-data/iam/security-credentials/imdsgate-lab-role HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token: " + token + "\r\n\r\n"
	got, _ := talk(t, c, evil, time.Second)
	if strings.Contains(got, "200 OK") || strings.Contains(strings.Join(r.received(), ""), "security-credentials") {
		t.Errorf("the service was asked what nobody judged, and the client got %.40q", got)
	}
}

// Where every connection of ours comes back, each is known as ours before another is
// made for it: one client does not keep the daemon busy with itself.
func TestComesBackAlways(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	loops := []string{"OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80", "-m", "mark", "--mark", fmt.Sprint(testMark), "-j", "REDIRECT", "--to-ports", "254"}
	run(t, "iptables", append([]string{"-t", "nat", "-I"}, loops...)...)
	defer run(t, "iptables", append([]string{"-t", "nat", "-D"}, loops...)...)
	c := r.dial(false)
	defer c.Close()
	got, end := talk(t, c, "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"\r\n", 2*time.Second)
	time.Sleep(100 * time.Millisecond)
	s := r.proxy.Stats()
	if n := s.Connections.Load(); s.Looped.Load() == 0 || n > 2+2*maxLoops {
		t.Errorf("the client got %q, %s; %d connections, %d of them our own", got, end, n, s.Looped.Load())
	}
}
