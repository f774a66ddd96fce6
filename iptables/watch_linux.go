package iptables

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// A Drift is a time, or several, during which the host was not as planned, or what leads from here to the service was
// changed.
type Drift struct {
	Found    []Difference  // of the last time
	By       []Writer      // who has changed rules meanwhile, as far as the kernel has told; not who sent the packets
	Times    int           // how often; more than one where not each could be told by itself
	AtMost   time.Duration // all together, since the kernel told of the change, or else since it was last seen to be right
	Repaired int           // how many of them
	Err      error         // why the last was not repaired, or why the host could not be read
	Report   Report        // Locks: a rule of somebody else's that appeared is respected, and its hook given back
	Contest  Contest       // as it is now

	waiting bool // for a lock to last

	Evasions      []Evasion // that have appeared
	Before, After []Way     // that have changed
}

const (
	// DefaultInterval is for Watch. Where changes are notified it is for what nobody notifies, and for rules lost in a
	// notification that the kernel dropped. Shorter costs 50 ms of one core each time.
	DefaultInterval = 15 * time.Second

	// quiet is how long nothing must change before a look, so that a program that rewrites its rules in steps is not
	// looked at in between; but a stream of changes is looked at after mostDelay.
	quiet     = 50 * time.Millisecond
	mostDelay = 250 * time.Millisecond

	// Drifts are told one by one at first, and then together once in tellEvery, so that who makes them does not fill
	// the log.
	tellAtOnce = 10
	tellEvery  = time.Minute
	maxTold    = 16 // evasions and ways in one
)

// An Observer hears what Watch finds.
type Observer struct {
	// Wrote is told at once of each who changes rules of nftables, from a goroutine of its own: most of them live for
	// some milliseconds only. It may be nil.
	Wrote func(Writer)
	// Looked is told of each look, from the goroutine of Watch. It may be nil.
	Looked func(Drift)
	// Tell is for people: as often as tellEvery allows, several drifts in one, from the goroutine of Watch.
	Tell func(Drift)
}

// Watch keeps the plan true until ctx ends: it looks at once, then when the kernel notifies a change of rules, of our
// link, of routes or of filters, and every interval (0 means DefaultInterval). Changes of legacy rules, which are not
// notified, are asked for. What differs is repaired, and said to o; its own repairs are not.
//
// To who changes the rules again and again Watch does not give in, but looks less and less often: see Contest.
func (r *Redirect) Watch(ctx context.Context, interval time.Duration, o Observer) error {
	if interval == 0 {
		interval = DefaultInterval
	}
	if o.Wrote == nil {
		o.Wrote = func(Writer) {}
	}
	changed := make(chan struct{}, 1)
	var readers sync.WaitGroup
	defer readers.Wait()
	subscriptions, err := r.subscribe(o.Wrote)
	if err != nil {
		return err
	}
	for _, s := range subscriptions {
		defer s.socket.Close()
		readers.Go(func() { s.listen(changed) })
	}
	if r.use.backend == BackendLegacy {
		legacy, err := openLegacyPoll()
		if err != nil {
			return err
		}
		var polls sync.WaitGroup
		ended := make(chan struct{})
		polls.Go(func() { legacy.run(changed, ended) })
		defer legacy.close()
		defer polls.Wait()
		defer close(ended)
	}

	r.setPatient(true)
	defer r.setPatient(false)
	timer := time.NewTicker(interval)
	defer timer.Stop()
	telling := rate.NewLimiter(rate.Every(tellEvery), tellAtOnce)
	right := time.Now()
	var pace pace
	var untold *Drift
	defer func() {
		if untold != nil {
			o.Tell(*untold)
		}
	}()
	for {
		began := time.Now()
		d, drifted := r.look(ctx, &right)
		if ctx.Err() != nil {
			return nil
		}
		if o.Looked != nil {
			o.Looked(d)
		}
		if drifted {
			untold = d.after(untold)
		}
		if untold != nil && telling.Allow() {
			o.Tell(*untold)
			untold = nil
		}
		if !sleep(ctx, max(pace.after(time.Now(), time.Since(began)), r.Contest().Gap)) {
			return nil
		}
		var again <-chan time.Time
		switch {
		case d.Err != nil:
			again = time.After(max(minBackOff, r.Contest().Gap))
		case d.waiting:
			again = time.After(lockLasts)
		case untold != nil:
			again = time.After(tellEvery)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-again:
		case <-changed:
			settled := time.Now().Add(mostDelay)
			for waiting := true; waiting && time.Now().Before(settled); {
				select {
				case <-changed:
				case <-time.After(quiet):
					waiting = false
				}
			}
		}
	}
}

// after is d with what was not told before it.
func (d Drift) after(untold *Drift) *Drift {
	if u := untold; u != nil {
		d.Times, d.Repaired, d.AtMost = d.Times+u.Times, d.Repaired+u.Repaired, d.AtMost+u.AtMost
		for _, w := range u.By {
			if len(d.By) < maxWriters && !slices.Contains(d.By, w) {
				d.By = append(d.By, w)
			}
		}
		if len(d.Found) == 0 {
			d.Found = u.Found
		}
		join := func(a, b []Way) []Way { return slices.Concat(a, b)[:min(len(a)+len(b), maxTold)] }
		d.Before, d.After = join(u.Before, d.Before), join(u.After, d.After)
		all := slices.Concat(u.Evasions, d.Evasions)
		d.Evasions = all[:min(len(all), maxTold)]
	}
	return &d
}

// Contest is what goes on now, or nothing. It waits for nobody.
func (r *Redirect) Contest() Contest {
	if c := r.contest.Load(); c != nil && !c.over(time.Now()) {
		return *c
	}
	return Contest{}
}

func (r *Redirect) setPatient(is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.patient = is
}

// look reads the host and repairs it. right is when it was last as it should be.
func (r *Redirect) look(ctx context.Context, right *time.Time) (d Drift, drifted bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	began, before := time.Now(), r.Contest()
	s, err := r.survey(ctx)
	if err == nil {
		d.Found, err = r.differences(s)
	}
	since := *right
	if len(d.Found) > 0 {
		since = r.since(since, d.Found)
		d.By = r.writers.take()
	}
	if err == nil && len(d.Found) > 0 {
		if _, err = r.apply(ctx, s); err == nil {
			d.Repaired = 1
		}
	}
	if s != nil {
		d.Report, d.waiting = s.report, s.waiting
	}
	if err == nil {
		d.Evasions, d.Before, d.After = r.told.learn(s.report)
	}
	switch {
	case len(d.Found) > 0:
	case len(d.Evasions) > 0:
		d.By = r.writers.take()
	case err == nil:
		r.writers.forget(began)
	}
	d.Err = err
	wrong := err != nil || len(d.Found) > 0
	if wrong {
		d.Times, d.AtMost = 1, time.Since(since)
		d.Contest = before.next(began, time.Now(), d.By)
		r.contest.Store(&d.Contest)
	}
	if err == nil {
		*right = began
		if d.Repaired > 0 {
			*right = time.Now()
		}
	}
	return d, wrong || len(d.Evasions)+len(d.Before) > 0
}

// since is when what was found began. The kernel tells of changes of nftables; others may be as old as the last time that
// all was right.
func (r *Redirect) since(right time.Time, found []Difference) time.Time {
	if r.use.backend != BackendNFT || slices.ContainsFunc(found, func(d Difference) bool { return d.Table == "" }) {
		return right
	}
	if first, ok := r.writers.since(); ok && first.After(right) {
		return first
	}
	return right
}
