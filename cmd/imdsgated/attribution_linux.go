package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy"
	"golang.org/x/sys/unix"
)

const (
	// checkEvery is how long a hook can have been gone before it is known, while nobody
	// connects whom it would have seen. More often costs some ten packets on loopback
	// each time.
	checkEvery = 30 * time.Second
	// doubtEvery is how long it takes if somebody connects: he is unattributed, and a
	// reason to look.
	doubtEvery = time.Second
)

// errLevel says that this host cannot give the evidence that enforce mode needs.
var errLevel = errors.New("the level of attribution that enforce mode requires is not there")

// openAttribution starts what finds the owners of connections, at the highest level
// that this host has. The function that it returns ends it.
func (d *daemon) openAttribution(c config.Attribution, rules iptables.Config, connector *os.File) (func() error, error) {
	d.required = c.RequireLevel
	enforce := d.engine.Mode() == policy.Enforce
	o := attribution.Options{Endpoints: rules.Endpoints, Connector: connector, Executed: d.executed, TimedNote: d.config.Control.TimedNote()}
	d.witness, o.NoWitness = witness.Open(witness.Options{
		Endpoints: rules.Endpoints, Mark: rules.Mark, Deny: enforce, DenyUncovered: c.Uncovered == config.Deny, Report: d.sighted,
	})
	if o.NoWitness == nil {
		o.Witness = d.witness
		d.admitMark()
	} else {
		d.witness = nil
	}
	// BPF programs are loaded now or never. Linux before 5.19 asks for CAP_BPF at each
	// question to a map, too. Nobody has been asked about other processes yet: see shed.
	spare := []uint{unix.CAP_PERFMON}
	if d.witness == nil {
		spare = append(spare, unix.CAP_BPF)
	}
	if err := shed(spare...); err != nil {
		d.log.Warn().Err(err).Msg("capabilities that are not needed any more are kept")
	}
	closeWitness := func() error {
		if d.witness == nil {
			return nil
		}
		return d.witness.Close()
	}
	if d.witness != nil { // of which conntrack is not asked, as a daemon may have that was killed
		if err := attribution.Untime(o.TimedNote); err != nil {
			d.log.Warn().Err(err).Msg("conntrack goes on to note times")
		}
	}
	var err error
	if d.finder, err = attribution.New(o); err != nil {
		return nil, errors.Join(fmt.Errorf("attribution cannot start: %w", err), closeWitness())
	}
	d.actors.Store(d.finder)
	d.culprits.process = d.finder.Process
	d.mu.Lock()
	d.level = d.finder.Level().String()
	d.mu.Unlock()
	closeAll := func() error { return errors.Join(d.finder.Close(), closeWitness()) }
	for _, l := range d.finder.Levels() {
		if l.Missing != nil {
			d.log.Warn().Stringer("attribution", l.Level).Err(l.Missing).Msg("a level of attribution is not there")
		}
	}
	if d.finder.Level() < c.RequireLevel {
		err := d.tooLow()
		switch {
		case enforce && d.modesNow().Set != nil && d.modesNow().Configured != policy.Enforce:
			d.forgetMode(err)
			if d.witness != nil {
				d.witness.SetDeny(false)
			}
		case enforce:
			return nil, errors.Join(err, closeAll())
		}
		d.log.Warn().Err(err).Msg("in enforce mode the daemon would not start")
	}
	return closeAll, nil
}

// admitMark lets systemd-imdsd have its mark, which is ours, too, so that systemd's lock lets both pass (FWMARK_DEFAULT
// in src/imds/imdsd.c, User= in units/systemd-imdsd@.service.in). Not where the redirect exempts without our cgroup, by mark and
// user alone: who may change his user could make a socket as ours, and connect as that one.
func (d *daemon) admitMark() {
	if d.witness == nil || d.rules.Cgroup == "" {
		return
	}
	uid := uint64(0)
	if u, err := user.Lookup("systemd-imds"); err == nil {
		uid, _ = strconv.ParseUint(u.Uid, 10, 32)
	}
	d.witness.SetMarkUser(uint32(uid))
}

// levelNow is "" until attribution is open: the kernel may have told of something by
// then.
func (d *daemon) levelNow() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.level
}

func (d *daemon) tooLow() error {
	err := fmt.Errorf("%w: attribution.require_level is %s and this host has %s", errLevel, d.required, d.finder.Level())
	for _, l := range d.finder.Levels() {
		if l.Missing != nil {
			return fmt.Errorf("%w; %s: %w", err, l.Level, l.Missing)
		}
	}
	return err
}

// redirected tells the witness whether what connects to the service comes here. What was
// read of the rules before is no longer so.
func (d *daemon) redirected(is bool) {
	d.readings.forget()
	if d.witness != nil {
		d.witness.SetRedirected(is)
	}
}

