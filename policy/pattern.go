package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// Names that change with each release of a program, or with each device of a host, have
// two places in Who. One directory of an executable may be named after a version, as
// with snaps and Elastic's agent:
//
//	/snap/amazon-ssm-agent/*/amazon-ssm-agent
//
// And a template unit stands for all of its instances: policy-routes@.service. Neither
// gives anybody a choice who has none otherwise: a grant holds for files alone which, with
// all directories above, root alone can change; and the system manager starts instances
// of a unit for root alone (systemd.unit(5)).

// minFixed is how many directories come before the one that is named after a version.
// With fewer, what any other package brings along could be meant.
const minFixed = 2

// checkVersioned says what is wrong with the star in the path of an executable.
func checkVersioned(file string) error {
	dir := path.Dir(file)
	before, _, _ := strings.Cut(dir, "*")
	switch {
	case strings.ContainsAny(file, "?["), strings.Contains(path.Base(file), "*"), strings.Count(file, "*") > 1:
		return fmt.Errorf("%q: a wildcard stands for a version in the name of one directory, as in /snap/app/*/app; whoever can add a file that it matches has the grant, so list each, as in [/usr/bin/a, /usr/bin/b]", file)
	case strings.Count(before, "/") <= minFixed:
		return fmt.Errorf("%q: a wildcard that near to the root matches other programs too: name at least %d directories before it, as in /snap/app/*/app", file, minFixed)
	}
	return nil
}

// versioned reports whether a path has a directory that is named after a version.
func versioned(file string) bool { return strings.Contains(file, "*") }

// fileIs reports whether a path is the one that is written in a policy.
func fileIs(written, file string) bool {
	before, after, ok := strings.Cut(written, "*")
	if !ok {
		return written == file
	}
	version, ok := strings.CutPrefix(file, before)
	if !ok {
		return false
	}
	version, ok = strings.CutSuffix(version, after)
	return ok && version != "" && !strings.Contains(version, "/")
}

// runs reports whether a process runs one of the executables.
func (w *Who) runs(p *event.Process) bool {
	return slices.ContainsFunc(w.Executable, func(written string) bool { return fileIs(written, p.Executable) })
}

// template is the part of a unit's name that it has from its template, with the "@";
// "" if it has none.
func template(unit string) string {
	return unit[:strings.IndexByte(unit, '@')+1]
}

// unitIs reports whether a unit is the one that is written in a policy, or an instance
// of it.
func unitIs(written, unit string) bool {
	if written == unit {
		return true
	}
	from := template(unit)
	kind, ok := strings.CutPrefix(written, from)
	return ok && from != "" && strings.HasPrefix(kind, ".") && strings.HasSuffix(unit, kind) && len(unit) > len(written)
}
