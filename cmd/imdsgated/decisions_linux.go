package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// decisions are those of operators, and the file that keeps them.
type decisions struct {
	file kept

	mu      sync.Mutex           // guards the following, and every change of the engine's
	ends    map[string]time.Time // of each, by the monotonic clock, which nobody sets
	damage  error                // why those of before were not taken up
	unsaved error                // why the file does not have what is in force
}

// decisionsFile is the content of the file.
type decisionsFile struct {
	Decisions []policy.Decision `json:"decisions"`
}

// recallDecisions takes up the decisions of before. Without them the daemon starts all
// the same: those that allowed are void, and so are those that denied, which it says.
func (d *daemon) recallDecisions(dir string) {
	ds := &d.decisions
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.file = kept{path: filepath.Join(dir, "decisions.json")}
	ds.ends = map[string]time.Time{}
	var f decisionsFile
	err := ds.file.read(&f)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err == nil:
		var all *policy.Decisions
		if all, err = policy.NewDecisions(f.Decisions); err == nil {
			d.engine.SetDecisions(all)
			now := time.Now()
			for _, one := range all.All() {
				ds.ends[one.ID] = now.Add(one.Expires.Sub(now))
			}
			d.sweepDecisions(now)
			return
		}
		err = ds.file.aside(fmt.Errorf("read %s: %w", ds.file.path, err))
	}
	ds.damage = err
	d.log.Error().Err(err).Msg("the decisions of before are not in force")
	d.change(event.State{Action: "decisions-lost", Type: "change", Message: "the decisions of before are not in force: what they allowed is not allowed, and what they denied is not denied"}, err)
}

// keepDecisions writes what is in force. It is called with decisions.mu held.
func (d *daemon) keepDecisions() {
	was := d.decisions.unsaved
	all := d.engine.Decisions().All()
	d.decisions.unsaved = d.decisions.file.write(decisionsFile{all})
	if err := d.decisions.unsaved; err != nil && was == nil {
		d.log.Error().Err(err).Msg("decisions are in force, and would be lost by a restart")
	}
}

// sweepDecisions takes away those that are over, by either clock. It is called with
// decisions.mu held.
func (d *daemon) sweepDecisions(now time.Time) {
	left, over := d.engine.Decisions().Without(func(one *policy.Decision) bool {
		return one.Over(now) || !now.Before(d.decisions.ends[one.ID])
	})
	if len(over) == 0 {
		return
	}
	d.engine.SetDecisions(left)
	d.keepDecisions()
	for _, one := range over {
		delete(d.decisions.ends, one.ID)
		d.decided("decision-expired", "deletion", "is over", &one, event.Actor{})
	}
}

// decided records what became of a decision.
func (d *daemon) decided(action, kind, became string, one *policy.Decision, by event.Actor) {
	d.change(event.State{
		Action: action, Type: kind, Decision: one.ID, Until: one.Expires, Actor: by, Reason: one.Reason,
		Message: fmt.Sprintf("decision %s of %s to %s (%s) %s", one.ID, one.By, one.Effect, one.About(), became),
	}, nil)
}

func (d *daemon) listDecisions(context.Context, control.Question) (any, error) {
	return d.decisionsNow(), nil
}

func (d *daemon) decisionsNow() report.Decisions {
	d.decisions.mu.Lock()
	defer d.decisions.mu.Unlock()
	r := report.Decisions{All: d.engine.Decisions().All()}
	if r.All == nil {
		r.All = []policy.Decision{}
	}
	if err := errors.Join(d.decisions.damage, undone(d.decisions.unsaved)); err != nil {
		r.Error = err.Error()
	}
	return r
}

func (d *daemon) addDecision(_ context.Context, q control.Question) (any, error) {
	by := actor(q.Peer)
	one, notes, err := newDecision(q.Args, by)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", control.ErrBadQuestion, err)
	}
	d.decisions.mu.Lock()
	defer d.decisions.mu.Unlock()
	for slices.ContainsFunc(d.engine.Decisions().All(), func(o policy.Decision) bool { return o.ID == one.ID }) {
		one.ID = newID()
	}
	next, replaced, err := d.engine.Decisions().With(one)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", control.ErrBadQuestion, err)
	}
	d.engine.SetDecisions(next)
	now := time.Now()
	d.decisions.ends[one.ID] = now.Add(one.Expires.Sub(now))
	d.keepDecisions()
	if replaced != nil {
		delete(d.decisions.ends, replaced.ID)
		d.decided("decision-replaced", "deletion", "was replaced by "+one.ID, replaced, recorded(by))
	}
	d.decided("decision-added", "creation", "was added", &one, recorded(by))
	if mode := d.engine.Mode(); mode != policy.Enforce && one.Effect == policy.Denies {
		notes = append(notes, fmt.Sprintf("the mode is %s, in which nothing is refused", mode))
	}
	return report.Decided{Decision: &one, Replaced: replaced, Notes: append(notes, d.unsavedNote()...)}, nil
}

func (d *daemon) unsavedNote() []string {
	if err := undone(d.decisions.unsaved); err != nil {
		return []string{err.Error()}
	}
	return nil
}

