package policy

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

const (
	// MaxDecisions bounds how many decisions there are. Who needs more wants a grant, or
	// a rule.
	MaxDecisions = 1024
	// MaxDecisionFor is how long one may last. What is right for longer belongs into the
	// configuration, where others read it.
	MaxDecisionFor = 30 * 24 * time.Hour
	// maxText bounds each text of a decision; all of them are in every answer to a list.
	maxText = 1024
)

// Decision is what an operator has decided about programs, for a time and over
// everything that rules and grants say.
//
// What it names must hold together. A denial stops whoever it describes. To allow
// takes what a grant takes, since what a caller can choose must open no door: an
// executable that is the host's own file and that only root can change, together with a
// unit, a user or a container. AcceptRisk makes do with less.
type Decision struct {
	ID     string `json:"id"`
	Effect Effect `json:"effect"`

	Executable string `json:"executable,omitempty"` // path
	Unit       string `json:"unit,omitempty"`       // of the system's service manager, when it allows
	User       string `json:"user,omitempty"`       // number
	Container  string `json:"container,omitempty"`  // 64 hexadecimal digits

	// AcceptRisk is for one that allows: the executable alone, one that does what its
	// arguments say for a user alone, or anything without an executable. Of a container
	// the files are not looked at, since they are its image's.
	AcceptRisk bool `json:"accept_risk,omitempty"`

	Reason  string    `json:"reason"`
	By      Actor     `json:"by"`
	Added   time.Time `json:"added"`
	Expires time.Time `json:"expires"`
}

// Effect is what a decision does.
type Effect uint8

const (
	// Denies refuses in enforce mode what the subjects ask for, whatever it is.
	Denies Effect = iota
	// Allows lets the subjects have what they ask for.
	Allows
)

var effectNames = []string{Denies: "deny", Allows: "allow"}

func (e Effect) String() string               { return effectNames[e] }
func (e Effect) MarshalText() ([]byte, error) { return []byte(e.String()), nil }
func (e *Effect) UnmarshalText(text []byte) error {
	return unmarshal((*uint8)(e), "decision", effectNames, text)
}

// Actor is who has changed something, as the kernel knows him.
type Actor struct {
	UID  uint32 `json:"uid"`
	PID  int32  `json:"pid"`
	Name string `json:"name,omitempty"` // of the account; "" if it has none
	// Login is the account with which he came, if another: who calls sudo is root.
	Login string `json:"login,omitempty"`
}

func (a Actor) String() string {
	name := a.Name
	if name == "" {
		name = fmt.Sprintf("uid %d", a.UID)
	}
	if a.Login != "" && a.Login != name {
		name += " (" + a.Login + ")"
	}
	return name
}

// Check says what is wrong with a decision. Whether its executable is the host's own
// file is judged when somebody asks for something.
func (d *Decision) Check() error {
	lasts := d.Expires.Sub(d.Added)
	switch {
	case d.ID == "":
		return errors.New("a decision needs an id")
	case d.Executable == "" && d.Unit == "" && d.User == "" && d.Container == "":
		return errors.New("a decision is about an executable, a unit, a user or a container, or several of them together")
	case d.Executable != "" && (!path.IsAbs(d.Executable) || path.Clean(d.Executable) != d.Executable || d.Executable == "/"):
		return fmt.Errorf("executable %q is not an absolute, clean path", d.Executable)
	case d.Effect == Allows && isLoader(d.Executable):
		return fmt.Errorf("executable %q is a dynamic loader, which runs whatever file it is given: nothing is allowed to it", d.Executable)
	case d.Effect == Allows && (strings.HasPrefix(d.Unit, "user@") || strings.HasPrefix(d.Unit, "user-runtime-dir@")):
		return fmt.Errorf("unit %w", CheckUnit(d.Unit))
	case d.Unit != "" && !strings.HasSuffix(d.Unit, ".service") && !strings.HasSuffix(d.Unit, ".scope"):
		return fmt.Errorf("unit %q is not the whole name of a service or a scope, as in app.service", d.Unit)
	case d.Container != "" && !isContainer(d.Container):
		return fmt.Errorf("container %q is not a whole id of 64 hexadecimal digits: docker ps --no-trunc shows it, and so does container.id of an event", d.Container)
	case strings.TrimSpace(d.Reason) == "":
		return errors.New("a decision needs a reason, for those who find it: the incident, the ticket")
	case d.Added.IsZero() || lasts <= 0:
		return errors.New("a decision needs a time when it ends")
	case lasts > MaxDecisionFor:
		return fmt.Errorf("%v is too long: a decision lasts at most %d days; what is right for longer is a grant or a rule",
			lasts, MaxDecisionFor/(24*time.Hour))
	}
	if d.User != "" {
		if _, err := strconv.ParseUint(d.User, 10, 32); err != nil {
			return fmt.Errorf("user %q is not a uid", d.User)
		}
	}
	for _, text := range []string{d.ID, d.Executable, d.Unit, d.Reason, d.By.Name, d.By.Login} {
		if len(text) > maxText {
			return fmt.Errorf("%.20q… has %d bytes, more than %d", text, len(text), maxText)
		}
	}
	if d.Effect == Allows && !d.AcceptRisk {
		return d.risk()
	}
	return nil
}

