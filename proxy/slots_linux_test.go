package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/proxy/loop"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	hoarder   = 1001
	bystander = 1002

	ask  = "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n"
	keep = "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "Connection: keep-alive\r\n\r\n"
	// ignored is a request that the service of hoarded does not answer.
	ignored = "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "\r\n"
)

// hoarded is a service with what a hoarder needs: something that is never
// answered, and an answer that is larger than any socket buffer.
func hoarded() *imdstest.Config {
	cfg := emulator()
	cfg.NoTranscript = true
	cfg.Data = map[string]string{"meta-data/hostname": strings.Repeat("x", 2<<20)}
	cfg.Fault = func(q *imdstest.Request) imdstest.Fault {
		if strings.Contains(q.Target, "ami-id") {
			return imdstest.Fault{Outcome: imdstest.Silence}
		}
		return imdstest.Fault{}
	}
	return cfg
}

// hoards are the ways to keep a connection for long that cost a client nothing.
var hoards = []struct {
	name string
	do   func(c *net.TCPConn)
}{
	{"idle", func(*net.TCPConn) {}},
	{"half a head", func(c *net.TCPConn) { c.Write([]byte("GET /latest/meta-data/ HTTP/1.1\r\nX: ")) }},
	{"half a body", func(c *net.TCPConn) {
		c.Write([]byte(expecting + "Transfer-Encoding: chunked\r\n\r\n"))
		c.Read(make([]byte, 100))
		c.Write([]byte("0\r"))
	}},
	{"no body", func(c *net.TCPConn) { c.Write([]byte(expecting + "Transfer-Encoding: chunked\r\n\r\n")) }},
	{"an answer that is not read", func(c *net.TCPConn) {
		c.SetReadBuffer(4096)
		c.Write([]byte("GET /latest/meta-data/hostname HTTP/1.1\r\n" + host + "\r\n"))
	}},
	{"an answer that does not come", func(c *net.TCPConn) { c.Write([]byte(ignored)) }},
	{"half-closed", func(c *net.TCPConn) {
		c.Write([]byte(ignored))
		c.CloseWrite()
	}},
	{"no HTTP", func(c *net.TCPConn) { c.Write([]byte("\x16\x03\x01\n")) }},
}

// served asks and wants an answer within a second.
func (r *rig) served(who string, c *net.TCPConn, ask string) {
	r.t.Helper()
	begin := time.Now()
	c.SetDeadline(begin.Add(3 * time.Second)) // who holds others up does it for minutes
	buf := make([]byte, 4096)
	if _, err := c.Write([]byte(ask)); err != nil {
		r.t.Errorf("%s: %v", who, err)
	}
	n, err := c.Read(buf)
	if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 200 ") {
		r.t.Errorf("%s, after %v: %q, %v", who, time.Since(begin), buf[:n], err)
	}
}

// full waits until the slots are full and those who had to go have gone, however
// busy they were.
func (r *rig) full(h *slots) {
	r.t.Helper()
	end := time.Now().Add(time.Second)
	for ; ; time.Sleep(time.Millisecond) {
		r.proxy.mu.Lock()
		open, arriving := h.taken(), h.arriving
		r.proxy.mu.Unlock()
		if open == h.limit && arriving == 0 {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("%d of %d slots are taken, and %d connections without one have not ended", open, h.limit, arriving)
		}
	}
}

