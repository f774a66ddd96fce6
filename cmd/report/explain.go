package report

import (
	"net/netip"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Explanation is what `imdsgate explain` shows: of a process that runs, of an event that
// was recorded, or of what somebody makes up.
type Explanation struct {
	Mode      string    `json:"mode"`
	Level     string    `json:"level,omitempty"` // of the evidence
	Request   Request   `json:"request"`
	Subject   *Subject  `json:"process,omitempty"` // nil where nobody is known
	Others    []Subject `json:"others,omitempty"`  // who held the connection, too
	Past      []Subject `json:"earlier_programs,omitempty"`
	Ancestors []Subject `json:"ancestors"`
	policy.Explanation
	// Verdicts are those on requests of each class, by the same process. There are none
	// of an event.
	Verdicts []Verdict `json:"verdicts,omitempty"`
	Recorded *Recorded `json:"recorded,omitempty"` // of an event
	Doubt    string    `json:"doubt,omitempty"`    // why the verdict on an event is not certain
}

// Request is what is asked for.
type Request struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Class  string `json:"class"`
	API    string `json:"api"`
}

// Verdict is what would become of a request of one class.
type Verdict struct {
	Class   string `json:"class"`
	Verdict string `json:"verdict"`
	Reason  string `json:"reason,omitempty"`
}

// Recorded is what an event says became of the request.
type Recorded struct {
	ID      string `json:"event_id"`
	Time    string `json:"time"`
	Host    string `json:"host"`
	Mode    string `json:"mode"`
	Verdict string `json:"verdict"`
	WouldBe string `json:"audit_verdict"`
	Reason  string `json:"reason,omitempty"`
	// Repeats is how many requests the event stands for, and First when the first of them
	// came; nothing for one that stands for itself.
	Repeats int64  `json:"repeats,omitempty"`
	First   string `json:"first,omitempty"`
}

// Explain tells how the verdict on a request comes about.
func Explain(e *policy.Engine, ev *event.Event) Explanation {
	x := Explanation{Mode: e.Mode().String(), Level: ev.Attribution.Level, Explanation: e.Explain(ev), Ancestors: []Subject{}}
	q := &ev.Request
	x.Request = Request{Method: q.Method, Path: q.Path, Class: q.Class, API: "v2"}
	switch {
	case q.Container:
		x.Request.API = "container"
	case !q.Token && q.Class != imds.Token.String():
		x.Request.API = "v1"
	}
	for i, p := range ev.Subjects {
		s := SubjectOf(p)
		if i > 0 {
			x.Others = append(x.Others, s)
			continue
		}
		x.Subject, x.Ancestors = &s, AncestorsOf(p)
	}
	return x
}

// Classes judges a request of each class, in the place of the one of an event.
func Classes(e *policy.Engine, ev *event.Event) []Verdict {
	var all []Verdict
	for _, class := range imds.Classes() {
		one := *ev
		one.Request = Ask("", examples[class], ev.Request.Token)
		e.Judge(&one)
		all = append(all, Verdict{class.String(), one.Decision.WouldBe.String(), one.Decision.Reason})
	}
	return all
}

// examples are a request of each class.
var examples = map[imds.Class]string{
	imds.Listing: "/latest/meta-data/", imds.Inventory: "/latest/meta-data/instance-id", imds.Operational: "/latest/meta-data/spot/instance-action",
	imds.Token: "/latest/api/token", imds.Unknown: "/latest/no-such-thing", imds.UserData: "/latest/user-data",
	imds.IdentityProof: "/latest/dynamic/instance-identity/pkcs7", imds.Credentials: CredentialsPath,
}

// CredentialsPath is what a thief asks for.
const CredentialsPath = "/latest/meta-data/iam/security-credentials/role"

// Ask is a request as clients make them, by a method or "" for that of its path, with a
// session token or without one.
func Ask(method, target string, token bool) event.Request {
	q := event.Request{Method: method, Target: target, Path: target, HTTP: "1.1", Host: imds.Endpoints[0].Addr().String()}
	t, err := imds.Classify(imds.Endpoints[0].Addr(), target)
	if err != nil {
		q.Malformed = err.Error()
	}
	q.Path, q.Class, q.Guarded, q.Version, q.Evasive, q.Container = t.Path, t.Class.String(), t.Guarded(), t.Version, t.Evasive, t.Container
	q.Token = token && t.Class != imds.Token
	if q.Method == "" {
		if q.Method = "GET"; t.Class == imds.Token {
			q.Method = "PUT"
		}
	}
	return q
}

// Asking is the event of a request of a process, of whom nobody else has the connection.
func Asking(host *event.Host, p *event.Process, q event.Request) *event.Event {
	return &event.Event{
		Host: host, Subjects: []*event.Process{p}, Roles: []string{"connector"}, Request: q,
		Connection:  event.Connection{Source: netip.AddrPortFrom(netip.IPv4Unspecified(), 0), Destination: imds.Endpoints[0], First: true},
		Attribution: event.Attribution{Complete: true},
	}
}

// AncestorsOf are the processes that have led to one, the nearest first.
func AncestorsOf(p *event.Process) []Subject {
	all := []Subject{}
	for a := p.Parent; a != nil; a = a.Parent {
		all = append(all, SubjectOf(a))
	}
	return all
}

// SubjectOf is a process in the form in which it is shown: its command line is redacted.
func SubjectOf(p *event.Process) Subject {
	s := described(p)
	if p.ParentNow != nil {
		now := described(p.ParentNow)
		s.ParentNow = &now
	}
	return s
}

func described(p *event.Process) Subject {
	name := p.UserName
	if name == "" {
		name = p.UserID
	}
	return Subject{
		PID: p.PID, EntityID: p.EntityID, Start: p.Start, Executable: p.Executable, Name: p.Name,
		CommandLine: strings.Join(event.RedactArgs(p.Args), " "), WorkingDir: p.WorkingDir, User: name, Unit: p.Unit, UserUnit: p.UserUnit,
		Cgroup: p.Cgroup, Container: p.Container, HostVerified: p.HostVerified, RootOwned: p.RootOwned, Loader: p.Loader,
		Swapped: p.Swapped, Ended: p.Ended, Earlier: p.Earlier, Ancestry: p.Ancestry,
	}
}