// risk says what a caller could choose, if a decision allowed on no more than it names.
func (d *Decision) risk() error {
	switch {
	case d.Executable == "":
		return fmt.Errorf("%w: without an executable, also what a thief has brought or started there; name the executable", ErrRisk)
	case d.Unit == "" && d.User == "" && d.Container == "":
		return fmt.Errorf("%w: an executable alone can be run by a thief with his own LD_PRELOAD; add a unit, a user or a container", ErrRisk)
	case strings.HasPrefix(d.Unit, "session-") && d.User == "" && d.Container == "":
		return fmt.Errorf("%w: %s is a login, where a thief who has it runs the program with his own LD_PRELOAD; add a user, or name a service", ErrRisk, d.Unit)
	case (d.Unit == "" || strings.HasPrefix(d.Unit, "session-")) && d.Container == "" && isTool(d.Executable):
		return fmt.Errorf("%w: %s does what its arguments say, also those of a thief who has become that user; add a unit of the system", ErrRisk, path.Base(d.Executable))
	}
	return nil
}

// ErrRisk says that a decision would allow what a thief can bring about.
var ErrRisk = errors.New("this would let in more than it says")

func isContainer(id string) bool {
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}

// holds reports whether the process that a decision describes is one that may be allowed
// something: a grant asks the same.
func (d *Decision) holds(p *event.Process) bool {
	if p.Earlier || d.AcceptRisk && d.Container != "" {
		return !p.Earlier
	}
	return p.HostVerified && p.RootOwned && !p.Loader
}

// inForce reports whether a decision counts at a time. By a clock that is behind, as it
// may be after a boot, what was to allow is yet to come: in doubt it is over. What
// denies counts until it ends.
func (d *Decision) inForce(at time.Time) bool {
	return at.Before(d.Expires) && (d.Effect == Denies || !at.Before(d.Added))
}

// About names what a decision is about.
func (d *Decision) About() string {
	var parts []string
	for _, c := range []struct{ name, value string }{
		{"executable", d.Executable}, {"unit", d.Unit}, {"uid", d.User}, {"container", d.Container},
	} {
		if c.value != "" {
			parts = append(parts, c.name+" "+c.value)
		}
	}
	return strings.Join(parts, ", ")
}

// Decisions are those that there are. They do not change; With and Without make others.
// Nil has none.
type Decisions struct {
	all  []*standing
	by   [2]map[criteria]*standing // by effect
	asks [2][]criteria             // which combinations of criteria there are, a "*" for each
}

// standing is a decision that is ready to be judged by.
type standing struct {
	Decision
	because string
}

// criteria is what a decision names, "" for what it does not.
type criteria struct{ executable, unit, user, container string }

func (d *Decision) criteria() criteria {
	return criteria{d.Executable, d.Unit, d.User, d.Container}
}

// NewDecisions checks decisions, of which no two may have one id, or the same effect on
// the same. All errors come together.
func NewDecisions(all []Decision) (*Decisions, error) {
	ds := new(Decisions)
	ids := map[string]bool{}
	var errs []error
	if len(all) > MaxDecisions {
		return nil, fmt.Errorf("%d decisions are more than the %d that there may be", len(all), MaxDecisions)
	}
	for _, d := range all {
		if err := d.Check(); err != nil {
			errs = append(errs, fmt.Errorf("decision %q: %w", d.ID, err))
			continue
		}
		if ids[d.ID] || ds.by[d.Effect][d.criteria()] != nil {
			errs = append(errs, fmt.Errorf("decision %q is there twice", d.ID))
			continue
		}
		ids[d.ID] = true
		ds.add(&standing{d, because(&d)})
	}
	slices.SortStableFunc(ds.all, func(a, b *standing) int { return a.Added.Compare(b.Added) })
	return ds, errors.Join(errs...)
}