// Who hoards connections, in whatever state, takes them from himself.
func TestHoarders(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		for _, c := range hoards {
			if c.name == "no HTTP" && mode == policy.Enforce {
				continue // refused at once
			}
			t.Run(mode.String()+" "+c.name, func(t *testing.T) {
				r := newRig(t, setting{lab: netlab.Options{IMDS: hoarded()}, policy: policy.Config{Mode: mode}, conns: 16})
				kept := r.dialAs(bystander)
				r.served("a client that was there before", kept, keep)
				for range 24 {
					c.do(r.dialAs(hoarder))
				}
				r.full(r.proxy.local)
				r.served("the same, again", kept, keep)
				r.served("another user", r.dialAs(bystander), ask)
				r.served("root", r.dial(false), ask)
				// It may still be found out whose some of the 24 are.
				evicted := &r.proxy.Stats().Evicted
				for end := time.Now().Add(time.Second); evicted.Load() < 24-12; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("%d were evicted", evicted.Load())
					}
				}

				// Nor does he hold up the end.
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				defer cancel()
				begin := time.Now()
				r.proxy.Shutdown(ctx)
				if took := time.Since(begin); took > time.Second {
					t.Errorf("shut down after %v", took)
				}
			})
		}
	}
}

// A hoarder that never stops coming holds up nobody either.
func TestHoarderThatKeepsComing(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: hoarded()}, policy: policy.Config{Mode: policy.Enforce}, conns: 16})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			c := r.dialAs(hoarder)
			c.Write([]byte(ignored))
			time.AfterFunc(200*time.Millisecond, func() { c.Close() })
		}
	}()
	for range 20 {
		time.Sleep(10 * time.Millisecond)
		r.served("another user", r.dialAs(bystander), ask)
	}
	stop()
	<-done
	if r.proxy.Stats().Evicted.Load() == 0 {
		t.Error("there was room for all, so nothing was tried")
	}
}

// A user who needs more than there is loses his own: idle ones first, and nothing
// that is in use while there are such.
func TestMoreClientsThanSlots(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: hoarded()}, conns: 16})
	first := r.dial(false)
	r.served("the first", first, keep)
	busy := r.dial(false)
	busy.Write([]byte(ignored))
	for range 9 {
		r.dial(false)
	}
	time.Sleep(2 * grace)
	r.served("the first, again", first, keep)
	for range 3 { // the slots are full with the first of them
		r.served("one more", r.dial(false), keep)
	}
	r.full(r.proxy.local)
	r.served("the first, which was not idle for longest", first, keep)
	if _, end := talk(t, busy, "", 100*time.Millisecond); end != "open" {
		t.Errorf("one in use ended with %s while others were idle", end)
	}
	if n := r.proxy.Stats().Evicted.Load(); n != 2 {
		t.Errorf("%d were evicted, want 2", n)
	}
}

// Of the user with the most, the cgroup with the most loses; of that, what is idle, and
// for longest.
func TestLast(t *testing.T) {
	h := newSlots(64)
	n := 0
	add := func(uid uint32, cgroup uint64, busy bool) *session {
		n++
		s := &session{accepted: start.Add(time.Duration(n)), slots: h}
		s.busy.Store(busy)
		s.idle.Store(int64(n) - int64(time.Hour))
		h.add(s, part{owner{known: true, uid: uid}, cgroup})
		return s
	}
	one, other := uint64(1), uint64(2)
	for range 4 {
		add(bystander, one, false)
	}
	var want []*session
	busy := []*session{add(hoarder, other, true), add(hoarder, other, true)}
	for range 3 {
		want = append(want, add(hoarder, other, false))
	}
	want = append(want, busy...)
	add(hoarder, one, false)
	for i, w := range want[:2] { // 6 of the hoarder's, then 5
		got := h.last()
		if got != w {
			t.Fatalf("%d: %+v, want %+v", i, got, w)
		}
		h.remove(got) // and it has not ended
	}
	add(hoarder, other, true)
	if got := h.last(); got != want[2] {
		t.Errorf("%+v, want the idle one of the larger cgroup", got)
	}
}

