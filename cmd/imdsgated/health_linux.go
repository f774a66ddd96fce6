package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy"
)

const (
	// testEvery is how long the way to the daemon can have been wrong before it is known,
	// while nothing else tells. More often costs ten packets on loopback each time.
	testEvery = 10 * time.Second
	// testFirst is how often it is tried until it has worked once: at boot there is no
	// route yet.
	testFirst = time.Second
	// dueIn is how soon it is tried after a change of the mode, of which something may be left to do.
	dueIn = 20 * time.Millisecond
)

// health is what the self-tests have found.
type health struct {
	due chan struct{} // the mode has changed, and what was found before says nothing

	mu      sync.Mutex // guards the following
	passed  time.Time  // the last time that each way to the daemon worked; zero before the first
	noRoute string     // why nothing can be said yet, or any more
	busy    string     // why nothing new can be said
	failure error      // why clients are not served as they should be
	failed  time.Time  // since when
}

// again has the test done soon.
func (h *health) again() {
	select {
	case h.due <- struct{}{}:
	default:
	}
}

// keepHealth tests what clients need, and tells systemd that the daemon lives as long as
// what answers them does (WatchdogSec= of systemd.service(5)). A redirect that is gone
// or a route that is not there is no reason to end a daemon, which would change neither.
func (d *daemon) keepHealth(ctx context.Context) {
	every := testEvery
	if within, err := sd.SdWatchdogEnabled(false); err == nil && within > 0 {
		every = min(every, within/3)
	}
	for next := time.NewTimer(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		case <-d.health.due:
			next.Reset(dueIn)
			continue
		}
		err := d.selfTest(ctx)
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) { // it drains
			return
		}
		if alive(err) {
			sd.SdNotify(false, sd.SdNotifyWatchdog)
		}
		d.health.mu.Lock()
		first := d.health.passed.IsZero()
		d.health.mu.Unlock()
		if first {
			next.Reset(min(every, testFirst))
		} else {
			next.Reset(every)
		}
	}
}

// alive reports whether what a self-test has found leaves the daemon to go on: whatever
// it says of the redirect, somebody is served.
func alive(err error) bool {
	return !errors.Is(err, proxy.ErrStuck) && !errors.Is(err, proxy.ErrUnanswered)
}

// found is what self-tests have found.
type found struct {
	passed                    int
	failed, unreachable, busy error
}

func sum(tests []error) (f found) {
	for _, err := range tests {
		switch {
		case err == nil:
			f.passed++
		case errors.Is(err, proxy.ErrBusy):
			f.busy = err
		case withoutRoute(err):
			f.unreachable = err
		default:
			f.failed = errors.Join(f.failed, err)
		}
	}
	return f
}

// selfTest tests each way that the redirect takes, once, and tells what has changed.
func (d *daemon) selfTest(ctx context.Context) error {
	if !d.modes.changing.TryLock() { // a change of the mode takes the redirect away, or makes it anew
		d.health.again()
		return d.proxy.Turns(ctx)
	}
	defer d.modes.changing.Unlock()
	ways := d.tested()
	tests := make([]error, len(ways))
	var all sync.WaitGroup
	for i, endpoint := range ways { // at once: each may take seconds, of the few that the watchdog has
		all.Go(func() { tests[i] = d.proxy.SelfTest(ctx, endpoint) })
	}
	all.Wait()
	f := sum(tests)
	passed, failed, unreachable := f.passed, f.failed, f.unreachable
	if passed == 0 && failed == nil {
		failed = d.proxy.Turns(ctx) // of which no route says nothing
	}
	if ctx.Err() != nil || errors.Is(failed, net.ErrClosed) {
		return failed
	}
	h := &d.health
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy = ""; failed == nil && f.busy != nil {
		h.busy, h.noRoute = f.busy.Error(), ""
		return nil
	}
	was, first := h.failure, h.passed.IsZero()
	h.failure, h.noRoute = failed, ""
	switch {
	case failed != nil:
		if was == nil {
			h.failed = time.Now()
			d.log.Error().Err(failed).Msg("clients are not served as they should be")
			d.integrity("self-test-failed", "a request of our own to the metadata service did not come here, or got no answer", failed)
		}
	case unreachable != nil && passed == 0:
		h.noRoute = unreachable.Error()
	case passed == 0:
		h.noRoute = "no traffic is led here"
	default:
		if first || was != nil {
			d.log.Info().Int("ways", passed).Msg("a request of our own to the metadata service came here")
			ev := d.changed(event.State{Action: "self-test-passed", Type: "info", Message: "a request of our own to the metadata service came here and was answered"}, nil)
			if was != nil {
				ev.Duration = time.Since(h.failed)
			}
			d.record(ev)
		}
		h.passed = time.Now()
	}
	return failed
}

// tested are the endpoints that clients of this host reach through us.
func (d *daemon) tested() (ways []netip.AddrPort) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.engine.Mode() == policy.Off {
		return nil
	}
	for _, e := range d.rules.Endpoints {
		if d.taken[e.Addr().Is4()] {
			ways = append(ways, e)
		}
	}
	return ways
}

// withoutRoute reports whether this host cannot send anything there: the packets did not
// even get as far as the redirect.
func withoutRoute(err error) bool {
	for _, e := range []error{syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN, syscall.EADDRNOTAVAIL, syscall.EACCES, syscall.EINVAL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (d *daemon) healthNow() report.SelfTest {
	h := &d.health
	h.mu.Lock()
	defer h.mu.Unlock()
	r := report.SelfTest{NoRoute: h.noRoute, Busy: h.busy}
	if !h.passed.IsZero() {
		passed := h.passed
		r.Passed = &passed
	}
	if h.failure != nil {
		r.Error = h.failure.Error()
	}
	return r
}
