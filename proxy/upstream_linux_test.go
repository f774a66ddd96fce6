package proxy

import (
	"bufio"
	"cmp"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/proxy/loop"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// service stands in for the metadata service where a test says when it ends its
// connections.
type service struct {
	mu   sync.Mutex // guards seen
	seen []string   // "CONNECTION METHOD PATH"
}

// serve lets play deal with each connection, whose number it is told.
func serve(t *testing.T, r *rig, play func(n int, c *net.TCPConn, ask func() error)) *service {
	t.Helper()
	ln, err := r.lab.Metadata.Listen(t.Context(), nil, "tcp", "169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	s := new(service)
	var open sync.WaitGroup
	open.Go(func() {
		for n := 1; ; n++ {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer c.Close()
				in := bufio.NewReader(c)
				play(n, c.(*net.TCPConn), func() error {
					r, err := http.ReadRequest(in)
					if err == nil {
						s.mu.Lock()
						s.seen = append(s.seen, string(rune('0'+n))+" "+r.Method+" "+r.URL.Path)
						s.mu.Unlock()
					}
					return err
				})
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		r.proxy.Shutdown(context.Background())
		open.Wait()
	})
	return s
}

// hold makes the proxy see nothing of what happens until the function is called.
func (r *rig) hold() (goOn func()) {
	held, release := make(chan struct{}), make(chan struct{})
	r.loop().Start(func(*loop.Task) {
		close(held)
		<-release
	})
	<-held
	return func() { close(release) }
}

func (s *service) saw() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.seen, ", ")
}

const (
	askA = "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "\r\n"
	askB = "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"
	kept = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
)

// The service may end a kept connection at any moment, also when a request is on its
// way: that is sent again, once, if not a byte of an answer has come.
func TestUpstreamEndsWhileAsked(t *testing.T) {
	const (
		post    = "POST /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"
		waiting = "PUT /latest/api/token HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
	)
	for _, c := range []struct {
		name string
		ask  string                      // B, if it is not askB
		end  func(n int, c *net.TCPConn) // instead of an answer to it
		got  string
		end2 string
		saw  string
	}{
		{"FIN", "", func(n int, c *net.TCPConn) {
			if n > 1 {
				io.WriteString(c, kept)
			}
		}, kept + kept, "FIN", "1 GET /latest/meta-data/ami-id, 1 GET /latest/meta-data/instance-id, 2 GET /latest/meta-data/instance-id"},
		{"RST", "", func(n int, c *net.TCPConn) {
			if n > 1 {
				io.WriteString(c, kept)
				return
			}
			c.SetLinger(0)
		}, kept + kept, "FIN", "1 GET /latest/meta-data/ami-id, 1 GET /latest/meta-data/instance-id, 2 GET /latest/meta-data/instance-id"},
		{"FIN twice", "", func(int, *net.TCPConn) {},
			kept, "FIN", "1 GET /latest/meta-data/ami-id, 1 GET /latest/meta-data/instance-id, 2 GET /latest/meta-data/instance-id"},
		{"in its answer", "", func(_ int, c *net.TCPConn) { io.WriteString(c, "HTTP/1.1 2") },
			kept + "HTTP/1.1 2", "FIN", "1 GET /latest/meta-data/ami-id, 1 GET /latest/meta-data/instance-id"},
		{"asked for what must not be done twice", post, func(int, *net.TCPConn) {},
			kept, "FIN", "1 GET /latest/meta-data/ami-id, 1 POST /latest/meta-data/instance-id"},
		{"before the body", waiting, func(n int, c *net.TCPConn) {
			if n > 1 {
				io.WriteString(c, kept)
				return
			}
			c.CloseWrite()
			io.Copy(io.Discard, c)
		}, kept + kept, "FIN", "1 GET /latest/meta-data/ami-id, 1 PUT /latest/api/token, 2 PUT /latest/api/token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
			s := serve(t, r, func(n int, conn *net.TCPConn, ask func() error) {
				if n == 1 {
					if ask() != nil {
						return
					}
					io.WriteString(conn, kept)
				}
				if ask() == nil {
					c.end(n, conn)
				}
			})
			conn := r.dial(false)
			if _, err := conn.Write([]byte(askA)); err != nil {
				t.Fatal(err)
			}
			first := make([]byte, len(kept))
			if _, err := io.ReadFull(conn, first); err != nil {
				t.Fatal(err)
			}
			got, end := talk(t, conn, cmp.Or(c.ask, askB), 5*time.Second)
			if got = string(first) + got; got != c.got || end != c.end2 || s.saw() != c.saw {
				t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
			}
			r.recorded(2)
		})
	}
}

