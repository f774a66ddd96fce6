// Package event is the record of one observation: what was seen, what the
// rules are asked about, and the line that is written. They are one value, so
// that what a rule saw is what the log says.
//
// An Event is filled by whoever observes, completed by whoever decides, and
// rendered by this package as documents of the Elastic Common Schema: the
// process that started, the connection it made, the decision on its request,
// and an alert for each rule that raised one. All documents come from the one
// table of fields in fields.go, which is also the schema against which rules
// are checked.
package event

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
)

// ECSVersion is the schema that the documents follow.
const ECSVersion = "9.5.0"

// Event is one observation. The zero value is an empty request. It may be
// changed until it is given to a sink, and never after.
type Event struct {
	Kind Kind
	Host *Host // never nil
	Time time.Time

	// Of a request.
	Connection  Connection
	Attribution Attribution
	Subjects    []*Process // the one that decided comes first
	Roles       []string   // of the subjects: "connector", "holder", "writer", ...
	Starts      []*Process // whose start this is the first event to tell of: subjects, and others that a sequence has matched with them
	Request     Request
	Token       Token // of the request, where Request.Token says that there is one
	Response    Response
	Decision    Decision
	Duration    time.Duration // from accept or the end of the previous answer, until the answer was passed on
	Repeats     Repeats

	// Of the daemon itself.
	State State

	// Gaps are those of a document that the event was read from.
	Gaps Gaps
}

// Kind tells what was observed.
type Kind uint8

const (
	Asked     Kind = iota // a request to the metadata service
	Started               // a program was executed, which a rule is about
	Lifecycle             // the daemon started, its policy or mode changed
	Integrity             // somebody or something touched what protects the service
)

// Document is one of the forms in which an Event is rendered, or asked by rules.
type Document uint8

const (
	ProcessStart Document = iota // a program was started
	ConnectionAttempt
	RequestDecision
	Alert
	LifecycleChange
	IntegrityFinding
)

// Host is what does not change while the daemon runs. It must not be changed once it
// is in a document.
type Host struct {
	ID           string // /etc/machine-id
	Name         string
	BootID       string
	Architecture string
	Kernel       string
	OSName       string
	OSVersion    string
	OSPlatform   string // ID of os-release(5)
	AgentID      string
	Version      string // of imdsgate
	Namespace    string // of the data streams; "" is "default"
	Layout       Layout // of the data streams

	written atomic.Pointer[[]written]
}

// Layout says in which data streams the starts of processes and the connections are.
type Layout uint8

const (
	// Own is streams of our own: imdsgate.process and imdsgate.network.
	Own Layout = iota
	// Defend is those that Elastic's rules about its own agent read,
	// endpoint.events.process and endpoint.events.network, in the namespace imdsgate. Where
	// that agent runs beside us, each alert comes twice.
	Defend
)

func (l Layout) MarshalText() ([]byte, error) {
	if l == Defend {
		return []byte("defend"), nil
	}
	return []byte("own"), nil
}

// UnmarshalText reads "own" or "defend".
func (l *Layout) UnmarshalText(text []byte) error {
	switch string(text) {
	case "own":
		*l = Own
	case "defend":
		*l = Defend
	default:
		return fmt.Errorf("unknown layout %q; there are own and defend", text)
	}
	return nil
}

// Connection is the client's connection before any redirect.
type Connection struct {
	Source      netip.AddrPort
	Destination netip.AddrPort
	Forwarded   bool // from another network namespace or host
	First       bool // this is the first request on it
	Accepted    time.Time
}

// Attribution is how the subjects were found, or why not.
type Attribution struct {
	Level      string // "L0" to "L3"
	Confidence string // none, low, medium, high
	Via        string
	Complete   bool
	Unawaited  bool   // the client left before the evidence was complete, and enforce mode would have made it wait
	Reason     string // why there is no subject, or why the evidence is not complete
	Cookie     uint64
	Took       time.Duration
	Unreadable []int64
}

// Sufficient reports whether enforce mode would have had, as far as can be
// known, the evidence to allow something to somebody.
func (a *Attribution) Sufficient() bool { return a.Complete || a.Unawaited }

// Process is one process in one image, as attribution saw it. It must not be changed
// once rules or documents have it.
type Process struct {
	EntityID   string
	PID        int64
	Start      time.Time
	Executed   time.Time // when it became this program; zero if that is not known, or it was forked as it is
	Executable string
	Name       string
	Thread     string
	Args       []string
	// CommandLine is Args with blanks between them.
	CommandLine string
	WorkingDir  string
	TTY         bool
	Session     int64
	Group       int64

	UserID, RealUserID, SavedUserID string
	UserName                        string
	GroupID                         string // effective
	RealGroupID, SavedGroupID       string
	GroupName                       string
	SupplementalGroups              []string

	Unit      string // system unit
	UserUnit  string
	Cgroup    string
	Container string
	Runtime   string
	Pod       string // UID of the Kubernetes pod

	Unproven     bool // it is not known whether the executable is the host's own file
	HostVerified bool // the executable is the host's own file
	RootOwned    bool // and only root can change it
	Loader       bool // and it is a dynamic loader
	Deleted      bool
	Known        bool // Executable could be read at all
	Earlier      bool // an image that the process has left since it connected
	Swapped      bool // /proc/PID/exe named another file than the kernel has executed
	Ended        bool // the process is gone; nothing but the program is known
	Gaps         Gaps // of the document that it was read from; its own, and GapAncestors

	Parent    *Process // that forked it, as it was then, where Ancestry says "birth"
	ParentNow *Process // if another: the one that adopted it
	Ancestry  string   // how Parent is known: "birth", "snapshot", "present"; "" if it is not

	clean   atomic.Pointer[[]string] // Args, redacted
	written atomic.Pointer[[]written]
	kept    atomic.Value
}