// A part of the slots is not taken from root, though nobody has more.
func TestReserve(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: hoarded()}, conns: 64})
	for _, mine := range []int{r.proxy.local.limit / reserve, r.proxy.local.limit/reserve + 1} {
		before := r.proxy.Stats().Evicted.Load()
		var kept []*net.TCPConn
		for range mine {
			c := r.dial(false)
			r.served("root", c, keep)
			kept = append(kept, c)
		}
		time.Sleep(2 * grace) // they are idle, and what comes is not
		var others []*net.TCPConn
		for i := range r.proxy.local.limit {
			c := r.dialAs(hoarder + i%12)
			c.Write([]byte(ignored))
			others = append(others, c)
		}
		r.full(r.proxy.local)
		lost := 0
		for _, c := range kept {
			if _, end := talk(t, c, "", 100*time.Millisecond); end != "open" {
				lost++
			}
			c.Close()
		}
		if evicted := r.proxy.Stats().Evicted.Load() - before; lost > 0 != (mine > r.proxy.local.limit/reserve) || evicted == 0 {
			t.Errorf("root lost %d of %d, of %d that were evicted", lost, mine, evicted)
		}
		for _, c := range others {
			c.Close()
		}
		r.settled()
	}
}

// In audit mode a connection waits for room before another is broken off for it.
func TestRoomIsAwaited(t *testing.T) {
	awaited := false
	for try := 0; try < 10 && !awaited; try++ { // a busy machine may take longer than is waited
		t.Run("", func(t *testing.T) {
			cfg := emulator()
			cfg.Fault = func(*imdstest.Request) imdstest.Fault { return imdstest.Fault{Delay: roomFor / 2} }
			r := newRig(t, setting{lab: netlab.Options{IMDS: cfg}, conns: 16})
			var all []*net.TCPConn
			for range r.proxy.local.limit + 4 {
				c := r.dialAs(hoarder)
				c.Write([]byte(ask))
				all = append(all, c)
			}
			answered := 0
			for _, c := range all {
				if got, end := talk(t, c, "", 5*time.Second); strings.HasPrefix(got, "HTTP/1.1 200 ") && end == "FIN" {
					answered++
				}
			}
			awaited = answered == len(all) && r.proxy.Stats().Evicted.Load() == 0
			t.Logf("%d of %d answered, %d evicted", answered, len(all), r.proxy.Stats().Evicted.Load())
		})
	}
	if !awaited {
		t.Error("somebody was broken off each time")
	}
}

// Containers and the host have slots of their own, and containers each other's
// only as far as they leave some.
func TestForwardedHoarders(t *testing.T) {
	cfg := hoarded()
	cfg.HopLimit = 64
	r := newRig(t, setting{lab: netlab.Options{IMDS: cfg, Containers: true}, conns: 16})
	r.served("a container", r.dialFrom(r.lab.Bridged), ask)
	for range 20 {
		r.dialFrom(r.lab.Bridged).Write([]byte(ignored))
	}
	r.full(r.proxy.forwarded)
	r.served("the host, beside a container that hoards", r.dial(false), ask)
	r.served("another container", r.dialFrom(r.lab.Routed), ask)
	if r.proxy.forwarded.limit != 4 || r.proxy.local.limit != 12 {
		t.Errorf("%d slots for containers and %d for the host", r.proxy.forwarded.limit, r.proxy.local.limit)
	}
	for range 24 {
		r.dialAs(hoarder).Write([]byte(ignored))
	}
	r.full(r.proxy.local)
	r.served("a container, beside a user who hoards", r.dialFrom(r.lab.Routed), ask)
}