// A connection that was made for a request, since the service had ended the one before, is
// no old one: what the service does to it is the client's to see.
func TestUpstreamEndsTwice(t *testing.T) {
	const put = "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	end, ended := make(chan struct{}), make(chan struct{})
	s := serve(t, r, func(n int, c *net.TCPConn, ask func() error) {
		if ask() != nil || n > 1 {
			return
		}
		io.WriteString(c, kept)
		<-end
		c.Close()
		close(ended)
	})
	c := r.dial(false)
	io.WriteString(c, askA)
	if _, err := io.ReadFull(c, make([]byte, len(kept))); err != nil {
		t.Fatal(err)
	}
	goOn := r.hold()
	close(end)
	<-ended
	io.WriteString(c, put)            // when it cannot know yet
	time.Sleep(20 * time.Millisecond) // both have come
	goOn()
	if got, end := talk(t, c, "", 5*time.Second); got != "" || end != "FIN" || s.saw() != "1 GET /latest/meta-data/ami-id, 2 PUT /latest/api/token" {
		t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
	}
}

// A connection of ours that is aborted because it has lost its port is replaced: a client
// that has asked on it is answered, as one that has not.
func TestAborted(t *testing.T) {
	for name, asked := range map[string]bool{"asked": true, "not yet": false} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
			aborted := make(chan error, 1)
			s := serve(t, r, func(n int, c *net.TCPConn, ask func() error) {
				if n == 1 {
					if asked && ask() != nil {
						return
					}
					aborted <- r.proxy.finder.AbortTuple(diag.Tuple{Local: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Remote: c.LocalAddr().(*net.TCPAddr).AddrPort()})
				}
				if ask() == nil {
					io.WriteString(c, kept)
				}
			})
			conn := r.dial(false)
			saw := "2 GET /latest/meta-data/ami-id"
			if asked {
				io.WriteString(conn, askA)
				saw = "1 GET /latest/meta-data/ami-id, " + saw
			}
			if err := <-aborted; err != nil {
				t.Fatal(err)
			}
			if !asked {
				io.WriteString(conn, askA)
			}
			if got, end := talk(t, conn, "", 5*time.Second); got != kept || end != "FIN" || s.saw() != saw {
				t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
			}
			r.recorded(1)
		})
	}
}

// What the service does to a connection on which nothing was asked yet is the
// client's to see, unless it asks before it can.
func TestUpstreamEndsUnasked(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	ended, third, play := make(chan struct{}, 8), make(chan struct{}), make(chan struct{})
	s := serve(t, r, func(n int, c *net.TCPConn, ask func() error) {
		switch n {
		case 1: // FIN
		case 2:
			c.SetLinger(0)
		case 3:
			close(third)
			<-play
		default:
			if ask() == nil {
				io.WriteString(c, kept)
			}
		}
		c.Close()
		ended <- struct{}{}
	})
	for _, want := range []string{"FIN", "RST"} {
		if got, end := talk(t, r.dial(false), "", 5*time.Second); got != "" || end != want {
			t.Errorf("%q, %s, want %s", got, end, want)
		}
		<-ended
	}
	conn := r.dial(false)
	<-third
	time.Sleep(20 * time.Millisecond) // now its session waits for both
	goOn := r.hold()
	play <- struct{}{}
	<-ended
	io.WriteString(conn, askA) // when it cannot know yet
	time.Sleep(20 * time.Millisecond)
	goOn()
	if got, end := talk(t, conn, "", 5*time.Second); got != kept || end != "FIN" || s.saw() != "4 GET /latest/meta-data/ami-id" {
		t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
	}
}

