package iptables

import (
	"testing"
	"time"
)

// TestContest is somebody who undoes each repair at once, stops, and begins again.
func TestContest(t *testing.T) {
	now := time.Unix(1000, 0)
	var c Contest
	var gaps []time.Duration
	for range 10 {
		now = now.Add(3*time.Second + c.Gap + 100*time.Millisecond)
		c = c.next(now, now.Add(3*time.Second), []Writer{{1, "nft"}})
		gaps = append(gaps, c.Gap)
	}
	const half = 500 * time.Millisecond
	for i, want := range []time.Duration{0, 0, 0, half, 2 * half, 4 * half, 8 * half, 8 * half, 8 * half, 8 * half} {
		if gaps[i] != want {
			t.Errorf("after round %d looks are %v apart, want %v", i+1, gaps[i], want)
		}
	}
	if !c.Is() || c.Rounds != 10 || !c.Since.Equal(time.Unix(1000, 0).Add(3100*time.Millisecond)) {
		t.Errorf("%+v", c)
	}
	if c.over(c.Last.Add(c.Gap)) || !c.over(c.Last.Add(c.Gap+soon+1)) {
		t.Error("it ends when a repair has lasted")
	}
	if c = c.next(now.Add(time.Minute), now.Add(time.Minute), nil); c.Is() || c.Gap != 0 || c.Rounds != 1 {
		t.Errorf("after a minute of peace: %+v", c)
	}
}

// TestSlowContest is one repair undone every half minute: each is repaired without a wait.
func TestSlowContest(t *testing.T) {
	now := time.Unix(1000, 0)
	var c Contest
	for range 100 {
		now = now.Add(30 * time.Second)
		if c = c.next(now, now, nil); c.Is() || c.Gap != 0 {
			t.Fatalf("%+v", c)
		}
	}
}

func TestPace(t *testing.T) {
	now := time.Unix(1000, 0)
	var p pace
	spent, began := time.Duration(0), now
	for range 10_000 { // of somebody who changes rules without an end
		const took = 80 * time.Millisecond
		spent += took
		now = now.Add(took)
		wait := p.after(now, took)
		if wait < minGap || wait > maxGap {
			t.Fatalf("waits %v", wait)
		}
		now = now.Add(wait)
	}
	if share := spent.Seconds() / now.Sub(began).Seconds(); share > 1.1/dutyCycle {
		t.Errorf("looks take %.3f of the time", share)
	}
	if wait := p.after(now.Add(time.Hour), 200*time.Millisecond); wait != minGap {
		t.Errorf("after an hour of peace the next look waits %v", wait)
	}
	for range 100 {
		now = now.Add(maxGap)
		if wait := p.after(now, 10*time.Second); wait != maxGap {
			t.Fatalf("after looks that take very long it waits %v", wait)
		}
	}
	if wait := p.after(now.Add(saved+maxGap), time.Millisecond); wait != minGap {
		t.Errorf("what could not be waited is owed: %v", wait)
	}
}

func TestDriftsTogether(t *testing.T) {
	var untold *Drift
	for i := range 40 {
		d := Drift{Times: 1, AtMost: time.Second, Repaired: 1, Found: []Difference{{Problem: "jump missing"}}, By: []Writer{{i, "nft"}},
			Evasions: []Evasion{{Rule: string(rune('a' + i))}}, Before: []Way{{"a", "b"}}, After: []Way{{"a", "c"}}}
		untold = d.after(untold)
	}
	untold = Drift{Before: []Way{{"x", "y"}}, After: []Way{{"x", "z"}}}.after(untold)
	if d := untold; d.Times != 40 || d.Repaired != 40 || d.AtMost != 40*time.Second || len(d.Found) != 1 || len(d.By) != maxWriters ||
		len(d.Evasions) != maxTold || len(d.Before) != maxTold || len(d.After) != maxTold {
		t.Errorf("%+v", d)
	}
}
