package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
)

// watch keeps the redirect as it should be. If it cannot be watched it is tried again.
func (d *daemon) watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := d.redirect.Watch(ctx, 0, iptables.Observer{Wrote: d.culprits.wrote, Looked: d.looked, Tell: d.drifted})
		if err == nil || ctx.Err() != nil {
			return
		}
		d.log.Error().Err(err).Msg("the redirect is not watched any more")
		d.integrity("redirect-not-watched", notWatched, err)
		d.mu.Lock()
		d.failure = "the redirect is not watched: " + err.Error() // until it is looked at again
		if d.open != nil && d.open[notWatched].IsZero() {
			d.open[notWatched] = time.Now()
		}
		d.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(watchAgain):
		}
	}
}

const notWatched = "the redirect is not watched any more"

// watchAgain is how long nobody repairs the redirect after it could not be watched.
const watchAgain = time.Minute

// drifted records what the redirect was found to be.
func (d *daemon) drifted(drift iptables.Drift) {
	for _, difference := range drift.Found {
		d.log.Warn().Err(drift.Err).Str("difference", difference.String()).Int("repaired", drift.Repaired).Msg("the redirect was changed")
	}
	by, who := d.culprits.of(drift.By)
	if len(drift.Found) > 0 {
		times := ""
		if drift.Times > 1 {
			times = fmt.Sprintf("%d times, together ", drift.Times)
		}
		s := event.State{Actor: by, Message: fmt.Sprintf("the redirect was not as it should be for %sat most %v: %s%s",
			times, drift.AtMost.Round(time.Millisecond), drift.Found[0], who)}
		var ev *event.Event
		if c := drift.Contest; c.Is() {
			s.Message += fmt.Sprintf("; somebody changes it again and again, %d times since %s", c.Rounds, c.Since.UTC().Format(time.RFC3339))
			ev = d.noticed("redirect-contested", s, drift.Err)
		} else {
			ev = d.noticed("redirect-rule-changed", s, drift.Err)
		}
		ev.Duration = drift.AtMost
		d.record(ev)
	}
	d.notTaken(drift.Report)
	d.evaded(drift.Evasions, by, who)
	for i, before := range drift.Before {
		d.log.Warn().Str("way", before.Of).Str("before", before.Is).Str("now", drift.After[i].Is).Msg("the way to the service has changed")
		d.finding("imds-way-changed", event.State{Message: fmt.Sprintf("%s: %s, was %s", before.Of, drift.After[i].Is, before.Is)}, nil)
	}
}

