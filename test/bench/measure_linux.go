package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// mode is one thing to measure at all targets.
type mode struct {
	kind     kind
	clients  int
	upstream imdstest.Persistence
}

// The real service closes after each answer unless it is asked not to.
var modes = []mode{
	{perRequest, 1, imdstest.AlwaysClose},
	{sequence, 1, imdstest.AlwaysClose},
	{perRequest, crowd, imdstest.AlwaysClose},
	{kept, 1, imdstest.AlwaysKeep},
	{kept, crowd, imdstest.AlwaysKeep},
}

const (
	// crowd is the number of clients that keeps every target busy all the time.
	crowd = 32
	// crowdTurns is how many times as many turns all of a crowd take together as one client alone, so that a block
	// is not over before it has begun.
	crowdTurns = 6
	// settle is how long what a proxy does after the answer may take, and still counts as its CPU time.
	settle = 50 * time.Millisecond
	// patiencePerTurn bounds the waiting for a quiet machine: 50 s in a run of default length.
	patiencePerTurn = 15 * time.Millisecond
)

// measure does everything and reports. It says on progress what it is at.
func measure(ctx context.Context, o options, progress io.Writer) (_ *report, err error) {
	// Collecting garbage stops all clients, so it is done between the blocks; and a client that returns from the
	// kernel must not wait for another one's place.
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(crowd + 2)

	rep := &report{Rounds: o.rounds, N: o.n, Think: o.think}
	if rep.Machine, err = describe(o.procs); err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "building imdsgate and starting everything")
	r, err := newRig(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	rep.Peers, rep.Notes = r.versions, r.notes
	q := &quiet{left: time.Duration(o.rounds*o.n) * patiencePerTurn}
	for _, m := range modes {
		if err := r.upstream.persist(m.upstream); err != nil {
			return nil, err
		}
		res, err := r.run(ctx, m, o, q, progress)
		if err != nil {
			return nil, err
		}
		rep.Modes = append(rep.Modes, res)
	}
	rep.Blocks, rep.Busy = q.blocks, q.busy
	for _, t := range r.targets {
		if t.tree == nil {
			continue
		}
		loaded, err := t.tree.memory()
		if err != nil {
			return nil, err
		}
		rep.Memory = append(rep.Memory, memory{Target: t.name, Idle: t.idle, Loaded: loaded})
		if t.daemon == nil {
			continue
		}
		s, err := t.daemon.Status()
		if err != nil {
			return nil, err
		}
		rep.Gates = append(rep.Gates, gateStatus{
			Target: t.name, Level: s.Attribution.Level, Rules: len(s.Policy.Rules),
			Requests: s.Requests.Requests, Events: s.Events.Written, Dropped: s.Events.Dropped,
			Searches: s.Attribution.Scans, LastSearch: s.Attribution.LastScan.Seconds(),
		})
	}
	rep.complete()
	return rep, nil
}

// run measures one mode. Everybody has a block in each round; the order rotates, and turns around every other round, so
// that nobody always comes after the same one.
func (r *rig) run(ctx context.Context, m mode, o options, q *quiet, progress io.Writer) (result, error) {
	res := result{Mode: m.kind, Clients: m.clients, Targets: make([]targetResult, len(r.targets))}
	for i, t := range r.targets {
		res.Targets[i].Target = t.name
		b, err := r.warm(t, m, min(o.n, 100))
		if err != nil {
			return res, fmt.Errorf("%s, %s: %w", t.name, m.kind, err)
		}
		res.Targets[i].count(b)
	}
	n := o.n
	if m.clients > 1 {
		n = max(1, crowdTurns*o.n/m.clients)
	}
	fmt.Fprintln(progress, strings.TrimSuffix(res.title(), ":"))
	for round := range o.rounds {
		for k := range r.targets {
			i := (k + round) % len(r.targets)
			if round%2 == 1 {
				i = len(r.targets) - 1 - i
			}
			runtime.GC()
			if err := q.wait(ctx); err != nil {
				return res, err
			}
			b, err := r.block(r.targets[i], m, n)
			if err != nil {
				return res, err
			}
			res.Targets[i].count(b)
			res.Targets[i].Blocks = append(res.Targets[i].Blocks, b)
		}
	}
	return res, nil
}

// warm makes sure that requests pass through the target, before anything is measured.
func (r *rig) warm(t *target, m mode, n int) (block, error) {
	b, err := r.block(t, m, max(1, n/m.clients))
	// Nobody relays a request in a microsecond.
	if err == nil && t.tree != nil && len(b.took) > 0 && b.CPU < 1e-6*1e4 {
		err = errors.New("requests do not pass through it")
	}
	return b, err
}

func (r *rig) block(t *target, m mode, n int) (block, error) {
	var before, after time.Duration
	var beforeErr, afterErr error
	done, err := t.drive(m.kind, r.script, m.clients, n, func() { before, beforeErr = t.tree.cpu() })
	time.Sleep(settle)
	after, afterErr = t.tree.cpu()
	if err := errors.Join(err, beforeErr, afterErr); err != nil {
		return block{}, err
	}
	return newBlock(m.kind, done, after-before), nil
}
