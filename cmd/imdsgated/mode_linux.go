package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
)

const (
	// maxModeFor bounds for how long a mode is set. Who needs longer changes the
	// configuration, where others read it.
	maxModeFor = 7 * 24 * time.Hour
	// sweepEvery is how late a decision or a mode may end.
	sweepEvery = time.Second
	// retryEvery is how long it takes until what failed is tried again: to return to the
	// configured mode, or to write a file.
	retryEvery = 5 * time.Second
)

// modes is which mode the daemon is in, and why.
//
// The engine's mode is what counts for a request. The rest of a mode is in the kernel:
// the rules of iptables with their guard, and what the connect hook refuses. A change
// makes what is stricter first, so that there is no moment in which the engine relies on
// what is not there yet, and then has the connections end that began in the old mode.
type modes struct {
	file     kept
	changing sync.Mutex // held by who changes the mode, the policy or what watches the redirect
	watching *watching  // guarded by changing; nil while there is no redirect

	mu         sync.Mutex // guards the following; written with changing held
	since      time.Time
	configured policy.Mode
	set        *report.SetMode // by an operator; nil if the configured one is in force. Does not change
	ends       time.Time       // of set, by the monotonic clock, which nobody sets; zero if it does not
	failure    error           // why the mode is not what it should be
	unsaved    error           // why the file does not have what is in force
}

// watching is somebody who keeps the redirect as it should be.
type watching struct {
	stop  context.CancelFunc
	ended chan struct{}
}

// recallMode takes up a mode that was set before, if its time is not over. It makes no
// difference yet but to the engine.
func (d *daemon) recallMode(dir string) {
	m := &d.modes
	m.file = modeFile(dir)
	m.since, m.configured = d.since, d.engine.Mode()
	set := new(report.SetMode)
	switch err := m.file.read(set); {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err != nil:
		m.failure = fmt.Errorf("which mode was set before is not known: %w", err)
		d.log.Error().Err(err).Stringer("mode", m.configured).Msg("which mode was set before is not known, and the configured one is in force")
		d.change(event.State{Action: "mode-lost", Type: "change", Message: fmt.Sprintf("which mode was set before is not known; %s, as configured, is in force", m.configured)}, err)
		return
	}
	now := time.Now()
	why := over(set, m.configured, now)
	if why != "" {
		d.change(event.State{Action: "mode-changed", Type: "change", Previous: set.Mode.String(), Reason: why,
			Message: fmt.Sprintf("the mode is %s, as configured, and no longer %s, which %s had set", m.configured, set.Mode, set.By)}, nil)
		m.unsaved = m.file.remove()
		return
	}
	m.set, m.since = set, set.Since
	if !set.Until.IsZero() {
		m.ends = now.Add(set.Until.Sub(now))
	}
	d.engine.SetMode(set.Mode)
	d.log.Warn().Stringer("mode", set.Mode).Str("until", until(set.Until)).Stringer("by", set.By).Str("reason", set.Reason).Msg("the mode is the one that was set before the daemon started")
}

// over says why a mode that was set is not taken up by a daemon that starts; "" if it is.
func over(set *report.SetMode, configured policy.Mode, now time.Time) string {
	switch {
	case !set.Until.IsZero() && !now.Before(set.Until):
		return "its time was over when the daemon started"
	case now.Before(set.Since) && strictness(set.Mode) < strictness(configured):
		return "by the clock it is yet to be set"
	case set.Until.IsZero() && set.Configured != configured:
		return "the configuration has another mode since"
	case set.Until.IsZero() && configured == policy.Enforce:
		return "it has no end"
	case set.Until.Sub(set.Since) > maxModeFor:
		return "its time is too long"
	case set.Mode == configured:
		return "it is the configured one"
	}
	return ""
}

func modeFile(dir string) kept { return kept{path: filepath.Join(dir, "mode.json")} }

