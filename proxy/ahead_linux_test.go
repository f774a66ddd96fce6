package proxy

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/loop"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// Connections that are ready are used once each, as many are made as are wanted, and
// what nobody uses ends.
func TestDialAhead(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: policy.Enforce}, ahead: 4})
	stats := r.proxy.Ahead()
	ready := func() int {
		r.proxy.ahead.mu.Lock()
		defer r.proxy.ahead.mu.Unlock()
		n := 0
		for _, s := range r.proxy.ahead.stocks {
			n += len(s.ready)
		}
		return n
	}
	for i := range 20 {
		if got, end := talk(t, r.dial(false), ask, 2*time.Second); !strings.HasPrefix(got, "HTTP/1.1 200") || end != "FIN" {
			t.Fatalf("%d: %q, %s", i, got, end)
		}
		r.settled()
	}
	if made, used := stats.Made.Load(), stats.Used.Load(); used < 15 || used > 19 || made-used > 4+stats.Unused.Load() {
		t.Errorf("%d were made, and %d used, of 20 requests", made, used)
	}
	if n := ready(); n != 1 {
		t.Errorf("%d are ready, want 1", n)
	}
	for end := time.Now().Add(5 * time.Second); ready() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("they are kept although nobody asks")
		}
	}
	if unused := stats.Made.Load() - stats.Used.Load() - stats.Unused.Load(); unused != 0 {
		t.Errorf("%d are unaccounted for", unused)
	}
}

// The service ends what is ready, in either way and at any moment. No client notices.
func TestAheadEnds(t *testing.T) {
	for _, how := range []string{"FIN", "RST", "FIN when asked", "RST when asked"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, ahead: 1})
			ended := make(chan struct{}, 16)
			s := serve(t, r, func(n int, c *net.TCPConn, asked func() error) {
				if n == 2 { // the first that is ready
					if strings.HasSuffix(how, "when asked") && asked() != nil {
						return
					}
					if strings.HasPrefix(how, "RST") {
						c.SetLinger(0)
					}
					c.Close()
					ended <- struct{}{}
					return
				}
				if asked() == nil {
					io.WriteString(c, strings.Replace(kept, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
				}
			})
			for i := range 2 {
				if i == 1 && !strings.HasSuffix(how, "when asked") {
					<-ended
					time.Sleep(10 * time.Millisecond)
				}
				if got, end := talk(t, r.dial(false), ask, 5*time.Second); !strings.HasSuffix(got, "ok") || end != "FIN" {
					t.Errorf("%d: %q, %s; the service saw %s", i, got, end, s.saw())
				}
				r.settled()
			}
			if used := r.proxy.Ahead().Used.Load(); used == 0 && strings.HasSuffix(how, "when asked") {
				t.Error("none was used: the test tests nothing")
			}
		})
	}
}

// The service ends what is ready when a client has it already, who has not asked yet and
// would not have had it without us. Nor does he notice when he asks for what cannot be read.
func TestAheadEndsUnasked(t *testing.T) {
	const riddle = "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "Upgrade: x\r\n\r\n"
	for _, c := range []struct{ name, ask string }{{"FIN", ask}, {"RST", ask}, {"RST when asked", riddle}} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, ahead: 1})
			end, ended := make(chan struct{}), make(chan struct{})
			s := serve(t, r, func(n int, conn *net.TCPConn, asked func() error) {
				if n == 2 { // which is ready
					if c.ask == riddle && asked() != nil {
						return
					}
					<-end
					if c.name != "FIN" {
						conn.SetLinger(0)
					}
					conn.Close()
					close(ended)
					return
				}
				if asked() == nil {
					io.WriteString(conn, strings.Replace(kept, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
				}
			})
			defer func() { // if it was not used
				select {
				case <-end:
				default:
					close(end)
				}
			}()
			if got, end := talk(t, r.dial(false), ask, 5*time.Second); !strings.HasSuffix(got, "ok") || end != "FIN" {
				t.Fatalf("%q, %s", got, end)
			}
			r.settled()
			conn := r.dial(false)
			until(t, "used", func() bool { return r.proxy.Ahead().Used.Load() == 1 })
			close(end)
			if c.ask != riddle {
				<-ended
				time.Sleep(2 * askedIn)
			}
			if got, end := talk(t, conn, c.ask, 5*time.Second); !strings.HasSuffix(got, "ok") || end != "FIN" {
				t.Errorf("%q, %s; the service saw %s", got, end, s.saw())
			}
		})
	}
}

// Forwarded clients get none of them, and neither does anybody while requests are
// counted.
func TestAheadIsNotFor(t *testing.T) {
	for _, s := range []setting{
		{lab: netlab.Options{IMDS: emulator(), Containers: true}, ahead: 4},
		{lab: netlab.Options{IMDS: emulator()}, ahead: 4, rate: 1000},
	} {
		t.Run(fmt.Sprintf("rate %d", s.rate), func(t *testing.T) {
			r := newRig(t, s)
			for range 3 {
				c := r.dial
				if s.lab.Containers {
					c = func(bool) *net.TCPConn { return r.dialFrom(r.lab.Bridged) }
				}
				if got, _ := talk(t, c(false), ask, 2*time.Second); !strings.HasPrefix(got, "HTTP/1.1 200") {
					t.Fatalf("%q", got)
				}
				r.settled()
			}
			if made := r.proxy.Ahead().Made.Load(); made != 0 {
				t.Errorf("%d were made", made)
			}
		})
	}
}

// All that is ready is dead, and only the first byte tells. No client notices, whether
// it may be asked twice or not.
func TestAheadAllDead(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		t.Run(method, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{NoIMDS: true}, ahead: 3})
			s := serve(t, r, func(n int, c *net.TCPConn, asked func() error) {
				if asked() != nil {
					return
				}
				if n >= 2 && n <= 4 {
					c.SetLinger(0)
					return
				}
				io.WriteString(c, strings.Replace(kept, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
			})
			ask := method + " /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"
			for i := range 2 {
				if got, end := talk(t, r.dial(false), ask, 5*time.Second); !strings.HasSuffix(got, "ok") || end != "FIN" {
					t.Errorf("%d: %q, %s; the service saw %s", i, got, end, s.saw())
				}
				r.settled()
				filled := make(chan struct{})
				r.loop().Start(func(k *loop.Task) {
					defer close(filled)
					dst := imds.Endpoints[0]
					r.proxy.ahead.mu.Lock()
					r.proxy.ahead.stock(dst).wanted = 3 * perReady
					r.proxy.ahead.mu.Unlock()
					r.proxy.ahead.fill(k, dst)
				})
				<-filled
			}
			if made := r.proxy.Ahead().Made.Load(); made < 3 {
				t.Errorf("%d were made: the test tests nothing", made)
			}
		})
	}
}