func (d *daemon) deleteDecisions(_ context.Context, q control.Question) (any, error) {
	by := recorded(actor(q.Peer))
	d.decisions.mu.Lock()
	defer d.decisions.mu.Unlock()
	now := d.engine.Decisions()
	all, ids := q.Args.Get("all") == "true", q.Args["id"]
	if all == (len(ids) > 0) {
		return nil, fmt.Errorf("%w: say which decisions, or that all", control.ErrBadQuestion)
	}
	var known []string
	for _, one := range now.All() {
		known = append(known, one.ID)
	}
	for _, id := range ids {
		if !slices.Contains(known, id) {
			there := "there are none"
			if len(known) > 0 {
				there = "there are " + strings.Join(known, ", ")
			}
			return nil, fmt.Errorf("%w: no decision %q; %s", control.ErrBadQuestion, id, there)
		}
	}
	left, gone := now.Without(func(one *policy.Decision) bool { return all || slices.Contains(ids, one.ID) })
	if len(gone) > 0 {
		d.engine.SetDecisions(left)
		d.keepDecisions()
	}
	for _, one := range gone {
		delete(d.decisions.ends, one.ID)
		d.decided("decision-deleted", "deletion", "was deleted", &one, by)
	}
	return report.Decided{Deleted: gone, Notes: d.unsavedNote()}, nil
}

// newDecision makes a decision of what an operator has written. The user is named by
// his number from then on, and the executable by the file that is executed, since that
// is what will be known of a client.
func newDecision(args url.Values, by policy.Actor) (one policy.Decision, notes []string, err error) {
	now := time.Now().UTC().Round(0)
	one = policy.Decision{
		ID: newID(), Executable: args.Get("exe"), Unit: args.Get("unit"), Container: args.Get("container"),
		AcceptRisk: args.Get("accept-risk") == "true", Reason: args.Get("reason"), By: by, Added: now,
	}
	if err := one.Effect.UnmarshalText([]byte(args.Get("effect"))); err != nil {
		return one, nil, err
	}
	lasts, err := time.ParseDuration(args.Get("for"))
	if err != nil {
		return one, nil, fmt.Errorf("%q is not a time, as in 4h or 30m", args.Get("for"))
	}
	one.Expires = now.Add(lasts)
	if name := args.Get("user"); name != "" {
		if one.User, err = uidOf(name); err != nil {
			return one, nil, err
		}
	}
	if one.Executable == "" || one.Check() != nil {
		return one, nil, one.Check()
	}
	real, err := filepath.EvalSymlinks(one.Executable)
	switch {
	case err == nil && real != one.Executable:
		notes = append(notes, fmt.Sprintf("%s is %s", one.Executable, real))
		one.Executable = real
	case err != nil && one.Effect == policy.Denies:
		notes = append(notes, fmt.Sprintf("there is no %s on this host now", one.Executable))
	}
	switch {
	case one.Effect == policy.Denies:
		if one.Unit == "" && one.User == "" && one.Container == "" {
			notes = append(notes, "this stops the file, not a copy of it under another name: a unit or a user stops whoever runs it")
		}
	case one.AcceptRisk && one.Container != "":
		notes = append(notes, "the files of a container are its image's: any program in it that has this path is allowed")
	default:
		if err := ownedByHost(one.Executable, err); err != nil {
			return one, nil, err
		}
	}
	return one, notes, one.Check()
}

// ownedByHost says why an executable can be allowed nothing, which would be found out
// only when somebody asks.
func ownedByHost(executable string, err error) error {
	if err == nil {
		err = attribution.ChangedByRoot(executable)
	}
	if err != nil {
		return fmt.Errorf("%s cannot be allowed anything, since others than root could put another program there: %w; "+
			"a program of a container's image goes with --container and --accept-risk", executable, err)
	}
	st, err := os.Stat(executable)
	if err == nil && (!st.Mode().IsRegular() || st.Mode()&0o111 == 0) {
		err = fmt.Errorf("%s is no program", executable)
	}
	return err
}

// uidOf finds a user's number.
func uidOf(name string) (string, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return strconv.FormatUint(n, 10), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return "", fmt.Errorf("this host has no user %q: give a name of /etc/passwd, or a number", name)
	}
	return u.Uid, nil
}

// newID is short enough to be typed, and there are so many that none comes twice.
func newID() string { return strings.ToLower(rand.Text()[:8]) }

// actor names who asks. Of one who has become another user the kernel knows with which
// account he has logged in (pam_loginuid(8)), as long as he waits for our answer.
func actor(p control.Peer) policy.Actor {
	a := policy.Actor{UID: p.UID, PID: p.PID}
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.UID), 10)); err == nil {
		a.Name = u.Username
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/loginuid", p.PID))
	if login := strings.TrimSpace(string(b)); err == nil && login != unset {
		if a.Login = "uid " + login; login == strconv.FormatUint(uint64(p.UID), 10) {
			a.Login = a.Name
		} else if u, err := user.LookupId(login); err == nil {
			a.Login = u.Username
		}
	}
	return a
}

// unset is the loginuid of who has not logged in.
const unset = "4294967295"

// recorded gives an actor the form in which events have him.
func recorded(a policy.Actor) event.Actor {
	return event.Actor{UserID: strconv.FormatUint(uint64(a.UID), 10), UserName: a.Name, Login: a.Login, PID: int64(a.PID)}
}