// A packet that is lost on the way to the service makes a client wait that has said
// that it sends no more, and is recorded when it does not.
func TestLostOnTheWay(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	lose := []string{"OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "--syn", "-m", "mark", "--mark", "0x7fff0815", "-j", "DROP"}
	run(t, "iptables", append([]string{"-I"}, lose...)...)
	waits, leaves := r.dial(false), r.dial(false)
	for _, c := range []*net.TCPConn{waits, leaves} {
		if _, err := c.Write([]byte("GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
	}
	waits.CloseWrite()
	leaves.SetLinger(0)
	leaves.Close()
	if ev := r.recorded(1)[0]; ev.Response.Failed != "the client left before it was sent" || ev.Request.Path == "" {
		t.Errorf("%+v, %+v", ev.Request, ev.Response)
	}
	run(t, "iptables", append([]string{"-D"}, lose...)...)
	waits.SetReadDeadline(time.Now().Add(5 * time.Second))
	if got, err := io.ReadAll(waits); !strings.Contains(string(got), " 200 OK\r\n") || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if ev := r.recorded(2)[1]; ev.Response.Status != 200 {
		t.Errorf("%+v", ev.Response)
	}
}

// Nobody waits for the end of a head that cannot become a request.
func TestUnfinishedHead(t *testing.T) {
	r := newRig(t, setting{policy: policy.Config{Mode: policy.Enforce}, lab: netlab.Options{IMDS: emulator()}})
	for _, send := range []string{
		"GET / HTTP/1.1\r\nHost: x\n\n", "GET / HTTP/1.1\r\nHost: x\n", "GET / HTTP/1.1\r\nHost: x\r\n\n",
		"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n", "GET / HTTP/1.1\r\nBad Header\r\n", "GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n",
		"GET /\r\n", "SSH-2.0-x\r\n", "\x16\x03\x01",
	} {
		if got, end := talk(t, r.dial(false), send, headTimeout/2); !strings.HasPrefix(got, "HTTP/1.1 400 ") || end != "FIN" {
			t.Errorf("%q: %q, %s", send, got, end)
		}
	}
	if seen := strings.Join(r.received(), ""); seen != "" {
		t.Errorf("the service saw %q", seen)
	}
}

// A client that has connected before the end, and is so slow to ask as one is on a busy
// host, is answered. One that has had an answer and asks no more is not waited for, and
// one that never asks not for long.
func TestShutdownAnswers(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}})
	idle, young, served := r.dial(false), r.dial(false), r.dial(false)
	io.WriteString(served, askA)
	in := bufio.NewReader(served)
	if resp, err := http.ReadResponse(in, nil); err != nil {
		t.Fatal(err)
	} else if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	for r.proxy.Open() < 3 {
		time.Sleep(time.Millisecond)
	}
	done := make(chan error)
	began := time.Now()
	go func() { done <- r.proxy.Shutdown(context.Background()) }()
	for !r.proxy.closing.Load() {
		time.Sleep(time.Millisecond)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("the connection that was kept: %v", err)
	} else if took := time.Since(began); took > askIn/2 {
		t.Errorf("one that has had an answer is closed after %v", took)
	}
	time.Sleep(time.Until(began.Add(askIn / 2)))
	if got, end := talk(t, young, askB, 5*time.Second); !strings.Contains(got, " 200 OK\r\n") || end != "FIN" {
		t.Errorf("one that asked later: %q, %s", got, end)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > drainTimeout/2 {
		t.Errorf("it took %v", took)
	}
	if got, end := talk(t, idle, "", 5*time.Second); got != "" || end != "FIN" {
		t.Errorf("idle: %q, %s", got, end)
	}
}

// TestShutdownAccepts has a client come while the loop has other things to do, and then
// the end. In audit mode nobody else would serve him.
func TestShutdownAccepts(t *testing.T) {
	r := newRig(t, setting{policy: policy.Config{Mode: policy.Audit}, lab: netlab.Options{IMDS: emulator()}})
	goOn := r.hold()
	c := r.dial(false)
	io.WriteString(c, askA)
	done := make(chan error)
	go func() { done <- r.proxy.Shutdown(context.Background()) }()
	for !r.proxy.closing.Load() {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond)
	goOn()
	if got, end := talk(t, c, "", 5*time.Second); !strings.Contains(got, " 200 OK\r\n") || end != "FIN" {
		t.Errorf("%q, %s", got, end)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The same when there are no descriptors, until others have ended.
func TestShutdownAcceptsWithoutDescriptors(t *testing.T) {
	r := newRig(t, setting{policy: policy.Config{Mode: policy.Audit}, lab: netlab.Options{IMDS: emulator()}})
	goOn := r.hold()
	c := r.dial(false)
	io.WriteString(c, askA)
	limit := func(n uint64) (was uint64) {
		t.Helper()
		var l unix.Rlimit
		err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &l)
		was, l.Cur = l.Cur, n
		if err == nil {
			err = unix.Prlimit(0, unix.RLIMIT_NOFILE, &l, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		return was
	}
	was := limit(3)
	t.Cleanup(func() { limit(was) })
	done := make(chan error, 1)
	go func() { done <- r.proxy.Shutdown(context.Background()) }()
	until(t, "closing", r.proxy.closing.Load)
	goOn()
	time.Sleep(200 * time.Millisecond)
	limit(was)
	if got, end := talk(t, c, "", 5*time.Second); !strings.Contains(got, " 200 OK\r\n") || end != "FIN" {
		t.Errorf("%q, %s", got, end)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The service begins to answer a client that sends no more, and stalls. The client is
// not kept for as long as the service says nothing, and does not take what it has for all.
func TestHalfClosedAndStalled(t *testing.T) {
	for name, head := range map[string]string{"with length": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", "without": "HTTP/1.1 200 OK\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, half: 300 * time.Millisecond})
			over := make(chan struct{})
			defer close(over)
			serve(t, r, func(_ int, c *net.TCPConn, ask func() error) {
				if ask() == nil {
					time.Sleep(50 * time.Millisecond)
					io.WriteString(c, head+"0123456789")
					<-over
				}
			})
			c := r.dial(false)
			io.WriteString(c, askA)
			c.CloseWrite()
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			if got, err := io.ReadAll(c); outcome(err) != "RST" || !strings.HasSuffix(string(got), "0123456789") {
				t.Errorf("%q, %s", got, outcome(err))
			}
			r.settled()
		})
	}
}

// A client that sends no more gets an answer that comes slowly, all of it, through a tunnel
// as well.
func TestHalfClosedAndSlow(t *testing.T) {
	for name, ask := range map[string]string{"request": askA, "tunnel": strings.Replace(askA, "\r\n\r\n", "\r\nUpgrade: x\r\n\r\n", 1)} {
		t.Run(name, func(t *testing.T) {
			const pieces, pause, half = 12, 200 * time.Millisecond, 2 * time.Second
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, half: half})
			serve(t, r, func(_ int, c *net.TCPConn, ask func() error) {
				if ask() != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
				for range pieces {
					time.Sleep(pause)
					io.WriteString(c, "x")
				}
			})
			c := r.dial(false)
			io.WriteString(c, ask)
			c.CloseWrite()
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if got, err := io.ReadAll(c); !strings.HasSuffix(string(got), "\r\n\r\n"+strings.Repeat("x", pieces)) || err != nil {
				t.Errorf("%q, %s", got, outcome(err))
			}
		})
	}
}

