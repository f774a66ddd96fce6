package proxy

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// A self-test tells whether clients come here, and the service hears nothing of it.
func TestSelfTest(t *testing.T) {
	r := newRig(t, setting{})
	for _, endpoint := range imds.Endpoints[:2] {
		if err := r.proxy.SelfTest(context.Background(), endpoint); err != nil {
			t.Error(err)
		}
	}
	if got := r.received(); len(got) != 0 {
		t.Errorf("the service got %q", got)
	}
	r.proxy.selfTests.mu.Lock()
	left := len(r.proxy.selfTests.open)
	r.proxy.selfTests.mu.Unlock()
	if n := r.proxy.Stats().Connections.Load(); n != 0 || left != 0 {
		t.Errorf("%d connections were counted, %d tests are left", n, left)
	}
	// Who asks as it does is a client.
	const ask = "GET /3VJ2PBTQWJMHVT5SZ7G5DLXWSA HTTP/1.1\r\nHost: imdsgate\r\nConnection: close\r\n\r\n"
	if got, _ := talk(t, r.dial(false), ask, time.Second); !strings.HasPrefix(got, "HTTP/1.1 404") {
		t.Errorf("a client got %q", got)
	}
	if got := r.received(); len(got) != 1 || got[0] != ask {
		t.Errorf("the service got %q", got)
	}
	r.recorded(1)

	run(t, "iptables", "-t", "nat", "-F", "OUTPUT")
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); !errors.Is(err, ErrNotRedirected) {
		t.Errorf("without the redirect: %v", err)
	}
	run(t, "iptables", "-A", "OUTPUT", "-d", "169.254.169.254", "-j", "DROP")
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("where packets are dropped: %v", err)
	}
	run(t, "iptables", "-F", "OUTPUT")
	run(t, "ip", "route", "replace", "unreachable", "169.254.169.254")
	defer run(t, "ip", "route", "del", "unreachable", "169.254.169.254")
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("without a route: %v", err)
	}
}

// A loop that does nothing is told from everything else, in bounded time.
func TestStuck(t *testing.T) {
	r := newRig(t, setting{})
	if err := r.proxy.Turns(context.Background()); err != nil {
		t.Error(err)
	}
	hold := make(chan struct{})
	r.proxy.loop.Start(func(*loop.Task) { <-hold })
	begin := time.Now()
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); !errors.Is(err, ErrStuck) {
		t.Error(err)
	}
	if took := time.Since(begin); took > 2*(selfTestIn+stuckAfter) {
		t.Errorf("it took %v", took)
	}
	if err := r.proxy.Turns(context.Background()); !errors.Is(err, ErrStuck) {
		t.Error(err)
	}
	close(hold)
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); err != nil {
		t.Error(err)
	}
}

// A self-test that waits behind others is told from one that nobody accepts.
func TestBusyIsNotStuck(t *testing.T) {
	k := newSlowKernel(func(a netip.Addr) bool { return a.Is4() })
	r := newRig(t, setting{witness: k})
	t.Cleanup(k.all)
	for range maxArriving + 128 { // the first of which leave no place to arrive
		r.dial(false)
	}
	r.dialTo("[fd00:ec2::254]:80", false)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for tick := time.NewTicker(100 * time.Millisecond); ; {
			select {
			case <-tick.C:
				k.goOn <- struct{}{} // and one is accepted
			case <-ctx.Done():
				return
			}
		}
	}()
	err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0])
	stop()
	<-done
	if !errors.Is(err, ErrBusy) || errors.Is(err, ErrUnanswered) {
		t.Errorf("behind others: %v", err)
	}
	time.Sleep(50 * time.Millisecond) // the last one is accepted
	other := make(chan struct{})
	go func() {
		defer close(other)
		for range 10 {
			time.Sleep(100 * time.Millisecond)
			r.proxy.acceptedOver(imds.Endpoints[1]).Add(1)
		}
	}()
	if err := r.proxy.SelfTest(context.Background(), imds.Endpoints[0]); !errors.Is(err, ErrUnanswered) {
		t.Errorf("where nobody is accepted: %v", err)
	}
	<-other
	k.all()
	until(t, "accepted", func() bool { return r.proxy.SelfTest(context.Background(), imds.Endpoints[0]) == nil })
}
