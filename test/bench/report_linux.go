package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// report is a whole run. Times are in microseconds, CPU in seconds per 10,000 requests. A ratio that could not be taken
// is 0.
type report struct {
	Machine    machine
	Peers      []string // names and versions
	Notes      []string
	Rounds     int
	N          int // turns of a block with one client
	Think      time.Duration
	Blocks     int
	Busy       int // blocks that began on a busy machine
	Modes      []result
	Memory     []memory
	Gates      []gateStatus
	Wrong      int
	FirstWrong string `json:",omitempty"`
}

type memory struct {
	Target       string
	Idle, Loaded int64 // bytes
}

// gateStatus is what a daemon says of itself at the end.
type gateStatus struct {
	Target     string
	Level      string // of attribution
	Rules      int
	Requests   uint64
	Events     uint64 // written
	Dropped    uint64
	Searches   uint64  // of the whole host
	LastSearch float64 // seconds that the last of them took
}

// result is one mode at all targets.
type result struct {
	Mode    kind
	Clients int
	Targets []targetResult
}

type targetResult struct {
	Target      string
	P50         float64 // median of the rounds'
	P90         float64 // of all turns, as the following
	P99, P999   float64
	Added       float64 // to direct's p50 of the same round, median
	PerSecond   float64 // requests, median of the rounds
	CPU         float64 // median of the rounds
	AddedToPeer float64 `json:",omitempty"` // Added as a multiple of haproxy's, median of the rounds
	RateToPeer  float64 `json:",omitempty"`
	CPUToPeer   float64 `json:",omitempty"`
	P99ToPeer   float64 `json:",omitempty"` // P99 as a multiple of haproxy's, as the following
	P999ToPeer  float64 `json:",omitempty"`
	Low, High   float64 `json:",omitempty"` // quartiles of what AddedToPeer is the median of
	Turns       int
	Wrong       int
	FirstWrong  string `json:",omitempty"`
	Blocks      []block
}

// block is one target's part of one round.
type block struct {
	P50, P90, P99 float64
	PerSecond     float64
	CPU           float64
	Wrong         int
	FirstWrong    string `json:",omitempty"`
	took          []time.Duration
}

// count notes wrong answers, also those before anything is measured.
func (t *targetResult) count(b block) {
	if t.Wrong += b.Wrong; t.FirstWrong == "" {
		t.FirstWrong = b.FirstWrong
	}
}

func newBlock(k kind, l load, cpu time.Duration) block {
	slices.Sort(l.took)
	b := block{P50: quantile(l.took, .5), P90: quantile(l.took, .9), P99: quantile(l.took, .99), Wrong: l.wrong, took: l.took}
	if requests := float64(len(l.took) * k.requests()); requests > 0 {
		b.PerSecond = requests / l.time.Seconds()
		b.CPU = cpu.Seconds() / requests * 1e4
	}
	if l.first != nil {
		b.FirstWrong = l.first.Error()
	}
	return b
}

// quantile of sorted times, in microseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	i := min(int(q*float64(len(sorted))), len(sorted)-1)
	return float64(sorted[i]) / float64(time.Microsecond)
}

// middle is the q-quantile of a few numbers; that of none is 0.
func middle(of []float64, q float64) float64 {
	if len(of) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(of))
	at := q * float64(len(s)-1)
	i := int(at)
	if i == len(s)-1 {
		return s[i]
	}
	return s[i] + (s[i+1]-s[i])*(at-float64(i))
}

// reference is the peer that ratios are about.
const reference = "haproxy"

func (r *result) of(name string) *targetResult {
	i := slices.IndexFunc(r.Targets, func(t targetResult) bool { return t.Target == name })
	if i < 0 {
		return nil
	}
	return &r.Targets[i]
}