// sighted records what the kernel saw that should not be. The witness may tell of it
// before there is a finder, which reads all processes first.
func (d *daemon) sighted(s witness.Sighting) {
	c := s.Connector
	by := event.Actor{PID: int64(c.PID), Name: c.Comm, UserID: strconv.FormatUint(uint64(c.UID), 10)}
	who := fmt.Sprintf("%s (pid %d, uid %d)", c.Comm, c.PID, c.UID)
	if finder := d.actors.Load(); finder != nil {
		if p, err := finder.Acted(c.Actor); err == nil { // or else it has ended
			by, who = named(p)
		}
	}
	became := "it was not refused"
	if s.Refused {
		became = "it was refused"
	}
	switch s.Kind {
	case witness.Marked:
		d.finding("imds-mark-forged", event.State{Actor: by,
			Message: fmt.Sprintf("%s connected to %v with the mark of the daemon; %s", who, c.Tuple.Remote, became)}, nil)
	case witness.Uncovered:
		d.finding("uncovered-imds-connection", event.State{Actor: by,
			Message: fmt.Sprintf("%s connected to %v from a network namespace whose traffic does not pass through here; %s", who, c.Tuple.Remote, became)}, nil)
	}
}

// executed gives a program that somebody has started to the rules. Most are none of
// their business, and cost no more than that question.
func (d *daemon) executed(p *attribution.Process, whole func() (*attribution.Process, bool)) {
	d.culprits.executed(p)
	ev := &event.Event{Kind: event.Started, Host: d.host.Load(), Time: p.Executed, Subjects: []*event.Process{proxy.Process(p)}}
	if !d.engine.Concerns(ev) {
		return
	}
	if now, ok := whole(); ok {
		ev.Subjects[0] = proxy.Process(now)
	}
	if d.engine.ObserveStart(ev) {
		d.record(ev)
	}
}

// checkAttribution makes sure that what the levels rest on still works.
func (d *daemon) checkAttribution(ctx context.Context) {
	every := time.NewTicker(doubtEvery)
	defer every.Stop()
	var doubts uint64
	var broke time.Time
	last := time.Now()
	whole := last // the last time that all was as it should be
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		if now := d.finder.Stats().NoWitness; now == doubts && time.Since(last) < checkEvery {
			continue
		} else {
			doubts, last = now, time.Now()
		}
		err := d.check(ctx)
		if err != nil && d.witness != nil && ctx.Err() == nil {
			names, againErr := d.witness.Reattach()
			if len(names) > 0 {
				d.log.Warn().Strs("hooks", names).Msg("somebody has detached BPF programs, and they are attached again")
				d.mu.Lock()
				d.reattached += uint64(len(names))
				d.mu.Unlock()
				ev := d.noticed("bpf-program-detached", event.State{Message: "somebody has detached " + strings.Join(names, ", ") + "; attached again"}, err)
				ev.Duration = time.Since(whole)
				d.record(ev)
			}
			if err = d.check(ctx); err != nil {
				err = errors.Join(err, againErr)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			whole = time.Now()
		}
		d.mu.Lock()
		was := d.broken
		d.broken = err
		d.mu.Unlock()
		switch {
		case err != nil && was == nil:
			d.log.Error().Err(err).Msg("attribution does not work any more")
			broke = time.Now()
			d.integrity("attribution-broken", "the kernel no longer tells what attribution needs, so that clients are unattributed", err)
		case err == nil && was != nil:
			ev := d.noticed("attribution-restored", event.State{Message: "attribution works again"}, nil)
			ev.Duration = time.Since(broke)
			d.record(ev)
		}
	}
}

func (d *daemon) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkEvery/2)
	defer cancel()
	return d.finder.Check(ctx)
}

// attributionStatus is what `imdsgate status` shows.
func (d *daemon) attributionStatus() report.Attribution {
	stats := d.finder.Stats()
	a := report.Attribution{
		Level: d.finder.Level().String(), Scans: stats.Scans, LastScan: stats.Last,
		Descriptors: stats.Descriptors, Budget: proxy.AttributeIn,
		Longest: report.Search{
			Ended: stats.Longest.Ended, Took: stats.Longest.Took,
			Descriptors: stats.Longest.Descriptors, Largest: report.Table(stats.Longest.Largest),
		},
	}
	a.Uncovered = d.config.Attribution.Uncovered.String()
	if d.required > attribution.Level0 {
		a.Required = d.required.String()
	}
	for _, l := range d.finder.Levels() {
		if l.Missing != nil {
			a.Missing = append(a.Missing, report.Missing{Level: l.Level.String(), Reason: l.Missing.Error()})
		}
	}
	if d.witness != nil {
		for _, h := range d.witness.Hooks() {
			hook := report.Hook{Name: h.Name}
			if h.Err != nil {
				hook.Missing = h.Err.Error()
			}
			a.Hooks = append(a.Hooks, hook)
		}
		w := d.witness.Stats()
		a.Witness = &report.Witness{
			Connects: w.Connects, Sockets: w.Live, MaxSockets: w.MaxSockets, Full: w.Full, OverShare: w.OverShare, Ambiguous: w.Ambiguous, Namespaces: w.Namespaces,
			StillBound: w.StillBound, Lost: w.LostExecs + w.LostCreators + w.LostWriters + w.Dropped, Missing: stats.NoWitness,
		}
	}
	if h, ok := d.finder.History(); ok {
		a.History = &report.History{Forks: h.Forks, Execs: h.Execs, Exits: h.Exits, Lost: h.Lost, Rebuilds: h.Rebuilds, Processes: h.Processes, Refused: h.Refused, Unjudged: h.Unsent}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken != nil {
		a.Broken = d.broken.Error()
	}
	return a
}
