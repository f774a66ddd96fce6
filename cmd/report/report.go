// Package report has the answers that the daemon gives to an operator, in the
// form in which they travel.
package report

import (
	"time"

	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/policy"
)

// Status is what `imdsgate status` shows.
type Status struct {
	Version     string      `json:"version"`
	PID         int         `json:"pid"`
	Since       time.Time   `json:"since"`
	Mode        string      `json:"mode"`
	Policy      Policy      `json:"policy"`
	Redirect    Redirect    `json:"redirect"`
	Attribution Attribution `json:"attribution"`
	Requests    Requests    `json:"requests"`
	Events      Events      `json:"events"`
	Process     Process     `json:"process"`
}

// Policy is the policy in force.
type Policy struct {
	Posture string   `json:"posture"`
	Digest  string   `json:"digest"`
	Rules   []Rule   `json:"rules"`
	Grants  []string `json:"grants"`
}

// Rule is one rule in force.
type Rule struct {
	ID         string   `json:"id"`
	Name       string   `json:"name"`
	Version    string   `json:"version,omitempty"`
	File       string   `json:"file"`
	Exclusions []string `json:"exclusions_that_do_not_excuse,omitempty"`
}

// Redirect is whether traffic comes to the daemon.
type Redirect struct {
	Installed   bool     `json:"installed"`
	Backend     string   `json:"backend,omitempty"`
	Covered     []string `json:"covered"`
	Differences []string `json:"differences,omitempty"`
	Locks       []string `json:"locks,omitempty"`
	Notes       []string `json:"notes,omitempty"`
	Repairs     uint64   `json:"repairs"`
	Error       string   `json:"error,omitempty"`
}

// Attribution is what can be known about clients on this host.
type Attribution struct {
	Level    string        `json:"level"`
	Missing  []Missing     `json:"missing,omitempty"`
	Scans    uint64        `json:"full_searches"`
	LastScan time.Duration `json:"last_full_search_ns"`
	// Descriptors is how many the last full search looked at. A search that takes
	// longer than Budget is too late for a request in enforce mode.
	Descriptors int           `json:"last_full_search_descriptors"`
	Largest     Table         `json:"largest_descriptor_table"`
	Budget      time.Duration `json:"full_search_budget_ns"`
}

// Table is the descriptors of one process.
type Table struct {
	PID         int `json:"pid"`
	Descriptors int `json:"descriptors"`
}

// Slow reports whether requests that need a full search are refused for want of
// time.
func (a Attribution) Slow() bool { return a.LastScan > a.Budget }

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
	Looped         uint64 `json:"looped"`
}

// Events is where they go.
type Events struct {
	Path string `json:"path"`
	sink.Stats
}

// Process is the daemon itself.
type Process struct {
	UID         int    `json:"uid"`
	ResidentMB  uint64 `json:"resident_mb"`
	Descriptors int    `json:"open_descriptors"`
}

// Explanation is what `imdsgate explain` shows.
type Explanation struct {
	Subject   Subject                 `json:"process"`
	Ancestors []Subject               `json:"ancestors"`
	Rules     []policy.RuleFinding    `json:"rules"`
	Grants    []policy.GrantFinding   `json:"grants"`
	Verdicts  []policy.VerdictFinding `json:"verdicts"`
	Mode      string                  `json:"mode"`
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
}