// A container about whose clients the kernel takes long to tell holds up no other one, nor
// those of its own clients that have to go.
func TestForwardedSlowly(t *testing.T) {
	for name, conns := range map[string]int{"room for all": 0, "little room": 16} {
		for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
			t.Run(name+" "+mode.String(), func(t *testing.T) {
				bridged := netip.MustParseAddr("172.17.0.2")
				k := newSlowKernel(func(a netip.Addr) bool { return a == bridged })
				cfg := emulator()
				cfg.HopLimit = 64
				r := newRig(t, setting{lab: netlab.Options{IMDS: cfg, Containers: true}, conns: conns, witness: k, policy: policy.Config{Mode: mode}})
				t.Cleanup(k.all)
				for range maxArriving + 64 {
					r.dialFrom(r.lab.Bridged)
				}
				h := r.proxy.forwarded
				until(t, "settled", func() bool {
					r.proxy.mu.Lock()
					defer r.proxy.mu.Unlock()
					return h.taken() == min(h.limit, maxArriving+64) && h.arriving <= maxTurns
				})
				begin := time.Now()
				r.served("another container", r.dialFrom(r.lab.Routed), ask)
				if took := time.Since(begin); took > time.Second {
					t.Errorf("it took %v", took)
				}
				if n := k.most.Load(); n > maxTurns {
					t.Errorf("the kernel was asked about %d at a time", n)
				}
				k.all()
				c := r.dialFrom(r.lab.Bridged)
				r.served("the container, when it is told of again", c, keep)
				turns := make(chan int)
				until(t, "given back by all", func() bool {
					r.loop().Start(func(*loop.Task) { turns <- len(r.proxy.turns.taken) + len(r.proxy.turns.waiting) })
					return <-turns == 0
				})
			})
		}
	}
}

// One owner's connections that are slow to end in the middle are not many: then a new one
// of his goes instead, and another owner's does not. It takes long to end, too, while it is
// found out who asks.
func TestSlowToEnd(t *testing.T) {
	for name, slow := range map[string]func(*session){
		"asked": func(s *session) { s.busy.Store(true) },
		"being asked about": func(s *session) {
			s.asking.Store(true)
			s.idle.Store(int64(time.Since(start) - 2*grace))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, setting{policy: policy.Config{Mode: policy.Enforce}, conns: 256})
			p, h := r.proxy, r.proxy.local
			var all []*session
			come := func(uid uint32) bool {
				s := &session{p: p, slots: h, accepted: time.Now()}
				s.task, _ = r.loop().Start(func(*loop.Task) {})
				slow(s)
				all = append(all, s)
				p.arrive(s)
				return p.admit(s, part{owner: owner{known: true, uid: uid}})
			}
			for n := range h.limit + maxEnding {
				if !come(hoarder) {
					t.Fatalf("%d has no room", n)
				}
			}
			for range 2 {
				if come(hoarder) {
					t.Error("one more of his has ended in the middle")
				}
			}
			if !come(bystander) {
				t.Error("there is no room for another owner")
			}
			for _, s := range all {
				p.leave(s)
			}
			if len(h.ending) != 0 {
				t.Errorf("left: %v", h.ending)
			}
		})
	}
}

// Clients that have left while others were asked about are not asked about, and those that
// may have left not before who has not.
func TestForwardedWhoLeft(t *testing.T) {
	k := newSlowKernel(func(netip.Addr) bool { return true })
	cfg := emulator()
	cfg.HopLimit = 64
	r := newRig(t, setting{lab: netlab.Options{IMDS: cfg, Containers: true}, witness: k, half: 3 * time.Second})
	t.Cleanup(k.all)
	waiting := func() (clients []netip.AddrPort) {
		t.Helper()
		r.each(func(s *session) {
			if slices.Contains(r.proxy.turns.waiting, s) {
				clients = append(clients, s.conn.Source)
			}
		})
		return clients
	}
	near := func(c *net.TCPConn) netip.AddrPort { return unmap(c.LocalAddr().(*net.TCPAddr).AddrPort()) }
	for range maxTurns {
		r.dialFrom(r.lab.Bridged)
	}
	until(t, "asked about", func() bool { return k.asked.Load() == maxTurns })
	silent, gone := r.dialFrom(r.lab.Bridged), r.dialFrom(r.lab.Bridged)
	mayHaveLeft, stays := r.dialFrom(r.lab.Bridged), r.dialFrom(r.lab.Bridged)
	io.WriteString(mayHaveLeft, ask)
	io.WriteString(stays, ask)
	until(t, "all waiting", func() bool { return len(waiting()) == 4 })
	silent.Close()
	gone.SetLinger(0)
	gone.Close()
	mayHaveLeft.CloseWrite()
	until(t, "two waiting", func() bool { return len(waiting()) == 2 })
	k.goOn <- struct{}{}
	until(t, "one waiting", func() bool { return len(waiting()) == 1 })
	if left := waiting(); len(left) == 1 && left[0] != near(mayHaveLeft) {
		t.Error("who may have left is asked about first")
	}
	until(t, "none waiting", func() bool { return len(waiting()) == 0 })
	mayHaveLeft.SetReadDeadline(time.Now().Add(5 * time.Second))
	if got, err := io.ReadAll(mayHaveLeft); len(got) > 0 || outcome(err) != "RST" {
		t.Errorf("who may have left: %q, %s", got, outcome(err))
	}
	k.all()
	if got, end := talk(t, stays, "", 5*time.Second); !strings.HasPrefix(got, "HTTP/1.1 200 ") || end != "FIN" {
		t.Errorf("who has not: %q, %s", got, end)
	}
}

