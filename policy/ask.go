package policy

import "github.com/imdsgate/imdsgate/event"

// Allows reports whether the grant covers what a process asks for, and if not what keeps
// it from doing so. A verdict takes more: all who have a part in the connection need a
// grant, on sufficient evidence.
func (g *Grant) Allows(p *event.Process, ev *event.Event) (ok bool, missed string) {
	return g.allows(p, ev)
}

// Granted finds the grant that covers what a process asks for.
func (p *Policy) Granted(subject *event.Process, ev *event.Event) (name string, ok bool) {
	return p.granted(subject, ev)
}

// Names reports whether a program is one of those that are named.
func (w *Who) Names(file string) bool { return w.executable(file) }

// CheckExecutable says why a grant cannot rest on an executable of this path.
func CheckExecutable(file string) error { return checkExecutable(file) }

// CheckUnit says why a grant cannot rest on a unit.
func CheckUnit(unit string) error { return checkUnit(unit) }

// Unversioned is the path of a request with "/latest" for its version, as the paths of
// grants have it.
func Unversioned(q *event.Request) string { return unversioned(q) }

// Template is the unit of which another is an instance: "app@.service" of
// "app@one.service"; "" if it is none.
func Template(unit string) string { return template(unit) }
