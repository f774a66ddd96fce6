package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/iptables"
)

const (
	// readAgain is for how long those who ask for the rules get what was read before. It
	// takes some processes each time, and nobody repairs the redirect meanwhile; and any
	// member of the group may ask as often as he likes.
	readAgain = time.Second
	// readTakes bounds one reading, whoever waits for it.
	readTakes = 30 * time.Second
)

// readings shares what is read of the rules between all who ask. Its methods may be
// called from any goroutine, read between begin and the end that this returns.
type readings struct {
	ctx     context.Context
	running sync.WaitGroup

	mu    sync.Mutex // guards the following
	last  *reading   // nil if there is none, or what it has read is no longer so
	ended bool
}

type reading struct {
	began  time.Time
	done   chan struct{} // closed when the following do not change any more
	report iptables.Report
	err    error
}

// fresh reports whether somebody who asks now may have it.
func (r *reading) fresh() bool {
	select {
	case <-r.done:
		return time.Since(r.began) < readAgain
	default:
		return true
	}
}

func (r *readings) begin() (end func()) {
	ctx, stop := context.WithCancel(context.Background())
	r.ctx = ctx
	return func() {
		r.mu.Lock()
		r.ended = true
		r.mu.Unlock()
		stop()
		r.running.Wait()
	}
}

// read returns what status has read, now or a moment ago.
func (r *readings) read(ctx context.Context, status func(context.Context) (iptables.Report, error)) (iptables.Report, error) {
	one := r.one(status)
	if one == nil {
		return iptables.Report{}, errors.New("read the rules: the daemon ends")
	}
	select {
	case <-one.done:
		return one.report, one.err
	case <-ctx.Done():
		return iptables.Report{}, ctx.Err()
	}
}

func (r *readings) one(status func(context.Context) (iptables.Report, error)) *reading {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return nil
	}
	if r.last == nil || !r.last.fresh() {
		one := &reading{began: time.Now(), done: make(chan struct{})}
		r.last = one
		r.running.Go(func() {
			defer close(one.done)
			ctx, cancel := context.WithTimeout(r.ctx, readTakes)
			defer cancel()
			one.report, one.err = status(ctx)
		})
	}
	return r.last
}

// forget has the next who asks get what is so then.
func (r *readings) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = nil
}