// forgetMode goes back to the configured mode before anything runs in the other one.
func (d *daemon) forgetMode(why error) {
	m := &d.modes
	m.mu.Lock()
	defer m.mu.Unlock()
	d.engine.SetMode(m.configured)
	d.log.Error().Err(why).Stringer("mode", m.configured).Msg("the mode that was set cannot be taken up, and the configured one is in force")
	d.change(event.State{Action: "mode-changed", Type: "change", Previous: m.set.Mode.String(),
		Message: fmt.Sprintf("the mode is %s, as configured: %s, which %s had set, cannot be taken up", m.configured, m.set.Mode, m.set.By)}, why)
	m.failure, m.set, m.since, m.ends = why, nil, d.since, time.Time{}
	m.unsaved = m.file.remove()
}

// strictness orders modes by how much they keep from clients.
func strictness(m policy.Mode) int {
	return map[policy.Mode]int{policy.Off: 0, policy.Audit: 1, policy.Enforce: 2}[m]
}

func (d *daemon) modesNow() report.Modes {
	m := &d.modes
	m.mu.Lock()
	defer m.mu.Unlock()
	r := report.Modes{Mode: d.engine.Mode(), Since: m.since, Configured: m.configured, Set: m.set}
	if err := errors.Join(m.failure, undone(m.unsaved)); err != nil {
		r.Error = err.Error()
	}
	return r
}

func (d *daemon) answerMode(context.Context, control.Question) (any, error) { return d.modesNow(), nil }