// Keep leaves something with the process that can be found out from it alone, for as
// long as the process is remembered. It takes the place of what was kept before, and
// must be of the same type.
func (p *Process) Keep(v any) { p.kept.Store(v) }

// Kept is what was kept last, or nil.
func (p *Process) Kept() any { return p.kept.Load() }

// redactedArgs are the arguments as documents have them. They are redacted once,
// since that takes long, and a process is in many documents.
func (p *Process) redactedArgs() []string {
	if clean := p.clean.Load(); clean != nil {
		return *clean
	}
	clean := RedactArgs(p.Args)
	p.clean.Store(&clean)
	return clean
}

// Request is what was asked.
type Request struct {
	Method    string
	Target    string // as sent
	Path      string // resolved
	Class     string
	Guarded   bool // one of the classes that policy keeps from matched and unattributed callers
	Version   string
	HTTP      string // "1.0", "1.1"
	Host      string
	UserAgent string
	Bytes     int64 // of head and body
	Token     bool  // carries an IMDSv2 token: the API of version 2
	Forwarded bool  // carries X-Forwarded-For, Forwarded, X-Forwarded-Host or Via
	HostIsOdd bool  // Host is a public name: a sign of DNS rebinding
	Evasive   bool  // spelled as no client spells it
	Container bool  // to an endpoint for tasks and pods, which knows no tokens
	Malformed string
	Read      time.Time // when it was there
}

// API is the version of the service's API that the request is of: v1, v2, or container
// at an endpoint for tasks and pods. It is "" where there is no request to speak of.
func (r *Request) API() string {
	switch {
	case r.Malformed != "":
		return ""
	case r.Container:
		return "container"
	case r.Token || r.Class == "token":
		return "v2"
	}
	return "v1"
}

// Response is what the client got.
type Response struct {
	Status      int64 // 0: no answer
	Bytes       int64
	Refused     bool // by us
	Failed      string
	AccessKeyID string
	Expiration  time.Time
	Took        time.Duration // from when the request was passed on until the answer was passed back; 0 if it was not
}

// Verdict is what became of a request, or would have.
type Verdict uint8

const (
	Allow Verdict = iota
	Deny
)

func (v Verdict) String() string {
	if v == Deny {
		return "deny"
	}
	return "allow"
}

// Decision is what policy said.
type Decision struct {
	Mode    string // audit, enforce
	Verdict Verdict
	// WouldBe is the verdict in enforce mode. In audit mode the two may differ.
	WouldBe Verdict
	Reason  string // for a person, one line
	Rule    *Rule  // that decided; nil if none did
	Latched bool   // the rule has blocked the process before, and need not match now
	Deny    string // of the policy, that decided
	Grant   string // that decided
	// Operator is the ID of an operator's decision that decided.
	Operator string
	Matches  []Match
	Took     time.Duration // from when the request was there
}

// Match is one rule that one subject matched.
type Match struct {
	Rule    *Rule
	Subject *Process
	Action  string // log, alert, block
	Literal bool   // as the rule is written
	Bound   bool   // its conditions hold for the process that owns the connection
	Alert   bool   // an alert is raised for it
}

// Rule is what an event says of a rule. It must not be changed once it is in a document.
type Rule struct {
	ID        string
	Name      string
	Ruleset   string
	Version   string
	Severity  string // low, medium, high, critical
	RiskScore int64
	Reference string
	Threat    []Threat

	written atomic.Pointer[[]written]
}

// Threat is one tactic with its techniques, of the framework that the rule
// names (MITRE ATT&CK).
type Threat struct {
	Framework         string
	TacticID          string
	TacticName        string
	TechniqueIDs      []string
	TechniqueNames    []string
	SubtechniqueIDs   []string
	SubtechniqueNames []string
}

// State is an event of the daemon itself.
type State struct {
	Action   string // "daemon-started", "redirect-rule-removed"
	Type     string // ECS event.type: change, info, deletion, ...
	Message  string
	Reason   string
	Failed   bool
	Mode     string
	Previous string // mode
	Policy   string // digest
	Rules    int64
	Grants   int64
	Level    string // of attribution
	Actor    Actor  // who has had it done; zero if nobody has
	Decision string // ID of the operator's decision that it is about
	Until    time.Time
	// Suppressed is how many events are missing, of events-suppressed.
	Suppressed int64
	// File is the one that it is about; zero if it is about none.
	File File
}

// Actor is who has asked the daemon for something, or has changed what is the daemon's,
// as the kernel knows him.
type Actor struct {
	UserID   string // "" if there is none, or it is not known
	UserName string
	Login    string // name under which he logged in, before he became another user
	PID      int64
	// The rest is what was read of the process while it lived.
	Name        string // that the process gave itself
	Executable  string
	CommandLine string
	Parent      string // executable
}

// File is a file that the daemon has read and that is another now.
type File struct {
	Path     string
	SHA256   string // "" if there is none any more
	Loaded   string // SHA-256 of what the daemon has read; "" if it has not
	Modified time.Time
	UID      string
	Owner    string
	Mode     string // as in 0644
}

// SeverityNumber gives event.severity as Kibana's alerts have it: 21, 47, 73
// or 99, and no other value maps.
func SeverityNumber(name string) (int64, error) {
	switch name {
	case "low":
		return 21, nil
	case "medium":
		return 47, nil
	case "high":
		return 73, nil
	case "critical":
		return 99, nil
	}
	return 0, fmt.Errorf("unknown severity %q; there are low, medium, high, critical", name)
}