// looked takes up how the redirect is now.
func (d *daemon) looked(drift iptables.Drift) {
	if drift.Err == nil && len(drift.Report.Families) > 0 {
		d.opened(drift.Report)
	}
	if drift.Repaired > 0 || len(drift.Report.Lost) > 0 {
		if err := d.settleAgain(drift.Report.Lost); err != nil {
			d.log.Error().Err(err).Msg("connections that do not come here are not known")
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if drift.Repaired > 0 {
		d.repairs += uint64(drift.Repaired)
		d.redirected(true)
	}
	d.failure, d.found = "", drift.Report
	switch {
	case drift.Err != nil:
		d.failure = drift.Err.Error()
	case len(drift.Report.Families) > 0:
		d.took(drift.Report)
	}
}

// evaded tells which packets go past the redirect.
func (d *daemon) evaded(evasions []iptables.Evasion, by event.Actor, who string) {
	for _, e := range evasions {
		d.log.Error().Str("rule", e.String()).Msg("a rule evades the redirect")
		d.finding("redirect-evaded", event.State{Actor: by, Message: e.String() + who}, nil)
	}
}

// opened takes up which ways past the redirect are open, and records those that are no
// more.
func (d *daemon) opened(report iptables.Report) {
	now, at := map[string]time.Time{}, time.Now()
	d.mu.Lock()
	was := d.open
	still := func(way string) {
		if now[way] = was[way]; now[way].IsZero() {
			now[way] = at
		}
	}
	for _, l := range report.Locks {
		still(l.String())
	}
	for _, e := range report.Evasions {
		still(e.String())
	}
	d.open = now
	d.mu.Unlock()
	for _, way := range slices.Sorted(maps.Keys(was)) {
		if _, open := now[way]; open {
			continue
		}
		lasted := at.Sub(was[way])
		d.log.Info().Str("way", way).Dur("lasted", lasted).Msg("a way past the redirect is closed")
		ev := d.noticed("redirect-restored", event.State{Message: fmt.Sprintf("over, after %v: %s", lasted.Round(time.Millisecond), way)}, nil)
		ev.Duration = lasted
		d.record(ev)
	}
}

// culprits remembers who has changed rules, while it lives. Its methods may be called
// from any goroutine.
type culprits struct {
	process func(pid int) (*attribution.Process, error)

	mu    sync.Mutex
	read  []*attribution.Process // that wrote rules, as they were then
	began []*attribution.Process // the last programs that were executed
}

const (
	// maxCulprits bounds the writers that are remembered, more than one look tells of.
	maxCulprits = 16
	// maxBegan is how many programs may begin until it is asked about one that has
	// ended since.
	maxBegan = 64
)

// wrote reads who changes rules at this moment.
func (c *culprits) wrote(w iptables.Writer) {
	p, err := c.process(w.PID)
	if err != nil || !is(p, w) {
		return // it has ended
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read = keep(c.read, p, maxCulprits)
}

// executed remembers a program that has begun.
func (c *culprits) executed(p *attribution.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.began = keep(c.began, p, maxBegan)
}

// keep appends to a list of at most so many, without those of before.
func keep(list []*attribution.Process, p *attribution.Process, most int) []*attribution.Process {
	if len(list) == most {
		list = append(list[:0], list[1:]...)
	}
	return append(list, p)
}

// is reports whether a process is the one that the kernel has named. The name of a
// program that was executed a moment ago is the one that the kernel gave it.
func is(p *attribution.Process, w iptables.Writer) bool {
	name := p.Thread
	if name == "" && len(p.Args) > 0 { // it has not been read beyond its program
		name = filepath.Base(p.Args[0])
	}
	return p.PID == w.PID && name[:min(len(name), maxComm)] == w.Name
}

// maxComm is TASK_COMM_LEN without the zero (include/linux/sched.h).
const maxComm = 15

// of names those that have changed rules: the first, for the record, and all in words.
func (c *culprits) of(writers []iptables.Writer) (first event.Actor, inWords string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []string
	for _, w := range writers {
		a, name := event.Actor{PID: int64(w.PID), Name: w.Name}, w.String()
		for _, p := range slices.Concat(c.began, c.read) { // the later and better known last
			if is(p, w) {
				a, name = named(p)
				a.Name = w.Name
			}
		}
		if names = append(names, name); len(names) == 1 {
			first = a
		}
	}
	if len(names) == 0 {
		return first, ""
	}
	return first, "; changed by " + strings.Join(names, ", ")
}

// named is a process as findings have it, for the record and in words.
func named(p *attribution.Process) (a event.Actor, inWords string) {
	a = event.Actor{PID: int64(p.PID), Name: p.Thread, Executable: p.Executable.Path, CommandLine: strings.Join(event.RedactArgs(p.Args), " ")}
	inWords = fmt.Sprintf("%s (pid %d", cmp.Or(a.Executable, a.Name), p.PID)
	if p.UID[1] != attribution.NoID {
		a.UserID, a.UserName = strconv.FormatUint(uint64(p.UID[1]), 10), p.UserName
		inWords += ", uid " + a.UserID
	}
	inWords += ")"
	if p.Parent != nil && p.Parent.Executable.Path != "" {
		a.Parent = p.Parent.Executable.Path
		inWords += " of " + a.Parent
	}
	return a, inWords
}

// contest is what `imdsgate status` says of somebody who does not give in.
func (d *daemon) contest() string {
	c := d.redirect.Contest()
	if !c.Is() {
		return ""
	}
	_, who := d.culprits.of(c.By)
	return fmt.Sprintf("changed again and again, %d times since %s, and repaired as often; it is looked at every %v%s",
		c.Rounds, c.Since.UTC().Format(time.RFC3339), c.Gap, who)
}

// finding is integrity with what else there is to say.
func (d *daemon) finding(action string, s event.State, failure error) {
	d.record(d.noticed(action, s, failure))
}

func (d *daemon) noticed(action string, s event.State, failure error) *event.Event {
	s.Action, s.Type, s.Mode, s.Level = action, "change", d.engine.Mode().String(), d.levelNow()
	if failure != nil {
		s.Failed, s.Reason = true, failure.Error()
	}
	return &event.Event{Kind: event.Integrity, Host: d.host.Load(), Time: time.Now(), State: s}
}

// integrity records that what protects the service is not as it should be.
func (d *daemon) integrity(action, message string, failure error) {
	d.finding(action, event.State{Message: message}, failure)
}

// notTaken tells which ways to the service do not lead here.
func (d *daemon) notTaken(report iptables.Report) {
	for _, lock := range report.Locks {
		d.log.Error().Str("lock", lock.String()).Msg("a hook is not taken")
		d.integrity("redirect-hook-not-taken", lock.String(), errors.New("somebody else's rule decides about this traffic"))
	}
}