// setMode is for an operator.
func (d *daemon) setMode(ctx context.Context, q control.Question) (any, error) {
	select {
	case <-d.started:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	by := actor(q.Peer)
	now := time.Now()
	set := &report.SetMode{Since: now.UTC().Round(0), By: by, Reason: strings.TrimSpace(q.Args.Get("reason"))}
	err := set.Mode.UnmarshalText([]byte(q.Args.Get("mode")))
	var lasts time.Duration
	if text := q.Args.Get("for"); err == nil && text != "" {
		if lasts, err = time.ParseDuration(text); err != nil || lasts <= 0 || lasts > maxModeFor {
			err = fmt.Errorf("%q is not a time of at most %d days, as in 30m or 4h", text, maxModeFor/(24*time.Hour))
		}
	}
	if err == nil && (set.Reason == "" || len(set.Reason) > 1024) {
		err = errors.New("say why, for those who find it so, in at most 1024 bytes: --reason INC-123")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", control.ErrBadQuestion, err)
	}

	d.modes.changing.Lock()
	defer d.modes.changing.Unlock()
	before := d.modesNow()
	back := set.Mode == before.Configured
	switch {
	case back && lasts > 0:
		return nil, fmt.Errorf("%w: %s is what the configuration asks for, so that it needs no time to end: leave out --for", control.ErrBadQuestion, set.Mode)
	case back && before.Set == nil:
		return before, nil
	case !back && lasts == 0 && (before.Configured == policy.Enforce || set.Mode == policy.Off):
		return nil, fmt.Errorf("%w: %s is the configured mode, and %s protects less: say for how long, as in --for 30m", control.ErrBadQuestion, before.Configured, set.Mode)
	}
	set.Configured = before.Configured
	if lasts > 0 {
		set.Until = set.Since.Add(lasts)
	}
	var next *report.SetMode
	if !back {
		next = set
	}
	if err := d.goTo(ctx, set.Mode, next, nil, recorded(by), set.Reason); err != nil {
		if errors.Is(err, errLevel) {
			return nil, fmt.Errorf("%w: %w", control.ErrBadQuestion, err)
		}
		return nil, err
	}
	return d.modesNow(), nil
}

// goTo changes the mode and what is known of it, and the policy with it if that is not
// nil. It is called with changing held. After an error everything is as before.
func (d *daemon) goTo(ctx context.Context, to policy.Mode, set *report.SetMode, p *policy.Policy, by event.Actor, reason string) error {
	ctx = context.WithoutCancel(ctx) // who is told to end half-way must not leave half of a mode
	from := d.engine.Mode()
	said := event.State{Type: "change", Actor: by, Reason: reason, Previous: from.String()}
	if set != nil {
		said.Until = set.Until
	}
	said.Action, said.Message = "mode-changing", fmt.Sprintf("the mode is to change from %s to %s, %s", from, to, until(said.Until))
	d.change(said, nil)
	said.Action, said.Message = "mode-changed", fmt.Sprintf("the mode has changed from %s to %s, %s", from, to, until(said.Until))
	err := d.switchTo(ctx, to, p)
	if err != nil {
		said.Message = fmt.Sprintf("the mode stays %s, and has not changed to %s", d.engine.Mode(), to)
		d.change(said, err)
		return fmt.Errorf("the mode stays %s: %w", d.engine.Mode(), err)
	}
	m := &d.modes
	m.mu.Lock()
	m.set, m.ends, m.failure = set, time.Time{}, nil
	if set != nil && !set.Until.IsZero() {
		m.ends = time.Now().Add(time.Until(set.Until))
	}
	if from != to {
		m.since = time.Now()
		d.health.again()
	}
	d.keepMode()
	m.mu.Unlock()
	d.keepStanding(to)
	sd.SdNotify(false, d.statusText())
	d.change(said, nil)
	d.log.Warn().Stringer("mode", to).Stringer("previous", from).Str("by", by.UserName).Str("until", until(said.Until)).Str("reason", reason).Msg("the mode has changed")
	return nil
}

// until says when a mode ends.
func until(t time.Time) string {
	if t.IsZero() {
		return "until it is changed"
	}
	return "until " + t.UTC().Format(time.RFC3339)
}

// undone says what follows if what is in force could not be written.
func undone(unsaved error) error {
	if unsaved == nil {
		return nil
	}
	return fmt.Errorf("it is in force, and would be undone by a restart: %w", unsaved)
}

// keepMode writes which mode is set. It is called with modes.mu held.
func (d *daemon) keepMode() {
	m := &d.modes
	was := m.unsaved
	if m.set == nil {
		m.unsaved = m.file.remove()
	} else {
		m.unsaved = m.file.write(m.set)
	}
	if m.unsaved != nil && was == nil {
		d.log.Error().Err(m.unsaved).Msg("the mode is in force, and would be another one after a restart")
	}
}

// switchTo does what a change of the mode takes, as a start in that mode would. It is
// called with changing held. After an error the mode is the old one.
func (d *daemon) switchTo(ctx context.Context, to policy.Mode, p *policy.Policy) error {
	from := d.engine.Mode()
	commit := func() {
		if p != nil {
			d.engine.SetPolicy(p)
		}
		if d.witness != nil {
			d.witness.SetDeny(to == policy.Enforce)
		}
		d.engine.SetMode(to)
	}
	switch {
	case from == to:
		commit()
		return nil
	case to == policy.Enforce && d.finder.Level() < d.required:
		return d.tooLow()
	case to == policy.Off:
		return d.leave(ctx, from, commit)
	}
	older, err := d.bring(ctx, to)
	if err != nil {
		if from == policy.Off {
			_, undone := iptables.Remove(ctx)
			err = errors.Join(err, undone)
		}
		return err
	}
	commit()
	d.guards = true
	if d.modes.watching == nil {
		d.beginWatch()
	}
	if to == policy.Enforce {
		// Also tunnels, and clients of whom it was not known whether the host would have
		// forwarded them.
		if err := d.proxy.Drain(ctx); err != nil {
			d.log.Warn().Err(err).Msg("connections of the mode before")
		}
	}
	if err := d.settle(older); err != nil {
		d.log.Error().Err(err).Msg("connections that do not pass through the redirect were not found")
		d.integrity("direct-imds-connection", "connections that do not pass through the redirect were not found", err)
	}
	return nil
}

// bring leads the traffic here, with the guard of a mode, and returns the connections
// that do not come here, being older.
func (d *daemon) bring(ctx context.Context, mode policy.Mode) ([]diag.Socket, error) {
	// Before, because the guard of enforce mode resets some of them at once.
	older, _, err := d.finder.Direct(d.rules.Endpoints, ports(d.rules), d.rules.UID)
	if err != nil {
		return nil, err
	}
	return older, d.install(ctx, mode == policy.Enforce)
}

// leave takes the redirect away, and harms no connection that is here: those end when
// they have their answers.
func (d *daemon) leave(ctx context.Context, from policy.Mode, commit func()) (err error) {
	d.endWatch() // or else it would be put back
	defer func() {
		if err != nil {
			d.redirect.Want(from == policy.Enforce) // also if it cannot be written now
			if undone := d.install(ctx, from == policy.Enforce); undone != nil {
				err = errors.Join(err, undone)
			}
			d.beginWatch()
		}
	}()
	if from == policy.Enforce { // whose guard refuses whoever goes to the service himself
		if err := d.install(ctx, false); err != nil {
			return err
		}
	}
	if err := iptables.Release(ctx); err != nil {
		return fmt.Errorf("take the redirect away: %w", err)
	}
	d.redirected(false)
	if err := d.proxy.Drain(ctx); err != nil {
		d.log.Warn().Err(err).Msg("connections of the mode before")
	}
	if _, err := iptables.Remove(ctx); err != nil {
		return fmt.Errorf("take the redirect away: %w", err)
	}
	commit()
	d.keepStanding(policy.Off)
	d.state("redirect-removed", "change", "the redirect is removed: nothing is attributed, judged or recorded", nil)
	return nil
}

// beginWatch begins to keep the redirect as it should be. It is called with changing
// held.
func (d *daemon) beginWatch() {
	ctx, stop := context.WithCancel(context.Background())
	w := &watching{stop, make(chan struct{})}
	d.modes.watching = w
	go func() {
		defer close(w.ended)
		d.watch(ctx)
	}()
}

// endWatch waits until nobody repairs the redirect any more. It is called with changing
// held, and may be called twice.
func (d *daemon) endWatch() {
	if w := d.modes.watching; w != nil {
		w.stop()
		<-w.ended
		d.modes.watching = nil
	}
	d.mu.Lock()
	d.open = nil
	d.mu.Unlock()
}

// keepTime ends decisions and modes whose time is over, tries again what has failed, and
// looks what the host is called and what has become of connections.
func (d *daemon) keepTime(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	var retry time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		d.followName()
		if err := d.settleMade(); err != nil {
			d.log.Error().Err(err).Msg("connections that do not come here are not known")
		}
		again := now.After(retry)
		d.decisions.mu.Lock()
		d.sweepDecisions(now)
		if again && d.decisions.unsaved != nil {
			d.keepDecisions()
		}
		d.decisions.mu.Unlock()
		d.modes.mu.Lock()
		if again && d.modes.unsaved != nil {
			d.keepMode()
		}
		d.modes.mu.Unlock()
		if again {
			retry = now.Add(retryEvery)
			d.endMode(ctx, now)
		}
	}
}

// endMode goes back to the configured mode if the time of the one that was set is over,
// by either clock.
func (d *daemon) endMode(ctx context.Context, now time.Time) {
	m := &d.modes
	m.changing.Lock()
	defer m.changing.Unlock()
	m.mu.Lock()
	set, ends, configured := m.set, m.ends, m.configured
	m.mu.Unlock()
	if set == nil || set.Until.IsZero() || now.Before(set.Until) && now.Before(ends) {
		return
	}
	if err := d.goTo(ctx, configured, nil, nil, event.Actor{}, fmt.Sprintf("the time is over for which %s had set %s: %s", set.By, set.Mode, set.Reason)); err != nil {
		d.log.Error().Err(err).Msg("the daemon cannot go back to the configured mode, and tries again")
		m.mu.Lock()
		m.failure = fmt.Errorf("it should be %s by now: %w", configured, err)
		m.mu.Unlock()
	}
}