func because(d *Decision) string {
	became := "denied"
	if d.Effect == Allows {
		became = "allowed"
	}
	return fmt.Sprintf("%s by decision %s of %s until %s: %s", became, d.ID, d.By, d.Expires.UTC().Format(time.RFC3339), d.Reason)
}

func (ds *Decisions) add(s *standing) {
	ds.all = append(ds.all, s)
	c, e := s.criteria(), s.Effect
	if ds.by[e] == nil {
		ds.by[e] = map[criteria]*standing{}
	}
	ds.by[e][c] = s
	for _, part := range []*string{&c.executable, &c.unit, &c.user, &c.container} {
		if *part != "" {
			*part = "*"
		}
	}
	if !slices.Contains(ds.asks[e], c) {
		ds.asks[e] = append(ds.asks[e], c)
	}
}

// All lists them by when they were added.
func (ds *Decisions) All() []Decision {
	if ds == nil {
		return nil
	}
	all := make([]Decision, len(ds.all))
	for i, s := range ds.all {
		all[i] = s.Decision
	}
	return all
}

// With adds a decision. One that has the same effect on the same is replaced by it, so
// that it is prolonged, or shortened, by being added again.
func (ds *Decisions) With(d Decision) (with *Decisions, replaced *Decision, err error) {
	if err := d.Check(); err != nil {
		return nil, nil, err
	}
	all := ds.All()
	if i := slices.IndexFunc(all, func(o Decision) bool { return o.Effect == d.Effect && o.criteria() == d.criteria() }); i >= 0 {
		old := all[i]
		replaced, all = &old, slices.Delete(all, i, i+1)
	}
	if len(all) >= MaxDecisions {
		return nil, nil, fmt.Errorf("there are %d decisions, and no more are possible: delete some, or write a grant or a rule", len(all))
	}
	with, err = NewDecisions(append(all, d))
	return with, replaced, err
}

// Without splits them by whether something is true of them.
func (ds *Decisions) Without(gone func(*Decision) bool) (left *Decisions, removed []Decision) {
	var kept []Decision
	for _, d := range ds.All() {
		if gone(&d) {
			removed = append(removed, d)
		} else {
			kept = append(kept, d)
		}
	}
	left, _ = NewDecisions(kept) // which were checked
	return left, removed
}

// Over reports whether a decision has ended. One may have ended and still be there,
// without any effect.
func (d *Decision) Over(now time.Time) bool { return !now.Before(d.Expires) }

// deny reports whether there are any that deny.
func (ds *Decisions) deny() bool { return ds != nil && len(ds.asks[Denies]) > 0 }

// denies finds a decision by which one of the subjects is refused.
func (ds *Decisions) denies(ev *event.Event) (by *standing, subject *event.Process) {
	if !ds.deny() {
		return nil, nil
	}
	for _, p := range ev.Subjects {
		users := [...]string{p.UserID, p.RealUserID, p.SavedUserID} // a setuid program is its caller's, too
		units := [...]string{p.Unit, p.UserUnit}
		for _, asks := range ds.asks[Denies] {
			for i, user := range users {
				if i > 0 && (asks.user == "" || slices.Contains(users[:i], user)) {
					continue
				}
				for j, unit := range units {
					if j > 0 && (asks.unit == "" || unit == units[0]) {
						continue
					}
					if s := ds.find(Denies, asks, criteria{p.Executable, unit, user, p.Container}, ev.Time); s != nil {
						return s, p
					}
				}
			}
		}
	}
	return nil, nil
}

// allows finds a decision that lets a process have what it asks for.
func (ds *Decisions) allows(p *event.Process, at time.Time) *standing {
	if ds == nil || len(ds.asks[Allows]) == 0 {
		return nil
	}
	is := criteria{executable: p.Executable, unit: p.Unit, container: p.Container}
	if p.RealUserID == p.UserID && p.SavedUserID == p.UserID {
		is.user = p.UserID
	}
	for _, asks := range ds.asks[Allows] {
		if s := ds.find(Allows, asks, is, at); s != nil && s.holds(p) {
			return s
		}
	}
	return nil
}

// find looks up what is about one combination of what a process is. There may be as
// many decisions as there may be: it takes no longer.
func (ds *Decisions) find(e Effect, asks, is criteria, at time.Time) *standing {
	for _, part := range [...]struct {
		asks string
		is   *string
	}{{asks.executable, &is.executable}, {asks.unit, &is.unit}, {asks.user, &is.user}, {asks.container, &is.container}} {
		if part.asks == "" {
			*part.is = ""
		} else if *part.is == "" {
			return nil // and what is not known is not what it asks for
		}
	}
	if s := ds.by[e][is]; s != nil && s.inForce(at) {
		return s
	}
	return nil
}
