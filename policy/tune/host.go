package tune

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// host is what is known of one whose events were read.
type host struct {
	name       string
	requests   uint64
	days       map[int32]struct{}
	last       time.Time
	level      string // the lowest of attribution
	suppressed uint64 // times that events were missing
}

// host finds one. Those beyond the bound are one.
func (t *Tuner) host(h *event.Host) *host {
	id := h.ID
	if t.hosts[id] == nil && len(t.hosts) >= maxHosts {
		id = ""
	}
	known := t.hosts[id]
	if known == nil {
		known = &host{name: cmp.Or(h.Name, h.ID), days: map[int32]struct{}{}}
		t.hosts[id] = known
	}
	return known
}

func (h *host) asked(ev *event.Event) {
	h.requests += ev.Requests()
	if len(h.days) < maxDays {
		h.days[dayOf(ev.Time)] = struct{}{}
	}
	if ev.Time.After(h.last) {
		h.last = ev.Time
	}
	if level := ev.Attribution.Level; level != "" && (h.level == "" || level < h.level) {
		h.level = level
	}
}

// changed takes an event of the daemon itself.
func (h *host) changed(action string) {
	if action == "events-suppressed" {
		h.suppressed++
	}
}

// silence is how long before the newest event of all a host must have been heard of.
const silence = 36 * time.Hour

// HostGap is why less is known of a host than of the others.
type HostGap struct {
	Host string `json:"host"`
	Why  string `json:"why"`
}

func (t *Tuner) gaps() []HostGap {
	var all []HostGap
	var most string
	var newest time.Time
	for _, h := range t.hosts {
		most = max(most, h.level)
		if h.last.After(newest) {
			newest = h.last
		}
	}
	for _, id := range slices.Sorted(maps.Keys(t.hosts)) {
		h := t.hosts[id]
		var why []string
		if h.suppressed > 0 {
			why = append(why, fmt.Sprintf("events are missing: it said so %s", times(h.suppressed)))
		}
		if h.level < most && h.requests > 0 {
			why = append(why, fmt.Sprintf("attribution at level %s, elsewhere %s: less is known of who asked", cmp.Or(h.level, "not told"), most))
		}
		if h.requests > 0 && newest.Sub(h.last) > silence {
			why = append(why, fmt.Sprintf("nothing since %s", h.last.UTC().Format("2006-01-02 15:04")))
		}
		if len(why) > 0 {
			all = append(all, HostGap{h.name, strings.Join(why, "; ")})
		}
	}
	slices.SortStableFunc(all, func(a, b HostGap) int { return strings.Compare(a.Host, b.Host) })
	return all
}

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
