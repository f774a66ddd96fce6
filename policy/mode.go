package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Mode is what the daemon does with its verdicts.
type Mode uint8

const (
	// Audit lets everything pass and records what Enforce would have done.
	Audit Mode = iota
	// Enforce refuses what is denied.
	Enforce
	// Off takes the redirect away.
	Off
)

var modeNames = []string{Audit: "audit", Enforce: "enforce", Off: "off"}

func (m Mode) String() string               { return modeNames[m] }
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }
func (m *Mode) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(m), "mode", modeNames, text)
}
func (p *Posture) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(p), "posture", postureNames, text)
}
func (a *Action) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(a), "action", actionNames, text)
}
func (a *AlertOn) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(a), "alert_on", alertOnNames, text)
}

// Posture is what becomes of guarded requests that no rule speaks of.
type Posture uint8

const (
	// Default lets them pass if the caller is known.
	Default Posture = iota
	// Strict refuses them unless a grant allows them.
	Strict
)

var postureNames = []string{Default: "default", Strict: "strict"}

func (p Posture) String() string               { return postureNames[p] }
func (p Posture) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Action is what follows from a match of a rule.
type Action uint8

const (
	// Log names the rule in the record of the decision.
	Log Action = iota
	// Alert also raises an alert, if the rule matches as it is written.
	Alert
	// Block also refuses the request in Enforce, if the rule's conditions hold
	// for the process that owns the connection.
	Block
)

var actionNames = []string{Log: "log", Alert: "alert", Block: "block"}

func (a Action) String() string               { return actionNames[a] }
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// AlertOn is which kind of match raises an alert in audit mode.
type AlertOn uint8

const (
	// Literal is the rule as it is written: for a sequence, the process event
	// and then the connection, within the span.
	Literal AlertOn = iota
	// Either is Literal, or its conditions holding for the owner at any age.
	Either
)

var alertOnNames = []string{Literal: "literal", Either: "either"}

func (a AlertOn) String() string               { return alertOnNames[a] }
func (a AlertOn) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

func unmarshal(dst *uint8, what string, names []string, text []byte) error {
	i := slices.Index(names, string(text))
	if i < 0 {
		return fmt.Errorf("unknown %s %q; there are %s", what, text, strings.Join(names, ", "))
	}
	*dst = uint8(i)
	return nil
}