func TestForwardedOwner(t *testing.T) {
	of := func(s string) owner { return forwardedOwner(netip.MustParseAddr(s)) }
	if of("fd00::1") != of("fd00::2:3:4:5") || of("fd00::1") == of("fd00:0:0:1::1") || of("10.0.0.1") == of("10.0.0.2") ||
		of("0.0.0.0") == (owner{}) {
		t.Error("an address is taken for another, or two of one network are not")
	}
}

// A service that is silent, and a client that does not read, keep a connection for
// so long and no longer, though the other is there.
func TestSilence(t *testing.T) {
	for _, c := range hoards {
		if c.name == "half a head" || c.name == "half a body" || c.name == "no body" {
			continue // headTimeout is for these
		}
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: hoarded()}, silence: 300 * time.Millisecond})
			conn := r.dialAs(hoarder)
			c.do(conn)
			for end := time.Now().Add(5 * time.Second); r.proxy.Open() == 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the connection did not come")
				}
			}
			r.settled()
		})
	}
}

// In audit mode nobody waits for the record of what could not be read, and the
// record does not wait for the end of the tunnel.
func TestRiddleIsNotHeldUp(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	r.mu.Lock() // the record takes long
	r.served("a client", r.dial(false), strings.Replace(keep, "\r\n\r\n", "\r\nUpgrade: x\r\n\r\n", 1))
	r.mu.Unlock()
	if ev := r.recorded(1)[0]; ev.Request.Malformed == "" {
		t.Errorf("recorded %+v", ev.Request)
	}
	if r.proxy.Open() != 1 {
		t.Error("the tunnel has ended, so nothing was tried")
	}
}

// Events that wait for their evidence are bounded; those beyond are recorded with
// what is known.
func TestTooMuchEvidence(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, conns: 4})
	for range cap(r.proxy.evidence) {
		r.proxy.evidence <- struct{}{}
	}
	r.served("a client", r.dial(false), "GET /latest/meta-data/iam/security-credentials/imdsgate-lab-role HTTP/1.1\r\n"+host+"\r\n")
	r.served("a riddle", r.dial(false), "GET /latest/meta-data/instance-id HTTP/1.1\r\n"+host+"Upgrade: x\r\n\r\n")
	for _, ev := range r.recorded(2) {
		if ev.Decision.Verdict != event.Allow || ev.Attribution.Complete {
			t.Errorf("recorded %+v %+v", ev.Decision, ev.Attribution)
		}
	}
}

// BenchmarkLast is what a new connection costs when the slots are full of one
// user's that are all busy.
func BenchmarkLast(b *testing.B) {
	h := newSlots(3072)
	for range 3072 {
		s := &session{accepted: time.Now()}
		s.busy.Store(true)
		h.add(s, part{owner: owner{known: true, uid: hoarder}})
	}
	b.ReportAllocs()
	for b.Loop() {
		if h.last() == nil {
			b.Fatal()
		}
	}
}
