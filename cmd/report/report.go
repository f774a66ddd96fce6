// Package report has the answers that the daemon gives to an operator, in the
// form in which they travel.
package report

import (
	"time"

	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/firstseen"
)

// Status is what `imdsgate status` shows.
type Status struct {
	Version     string      `json:"version"`
	PID         int         `json:"pid"`
	Since       time.Time   `json:"since"`
	Mode        string      `json:"mode"`
	Modes       Modes       `json:"modes"`
	Decisions   Decisions   `json:"decisions"`
	Policy      Policy      `json:"policy"`
	Redirect    Redirect    `json:"redirect"`
	SelfTest    SelfTest    `json:"self_test"`
	Attribution Attribution `json:"attribution"`
	Requests    Requests    `json:"requests"`
	Events      Events      `json:"events"`
	// SequencesEvicted is how often a sequence has given up what it waited with, for want
	// of room.
	SequencesEvicted uint64 `json:"sequences_evicted"`
	// FirstSeen is what rules of the type new_terms remember.
	FirstSeen firstseen.Stats `json:"first_seen"`
	Metrics   Metrics         `json:"metrics"`
	Process   Process         `json:"process"`
	Files     Files           `json:"files"`
}

// HopLimit is how far session tokens come from the service.
type HopLimit struct {
	Beyond bool `json:"beyond_host"` // the instance's hop limit is 2 or more
}

// IMDSv1 is whether the service answers without a session token.
type IMDSv1 struct {
	Answered bool `json:"answered"` // tokens are optional
}

// Files are what the daemon has read, and itself.
type Files struct {
	Loaded  []File   `json:"loaded"`
	Changed []File   `json:"changed,omitempty"` // that are not what was loaded
	Exposed []string `json:"exposed,omitempty"` // that others than root can change
}

// File is one of them.
type File struct {
	Path     string    `json:"path"`
	SHA256   string    `json:"sha256,omitempty"` // "" if there is none any more
	Owner    string    `json:"owner,omitempty"`
	Modified time.Time `json:"modified,omitzero"`
}

// Modes is what `imdsgate mode` shows.
type Modes struct {
	Mode       policy.Mode `json:"mode"`
	Since      time.Time   `json:"since"`
	Configured policy.Mode `json:"configured"`
	Set        *SetMode    `json:"set,omitempty"`   // nil if it is the configured one
	Error      string      `json:"error,omitempty"` // why it is not as it should be, or not kept beyond a restart
}

// SetMode is a mode that an operator has set.
type SetMode struct {
	Mode policy.Mode `json:"mode"`
	// Configured is what the configuration asked for then.
	Configured policy.Mode  `json:"configured"`
	Since      time.Time    `json:"since"`
	Until      time.Time    `json:"until,omitzero"` // zero if it holds until it is changed
	By         policy.Actor `json:"by"`
	Reason     string       `json:"reason"`
}

// Decisions are those of operators.
type Decisions struct {
	All   []policy.Decision `json:"decisions"`
	Error string            `json:"error,omitempty"` // why they are not kept beyond a restart, or were not taken up
}

// Decided is what came of a change of decisions.
type Decided struct {
	Decision *policy.Decision  `json:"decision,omitempty"` // that was added
	Replaced *policy.Decision  `json:"replaced,omitempty"` // by it
	Deleted  []policy.Decision `json:"deleted,omitempty"`
	Notes    []string          `json:"notes,omitempty"` // what the operator should know
}

// Reload is what a reload of the configuration has changed.
type Reload struct {
	// Refused is why there was none: with file, line and caret, if it is about the files.
	Refused string   `json:"refused,omitempty"`
	Before  Policy   `json:"before"`
	After   Policy   `json:"after"`
	Changed []string `json:"changed"` // one line for each rule, grant and deny that came, went or differs, and for the mode
	// Restart names what is changed in the files and holds from the next start on.
	Restart []string `json:"restart,omitempty"`
}

// Policy is the policy in force.
type Policy struct {
	Name     string `json:"name,omitempty"`
	Revision string `json:"revision,omitempty"`

	Posture string   `json:"posture"`
	Digest  string   `json:"digest"`
	Rules   []Rule   `json:"rules"`
	Skipped int      `json:"rules_skipped"` // files that were refused
	Grants  []string `json:"grants"`
	Denies  []string `json:"denies"`
	// Expiring are the grants that end within two weeks, or have ended.
	Expiring []Expiring `json:"grants_expiring,omitempty"`
}

// Expiring is a grant with the last day on which it holds.
type Expiring struct {
	Name    string `json:"name"`
	Expires string `json:"expires"`
}

// Rule is one rule in force.
type Rule struct {
	ID         string   `json:"id"`
	Name       string   `json:"name"`
	Version    string   `json:"version,omitempty"`
	File       string   `json:"file"`
	Exclusions []string `json:"exclusions_that_do_not_excuse,omitempty"`
}

// Foreign is a rule of somebody else, and what to do about it.
type Foreign struct {
	Message string `json:"message"`
	Fix     string `json:"fix"`
}

