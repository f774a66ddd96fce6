// Package config reads the files that operators write. What each part of them means
// belongs to the package that has the part.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// DefaultEvents is where events are written.
const DefaultEvents = "/var/log/imdsgate/events.ndjson"

// DefaultFirstSeen is where rules remember what they have seen.
const DefaultFirstSeen = "/var/lib/imdsgate/first-seen.db"

// DefaultState is where the daemon keeps what operators have decided.
const DefaultState = "/var/lib/imdsgate"

// Config is all that can be set, in one file or several.
type Config struct {
	policy.Config `yaml:",inline"`
	Redirect      iptables.Config `yaml:"redirect"`
	Events        sink.Options    `yaml:"events"`
	Attribution   Attribution     `yaml:"attribution"`
	FirstSeen     FirstSeen       `yaml:"first_seen"`
	State         State           `yaml:"state"`
	Control       Control         `yaml:"control"`
	Metrics       Metrics         `yaml:"metrics"`
	Limits        Limits          `yaml:"limits"`
	Upstream      Upstream        `yaml:"upstream"`
	Log           Log             `yaml:"log"`

	layers layers // that it was read from
}

// Attribution is how much must be known of clients.
type Attribution struct {
	// RequireLevel is the level without which the daemon does not start in enforce
	// mode. Without it, enforce mode works with what the host can give.
	RequireLevel attribution.Level `yaml:"require_level"`
	// Uncovered says what becomes of connections to the service from network
	// namespaces that have an interface of their own, so that they do not pass
	// through the redirect. It is about enforce mode; in audit mode they are
	// reported.
	Uncovered Uncovered `yaml:"uncovered"`
}

// Uncovered is what becomes of connections that do not pass through the redirect.
type Uncovered uint8

const (
	Deny Uncovered = iota
	Report
)

func (u Uncovered) String() string {
	if u == Report {
		return "report"
	}
	return "deny"
}

// MarshalText writes what UnmarshalText reads.
func (u Uncovered) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText reads "deny" or "report".
func (u *Uncovered) UnmarshalText(text []byte) error {
	switch string(text) {
	case "deny":
		*u = Deny
	case "report":
		*u = Report
	default:
		return fmt.Errorf("unknown value %q; there are deny and report", text)
	}
	return nil
}

// FirstSeen is what rules of the type new_terms know.
type FirstSeen struct {
	// Path is a file that the daemon alone uses. A change takes a restart.
	Path string `yaml:"path"`
}

// State is what operators have decided, which outlives the daemon.
type State struct {
	// Dir is a directory that nobody else may write to. A change takes a restart.
	Dir string `yaml:"dir"`
}

// Control is where operators ask.
type Control struct {
	Socket string `yaml:"socket"`
	Group  string `yaml:"group"` // that may ask; the group imdsgate, if there is one
}

// TimedNote is attribution.Options.TimedNote of the daemon that is asked there. Like what
// else is beside its socket it does not outlive the boot.
func (c Control) TimedNote() string { return filepath.Join(filepath.Dir(c.Socket), "conntrack-timed") }

// RemovedNote is a file that is there since an operator has removed the redirect, until a
// daemon starts: nothing else puts it back meanwhile.
func (c Control) RemovedNote() string { return filepath.Join(filepath.Dir(c.Socket), "removed") }

// Limits of the proxy.
type Limits struct {
	// Connections are served at once, a quarter of them for forwarded clients.
	// When there is no room, who has the most loses one of his.
	Connections uint16 `yaml:"connections"`
	// RequestsPerSecond bounds those of one caller, after Burst at once: a user, a
	// cgroup of root's, an address of another network namespace. 0 sets no bounds.
	RequestsPerSecond uint16 `yaml:"requests_per_second"`
	Burst             uint16 `yaml:"burst"` // twice as many if 0
}

// Upstream is how the service is reached.
type Upstream struct {
	// DialAhead bounds the connections to each endpoint that are made before they are
	// asked for. 0 is none. With RequestsPerSecond there are none.
	DialAhead uint8 `yaml:"dial_ahead"`
}

// Log is the operator's own log, on standard error.
type Log struct {
	Level LogLevel `yaml:"level"`
}

// LogLevel is the least of what the log tells: debug, info, warn or error.
type LogLevel string

var logLevels = []string{"debug", "info", "warn", "error"}

// UnmarshalText reads one of the four.
func (l *LogLevel) UnmarshalText(text []byte) error {
	if !slices.Contains(logLevels, string(text)) {
		return fmt.Errorf("unknown level %q; there are %s", text, strings.Join(logLevels, ", "))
	}
	*l = LogLevel(text)
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (l LogLevel) MarshalText() ([]byte, error) { return []byte(l), nil }

// complete sets what nobody has set.
func (c *Config) complete() {
	c.Events.Path = cmp.Or(c.Events.Path, DefaultEvents)
	c.FirstSeen.Path = cmp.Or(c.FirstSeen.Path, DefaultFirstSeen)
	c.State.Dir = cmp.Or(c.State.Dir, DefaultState)
	c.Control.Socket = cmp.Or(c.Control.Socket, control.DefaultSocket)
	c.Log.Level = cmp.Or(c.Log.Level, "info")
}

// Restart lists the keys that differ in another configuration and are read at the start
// of the daemon alone.
func (c Config) Restart(other Config) (keys []string) {
	mine, theirs := reflect.ValueOf(c), reflect.ValueOf(other)
	policys := yamlfile.KeysOf(reflect.TypeFor[policy.Config]())
	for _, k := range yamlfile.KeysOf(mine.Type()) {
		reloaded := slices.ContainsFunc(policys, func(p yamlfile.Key) bool { return p.Name == k.Name })
		if !reloaded && !reflect.DeepEqual(mine.FieldByIndex(k.Index).Interface(), theirs.FieldByIndex(k.Index).Interface()) {
			keys = append(keys, k.Name)
		}
	}
	return keys
}

// Policy compiles the part that judges, and looks whether the redirect can be as it is
// wanted. What is wrong is shown where it is written.
func (c Config) Policy() (*policy.Policy, error) {
	var classes []string
	for _, class := range imds.Classes() {
		classes = append(classes, class.String())
	}
	p, err := policy.Compile(c.Config, classes)
	redirect := c.Redirect
	redirect.UID = 1 // which the daemon has from who starts it
	if wrong := redirect.Validate(); wrong != nil {
		p, err = nil, errors.Join(append(Errors(err), &policy.KeyError{Key: "redirect", Err: wrong})...)
	}
	return p, c.layers.locate(err)
}
