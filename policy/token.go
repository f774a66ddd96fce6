package policy

import (
	"slices"

	"github.com/imdsgate/imdsgate/event"
)

// TokensConfig says what follows when a session token is used by somebody else than
// the process to whom it was issued. One of which that is not known, because it was
// issued before the daemon started, is nobody else's.
type TokensConfig struct {
	// Scope is who may use a token beside the process to whom it was issued. Too wide,
	// and a thief who lives in it is not seen; too narrow, and programs that hand
	// their tokens on are.
	Scope event.TokenScope `yaml:"scope"`
	// Action is Alert if it is not set; or nothing, where the rules that are built in
	// are left out. Block refuses guarded requests without a grant, and alerts on
	// others. An action in RulesConfig for the rule itself goes before.
	Action *TokenAction `yaml:"action"`
}

// TokenAction is what follows from the use of somebody else's token.
type TokenAction uint8

const (
	TokenOff TokenAction = iota
	TokenAlert
	TokenBlock
)

var tokenActionNames = []string{TokenOff: "off", TokenAlert: "alert", TokenBlock: "block"}

func (a TokenAction) String() string               { return tokenActionNames[a] }
func (a TokenAction) MarshalText() ([]byte, error) { return []byte(a.String()), nil }
func (a *TokenAction) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(a), "action", tokenActionNames, text)
}

// foreignTokenFile has the rule that the action is about.
const foreignTokenFile = "rules/foreign-token.toml"

// rules gives those that are built in what the setting says of one of them, which
// is loaded for it if they are not.
func (c TokensConfig) rules(builtIn []*Rule) ([]*Rule, error) {
	if c.Action == nil {
		return builtIn, nil
	}
	if *c.Action == TokenOff {
		return slices.DeleteFunc(builtIn, func(r *Rule) bool { return r.File == foreignTokenFile }), nil
	}
	if len(builtIn) == 0 {
		var err error
		if builtIn, err = ParseRules(shipped, foreignTokenFile); err != nil {
			return nil, err
		}
	}
	action := Alert
	if *c.Action == TokenBlock {
		action = Block
	}
	for _, r := range builtIn {
		if r.File == foreignTokenFile {
			r.Action = &action
		}
	}
	return builtIn, nil
}