func (f Foreign) String() string { return f.Message + ": " + f.Fix }

// Redirect is whether traffic comes to the daemon.
type Redirect struct {
	Installed   bool      `json:"installed"`
	Backend     string    `json:"backend,omitempty"`
	Covered     []string  `json:"covered"`
	Differences []string  `json:"differences,omitempty"`
	Locks       []Foreign `json:"locks,omitempty"`
	// Evasions are rules of others by which packets go past the redirect.
	Evasions []Foreign `json:"evasions,omitempty"`
	// Contested says that somebody changes it again and again; "" if nobody does.
	Contested string `json:"contested,omitempty"`
	// Ways are how packets get from here to the service. A change is an event.
	Ways    []string `json:"ways,omitempty"`
	Notes   []string `json:"notes,omitempty"`
	Repairs uint64   `json:"repairs"`
	Error   string   `json:"error,omitempty"`
}

// SelfTest is what came of requests of the daemon's own to the metadata service, which
// it answers itself.
type SelfTest struct {
	Passed  *time.Time `json:"passed,omitempty"`   // the last time; nil if none has yet
	NoRoute string     `json:"no_route,omitempty"` // why there is none to make
	Busy    string     `json:"busy,omitempty"`     // why there is no answer yet: the last one stands
	Error   string     `json:"error,omitempty"`
}

// Attribution is what can be known about clients on this host.
type Attribution struct {
	Level     string        `json:"level"`
	Required  string        `json:"require_level,omitempty"`
	Hooks     []Hook        `json:"hooks,omitempty"`
	Uncovered string        `json:"uncovered"`        // what becomes of connections that do not pass through the redirect: deny, report
	Broken    string        `json:"broken,omitempty"` // what the last check found
	History   *History      `json:"process_events,omitempty"`
	Witness   *Witness      `json:"witness,omitempty"`
	Missing   []Missing     `json:"missing,omitempty"`
	Scans     uint64        `json:"full_searches"`
	LastScan  time.Duration `json:"last_full_search_ns"`
	// Descriptors is how many the last full search looked at.
	Descriptors int    `json:"last_full_search_descriptors"`
	Longest     Search `json:"longest_full_search"` // of the last hour or so
	// A search that takes longer than Budget is too late for a request in enforce mode.
	Budget time.Duration `json:"full_search_budget_ns"`
}

// Search is one search of all descriptors of the host.
type Search struct {
	Ended       time.Time     `json:"ended"`
	Took        time.Duration `json:"took_ns"`
	Descriptors int           `json:"descriptors"`
	Largest     Table         `json:"largest_table"`
}

// Table is the descriptors of one process.
type Table struct {
	PID         int `json:"pid"`
	Descriptors int `json:"descriptors"`
}

// Slow reports whether requests that need a full search are, or were within the last
// hour, refused for want of time.
func (a Attribution) Slow() bool { return a.Longest.Took > a.Budget }

// Hook is one program in the kernel.
type Hook struct {
	Name    string `json:"name"`
	Missing string `json:"missing,omitempty"` // why; "" if it is attached
}

// Witness is what the programs in the kernel have counted.
type Witness struct {
	Connects   uint64 `json:"connects"`
	Sockets    uint64 `json:"sockets"` // that have a witness now
	MaxSockets uint64 `json:"max_sockets"`
	// Sockets that have none: no room, their user has more than a quarter of the room,
	// another with the same addresses and ports.
	Full      uint64 `json:"full"`
	OverShare uint64 `json:"over_share"`
	Ambiguous uint64 `json:"ambiguous"`
	// Namespaces are connects from network namespaces that had no room, so that nobody
	// can tell whether they came through the redirect.
	Namespaces uint64 `json:"namespaces"`
	// StillBound are those that are bound to a device and could not be unbound.
	StillBound uint64 `json:"still_bound"`
	// Lost are executions, clones, writes and sightings that were not kept.
	Lost uint64 `json:"lost"`
	// Missing are connections that came here and that nobody was seen to make.
	Missing uint64 `json:"missing"`
}

// History is what the proc connector has told.
type History struct {
	Forks     uint64 `json:"forks"`
	Execs     uint64 `json:"execs"`
	Exits     uint64 `json:"exits"`
	Lost      uint64 `json:"lost"`
	Rebuilds  uint64 `json:"rebuilds"`
	Processes int    `json:"processes"`
	Refused   uint64 `json:"refused"`  // processes for which the table had no room
	Unjudged  uint64 `json:"unjudged"` // executions that the rules were not told of, as too many waited
}

// Missing is a level that this host does not have, and why.
type Missing struct {
	Level  string `json:"level"`
	Reason string `json:"reason"`
}