// complete computes everything from the blocks.
func (r *report) complete() {
	for m := range r.Modes {
		mode := &r.Modes[m]
		base, peer := mode.of(direct), mode.of(reference)
		for i := range mode.Targets {
			t := &mode.Targets[i]
			t.complete(base, peer)
			if peer != nil && peer.Turns > 0 {
				t.P99ToPeer, t.P999ToPeer = t.P99/peer.P99, t.P999/peer.P999
			}
			if r.Wrong += t.Wrong; t.Wrong > 0 && r.FirstWrong == "" {
				r.FirstWrong = fmt.Sprintf("%s, %s, %d clients: %s", t.Target, mode.Mode, mode.Clients, t.FirstWrong)
			}
		}
	}
}

func (t *targetResult) complete(base, peer *targetResult) {
	var p50, rate, cpu, added, addedTo, rateTo, cpuTo []float64
	var all []time.Duration
	for i, b := range t.Blocks {
		if b.P50 == 0 { // nothing was answered
			continue
		}
		all = append(all, b.took...)
		p50, rate, cpu = append(p50, b.P50), append(rate, b.PerSecond), append(cpu, b.CPU)
		floor := base.Blocks[i].P50
		added = append(added, b.P50-floor)
		if peer == nil || peer.Blocks[i].P50 == 0 {
			continue
		}
		// In a round in which the peer seems to add nothing, there is nothing to compare with.
		if cost := peer.Blocks[i].P50 - floor; cost > 0 {
			addedTo = append(addedTo, (b.P50-floor)/cost)
		}
		rateTo, cpuTo = append(rateTo, b.PerSecond/peer.Blocks[i].PerSecond), append(cpuTo, b.CPU/peer.Blocks[i].CPU)
	}
	slices.Sort(all)
	t.Turns = len(all)
	t.P50, t.P90, t.P99, t.P999 = middle(p50, .5), quantile(all, .9), quantile(all, .99), quantile(all, .999)
	t.PerSecond, t.CPU, t.Added = middle(rate, .5), middle(cpu, .5), middle(added, .5)
	t.AddedToPeer, t.Low, t.High = middle(addedTo, .5), middle(addedTo, .25), middle(addedTo, .75)
	t.RateToPeer, t.CPUToPeer = middle(rateTo, .5), middle(cpuTo, .5)
}

// markdown prints the tables.
func (r *report) markdown(w io.Writer) {
	fmt.Fprint(w, r.Machine)
	for _, p := range r.Peers {
		fmt.Fprintf(w, ", %s", p)
	}
	fmt.Fprintf(w, ".\n%d rounds of %d, with %d clients of %d; %d of %d blocks began while the machine was busy.\n",
		r.Rounds, r.N, crowd, max(1, crowdTurns*r.N/crowd)*crowd, r.Busy, r.Blocks)
	if r.Think > 0 {
		fmt.Fprintf(w, "The service waits for %v before each answer.\n", r.Think)
	}
	fmt.Fprintln(w, "p50, added p50 and CPU are medians of the rounds, and × haproxy after them the medians of the rounds' ratios; p90, p99 and p99.9 are of all turns.")
	for _, g := range r.Gates {
		fmt.Fprintf(w, "%s: attribution at level %s, %d rules, %d requests, %d events written, %d dropped, %d searches of the host, the last in %.1f ms.\n",
			g.Target, g.Level, g.Rules, g.Requests, g.Events, g.Dropped, g.Searches, g.LastSearch*1e3)
	}
	for _, n := range r.Notes {
		fmt.Fprintln(w, n)
	}
	for _, m := range r.Modes {
		fmt.Fprintf(w, "\n%s\n\n", m.title())
		if m.Clients == 1 {
			m.latency().print(w)
		} else {
			m.throughput().print(w)
		}
	}
	fmt.Fprintf(w, "\nResident memory in MB, summed over a target's processes:\n\n")
	rows := table{{"", "idle", "after load"}}
	for _, m := range r.Memory {
		rows = append(rows, []string{m.Target, fmt.Sprintf("%.1f", float64(m.Idle)/1e6), fmt.Sprintf("%.1f", float64(m.Loaded)/1e6)})
	}
	rows.print(w)
	fmt.Fprintf(w, "\n%s\n", r.verdict())
}

