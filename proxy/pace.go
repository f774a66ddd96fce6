package proxy

import (
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// pace bounds the requests of one caller that reach the service, which shares 1,024
// packets a second with DNS and NTP (AWS, "Amazon DNS quotas") and throttles the whole
// instance when there are too many. A caller is a user; of root, each cgroup, since
// a user may make as many as he likes where some are delegated to him; and of another
// network namespace an address. Who has subordinate uids (newuidmap(1)) is as many
// callers as he has users. The zero value sets no bounds.
type pace struct {
	each  rate.Limit // requests a second; 0 for no bounds
	burst int
	held  time.Duration // heldFor
	heldA time.Duration // heldForA
	owed  time.Duration // owedFor

	mu      sync.Mutex // guards callers
	callers map[part]*rate.Limiter
}

const (
	// heldFor is how long a request waits for its turn in enforce mode, after as much as
	// AttributeIn for its verdict: together less than the 300 ms for which Datadog's agent
	// waits, or the 500 of the SDK for Go v2. Longer, and one that gives up has asked in
	// vain; shorter, and one that would have waited is told to come later.
	heldFor = 150 * time.Millisecond
	// heldForA is that in audit mode, after which it passes: half of what the least patient
	// client waits (a probe of HashiCorp's, 100 ms). Shorter, and it slows down less.
	heldForA = 50 * time.Millisecond
	// owedFor is how far a caller's session tokens may be ahead of his turns. Nobody needs
	// more than one in six hours; less, and the tokens of a user are refused, who has some
	// hundred programs start at once; more, and one that asks for nothing else sends so
	// much more.
	owedFor = 10 * time.Second
	// maxCallers bounds those that are remembered. One that is forgotten before he has
	// his burst again has the rest of it at once.
	maxCallers = 4096
)

func caller(of part) part {
	if of.uid != 0 || !of.known {
		of.cgroup = 0
	}
	return of
}

// hold says how long a request has to wait, and whether that is longer than so long. What
// is takes no place from those that come after it.
func (p *pace) hold(of part, most time.Duration) (wait time.Duration, long bool) {
	if p.each == 0 {
		return 0, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	turn := p.of(of).Reserve()
	if wait = turn.Delay(); wait > most {
		turn.Cancel()
		return most, true
	}
	return wait, false
}

// of is called with p.mu held.
func (p *pace) of(of part) *rate.Limiter {
	of = caller(of)
	l := p.callers[of]
	if l == nil {
		switch {
		case p.callers == nil:
			p.callers = map[part]*rate.Limiter{}
		case len(p.callers) >= maxCallers:
			p.forget()
		}
		l = rate.NewLimiter(p.each, p.burst)
		p.callers[of] = l
	}
	return l
}

// forget makes room: of those who have their whole burst again, to whom it makes no
// difference, or, if these are less than half, of the half that has the most left. It is
// called with p.mu held.
func (p *pace) forget() {
	now := time.Now()
	left := make([]float64, 0, len(p.callers))
	for _, l := range p.callers {
		left = append(left, l.TokensAt(now))
	}
	slices.Sort(left)
	maps.DeleteFunc(p.callers, func(_ part, l *rate.Limiter) bool { return l.TokensAt(now) >= left[len(left)/2] })
}

// paced waits for the turn of a request. It reports false if the caller asks so often
// that it would take too long; in audit mode, where nothing may break, it does not. The
// error says that the connection is over, and that nothing shall be sent for it: one who
// has only ended his half, or closed, may be waiting for the answer.
//
// A request for a session token has its place and does not wait for it: without a token
// the CRT and the SDKs for C++ and Java would ask by IMDSv1 instead.
func (s *session) paced(class imds.Class, enforce bool) (soon bool, err error) {
	p := &s.p.pace
	most := p.heldA
	switch {
	case class == imds.Token:
		most = p.owed
	case enforce:
		most = p.held
	}
	wait, long := p.hold(s.of, most)
	if long {
		s.p.stats.Throttled.Add(1)
		if enforce {
			return false, nil
		}
	}
	if class == imds.Token {
		return true, nil
	}
	for until := time.Now().Add(wait); wait > 0; wait = time.Until(until) {
		err := s.task.Wait(until, s.fromClient(loop.Gone))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return true, nil
		case err != nil:
			return false, err
		case s.client.Look() == loop.Broken:
			return false, errClient
		}
	}
	return true, nil
}
