package policytest

import (
	"fmt"
	"path"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// Ref is a process: the name of one of the file's subjects, the path of a program that
// is otherwise as usual, or described in place.
type Ref struct {
	Name string
	In   *Subject
}

// Nobody is the name of a subject of whom nothing is known.
const Nobody = "nobody"

func (r Ref) set() bool { return r.Name != "" || r.In != nil }

// UnmarshalYAML reads a name, a path or a Subject.
func (r *Ref) UnmarshalYAML(decode func(any) error) error {
	if name := ""; decode(&name) == nil {
		if strings.HasPrefix(name, "/") {
			r.In = &Subject{Executable: &name}
		} else {
			r.Name = name
		}
		return nil
	}
	r.In = new(Subject)
	return decode(r.In)
}

// Subject is a process. What is not set is as with a program that root has installed
// and systemd has started, unless it is in a container.
type Subject struct {
	// Like is another subject, from which all is taken that is not set here.
	Like       string   `yaml:"like"`
	Executable *string  `yaml:"executable"`
	Args       []string `yaml:"args"` // with the first, the program's name
	WorkingDir *string  `yaml:"cwd"`
	// User is a name or a number. Root has the number 0, others have 1000 unless UID
	// says another.
	User      *string  `yaml:"user"`
	UID       *string  `yaml:"uid"`
	RealUID   *string  `yaml:"real_uid"`
	SavedUID  *string  `yaml:"saved_uid"`
	Group     *string  `yaml:"group"` // a name or a number, as with User
	Groups    []string `yaml:"groups"`
	Unit      *string  `yaml:"unit"` // system unit
	UserUnit  *string  `yaml:"user_unit"`
	Cgroup    *string  `yaml:"cgroup"`
	Container *string  `yaml:"container"`
	Pod       *string  `yaml:"pod"`
	// HostNetwork is set for a container without a network of its own.
	HostNetwork *bool `yaml:"host_network"`
	// Parent is who forked it, or a list with those above.
	Parent Parents `yaml:"parent"`
	// Ancestry is how the parent is known; birth if it is not set.
	Ancestry *string `yaml:"ancestry"`
	// Age is how long before the request it was started: 50ms if it is not set, so
	// that rules about programs which ask at once are asked.
	Age *time.Duration `yaml:"age"`
	TTY *bool          `yaml:"tty"`

	HostVerified *bool `yaml:"host_verified"` // true if it is not set, outside of containers
	RootOwned    *bool `yaml:"root_owned"`    // likewise
	Loader       *bool `yaml:"loader"`
	Deleted      *bool `yaml:"deleted"`
	Swapped      *bool `yaml:"swapped"`
	Unreadable   *bool `yaml:"unreadable"` // not even the path of its program is known
	Earlier      *bool `yaml:"earlier"`    // it has executed another program since it connected
}

// Parents are a process and those above, the nearest first.
type Parents []Ref

// OrOne lets one Ref stand for a list.
func (*Parents) OrOne() {}

// systemd is the parent of those who have no other.
const systemd = "/usr/lib/systemd/systemd"

// defaultAge is that of a program that asks as soon as it has started.
const defaultAge = 50 * time.Millisecond

// cast makes the processes of one case. Who is named twice is one process.
type cast struct {
	file  *File
	now   time.Time
	known map[string]*event.Process
	// forwarded are those whose connections come from a network namespace of their own.
	forwarded map[*event.Process]bool
	next      int64 // pid
}

func newCast(f *File, now time.Time) *cast {
	return &cast{file: f, now: now, known: map[string]*event.Process{}, forwarded: map[*event.Process]bool{}, next: 4000}
}

// process is the one that a Ref is about; nil for nobody. File.check has seen that names are there, and that no
// subject is like, or the child of, itself.
func (c *cast) process(r Ref) *event.Process {
	if r.In != nil {
		return c.make(r.In)
	}
	if r.Name == Nobody {
		return nil
	}
	if p := c.known[r.Name]; p != nil {
		return p
	}
	s := c.file.Subjects[r.Name]
	p := c.make(&s)
	c.known[r.Name] = p
	return p
}

func (c *cast) make(own *Subject) *event.Process {
	s := c.file.whole(own)
	p := c.alone(&s)
	c.descend(p, s.Parent)
	if p.Parent != nil {
		p.Ancestry = or(s.Ancestry, "birth")
	}
	return p
}

// alone makes a process without parents.
func (c *cast) alone(s *Subject) *event.Process {
	c.next++
	p := &event.Process{
		EntityID: fmt.Sprintf("case-%d", c.next), PID: c.next, Known: true,
		Start:      c.now.Add(-or(s.Age, defaultAge)),
		Executable: or(s.Executable, ""), WorkingDir: or(s.WorkingDir, "/"), TTY: or(s.TTY, false),
		Unit: or(s.Unit, ""), UserUnit: or(s.UserUnit, ""), Container: or(s.Container, ""), Pod: or(s.Pod, ""),
		Loader: or(s.Loader, false), Deleted: or(s.Deleted, false), Swapped: or(s.Swapped, false), Earlier: or(s.Earlier, false),
		SupplementalGroups: s.Groups, Session: c.next, Group: c.next,
	}
	p.Name = path.Base(p.Executable)
	p.Thread = p.Name[:min(len(p.Name), 15)] // comm is TASK_COMM_LEN long, proc_pid_comm(5)
	if or(s.Unreadable, false) {
		p.Known, p.Executable, p.Name = false, "", ""
	}
	if p.Args = s.Args; p.Args == nil && p.Known {
		p.Args = []string{p.Executable}
	}
	p.CommandLine = strings.Join(p.Args, " ")
	p.UserName, p.UserID = identity(or(s.User, "root"))
	p.UserID = or(s.UID, p.UserID)
	p.RealUserID, p.SavedUserID = or(s.RealUID, p.UserID), or(s.SavedUID, p.UserID)
	p.GroupName, p.GroupID = identity(or(s.Group, or(s.User, "root")))
	p.RealGroupID, p.SavedGroupID = p.GroupID, p.GroupID

	hosts := p.Known && p.Container == "" && p.Pod == "" && !p.Deleted && !p.Swapped
	p.HostVerified = or(s.HostVerified, hosts)
	p.RootOwned = or(s.RootOwned, p.HostVerified)
	p.Cgroup = or(s.Cgroup, cgroup(p))
	c.forwarded[p] = (p.Container != "" || p.Pod != "") && !or(s.HostNetwork, false)
	return p
}

// descend gives a process its parents.
func (c *cast) descend(p *event.Process, parents Parents) {
	if len(parents) == 0 {
		if p.Executable != systemd {
			p.Parent = c.init()
		}
		return
	}
	p.Parent = c.process(parents[0])
	if len(parents) == 1 || p.Parent == nil {
		return
	}
	// What is above is said here, whatever it is where the same process is named again.
	s := c.file.whole(c.file.described(parents[0]))
	above := c.alone(&s)
	above.Ancestry = or(s.Ancestry, "birth")
	above.EntityID, above.PID, above.Start = p.Parent.EntityID, p.Parent.PID, p.Parent.Start
	c.descend(above, parents[1:])
	p.Parent = above
}

// init is the host's first process.
func (c *cast) init() *event.Process {
	const name = "\x00init"
	if c.known[name] == nil {
		c.known[name] = &event.Process{
			EntityID: "case-1", PID: 1, Start: c.now.Add(-24 * time.Hour), Executable: systemd, Name: "systemd", Thread: "systemd",
			Args: []string{"/sbin/init"}, CommandLine: "/sbin/init", WorkingDir: "/", UserName: "root", UserID: "0", RealUserID: "0", SavedUserID: "0",
			GroupID: "0", RealGroupID: "0", SavedGroupID: "0", GroupName: "root", Unit: "init.scope", Cgroup: "/init.scope", Known: true, HostVerified: true, RootOwned: true,
		}
	}
	return c.known[name]
}

// identity is the name and number of a user or group.
func identity(text string) (name, id string) {
	if text == "root" {
		return text, "0"
	}
	if _, err := strconv.ParseUint(text, 10, 32); err == nil {
		return "", text
	}
	return text, "1000"
}

// cgroup is where systemd and container runtimes put such a process.
func cgroup(p *event.Process) string {
	switch {
	case p.Pod != "":
		return "/kubepods.slice/kubepods-pod" + strings.ReplaceAll(p.Pod, "-", "_") + ".slice/cri-containerd-" + p.Container + ".scope"
	case p.Container != "":
		return "/system.slice/docker-" + p.Container + ".scope"
	case p.UserUnit != "":
		return "/user.slice/user-" + p.UserID + ".slice/user@" + p.UserID + ".service/app.slice/" + p.UserUnit
	case p.Unit != "":
		return "/system.slice/" + p.Unit
	}
	return "/user.slice/user-" + p.UserID + ".slice/session-1.scope"
}

func or[T any](set *T, otherwise T) T {
	if set != nil {
		return *set
	}
	return otherwise
}

// described is the Subject that a Ref is about.
func (f *File) described(r Ref) *Subject {
	if r.In != nil {
		return r.In
	}
	s := f.Subjects[r.Name]
	return &s
}

// whole is a Subject with all that it takes from another.
func (f *File) whole(s *Subject) Subject {
	if s.Like == "" {
		return *s
	}
	base := f.Subjects[s.Like]
	w := f.whole(&base)
	if s.Executable != nil {
		w.Args = nil // which were another program's
	}
	target, own := reflect.ValueOf(&w).Elem(), reflect.ValueOf(s).Elem()
	for i := range own.NumField() {
		if !own.Field(i).IsZero() {
			target.Field(i).Set(own.Field(i))
		}
	}
	return w
}
