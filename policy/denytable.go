package policy

import (
	"path"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// denyTable finds the deny that is about a process, however many there are of others. Each
// that names a process is filed under one fact that it names: a process has but a few, and
// only what is filed under these is asked.
type denyTable struct {
	denies []Deny
	by     map[denyKey][]int // in their order
	kinds  [denyKinds]bool   // that there are
	others []int             // that are about anybody, or name nothing as a whole
}

type denyKey struct {
	kind  denyKind
	value string
	unit  string // besides an executable
}

type denyKind uint8

const (
	byExecutable denyKind = iota
	byUnit
	byParent
	byUser
	byGroup
	byPod
	byContainer
	denyKinds
)

// containerDigits is how many of a container's ID a deny has at least.
const containerDigits = 12

func newDenyTable(denies []Deny) *denyTable {
	t := &denyTable{denies: denies, by: map[denyKey][]int{}}
	for i := range denies {
		keys := keysOf(&denies[i])
		if len(keys) == 0 {
			t.others = append(t.others, i)
		}
		for _, k := range keys {
			t.kinds[k.kind] = true
			t.by[k] = append(t.by[k], i)
		}
	}
	return t
}

// keysOf are those under which a deny is filed: one, or one for each executable.
func keysOf(d *Deny) (keys []denyKey) {
	switch {
	case len(d.Executable) > 0:
		for _, file := range slices.Compact(slices.Sorted(slices.Values(d.Executable))) {
			name, ok := programKey(file)
			if !ok {
				return nil
			}
			if k := (denyKey{byExecutable, name, d.Unit}); !slices.Contains(keys, k) {
				keys = append(keys, k)
			}
		}
		return keys
	case d.Unit != "":
		return []denyKey{{byUnit, "", d.Unit}}
	case d.Parent != "":
		if name, ok := programKey(d.Parent); ok {
			return []denyKey{{byParent, name, ""}}
		}
	case d.User != "":
		return []denyKey{{byUser, d.User, ""}}
	case d.Group != "":
		return []denyKey{{byGroup, d.Group, ""}}
	case d.Pod != "":
		return []denyKey{{byPod, d.Pod, ""}}
	case len(d.Container) >= containerDigits:
		return []denyKey{{byContainer, d.Container[:containerDigits], ""}}
	}
	return nil
}

// programKey is a path, or where that has a wildcard the name behind the last slash; there
// is none where the wildcard is in that.
func programKey(file string) (key string, ok bool) {
	if !strings.Contains(file, "*") {
		return file, file != ""
	}
	key = path.Base(file)
	return key, !strings.Contains(key, "*")
}

// find is the first deny that covers what a process asks for; subject is nil where none is
// known.
func (t *denyTable) find(subject *event.Process, ev *event.Event) *Deny {
	if len(t.denies) == 0 {
		return nil
	}
	s := denySearch{t, subject, ev, len(t.denies)}
	s.among(t.others)
	if subject != nil {
		s.process(subject)
	}
	if s.first == len(t.denies) {
		return nil
	}
	return &t.denies[s.first]
}

// denySearch is one search.
type denySearch struct {
	*denyTable
	subject *event.Process
	ev      *event.Event
	first   int // that covers, of those that were looked at
}

func (s *denySearch) among(list []int) {
	for _, i := range list {
		if i >= s.first {
			return
		}
		if s.denies[i].covers(s.subject, s.ev) {
			s.first = i
			return
		}
	}
}

func (s *denySearch) under(kind denyKind, values ...string) {
	if !s.kinds[kind] {
		return
	}
	for _, v := range values {
		if v != "" {
			s.among(s.by[denyKey{kind, v, ""}])
		}
	}
}

// process looks under all facts of a process at which covers looks.
func (s *denySearch) process(p *event.Process) {
	if s.kinds[byExecutable] || s.kinds[byUnit] {
		files := [...]string{p.Executable, path.Base(p.Executable)}
		for _, unit := range [...]string{p.Unit, Template(p.Unit), p.UserUnit, Template(p.UserUnit)} {
			if unit == "" {
				continue
			}
			s.among(s.by[denyKey{byUnit, "", unit}])
			for _, file := range files {
				s.among(s.by[denyKey{byExecutable, file, unit}])
			}
		}
		s.under(byExecutable, files[:]...)
	}
	for _, parent := range [...]*event.Process{p.Parent, p.ParentNow} {
		if parent != nil {
			s.under(byParent, parent.Executable, path.Base(parent.Executable))
		}
	}
	s.under(byUser, p.UserID, p.RealUserID, p.SavedUserID, p.UserName)
	s.under(byGroup, p.GroupID, p.RealGroupID, p.SavedGroupID, p.GroupName)
	s.under(byGroup, p.SupplementalGroups...)
	s.under(byPod, p.Pod)
	s.under(byContainer, p.Container[:min(len(p.Container), containerDigits)])
}
