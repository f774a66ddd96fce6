package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imdsgate/imdsgate/iptables"
)

// However many ask, the rules are read once in a while, and who leaves harms no other.
func TestReadings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r readings
		end := r.begin()
		var times atomic.Int32
		status := func(ctx context.Context) (iptables.Report, error) {
			times.Add(1)
			select {
			case <-time.After(300 * time.Millisecond):
				return iptables.Report{Version: "v1"}, nil
			case <-ctx.Done():
				return iptables.Report{}, ctx.Err()
			}
		}
		ask := func() {
			t.Helper()
			if report, err := r.read(t.Context(), status); err != nil || report.Version != "v1" {
				t.Errorf("%+v, %v", report, err)
			}
		}
		expect := func(when string, want int32) {
			t.Helper()
			if n := times.Swap(0); n != want {
				t.Errorf("%s: read %d times, want %d", when, n, want)
			}
		}
		gone, leave := context.WithCancel(t.Context())
		leave()
		if _, err := r.read(gone, status); !errors.Is(err, context.Canceled) {
			t.Errorf("who has left: %v", err)
		}
		var all sync.WaitGroup
		for range 10 {
			all.Go(ask)
		}
		all.Wait()
		ask()
		expect("at a time", 1)
		r.forget()
		ask()
		expect("after a change", 1)
		time.Sleep(readAgain)
		ask()
		expect("later", 1)

		r.forget()
		all.Go(func() {
			if _, err := r.read(t.Context(), status); !errors.Is(err, context.Canceled) {
				t.Errorf("at the end: %v", err)
			}
		})
		synctest.Wait()
		end()
		all.Wait()
		if _, err := r.read(t.Context(), status); err == nil {
			t.Error("after the end it is read")
		}
		expect("at the end", 1)
	})
}
