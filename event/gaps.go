package event

import "strings"

// Gaps are facts of which a document that was read back does not have the whole: a
// command line in which a secret was replaced, a path that was cut. A value that rests
// on one of them is another than the rules were asked about when it happened, and says
// nothing. The zero value is an event as it was observed.
type Gaps uint64

// Facts about a process.
const (
	GapName Gaps = 1 << iota
	GapExecutable
	GapThread
	GapArgs
	GapArgsCount
	GapCommandLine
	GapWorkingDir
	GapUser      // and groups
	GapPlace     // unit, cgroup, container
	GapFile      // whose it is
	ofOneProcess = 1<<iota - 1
)

// The facts of a process are told apart from those of its parents by their place.
const (
	parentGaps    = 12 // where those of the parent begin
	parentNowGaps = 24
)

// OfParent are the same facts about the parent.
func (g Gaps) OfParent() Gaps { return g & ofOneProcess << parentGaps }

// OfPresentParent are the same facts about the one that adopted the process.
func (g Gaps) OfPresentParent() Gaps { return g & ofOneProcess << parentNowGaps }

// Facts about the rest of an event.
const (
	GapAncestors Gaps = 1 << (36 + iota)
	GapMethod
	GapTarget
	GapPath
	GapHost
	GapUserAgent
	GapRequest // anything else that the client sent
	GapToken
	GapSubjects // there were more subjects than the document has
	GapTime     // to less than the millisecond, and of what came before the request
	GapAnswer   // whether the request was judged before it was answered, or after that
	GapOutcome  // the same, where the outcome of the event is another after it
)

// Gaps are those of a document: of the event, its subject and the parents of that.
func (v *View) Gaps() Gaps {
	g := v.Event.Gaps
	p := v.Subject
	if p == nil {
		return g
	}
	g |= p.Gaps
	if p.Parent != nil && !v.Adopted {
		g |= (p.Parent.Gaps & ofOneProcess) << parentGaps
	}
	if p.ParentNow != nil {
		now := p.ParentNow.Gaps & ofOneProcess
		if g |= now << parentNowGaps; v.Adopted {
			g |= now << parentGaps
		}
	}
	return g
}

// Rests are the facts on which the value of a field rests, as far as a document may
// have gaps there.
func (f *Field) Rests() Gaps { return f.rests }

func restsOf(name string) Gaps {
	if fact, ok := strings.CutPrefix(name, "process.parent."); ok {
		return ofProcessField(fact) << parentGaps
	}
	if fact, ok := strings.CutPrefix(name, "imdsgate.process.parent_now."); ok {
		return ofProcessField(fact) << parentNowGaps
	}
	if strings.HasPrefix(name, "imdsgate.process.parent.") {
		return GapFile << parentGaps
	}
	if fact, ok := strings.CutPrefix(name, "process."); ok {
		return ofProcessField(fact)
	}
	switch name {
	case "@timestamp", "event.start", "event.end":
		return GapTime
	case "message", "event.reason":
		return ^Gaps(0)
	case "event.outcome":
		return GapOutcome
	case "http.request.method":
		return GapMethod
	case "url.original":
		return GapTarget
	case "url.path":
		return GapPath
	case "url.domain":
		return GapHost
	case "user_agent.original":
		return GapUserAgent
	case "imdsgate.process.unit", "imdsgate.process.user_unit", "imdsgate.process.cgroup":
		return GapPlace
	}
	for _, g := range []struct {
		prefix string
		gap    Gaps
	}{
		{"user.", GapUser}, {"related.user", GapUser}, {"container.", GapPlace}, {"orchestrator.", GapPlace},
		{"imdsgate.ancestors.", GapAncestors}, {"imdsgate.subjects.", GapSubjects}, {"imdsgate.token.", GapToken},
		{"imdsgate.request.", GapRequest}, {"http.request.", GapRequest}, {"http.version", GapRequest},
		{"event.duration", GapAnswer}, {"imdsgate.repeats.", GapAnswer}, {"http.response.", GapAnswer}, {"imdsgate.response.", GapAnswer}, {"imdsgate.credential.", GapAnswer},
	} {
		if strings.HasPrefix(name, g.prefix) {
			return g.gap
		}
	}
	return 0
}

func ofProcessField(fact string) Gaps {
	switch fact {
	case "name":
		return GapName
	case "executable":
		return GapExecutable
	case "thread.name":
		return GapThread
	case "args":
		return GapArgs
	case "args_count":
		return GapArgsCount
	case "command_line":
		return GapCommandLine
	case "working_directory":
		return GapWorkingDir
	case "start": // to the millisecond, in which rules are written
		return 0
	case "entity_id", "pid", "interactive", "group_leader.pid", "session_leader.pid":
		return 0
	}
	return GapUser // user.id, real_user.id, group.name, ...
}

// String names the facts, for people.
func (g Gaps) String() string {
	var all []string
	for _, place := range []struct {
		of    string
		shift int
	}{{"", 0}, {" of the parent", parentGaps}, {" of the present parent", parentNowGaps}} {
		for i, name := range [...]string{"name", "executable", "thread name", "arguments", "number of arguments", "command line", "working directory", "user", "unit or container", "owner of the executable"} {
			if g>>(place.shift+i)&1 == 1 {
				all = append(all, name+place.of)
			}
		}
	}
	for i, name := range [...]string{"ancestors", "method", "target", "path", "Host header", "user agent", "request", "session token", "other subjects", "exact time", "answer", "outcome"} {
		if g>>(36+i)&1 == 1 {
			all = append(all, name)
		}
	}
	return strings.Join(all, ", ")
}
