package event

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Token is what is known of the session token that a request carries. The zero
// value is a token of which nothing is known: it was issued before the daemon
// started, or past it, or so many were issued since that it was forgotten.
type Token struct {
	// Issuers are the processes to whom it was issued: all that had a part in that
	// connection. Nobody knows whose it is when there are none.
	Issuers []*Issuer
	Issued  time.Time
	Expires time.Time
	Scope   TokenScope // of the policy that judges; set by whoever judges

	told []tie // what a document says of each subject, instead of Issuers
}

// tie is how a process is tied to the issuer that is closest to it.
type tie struct {
	process *Process
	issuer  *Issuer // nil if none is known
	scope   TokenScope
	tied    bool
}

// TokenScope is how far from the process to whom it was issued a token is still
// used by its own. Each is a part of the one before it.
type TokenScope uint8

const (
	// ScopeUnit is ScopeParent, or the same system unit, or else the same cgroup.
	ScopeUnit TokenScope = iota
	// ScopeParent is ScopeProcess, or what descends from the issuer or has started it,
	// or a process of the same user with a common parent: `T=$(curl ...); curl -H
	// "...: $T"`.
	ScopeParent
	// ScopeProcess is the process itself, whatever program it is now.
	ScopeProcess
)

var scopeNames = [...]string{ScopeUnit: "unit", ScopeParent: "parent", ScopeProcess: "process"}

func (s TokenScope) String() string               { return scopeNames[s] }
func (s TokenScope) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads a scope as a policy has it.
func (s *TokenScope) UnmarshalText(text []byte) error {
	i := slices.Index(scopeNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("unknown scope %q; there are %s", text, strings.Join(scopeNames[:], ", "))
	}
	*s = TokenScope(i)
	return nil
}

// Issuer is a process to whom a token was issued. It outlives the process, and so
// has no more than is needed to know it and its relatives again. It is never
// changed.
type Issuer struct {
	EntityID   string
	PID        int64
	Executable string // cut at maxIssuerPath
	UserID     string
	UserName   string
	Unit       string   // or cgroup
	Lineage    []string // entity ids of its parents, nearest first; see lineage
}

const (
	// maxIssuerPath bounds what a process can make us keep by a long name. The event
	// of the request for the token has the whole of it.
	maxIssuerPath = 256
	// maxLineage is how many parents are looked at. Fewer, and a worker far below the
	// process that asked is a stranger to it; more, and each token takes more memory.
	maxLineage = 16
	// near is how many generations up two processes may have their common parent: one
	// for siblings, two where a shell runs one of them in a pipe or a subshell.
	near = 2
)

// NewIssuer keeps what is needed of a process.
func NewIssuer(p *Process) *Issuer {
	i := &Issuer{EntityID: p.EntityID, PID: p.PID, Executable: p.Executable, UserID: p.UserID, UserName: p.UserName, Unit: unitOf(p)}
	if len(i.Executable) > maxIssuerPath {
		i.Executable = strings.Clone(i.Executable[:maxIssuerPath])
	}
	for a := p.Parent; a != nil && related(a) && len(i.Lineage) < maxLineage; a = a.Parent {
		i.Lineage = append(i.Lineage, a.EntityID)
	}
	return i
}

// related reports whether to have this parent says anything about a process: that
// of the host's first process does not, which has started every service.
func related(parent *Process) bool { return parent.PID != 1 && parent.EntityID != "" }

// unitOf is where a process runs, as its own user cannot choose it; "" when that is
// nowhere in particular.
func unitOf(p *Process) string {
	switch {
	case p.Unit != "":
		return p.Unit
	case p.Cgroup == "/":
		return ""
	}
	return p.Cgroup
}

// scope is the narrowest scope in which the token that an issuer got is the
// process's own; false if there is none.
func (i *Issuer) scope(p *Process) (s TokenScope, ok bool) {
	switch {
	case p.EntityID == "":
		return 0, false
	case p.EntityID == i.EntityID:
		return ScopeProcess, true
	case i.relative(p):
		return ScopeParent, true
	case i.Unit != "" && i.Unit == unitOf(p):
		return ScopeUnit, true
	}
	return 0, false
}

// relative reports whether a process descends from the issuer or is a near parent of
// it, or is of the same user and has a near parent in common with it. What root's
// servers start for different users are no relatives.
func (i *Issuer) relative(p *Process) bool {
	close := i.Lineage[:min(len(i.Lineage), near)]
	kin := p.UserID == i.UserID && len(close) > 0
	if slices.Contains(close, p.EntityID) {
		return true
	}
	for a, n := p.Parent, 0; a != nil && related(a) && n < maxLineage; a, n = a.Parent, n+1 {
		if a.EntityID == i.EntityID || kin && a.EntityID == close[0] || kin && n < near && slices.Contains(close, a.EntityID) {
			return true
		}
	}
	return false
}

// closest is the issuer to whom a process is tied most closely, and the scope of
// that; or else the first, and false.
func (t *Token) closest(p *Process) (issuer *Issuer, s TokenScope, tied bool) {
	for i := range t.told {
		if tie := &t.told[i]; tie.process == p && p != nil {
			return tie.issuer, tie.scope, tie.tied
		}
	}
	if p == nil || len(t.Issuers) == 0 {
		return nil, 0, false
	}
	issuer = t.Issuers[0]
	for _, i := range t.Issuers {
		if narrower, ok := i.scope(p); ok && (!tied || narrower > s) {
			issuer, s, tied = i, narrower, true
		}
	}
	return issuer, s, tied
}

// Foreign reports whether the token was issued to somebody else than a process and
// its own. It is false when it is not known to whom it was, or who uses it.
func (t *Token) Foreign(p *Process) bool {
	issuer, s, tied := t.closest(p)
	return issuer != nil && (!tied || s < t.Scope)
}
