package proxy

import (
	"strconv"
	"strings"
	"sync"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
)

// rendered remembers the form in which events have the processes that were seen
// last. Clients come back, and all of them have the same ancestors. The zero value
// is ready.
type rendered struct {
	mu    sync.Mutex // guards known
	known map[*attribution.Process]*event.Process
}

// maxRendered bounds what is remembered; a process takes one to two kilobytes, and as
// much again with what documents say of it.
const maxRendered = 256

func (r *rendered) process(p *attribution.Process) *event.Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chain(p)
}

// chain is called with r.mu held.
func (r *rendered) chain(p *attribution.Process) *event.Process {
	if q := r.known[p]; q != nil {
		return q
	}
	q := render(p)
	if p.Parent != nil {
		q.Parent = r.chain(p.Parent)
	}
	if p.ParentNow != nil {
		q.ParentNow = r.chain(p.ParentNow)
	}
	if r.known == nil || len(r.known) >= maxRendered {
		r.known = map[*attribution.Process]*event.Process{}
	}
	r.known[p] = q
	return q
}

// observe records who holds the connection.
func (r *rendered) observe(ev *event.Event, o attribution.Owner) {
	ev.Attribution = event.Attribution{
		Level: o.Level.String(), Confidence: o.Confidence().String(), Via: o.Via, Complete: o.Complete, Reason: o.Reason.String(),
		Cookie: o.Socket.Cookie, Took: o.Took,
	}
	for _, pid := range o.Unreadable {
		ev.Attribution.Unreadable = append(ev.Attribution.Unreadable, int64(pid))
	}
	ev.Subjects, ev.Roles = nil, nil
	for i, p := range o.Subjects {
		ev.Subjects = append(ev.Subjects, r.process(p))
		ev.Roles = append(ev.Roles, o.Roles[i].String())
	}
}

// Process gives a process, with its ancestors, the form in which events and rules
// have it.
func Process(p *attribution.Process) *event.Process { return new(rendered).process(p) }

// render leaves the parent out.
func render(p *attribution.Process) *event.Process {
	q := &event.Process{
		EntityID: p.EntityID, PID: int64(p.PID), Start: p.Start, Executed: p.Executed,
		Executable: p.Executable.Path, Name: p.Name, Thread: p.Thread, Args: p.Args, CommandLine: strings.Join(p.Args, " "), WorkingDir: p.WorkingDir,
		TTY: p.TTY, Session: int64(p.Session), Group: int64(p.Group),
		UserID: id(p.UID[1]), RealUserID: id(p.UID[0]), SavedUserID: id(p.UID[2]), UserName: p.UserName,
		GroupID: id(p.GID[1]), RealGroupID: id(p.GID[0]), SavedGroupID: id(p.GID[2]), GroupName: p.GroupName,
		Unit: p.Cgroup.Unit, UserUnit: p.Cgroup.UserUnit, Cgroup: p.Cgroup.Path,
		Container: p.Cgroup.Container, Runtime: p.Cgroup.Runtime, Pod: p.Cgroup.Pod,
		Unproven: p.Executable.Unproven, HostVerified: p.Executable.HostVerified, RootOwned: p.Executable.RootOwned, Loader: p.Executable.Loader,
		Deleted: p.Executable.Deleted, Known: p.Executable.Inode != 0, Earlier: p.Earlier,
		Swapped: p.Swapped, Ended: p.Ended, Ancestry: p.Ancestry.String(),
	}
	if p.Ended {
		q.RealUserID, q.SavedUserID, q.RealGroupID, q.SavedGroupID = "", "", "", ""
		if q.UserID == id(attribution.NoID) {
			q.UserID, q.GroupID = "", ""
		}
	}
	for _, g := range p.Groups {
		q.SupplementalGroups = append(q.SupplementalGroups, id(g))
	}
	return q
}

func id(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
