// Package policytest tests a policy before a host has it: cases in YAML say who asks
// what, and what is expected to become of it.
//
// A case is judged by the engine that the daemon has. Its request is written as the
// bytes that a client would send, and read and classified by what the relay reads
// with, so that a case cannot claim a class that its path does not have. What a case
// does not say of a process is what a program has that the host's administrator has
// installed and started.
//
// A policy that passes says nothing about how a process would be found: that is
// attribution's, and cases state its result.
package policytest

import (
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// Suffix is how files of cases end, where directories are searched for them.
const Suffix = "_test.yaml"

// File is a file of cases.
type File struct {
	Name string `yaml:"-"`
	// Policy is what the cases are judged by; nil for that of whoever runs them.
	Policy *policy.Config `yaml:"policy"`
	// Subjects are processes that cases name.
	Subjects map[string]Subject `yaml:"subjects"`
	Cases    []Case             `yaml:"cases"`

	source *yamlfile.File
}

// Case is one question with the answer that is expected.
type Case struct {
	Name    string `yaml:"name"`
	Subject Ref    `yaml:"subject"` // who asks
	// Others have the connection as well: who connects and hands the socket on, or
	// has got it.
	Others []Ref `yaml:"others"`
	// Evidence is whether all who have the connection are known.
	Evidence Evidence `yaml:"evidence"`
	// Request is one or several, each of which is asked by itself.
	Request Requests `yaml:"request"`
	// Before is what happened before, the oldest first.
	Before []Step `yaml:"before"`
	// Mode in which alerts are raised; verdicts are those of enforce.
	Mode *policy.Mode `yaml:"mode"`
	// At is the day on which this happens; today if it is not set.
	At     policy.Date `yaml:"at"`
	Expect Expect      `yaml:"expect"`
}

// Step is a part of what happened before: a request, or if there is none the start of a
// program.
type Step struct {
	Subject Ref           `yaml:"subject"` // who asks in the case, if it is not set
	Request *Request      `yaml:"request"`
	Ago     time.Duration `yaml:"ago"`
	Times   int           `yaml:"times"` // once if it is not set
}

// Evidence is what is known of who has a connection.
type Evidence uint8

const (
	Complete   Evidence = iota
	Incomplete          // somebody else may have it
)

var evidenceNames = [...]string{Complete: "complete", Incomplete: "incomplete"}

// UnmarshalText reads the name of an Evidence.
func (e *Evidence) UnmarshalText(text []byte) error {
	return named(e, "evidence", evidenceNames[:], text)
}

// Expect is what a case expects. What is not set may be anything.
type Expect struct {
	Verdict *Verdict `yaml:"verdict"` // of enforce mode
	// Rule is the one that decides, by rule_id, by name, or by the name of its file
	// without ".toml"; "none" if none must.
	Rule string `yaml:"rule"`
	// Grant is the one that lets the request pass, or those of several subjects;
	// "none" if none must.
	Grant Names  `yaml:"grant"`
	Class string `yaml:"class"` // of the request
	Alert *Alert `yaml:"alert"`
	// Matches are all the rules that match.
	Matches *Names `yaml:"matches"`
	// Reason is a part of it.
	Reason string `yaml:"reason"`
}

// Verdict is allow or deny.
type Verdict uint8

const (
	Allow Verdict = iota
	Deny
)

var verdictNames = [...]string{Allow: "allow", Deny: "deny"}

func (v Verdict) String() string { return verdictNames[v] }

// UnmarshalText reads the name of a Verdict.
func (v *Verdict) UnmarshalText(text []byte) error {
	return named(v, "verdict", verdictNames[:], text)
}

// Alert is which rules raise an alert: any, none, or exactly these.
type Alert struct {
	Any   bool
	Rules Names
}

// Names is one name or several.
type Names []string
