package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// Who is the processes that a grant or a deny is about: those on whom all that is set
// holds.
type Who struct {
	// Executable is one path or several: of the host's own file, or of one in the
	// container that is named. "*" is a part of the name of a directory.
	Executable OneOrMore `yaml:"executable"`
	Unit       string    `yaml:"unit"`      // system unit; "app@.service" is every instance
	User       string    `yaml:"user"`      // name or number
	Group      string    `yaml:"group"`     // name or number
	Container  string    `yaml:"container"` // ID, or at least its first 12 digits
	Pod        string    `yaml:"pod"`       // UID of a Kubernetes pod
	// Parent is the executable of the process that forked this one.
	Parent string `yaml:"parent"`
}

// WhyNot says why a grant or a deny does not have a key of which somebody may think.
func (*Who) WhyNot(key string) string { return notInGrants[key] }

// Names reports whether a program is one of those that are named.
func (w *Who) Names(file string) bool {
	return slices.ContainsFunc(w.Executable, func(named string) bool { return isProgram(named, file) })
}

func isProgram(named, file string) bool {
	return named == file || strings.Contains(named, "*") && glob(named, file)
}

// unit reports whether a unit is the one that is named, or an instance of it.
func (w *Who) unit(unit string) bool {
	return unit == w.Unit || unit != "" && Template(unit) == w.Unit
}

// contained reports whether this is about processes in a container.
func (w *Who) contained() bool { return w.Container != "" || w.Pod != "" }

// anyone reports whether this is about everybody.
func (w *Who) anyone() bool {
	return len(w.Executable) == 0 && w.Unit == "" && w.User == "" && w.Group == "" && !w.contained() && w.Parent == ""
}

// What is the requests that a grant or a deny is about: those for which all that is set
// holds.
type What struct {
	Classes []string `yaml:"classes"`
	// Paths are globs: "*" is any part of one segment, "**" at the end everything
	// below. "/latest" stands for every version of the service.
	Paths []string `yaml:"paths"`
	API   API      `yaml:"api"`
}

// API is a version of the service's protocol.
type API uint8

const (
	AnyAPI API = iota
	V1         // without a session token
	V2         // with one, or for one
)

var apiNames = []string{AnyAPI: "any", V1: "v1", V2: "v2"}

func (a API) String() string               { return apiNames[a] }
func (a API) MarshalText() ([]byte, error) { return []byte(a.String()), nil }
func (a *API) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(a), "api", apiNames, text)
}

// of is the API that a request belongs to. The one for a token is the second's.
func (API) of(q *event.Request) API {
	if q.Token || q.Class == "token" {
		return V2
	}
	return V1
}

// OneOrMore is a text or a list of texts.
type OneOrMore []string

// OrOne lets one text stand for a list.
func (*OneOrMore) OrOne() {}

// MarshalYAML writes one as a text.
func (o OneOrMore) MarshalYAML() (any, error) {
	if len(o) == 1 {
		return o[0], nil
	}
	return []string(o), nil
}

// userIs reports whether all of a process's user ids are of one user. A name is that
// of the host for the effective one.
func userIs(user string, p *event.Process) bool {
	if p.UserID == "" || p.RealUserID != p.UserID || p.SavedUserID != p.UserID {
		return false
	}
	return user == p.UserID || user == p.UserName && p.UserName != ""
}

// groupIs reports whether a process is of a group: by its group ids, all of which are
// the same, so that none comes from a set-group-ID program; or, where the group is a
// number, by one of the supplementary groups, which nobody gives himself.
func groupIs(group string, p *event.Process) bool {
	if slices.Contains(p.SupplementalGroups, group) {
		return true
	}
	if p.GroupID == "" || p.RealGroupID != p.GroupID || p.SavedGroupID != p.GroupID {
		return false
	}
	return group == p.GroupID || group == p.GroupName && p.GroupName != ""
}

// glob reports whether a path of the service is one of those that a pattern names. "*"
// does not match a slash, and "**" stands for all segments that follow.
func glob(pattern, path string) bool {
	for pattern != "" {
		wanted, more, _ := cutSegment(pattern)
		if wanted == "/**" && more == "" {
			return strings.HasPrefix(path, "/")
		}
		got, rest, ok := cutSegment(path)
		if !ok || !segment(wanted, got) {
			return false
		}
		pattern, path = more, rest
	}
	return path == ""
}

// cutSegment takes the first segment off a path, with the slash before it.
func cutSegment(path string) (segment, rest string, ok bool) {
	if !strings.HasPrefix(path, "/") {
		return "", path, false
	}
	if i := strings.IndexByte(path[1:], '/'); i >= 0 {
		return path[:i+1], path[i+1:], true
	}
	return path, "", true
}

// segment matches one segment: what is between stars must come in this order, and
// taking the first place of each misses none.
func segment(pattern, s string) bool {
	first, rest, starred := strings.Cut(pattern, "*")
	if !starred {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, first)
	if !ok {
		return false
	}
	for {
		part, more, starred := strings.Cut(rest, "*")
		if !starred {
			return strings.HasSuffix(s, part)
		}
		_, after, ok := strings.Cut(s, part)
		if !ok {
			return false
		}
		s, rest = after, more
	}
}

// Unversioned is the path of a request with "/latest" for its version, which names the
// same tree in each (EC2 User Guide, "Get the available versions of the instance
// metadata"). The endpoints for tasks and pods have no such versions.
func Unversioned(q *event.Request) string {
	if q.Version == "" || q.Version == "latest" || q.Container {
		return q.Path
	}
	rest, ok := strings.CutPrefix(q.Path, "/"+q.Version)
	if !ok {
		return q.Path
	}
	return "/latest" + rest
}

// checkPath says what is wrong with a pattern of paths.
func checkPath(pattern string) error {
	version, _, _ := cutSegment(pattern)
	switch {
	case !strings.HasPrefix(pattern, "/"):
		return fmt.Errorf("path %q does not begin with a slash, as in /latest/meta-data/iam/*", pattern)
	case strings.Contains(pattern, "//") || strings.Contains(pattern, "/./") || strings.Contains(pattern, "/../"):
		return fmt.Errorf("path %q is not clean: requests are compared after empty and dot segments are resolved", pattern)
	case strings.ContainsAny(pattern, "?#%[]{}\\; "):
		return fmt.Errorf("path %q: of wildcards there is * for a part of one segment, and ** at the end for everything below; requests are compared decoded and without query", pattern)
	case dated(version[1:]):
		return fmt.Errorf("path %q is of one version: write /latest%s, which stands for every version", pattern, strings.TrimPrefix(pattern, version))
	case version != "/latest" && !(len(version) == 3 && version[1] == 'v' && isNumber(version[2:])) || version == pattern:
		return fmt.Errorf("path %q does not begin with /latest/, which stands for every version, nor as at the endpoints of ECS and EKS with /v1/ or another", pattern)
	}
	for i := strings.Index(pattern, "**"); i >= 0; i = -1 {
		if i+2 != len(pattern) || pattern[i-1] != '/' {
			return fmt.Errorf("path %q: ** is for everything below, and only at the end, as in /latest/meta-data/**", pattern)
		}
	}
	return nil
}

// dated reports whether a segment is a version other than latest.
func dated(s string) bool {
	digits := strings.ReplaceAll(s, "-", "")
	_, err := strconv.ParseUint(digits, 10, 64)
	return s == "1.0" || err == nil && len(s) == len("2006-01-02") && len(digits) == 8
}
