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
			// Who waits half a second gets ten turns more; a busy machine sends for longer.
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

// Who leaves while his request waits for its turn has not asked: the service does not
// hear of it, and the record says so.
func TestLeavesBeforeTurn(t *testing.T) {
	const rate = 4 // and twice that at once
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, policy: policy.Config{Mode: mode}, rate: rate})
			c := r.dialAs(hoarder)
			for range 2 * rate {
				r.served("a client", c, keep)
			}
			c.SetLinger(0)
			if _, err := c.Write([]byte(keep)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond) // now it waits, for some 250
			c.Close()
			ev := r.recorded(2*rate + 1)[2*rate]
			if ev.Response.Failed != "the client left before it was sent" || ev.Response.Status != 0 {
				t.Errorf("%+v", ev.Response)
			}
			if n := strings.Count(strings.Join(r.received(), ""), "GET "); n != 2*rate {
				t.Errorf("the service got %d requests, want %d", n, 2*rate)
			}
		})
	}
}

// Callers are told apart, and those that have been quiet are forgotten.
func TestCallers(t *testing.T) {
	of := func(uid uint32, cgroup uint64) part { return part{owner{known: true, uid: uid}, cgroup} }
	if caller(of(0, 1)) == caller(of(0, 2)) || caller(of(1, 1)) != caller(of(1, 2)) || caller(of(1, 1)) == caller(of(2, 1)) {
		t.Error("a caller is taken for another")
	}
	p := pace{each: 1, burst: 1}
	for uid := range uint32(2*maxCallers + 1) {
		if wait, long := p.hold(of(uid, 0)); wait > 0 || long {
			t.Fatalf("user %d waits %v, %t", uid, wait, long)
		}
	}
	if len(p.callers) > maxCallers {
		t.Errorf("%d are remembered", len(p.callers))
	}
}

func BenchmarkHold(b *testing.B) {
	p := pace{each: 1e9, burst: 1e9}
	b.ReportAllocs()
	for b.Loop() {
		p.hold(part{owner: owner{known: true, uid: hoarder}})
	}
}
