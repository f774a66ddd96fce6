// Package tune proposes grants: the fewest that let through what was legitimate in a
// recorded history, and would be refused in enforce mode.
//
// It judges recorded events again, by the policy that there is, and groups what that
// refuses by who asked for what. Of each group it says one of three things. A proposal is
// a grant, with the evidence for it, a risk and what else of the history it would have let
// through. A refusal is what looks legitimate and has no grant that would be worth it,
// with what the operator can do instead. Everything else is unexplained: there is a sign
// of theft in it, or who it was is not known for certain.
//
// Nothing here decides: whoever takes a proposal does. What is remembered is bounded,
// however many events there are.
package tune

import (
	"cmp"
	"encoding/binary"
	"slices"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// Options say what is proposed. The zero value of each but Policy is a default.
type Options struct {
	Policy *policy.Policy // by which events are judged again
	// MinCount and MinDays are how often, and on how many days, something must have
	// happened to be proposed. A theft happens once; with less than 2 it is proposed.
	MinCount, MinDays int
	// Lifetime is how long after the newest event a grant ends; 90 days if 0.
	Lifetime time.Duration
	Owner    string // of the grants
	// Since and Until bound the requests that are counted; zero for no bound. What came
	// before is remembered all the same: whom a rule had blocked.
	Since, Until time.Time
	// Class orders the classes of requests in what is printed.
	Classes []string
}

const (
	defaultMin      = 2
	defaultLifetime = 90 * 24 * time.Hour
)

// Tuner reads a history. It must be used by one goroutine.
type Tuner struct {
	options Options
	reader  *event.Reader
	engine  *policy.Engine
	record  event.Record
	groups  map[key]*group
	joint   map[string]*joint
	hosts   map[string]*host
	classes map[string]*classCount
	grants  []policy.Grant             // of the policy
	above   map[*event.Process]descent // what the parents of processes say that were seen last
	sum     Sum
	parts   []*group // of one request
	ids     []byte   // of them
}

// Sum counts.
type Sum struct {
	Requests uint64    `json:"requests"`
	Blocked  uint64    `json:"would_be_blocked"`
	Denied   uint64    `json:"denied_by_policy"` // of those, by a deny of the operator's own
	Unsure   uint64    `json:"as_recorded"`      // verdicts that could not be judged again, and were taken as recorded
	First    time.Time `json:"first"`
	Last     time.Time `json:"last"`
	Beyond   uint64    `json:"beyond"` // requests in more groups than are kept
}

// New makes a Tuner.
func New(o Options) *Tuner {
	o.MinCount, o.MinDays = cmp.Or(o.MinCount, defaultMin), cmp.Or(o.MinDays, defaultMin)
	o.Lifetime = cmp.Or(o.Lifetime, defaultLifetime)
	return &Tuner{
		options: o, grants: o.Policy.Grants(), above: map[*event.Process]descent{}, reader: event.NewReader(), engine: policy.NewReplayEngine(o.Policy),
		groups: map[key]*group{}, joint: map[string]*joint{}, hosts: map[string]*host{}, classes: map[string]*classCount{},
	}
}

const (
	// maxGroups bounds the groups. What comes when there are so many is counted, and
	// unexplained. With fewer, the groups of a large fleet do not fit; each takes some
	// kilobytes.
	maxGroups = 4 << 10
	maxHosts  = 64 << 10
	// maxClasses bounds those of a file that somebody made: there are eight.
	maxClasses = 64
)

// Line takes a line of a file of events. Those of a host come in the order in which it
// wrote them, those of different hosts in any. The error is what is wrong with the line:
// it is event.ErrForeign if it is somebody else's.
func (t *Tuner) Line(line []byte) error {
	if err := t.reader.Read(line, &t.record); err != nil {
		return err
	}
	rec := &t.record
	ev := &rec.Event
	counted := !ev.Time.Before(t.options.Since) && (t.options.Until.IsZero() || ev.Time.Before(t.options.Until))
	switch {
	case rec.Document == event.LifecycleChange && counted:
		t.host(ev.Host).changed(ev.State.Action)
	case rec.Document == event.RequestDecision:
		doubt := t.engine.Rejudge(rec, false)
		if doubt.About == policy.TheVerdict {
			ev.Decision.WouldBe, ev.Decision.Rule, ev.Decision.Deny = rec.Decision.WouldBe, rec.Decision.Rule, rec.Decision.Deny
		}
		if counted {
			t.count(doubt)
		}
	}
	return nil
}

// Sum is what was counted so far.
func (t *Tuner) Sum() Sum { return t.sum }

// Seen reports whether there were events of a host.
func (t *Tuner) Seen(hostID string) bool { return hostID != "" && t.hosts[hostID] != nil }

// count counts a request that was judged.
func (t *Tuner) count(doubt policy.Doubt) {
	ev, s := &t.record.Event, &t.sum
	n := ev.Requests()
	s.Requests += n
	if start := ev.Start(); s.First.IsZero() || start.Before(s.First) {
		s.First = start
	}
	if ev.Time.After(s.Last) {
		s.Last = ev.Time
	}
	if doubt.About == policy.TheVerdict {
		s.Unsure += n
	}
	h := t.host(ev.Host)
	h.asked(ev)
	name := ev.Request.Class
	if t.classes[name] == nil && len(t.classes) >= maxClasses {
		name = "others"
	}
	class := t.classes[name]
	if class == nil {
		class = &classCount{}
		t.classes[name] = class
	}
	class.requests += n
	if ev.Decision.WouldBe != event.Deny {
		return
	}
	s.Blocked += n
	class.blocked += n
	if ev.Decision.Deny != "" {
		s.Denied += n
		class.denied += n
		return
	}
	t.group(h, class)
}

// group counts a request that would be refused, for each of those who lack a grant.
func (t *Tuner) group(h *host, class *classCount) {
	ev := &t.record.Event
	requests := ev.Requests()
	why := t.suspicion(ev)
	subjects := ev.Subjects
	if len(subjects) == 0 {
		subjects = nobody
	}
	parts := t.parts[:0]
	for _, subject := range subjects {
		if subject != nil && why == "" {
			if _, ok := t.options.Policy.Granted(subject, ev); ok {
				continue
			}
		}
		k := keyOf(subject, ev, why)
		if subject != nil && why == "" {
			k.by = t.descent(subject).by
		}
		g := t.groups[k]
		if g == nil && len(t.groups) < maxGroups {
			g = newGroup(len(t.groups), k, subject, ev)
			t.groups[k] = g
		}
		if g == nil {
			parts = nil
			break
		}
		g.add(&t.record, subject, h)
		if !slices.Contains(parts, g) {
			parts = append(parts, g)
		}
	}
	switch len(parts) {
	case 0:
		t.sum.Beyond += requests
		class.beyond += requests
	case 1:
		parts[0].alone += requests
	default:
		t.together(parts, class)
	}
	if parts != nil {
		t.parts = parts
	}
}

var nobody = []*event.Process{nil}

// joint counts requests that several groups have a part in: each must have its grant.
type joint struct {
	groups []*group
	count  uint64
}

func (t *Tuner) together(parts []*group, class *classCount) {
	requests := t.record.Event.Requests()
	slices.SortFunc(parts, func(a, b *group) int { return cmp.Compare(a.id, b.id) })
	ids := t.ids[:0]
	for _, g := range parts {
		ids = binary.AppendUvarint(ids, uint64(g.id))
	}
	t.ids = ids
	j := t.joint[string(ids)]
	if j == nil {
		if len(t.joint) >= maxGroups {
			t.sum.Beyond += requests
			class.beyond += requests
			return
		}
		j = &joint{groups: slices.Clone(parts)}
		t.joint[string(ids)] = j
	}
	j.count += requests
}
