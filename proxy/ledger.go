package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// Issuance is one line of the ledger of role credentials: which key was handed out
// to whom, how often, and what policy said. It has neither the secret key nor the
// session token.
type Issuance struct {
	AccessKeyID string // "" of a part of the document (206) in which it is not
	Expiration  time.Time
	First, Last time.Time
	Count       uint64
	Source      netip.Addr
	To          []Recipient // all that had a part in the connection; none if nobody is known
	Decision    event.Decision
}

// Recipient is a process to which credentials were handed out, as it was then.
type Recipient struct {
	Role       string // "holder", "connector", ...
	EntityID   string
	PID        int64
	Executable string // cut at maxLedgerText
	User       string
	Unit       string // or cgroup, cut likewise
}

const (
	// maxIssuances bounds the ledger: one line for each program that got a key. Lower,
	// and who starts many programs that may have credentials pushes his own first one
	// out sooner; higher takes more memory, 700 bytes for each.
	maxIssuances = 4 << 10
	// maxLedgerText bounds what a process can make us keep by a long name.
	maxLedgerText = 256
	maxRecipients = 8
)

// ledger remembers to whom credentials were handed out. Its methods may be called
// from any goroutine.
type ledger struct {
	mu    sync.Mutex // guards lines
	lines *shares[lineKey, *Issuance]
}

// lineKey is what makes one line of many requests: a program that asks for the same
// key again does not push out others.
type lineKey struct {
	accessKeyID, entity, executable string
	source                          netip.Addr // of one that is not known
	verdict, wouldBe                event.Verdict
	rule, grant                     string
}

func newLedger() *ledger { return &ledger{lines: newShares[lineKey, *Issuance](maxIssuances)} }

func (l *ledger) add(o owner, ev *event.Event, now time.Time) {
	d := &ev.Decision
	key := lineKey{accessKeyID: ev.Response.AccessKeyID, verdict: d.Verdict, wouldBe: d.WouldBe, grant: d.Grant}
	if d.Rule != nil {
		key.rule = d.Rule.ID
	}
	if len(ev.Subjects) > 0 {
		key.entity, key.executable = ev.Subjects[0].EntityID, short(ev.Subjects[0].Executable)
	}
	if key.entity == "" {
		key.source = ev.Connection.Source.Addr()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.lines.get(key); e != nil {
		e.value.Last = now
		e.value.Count++
		return
	}
	line := &Issuance{
		AccessKeyID: ev.Response.AccessKeyID, Expiration: ev.Response.Expiration, First: now, Last: now, Count: 1,
		Source: ev.Connection.Source.Addr(),
		// Not its matches, which keep processes alive.
		Decision: event.Decision{Mode: d.Mode, Verdict: d.Verdict, WouldBe: d.WouldBe, Reason: short(d.Reason), Rule: d.Rule, Grant: d.Grant},
	}
	for i, p := range ev.Subjects[:min(len(ev.Subjects), maxRecipients)] {
		line.To = append(line.To, Recipient{
			Role: ev.Roles[i], EntityID: p.EntityID, PID: p.PID, Executable: short(p.Executable), User: cmp.Or(p.UserName, p.UserID), Unit: short(cmp.Or(p.Unit, p.Cgroup)),
		})
	}
	over := line.Expiration
	if over.IsZero() {
		over = now.Add(maxTokenAge) // as long as a role's live
	}
	l.lines.add(o, key, line, over, now)
}

func short(text string) string {
	if len(text) > maxLedgerText {
		return strings.Clone(text[:maxLedgerText])
	}
	return text
}

// Issued lists to whom the key with this id was handed out, or all keys for "", the
// latest first, and counts what was forgotten before it had expired.
func (p *Proxy) Issued(accessKeyID string) (lines []Issuance, forgotten uint64) {
	l := p.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.lines.entries {
		if accessKeyID == "" || e.value.AccessKeyID == accessKeyID {
			lines = append(lines, *e.value)
		}
	}
	slices.SortFunc(lines, func(a, b Issuance) int { return b.Last.Compare(a.Last) })
	return lines, l.lines.forgotten
}
