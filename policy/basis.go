package policy

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// Basis is what a verdict rests on: the step of judging that decided, and what there.
type Basis struct {
	Step Step   `json:"step"`
	Name string `json:"name,omitempty"` // of the rule, grant or deny; or why nobody is known
	ID   string `json:"id,omitempty"`   // of the rule
}

// Step is a step of judging. They are taken in order, and the first that decides ends
// it.
type Step uint8

const (
	StepMalformed Step = iota
	StepDeny           // of the policy, or an operator's decision
	StepDecision       // of an operator, that allows
	StepGrant
	StepRule
	StepUnattributed
	StepClass // the posture of the class, of which one lets the request pass
)

var stepNames = []string{StepMalformed: "malformed", StepDeny: "deny", StepDecision: "decision", StepGrant: "grant", StepRule: "rule", StepUnattributed: "unattributed", StepClass: "class"}

func (s Step) String() string               { return stepNames[s] }
func (s Step) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
func (s *Step) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(s), "step", stepNames, text)
}

// How reasons begin where neither a rule nor anything with a name has decided.
const (
	unattributed  = "unattributed: "
	postureStrict = "posture strict: "
)

// BasisOf tells on what the verdict of enforce mode rests, of a decision on a request
// that was made now or is read back.
func BasisOf(q *event.Request, d *event.Decision) Basis {
	switch {
	case q.Malformed != "":
		return Basis{Step: StepMalformed, Name: q.Malformed}
	case d.Operator != "" && d.WouldBe == event.Deny:
		return Basis{Step: StepDeny, Name: "decision " + d.Operator}
	case d.Operator != "":
		return Basis{Step: StepDecision, Name: d.Operator}
	case d.Deny != "":
		return Basis{Step: StepDeny, Name: d.Deny}
	case d.WouldBe == event.Allow && d.Grant != "":
		return Basis{Step: StepGrant, Name: d.Grant}
	case d.WouldBe == event.Deny && d.Rule != nil:
		return Basis{Step: StepRule, Name: d.Rule.Name, ID: d.Rule.ID}
	case d.WouldBe == event.Deny && strings.HasPrefix(d.Reason, unattributed):
		return Basis{Step: StepUnattributed, Name: strings.TrimPrefix(d.Reason, unattributed)}
	case d.WouldBe == event.Deny:
		return Basis{Step: StepClass, Name: Strict.String()}
	}
	return Basis{Step: StepClass, Name: Default.String()}
}

// String is for people.
func (b Basis) String() string {
	switch b.Step {
	case StepMalformed:
		return "the request is malformed: " + b.Name
	case StepUnattributed:
		return "nobody is known for certain: " + cmp.Or(b.Name, "no reason is given")
	case StepClass:
		return "posture " + b.Name
	}
	return fmt.Sprintf("%s %q", b.Step, b.Name)
}
