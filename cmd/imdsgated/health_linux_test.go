package main

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/imdsgate/imdsgate/proxy"
)

// The watchdog ends a daemon that hangs, and none that has much to do or no redirect.
func TestAlive(t *testing.T) {
	of := func(err error) error { return fmt.Errorf("self-test of x: %w", err) }
	for _, c := range []struct {
		tests  []error
		alive  bool
		failed bool
	}{
		{nil, true, false},
		{[]error{nil, of(syscall.EHOSTUNREACH)}, true, false},
		{[]error{nil, of(proxy.ErrNotRedirected)}, true, true},
		{[]error{of(proxy.ErrBusy), nil}, true, false},
		{[]error{of(proxy.ErrBusy), of(proxy.ErrBusy)}, true, false},
		{[]error{of(proxy.ErrBusy), of(proxy.ErrUnanswered)}, false, true},
		{[]error{nil, of(proxy.ErrStuck)}, false, true},
	} {
		if f := sum(c.tests); alive(f.failed) != c.alive || (f.failed != nil) != c.failed {
			t.Errorf("%v: %+v", errors.Join(c.tests...), f)
		}
	}
}