// Requests counts since the start.
type Requests struct {
	Open           int    `json:"open_connections"`
	Connections    uint64 `json:"connections"`
	Requests       uint64 `json:"requests"`
	Denied         uint64 `json:"denied"`
	WouldDeny      uint64 `json:"would_deny"`
	Malformed      uint64 `json:"malformed"`
	NotRedirected  uint64 `json:"not_redirected"`
	NotForwardable uint64 `json:"not_forwardable"`
	UpstreamFailed uint64 `json:"upstream_failed"`
	Evicted        uint64 `json:"evicted"`
	Throttled      uint64 `json:"throttled"`
	DialledAhead   uint64 `json:"dialled_ahead"` // connections to the service, of which
	DialledUnused  uint64 `json:"dialled_unused"`
	// LinkLocalExceeded is how many packets to link-local services the instance's network
	// interfaces have dropped since they came up; nil where no driver counts them.
	LinkLocalExceeded *uint64 `json:"linklocal_allowance_exceeded,omitempty"`
	Looped            uint64  `json:"looped"`
	// Tokens are the session tokens of which it is known whose they are; Forgotten were
	// those that made room for others before they had expired.
	Tokens    int    `json:"tokens"`
	Forgotten uint64 `json:"tokens_forgotten"`
}

// Events is where they go.
type Events struct {
	Path string `json:"path"`
	sink.Stats
	Journal *Journal `json:"journal,omitempty"` // nil without events.journal
}

// Journal is how events are passed on to journald.
type Journal struct {
	Error  string `json:"error,omitempty"` // why they are not, now
	Missed uint64 `json:"missed"`          // how often events were removed before they were
}

// Metrics is where counters can be read.
type Metrics struct {
	Listen string `json:"listen,omitempty"`
	Error  string `json:"error,omitempty"` // why they cannot
}

// Process is the daemon itself.
type Process struct {
	UID         int    `json:"uid"`
	ResidentMB  uint64 `json:"resident_mb"`
	Descriptors int    `json:"open_descriptors"`
	Goroutines  int    `json:"goroutines"`
}

// Subject is a process as policy sees it.
type Subject struct {
	PID          int64     `json:"pid"`
	EntityID     string    `json:"entity_id"`
	Start        time.Time `json:"start"`
	Executable   string    `json:"executable"`
	Name         string    `json:"name"`
	CommandLine  string    `json:"command_line"`
	WorkingDir   string    `json:"working_directory"`
	User         string    `json:"user"`
	Unit         string    `json:"unit,omitempty"`
	UserUnit     string    `json:"user_unit,omitempty"`
	Cgroup       string    `json:"cgroup"`
	Container    string    `json:"container,omitempty"`
	HostVerified bool      `json:"host_verified"`
	RootOwned    bool      `json:"root_owned"`
	Loader       bool      `json:"loader"`
	Swapped      bool      `json:"swapped,omitempty"`
	Ended        bool      `json:"ended,omitempty"`
	Earlier      bool      `json:"earlier_image,omitempty"`
	Ancestry     string    `json:"ancestry,omitempty"`
	ParentNow    *Subject  `json:"parent_now,omitempty"`
}

// Whois is what `imdsgate whois` shows: who has one connection.
type Whois struct {
	Client     string        `json:"client"`
	Endpoint   string        `json:"endpoint"`
	Forwarded  bool          `json:"forwarded"`
	Level      string        `json:"level"`
	Confidence string        `json:"confidence"`
	Via        string        `json:"via"`
	Complete   bool          `json:"complete"`
	Reason     string        `json:"reason,omitempty"`
	Error      string        `json:"error,omitempty"`
	Took       time.Duration `json:"took_ns"`
	Inode      uint32        `json:"inode"`
	Cookie     uint64        `json:"cookie"`
	Subjects   []Holder      `json:"subjects"`
}

// Holder is one subject of a connection.
type Holder struct {
	Role string `json:"role"`
	Subject
	Ancestors []Subject `json:"ancestors"`
}

// Credentials is what `imdsgate credentials` shows: which keys were handed out to
// whom, the latest first.
type Credentials struct {
	Since     time.Time  `json:"since"`     // what was handed out before is not known
	Forgotten uint64     `json:"forgotten"` // that had not expired
	Issued    []Issuance `json:"issued"`
}

// Issuance is one key that one program got, perhaps several times.
type Issuance struct {
	// AccessKeyID is empty where a part of the document was handed out in which it is
	// not.
	AccessKeyID string      `json:"access_key_id,omitempty"`
	Expiration  *time.Time  `json:"expiration,omitempty"`
	First       time.Time   `json:"first"`
	Last        time.Time   `json:"last"`
	Count       uint64      `json:"count"`
	Source      string      `json:"source_ip"`
	To          []Recipient `json:"processes"` // none if nobody is known
	Mode        string      `json:"mode"`
	Verdict     string      `json:"verdict"`
	WouldBe     string      `json:"audit_verdict"`
	Rule        string      `json:"rule,omitempty"`
	RuleID      string      `json:"rule_id,omitempty"`
	Grant       string      `json:"grant,omitempty"`
	Reason      string      `json:"reason,omitempty"`
}

// Recipient is a process that had a part in the connection.
type Recipient struct {
	Role       string `json:"role"`
	EntityID   string `json:"entity_id"`
	PID        int64  `json:"pid"`
	Executable string `json:"executable"`
	User       string `json:"user"`
	Unit       string `json:"unit"`
}
