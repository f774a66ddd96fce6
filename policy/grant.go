package policy

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// Grant lets a program have what rules and posture would refuse. It rests only
// on what the caller cannot choose: the executable, as the host's own file that
// only root can change, together with the system unit or the user it runs as.
// The executable alone says nothing about who tells it what to do
// (LD_PRELOAD=./steal.so /usr/bin/granted), so a grant that names nothing else
// must say executable_only.
type Grant struct {
	Name       string `yaml:"name"`
	Executable string `yaml:"executable"`
	Unit       string `yaml:"unit"`
	User       string `yaml:"user"` // name or number, of all of real, effective and saved uid
	// ExecutableOnly accepts that whoever may run the executable has the grant.
	ExecutableOnly bool `yaml:"executable_only"`
	// Classes of requests that it is for; empty for all.
	Classes []string `yaml:"classes"`
	// OwnToken leaves out requests with a session token that was issued to somebody
	// else: what the executable is made to ask by one who brings a token of his own.
	OwnToken bool   `yaml:"own_token"`
	Owner    string `yaml:"owner"`
	Reason   string `yaml:"reason"`
	Expires  Date   `yaml:"expires"`
}

// Date is a day, written 2006-01-02. The zero Date is never.
type Date struct{ time.Time }

// UnmarshalText reads a day.
func (d *Date) UnmarshalText(text []byte) error {
	t, err := time.Parse(time.DateOnly, string(text))
	if err != nil {
		return fmt.Errorf("date %q is not written as 2006-01-02", text)
	}
	d.Time = t
	return nil
}

// MarshalText writes a day.
func (d Date) MarshalText() ([]byte, error) {
	if d.IsZero() {
		return nil, nil
	}
	return []byte(d.Format(time.DateOnly)), nil
}

// over reports whether the day has ended.
func (d Date) over(now time.Time) bool {
	return !d.IsZero() && !now.Before(d.AddDate(0, 0, 1))
}

// check says what is wrong with a grant; classes are those that there are.
func (g *Grant) check(classes []string) error {
	switch {
	case g.Name == "":
		return fmt.Errorf("a grant needs a name")
	case !path.IsAbs(g.Executable) || path.Clean(g.Executable) != g.Executable:
		return fmt.Errorf("grant %q: executable %q is not an absolute, clean path", g.Name, g.Executable)
	case g.Unit == "" && g.User == "" && !g.ExecutableOnly:
		return fmt.Errorf("grant %q: an executable alone can be run by an attacker with his own LD_PRELOAD; add unit or user, or accept that with executable_only: true", g.Name)
	case g.ExecutableOnly && (g.Unit != "" || g.User != ""):
		return fmt.Errorf("grant %q: executable_only contradicts unit and user", g.Name)
	case g.Owner == "" || g.Reason == "":
		return fmt.Errorf("grant %q: say who owns it (owner) and why it is there (reason)", g.Name)
	}
	for _, c := range g.Classes {
		if !slices.Contains(classes, c) {
			return fmt.Errorf("grant %q: unknown class %q; there are %v", g.Name, c, classes)
		}
	}
	return nil
}

// allows reports whether the grant covers what this process asks for, and if not what
// keeps it from doing so.
func (g *Grant) allows(p *event.Process, ev *event.Event) (ok bool, missed string) {
	switch {
	case p.Executable != g.Executable:
		return false, "executable"
	case !p.HostVerified:
		return false, "the executable is not the host's own file"
	case !p.RootOwned:
		return false, "others than root can change the executable"
	case p.Loader:
		return false, "the executable is a dynamic loader"
	case p.Earlier:
		return false, "the process has executed another program since"
	case g.Unit != "" && g.Unit != p.Unit:
		return false, "unit " + strconv.Quote(p.Unit)
	case g.User != "" && !g.user(p):
		return false, "user " + strconv.Quote(p.UserName)
	case len(g.Classes) > 0 && !slices.Contains(g.Classes, ev.Request.Class):
		return false, "class " + ev.Request.Class
	case g.OwnToken && ev.Token.Foreign(p):
		return false, "the session token of another process"
	case g.Expires.over(ev.Time):
		return false, "expired on " + g.Expires.Format(time.DateOnly)
	}
	return true, ""
}

func (g *Grant) user(p *event.Process) bool {
	if p.RealUserID != p.UserID || p.SavedUserID != p.UserID {
		return false
	}
	return g.User == p.UserID || g.User == p.UserName && p.UserName != ""
}