// A client that does not read is given up, and does not take what it has for all.
func TestNotReadIsReset(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, silence: 300 * time.Millisecond})
	serve(t, r, func(_ int, c *net.TCPConn, ask func() error) {
		if ask() == nil {
			io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"+strings.Repeat("x", 16<<20))
		}
	})
	c := r.dial(false)
	c.SetReadBuffer(4096)
	io.WriteString(c, askA)
	until(t, "asked", func() bool { return r.proxy.Stats().Requests.Load() == 1 })
	r.settled()
	if got, end := talk(t, c, "", 5*time.Second); end != "RST" {
		t.Errorf("%d bytes, %s", len(got), end)
	}
}

// A client that asks for more and leaves is not waited for as long as the service is silent.
func TestLeavesBehindRequest(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, half: 300 * time.Millisecond})
	asked, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	serve(t, r, func(_ int, _ *net.TCPConn, ask func() error) {
		if ask() == nil {
			close(asked)
			<-over
		}
	})
	c := r.dial(false)
	io.WriteString(c, askA)
	<-asked
	io.WriteString(c, askB)
	c.Close()
	r.settled()
}

// The service need not wait for a body that it has asked for, nor for one that it has not.
func TestAnswersBeforeBody(t *testing.T) {
	const (
		waiting = "PUT /latest/api/token HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
		goOn    = "HTTP/1.1 100 Continue\r\n\r\n"
		no      = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n"
	)
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		for _, c := range []struct {
			name     string
			at       string // once, with 100 Continue
			later    func(c *net.TCPConn)
			got, end string
		}{
			{"at once", no, func(c *net.TCPConn) { io.Copy(io.Discard, c) }, no, "FIN"},
			{"later", "", func(c *net.TCPConn) { io.WriteString(c, no); io.Copy(io.Discard, c) }, no, "FIN"},
			{"FIN", "", func(*net.TCPConn) {}, "", "FIN"},
			{"RST", "", func(c *net.TCPConn) { c.SetLinger(0) }, "", "RST"},
		} {
			t.Run(mode.String()+" "+c.name, func(t *testing.T) {
				r := newRig(t, setting{policy: policy.Config{Mode: mode}, lab: netlab.Options{NoIMDS: true}})
				then := make(chan struct{})
				serve(t, r, func(_ int, conn *net.TCPConn, ask func() error) {
					if ask() == nil {
						io.WriteString(conn, goOn+c.at)
						<-then
						c.later(conn)
					}
				})
				conn := r.dial(false)
				io.WriteString(conn, waiting)
				if _, err := io.ReadFull(conn, make([]byte, len(goOn))); err != nil {
					t.Error(err)
				}
				time.Sleep(20 * time.Millisecond) // now the body is waited for
				close(then)
				if got, end := talk(t, conn, "", headTimeout/2); got != c.got || end != c.end {
					t.Errorf("%q, %s", got, end)
				}
			})
		}
	}
}