func (m *result) title() string {
	switch {
	case m.Clients > 1 && m.Mode == kept:
		return fmt.Sprintf("%d clients, a kept connection each; times in µs:", m.Clients)
	case m.Clients > 1:
		return fmt.Sprintf("%d clients, a connection for each request; times in µs:", m.Clients)
	case m.Mode == kept:
		return "One client, one kept connection; times in µs:"
	case m.Mode == sequence:
		return "One client, token and role and credentials on three connections; times in µs, of all three:"
	default:
		return "One client, a connection for each request; times in µs:"
	}
}

func (m *result) latency() table {
	rows := table{{"", "p50", "p90", "p99", "× haproxy", "p99.9", "× haproxy", "added p50", "× haproxy", "(quartiles)", "CPU s per 10,000", "× haproxy"}}
	for _, t := range m.Targets {
		row := []string{t.Target, whole(t.P50), whole(t.P90), whole(t.P99), ratio(t.P99ToPeer), whole(t.P999), ratio(t.P999ToPeer)}
		if t.Target == direct || t.Turns == 0 {
			row = append(row, "", "", "", "", "")
		} else {
			spread := ""
			if t.AddedToPeer != 0 {
				spread = fmt.Sprintf("%.2f to %.2f", t.Low, t.High)
			}
			row = append(row, fmt.Sprintf("%+.0f", t.Added), ratio(t.AddedToPeer), spread, ratio(t.CPU), ratio(t.CPUToPeer))
		}
		rows = append(rows, row)
	}
	return rows
}

func (m *result) throughput() table {
	rows := table{{"", "requests/s", "× haproxy", "p50", "p90", "p99", "CPU s per 10,000", "× haproxy"}}
	for _, t := range m.Targets {
		rows = append(rows, []string{t.Target, whole(t.PerSecond), ratio(t.RateToPeer), whole(t.P50), whole(t.P90), whole(t.P99),
			ratio(t.CPU), ratio(t.CPUToPeer)})
	}
	return rows
}

func whole(x float64) string { return known("%.0f", x) }

func ratio(x float64) string { return known("%.2f", x) }

// known leaves out what could not be measured.
func known(format string, x float64) string {
	if x == 0 {
		return ""
	}
	return fmt.Sprintf(format, x)
}

// goal is the most that audit mode may add to a new connection, as a multiple of what haproxy adds.
const goal = 1.3

func (r *report) verdict() string {
	i := slices.IndexFunc(r.Modes, func(m result) bool { return m.Mode == perRequest && m.Clients == 1 })
	t := r.Modes[i].of(audit)
	if t.AddedToPeer == 0 {
		return "Whether the goal holds cannot be told: there is no haproxy to compare with."
	}
	says := "holds"
	if t.AddedToPeer > goal {
		says = "does not hold"
	}
	return fmt.Sprintf("The goal for now %s: imdsgate (audit) adds %.2f times what haproxy adds to a new connection; at most %.1f are wanted.",
		says, t.AddedToPeer, goal)
}

// table is rows of cells, the first its head.
type table [][]string

// print aligns the columns, so that the Markdown can be read as it is.
func (t table) print(w io.Writer) {
	widths := make([]int, len(t[0]))
	for _, row := range t {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)), 2)
		}
	}
	line := func(row []string) {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-len([]rune(cell)))
			if i == 0 {
				fmt.Fprintf(w, "| %s%s |", cell, pad)
			} else {
				fmt.Fprintf(w, " %s%s |", pad, cell)
			}
		}
		fmt.Fprintln(w)
	}
	line(t[0])
	for i, n := range widths {
		if i == 0 {
			fmt.Fprintf(w, "|-%s-|", strings.Repeat("-", n))
		} else {
			fmt.Fprintf(w, "-%s:|", strings.Repeat("-", n))
		}
	}
	fmt.Fprintln(w)
	for _, row := range t[1:] {
		line(row)
	}
}
