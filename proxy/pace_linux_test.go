package proxy

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// A caller who asks without end waits for his turns, and is told to come later where
// that takes too long; nobody else waits.
func TestPaced(t *testing.T) {
	const rate, many = 20, 80 // and twice the rate at once
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: mode}, rate: rate})
			var all sync.WaitGroup
			answers := make(chan string, many)
			for range many {
				c := r.dialAs(hoarder)
				all.Go(func() {
					got, end := talk(t, c, ask, 5*time.Second)
					status, _, _ := strings.Cut(got, "\r\n")
					answers <- status + " " + end
				})
			}
			r.served("another user", r.dialAs(bystander), ask)
			all.Wait()
			close(answers)
			count := map[string]int{}
			for a := range answers {
				count[a]++
			}
			ok, later := count["HTTP/1.1 200 OK FIN"], count["HTTP/1.1 503 Service Unavailable FIN"]
			// Who waits gets some turns more; a busy machine sends for longer.
			wrong := ok != many || r.proxy.Stats().Throttled.Load() == 0
			if mode == policy.Enforce {
				wrong = ok < 2*rate || later == 0 || ok+later != many
			}
			if wrong {
				t.Errorf("%v", count)
			}
			throttled := 0
			for _, ev := range r.recorded(many + 1) {
				if ev.Response.Status == 503 && ev.Response.Refused && strings.Contains(ev.Response.Failed, "requests_per_second") {
					throttled++
				}
			}
			if seen := len(r.received()); throttled != later || seen != ok+1 {
				t.Errorf("%d of %d are recorded, and the service saw %d connections", throttled, later, seen)
			}
		})
	}
}

// burst1000 is more than a test asks.
func burst1000(p *pace) { p.burst = 1000 }

// indebted has a user have used up his budget for so many seconds, at one request a second.
func (r *rig) indebted(uid uint32, seconds float64) {
	p := &r.proxy.pace
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.of(part{owner: owner{known: true, uid: uid}})
	for l.Tokens() > -seconds {
		l.ReserveN(time.Now(), p.burst)
	}
}

// A session token is not waited for: who gets none asks by IMDSv1. It counts for what is
// asked next, and who asks for nothing else is not let go on for ever.
func TestTokensAreNotHeld(t *testing.T) {
	const put = "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: mode}, rate: 1,
				pace: func(p *pace) { p.burst, p.heldA, p.owed = 1000, time.Minute, time.Hour }})
			p := &r.proxy.pace
			tokens := func() {
				t.Helper()
				for range 8 {
					if got, end := talk(t, r.dialAs(hoarder), put, 5*time.Second); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") || end != "FIN" {
						t.Errorf("%q, %s", got, end)
					}
				}
			}
			tokens()
			p.mu.Lock()
			left := p.of(part{owner: owner{known: true, uid: hoarder}}).Tokens()
			p.mu.Unlock()
			if left > 996 {
				t.Errorf("%v of 1000 are left after 8 tokens", left)
			}
			r.indebted(hoarder, 1000)
			tokens()
			got, end := talk(t, r.dialAs(hoarder), ask, 100*time.Millisecond)
			if held := got == "" && end == "open"; mode == policy.Audit && !held || mode == policy.Enforce && !strings.HasPrefix(got, "HTTP/1.1 503 ") {
				t.Errorf("%q, %s: the test tests nothing", got, end)
			}
			r.indebted(hoarder, time.Hour.Seconds())
			want := "HTTP/1.1 200 OK\r\n"
			if mode == policy.Enforce {
				want = "HTTP/1.1 503 "
			}
			if got, end := talk(t, r.dialAs(hoarder), put, 5*time.Second); !strings.HasPrefix(got, want) || end != "FIN" {
				t.Errorf("far ahead: %q, %s", got, end)
			}
		})
	}
}

// Who may not ask is told so at once, whatever he has asked before.
func TestRefusedBeforePaced(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: policy.Enforce, Posture: policy.Strict}, rate: 1, pace: burst1000})
	r.indebted(hoarder, 1000)
	ask := "GET /latest/meta-data/iam/security-credentials/imdsgate-lab-role HTTP/1.1\r\n" + host + "\r\n"
	if got, end := talk(t, r.dialAs(hoarder), ask, 5*time.Second); !strings.HasPrefix(got, "HTTP/1.1 403 ") || end != "FIN" {
		t.Errorf("%q, %s", got, end)
	}
	if n := r.proxy.Stats().Throttled.Load(); n != 0 {
		t.Errorf("%d were throttled", n)
	}
}

// What audit mode adds is less than the least patient client waits.
func TestHeldInAudit(t *testing.T) {
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}, rate: 1, pace: burst1000})
	fastest := time.Hour
	for range 10 { // a busy machine takes longer now and then
		r.indebted(hoarder, 1000)
		c := r.dialAs(hoarder)
		begin := time.Now()
		r.served("a client", c, ask)
		fastest = min(fastest, time.Since(begin))
	}
	if fastest < heldForA || fastest >= 100*time.Millisecond {
		t.Errorf("it took %v", fastest)
	}
}

// Who leaves while his request waits for its turn has not asked: the service does not
// hear of it, and the record says so.
func TestLeavesBeforeTurn(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, policy: policy.Config{Mode: mode}, rate: 1,
				pace: func(p *pace) { p.burst, p.held, p.heldA = 10, time.Minute, time.Minute }})
			c := r.dialAs(hoarder)
			r.served("a client", c, keep)
			r.indebted(hoarder, 10)
			c.SetLinger(0)
			if _, err := c.Write([]byte(keep)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond) // now it waits, for some ten seconds
			c.Close()
			ev := r.recorded(2)[1]
			if ev.Response.Failed != "the client left before it was sent" || ev.Response.Status != 0 {
				t.Errorf("%+v", ev.Response)
			}
			if n := strings.Count(strings.Join(r.received(), ""), "GET "); n != 1 {
				t.Errorf("the service got %d requests, want 1", n)
			}
		})
	}
}

// Callers are told apart. Of those that are many, whoever has the least left is remembered.
func TestCallers(t *testing.T) {
	of := func(uid uint32, cgroup uint64) part { return part{owner{known: true, uid: uid}, cgroup} }
	if caller(of(0, 1)) == caller(of(0, 2)) || caller(of(1, 1)) != caller(of(1, 2)) || caller(of(1, 1)) == caller(of(2, 1)) {
		t.Error("a caller is taken for another")
	}
	p := pace{each: 0.01, burst: 4}
	for range p.burst {
		p.hold(of(hoarder, 0), 0)
	}
	for uid := range uint32(2*maxCallers + 1) {
		if wait, long := p.hold(of(2*hoarder+uid, 0), 0); wait > 0 || long {
			t.Fatalf("user %d waits %v, %t", uid, wait, long)
		}
		if len(p.callers) > maxCallers {
			t.Fatalf("%d are remembered", len(p.callers))
		}
	}
	if _, long := p.hold(of(hoarder, 0), 0); !long {
		t.Error("one whose budget is used up has a new one")
	}
}

func BenchmarkHold(b *testing.B) {
	p := pace{each: 1e9, burst: 1e9}
	b.ReportAllocs()
	for b.Loop() {
		p.hold(part{owner: owner{known: true, uid: hoarder}}, heldFor)
	}
}