// An answer in another protocol is not passed on, and the record says so.
func TestSwitched(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	serve(t, r, func(_ int, c *net.TCPConn, ask func() error) {
		if ask() == nil {
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nevil")
		}
	})
	if got, _ := talk(t, r.dial(false), askA, 5*time.Second); got != "" {
		t.Errorf("%q", got)
	}
	if ev := r.recorded(1)[0]; ev.Response.Failed != errSwitched.Error() {
		t.Errorf("%+v", ev.Response)
	}
}

// What cannot be read goes through a tunnel in audit mode. The service may answer and
// end while the client goes on sending: the answer arrives.
func TestTunnelAnswers(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	const no = "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno"
	serve(t, r, func(_ int, c *net.TCPConn, _ func() error) {
		b := make([]byte, 64<<10)
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		for {
			if _, err := c.Read(b); err != nil {
				break
			}
		}
		io.WriteString(c, no)
		c.Close()
	})
	for try := range 20 {
		c := r.dial(false)
		io.WriteString(c, "POST /latest/meta-data/x HTTP/1.1\r\n"+host+"Content-Length: 10000000\r\n\r\n")
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			b := make([]byte, 32<<10)
			for {
				if _, err := c.Write(b); err != nil {
					return
				}
				time.Sleep(2 * time.Millisecond)
			}
		}()
		c.SetReadDeadline(time.Now().Add(3 * time.Second))
		got, err := io.ReadAll(c)
		if string(got) != no {
			t.Errorf("%d: %q, %s", try, got, outcome(err))
		}
		c.Close()
		<-sent
	}
}

