package iptables

import "time"

// A Contest is about somebody who changes our rules again and again.
type Contest struct {
	Rounds int // how often, the last one included
	Since  time.Time
	Last   time.Time
	By     []Writer // the last one
	Gap    time.Duration
}

const (
	// A repair that does not last soon is the next round of a contest. From contested on it is one, so that other
	// programs which start, and rewrite their rules a few times, are none.
	soon      = 5 * time.Second
	contested = 4

	// In a contest looks are farther and farther apart, since neither gives up and each repair costs both some tenths
	// of a second of a processor. Farther than maxBackOff, and giving way would be worth the other's while.
	minBackOff = 500 * time.Millisecond
	maxBackOff = 4 * time.Second
)

// Is reports whether it is one: a repair that does not last once or twice is none.
func (c Contest) Is() bool { return c.Rounds >= contested }

// next is the contest after one more drift, which a look has found that began and ended at these times: on a busy host
// it takes seconds.
func (c Contest) next(began, ended time.Time, by []Writer) Contest {
	if c.over(began) {
		c = Contest{Since: began}
	}
	c.Rounds++
	c.Last, c.By, c.Gap = ended, by, 0
	if c.Rounds >= contested {
		c.Gap = min(minBackOff<<min(c.Rounds-contested, 10), maxBackOff)
	}
	return c
}

func (c Contest) over(now time.Time) bool { return now.Sub(c.Last) > soon+c.Gap }

// pace spaces looks so that in the long run they take a twentieth of the time, but not farther than maxGap: during it
// a flush goes unseen. What was saved up lets several come without a wait.
type pace struct{ paid time.Time }

const (
	dutyCycle = 20
	saved     = 20 * time.Second
	minGap    = 50 * time.Millisecond
	maxGap    = 2 * time.Second
)

// after is how long to wait after a look that took so long.
func (p *pace) after(now time.Time, took time.Duration) time.Duration {
	if p.paid.Before(now) {
		p.paid = now
	}
	p.paid = p.paid.Add(dutyCycle * took)
	wait := p.paid.Sub(now) - saved
	if wait > maxGap { // longer is not waited, so that it is not owed either
		p.paid = now.Add(saved + maxGap)
	}
	return min(max(wait, minGap), maxGap)
}