// Of an answer whose framing breaks nobody knows where it ends but by the end of the
// connection: no other answer follows it.
func TestNothingBehindBrokenChunks(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			const broken = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello\r\n"
			r := newRig(t, setting{policy: policy.Config{Mode: mode}, lab: netlab.Options{NoIMDS: true}})
			s := serve(t, r, func(n int, c *net.TCPConn, ask func() error) {
				if ask() != nil {
					return
				}
				answer := kept
				if n == 1 {
					answer = broken
				}
				io.WriteString(c, answer)
			})
			if got, end := talk(t, r.dial(false), askA+askB, 5*time.Second); got != broken || end != "FIN" || s.saw() != "1 GET /latest/meta-data/ami-id" {
				t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
			}
		})
	}
}

// Who is turned away while his request waits for the service has not met a service that
// cannot be reached.
func TestNoRoomBeforeSent(t *testing.T) {
	k := newSlowKernel(func(netip.Addr) bool { return true })
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, witness: k})
	t.Cleanup(k.all)
	lose := []string{"OUTPUT", "-d", "169.254.169.254", "-p", "tcp", "--syn", "-m", "mark", "--mark", "0x7fff0815", "-j", "DROP"}
	run(t, "iptables", append([]string{"-I"}, lose...)...)
	defer run(t, "iptables", append([]string{"-D"}, lose...)...)
	goOn := r.hold()
	c := r.dial(false)
	io.WriteString(c, askA) // is there when the connection is accepted
	goOn()
	until(t, "asked about", func() bool { return k.asked.Load() == 1 })
	r.proxy.mu.Lock()
	r.proxy.over = true // and so has no room for anybody
	r.proxy.mu.Unlock()
	k.all()
	if ev := r.recorded(1)[0]; ev.Response.Failed != "the proxy closed the connection" || r.proxy.Stats().UpstreamFailed.Load() != 0 {
		t.Errorf("%+v, and the service failed %d times", ev.Response, r.proxy.Stats().UpstreamFailed.Load())
	}
}

// A service that refuses a connection is the client's to see, also if it would take the
// next one: without us the client had none.
func TestRefusedOnce(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
	conn := r.dial(false)
	time.Sleep(20 * time.Millisecond) // now its session has seen that
	goOn := r.hold()
	s := serve(t, r, func(_ int, c *net.TCPConn, ask func() error) {
		if ask() == nil {
			io.WriteString(c, kept)
		}
	})
	io.WriteString(conn, askA)
	goOn()
	if got, end := talk(t, conn, "", 5*time.Second); got != "" || end != "RST" || s.saw() != "" {
		t.Errorf("%q, %s, and the service saw %q", got, end, s.saw())
	}
	if ev := r.recorded(1)[0]; ev.Response.Failed != "the service cannot be reached" {
		t.Errorf("%+v", ev.Response)
	}
}

// Requests that were sent one behind the other are answered before the end, each.
func TestEndAnswersPipelined(t *testing.T) {
	for _, end := range []struct {
		name string
		do   func(p *Proxy) error
	}{
		{"Shutdown", func(p *Proxy) error { return p.Shutdown(context.Background()) }},
		{"Drain", func(p *Proxy) error { return p.Drain(context.Background()) }},
	} {
		for _, apart := range []bool{false, true} {
			t.Run(end.name, func(t *testing.T) {
				r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}})
				asked, answer := make(chan struct{}, 2), make(chan struct{})
				defer close(answer)
				s := serve(t, r, func(n int, c *net.TCPConn, ask func() error) {
					for ask() == nil {
						asked <- struct{}{}
						<-answer
						io.WriteString(c, kept)
					}
				})
				conn := r.dial(false)
				first, then := askA+askB, ""
				if apart {
					first, then = askA, askB
				}
				io.WriteString(conn, first)
				until(t, "asked", func() bool { return len(asked) == 1 })
				<-asked
				io.WriteString(conn, then)
				done := make(chan error, 1)
				go func() { done <- end.do(r.proxy) }()
				until(t, "ending", func() bool { return r.proxy.closing.Load() || r.proxy.drained.Load() > 0 })
				answer <- struct{}{}
				select {
				case <-asked:
					answer <- struct{}{}
				case <-time.After(time.Second):
				}
				if got, end := talk(t, conn, "", 3*time.Second); got != kept+kept || end != "FIN" {
					t.Errorf("%q, %s, and the service saw %s", got, end, s.saw())
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		}
	}
}
