package event

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Type is the type of a field.
type Type uint8

const (
	Keyword Type = iota
	IP
	Long
	Boolean
	Date
)

// Value is what one field has in one document. The zero Value is no value.
type Value struct {
	Set   bool
	Text  string
	Texts []string // instead of Text, for a field with several values
	Int   int64
	Ints  []int64 // instead of Int
	Bool  bool
	Addr  netip.Addr
	Time  time.Time

	command *Process // whose arguments Texts are, or Text with blanks between them
	hidden  bool     // Text is for rules alone
}

// A View is one document of an event, with the process that it is about. It
// carries what belongs to the document and not to the event.
type View struct {
	*Event
	Document Document
	Subject  *Process // nil when unattributed
	Match    *Match   // of an alert
	ID       string
	Sequence uint64
	Created  time.Time
	Related  []string // of an alert: the IDs of the event's other documents
	// Adopted makes the present parent stand in the place of the one that forked the
	// process. It is for rules: what is written has both.
	Adopted bool

	likeness bool // without what is new in each request
}

// Field is one row of the schema. Name is dotted, as in ECS; names outside ECS
// begin with "imdsgate.".
type Field struct {
	Name  string
	Type  Type
	Array bool // may have several values

	docs    docs
	lasting docs // where it says the same of a process at all times
	asked   bool // only of requests
	free    bool // text that a process or client chose, and that may carry a secret
	first   bool // only the first of several values is written; ECS wants one
	fixed   bool // depends on the document alone
	rests   Gaps
	exact   bool // a time to the nanosecond, not the millisecond
	single  bool // in which requests may differ and be alike
	get     func(*View) Value
	tells   loss                               // that the line has of rules' text
	write   func(*View, []byte) ([]byte, loss) // renders the value without making it; nil where get will do
	parts   []string
	key     string // the last part, as JSON has it before a value
}

// Value reads the field in a document.
func (f *Field) Value(v *View) Value {
	if f.docs&(1<<v.Document) == 0 || f.asked && v.Kind == Started {
		return Value{}
	}
	return f.get(v)
}

// Lasting reports whether all documents of this kind that are about the same process of
// the same host, seen as the child of the same parent, have the same value.
func (f *Field) Lasting(d Document) bool { return (f.lasting|^f.docs)&(1<<d) != 0 }

// docs is a set of documents.
type docs uint8

const (
	inProcess   docs = 1 << ProcessStart
	inConn      docs = 1 << ConnectionAttempt
	inDecision  docs = 1 << RequestDecision
	inAlert     docs = 1 << Alert
	inLifecycle docs = 1 << LifecycleChange
	inIntegrity docs = 1 << IntegrityFinding

	everywhere = inProcess | inConn | onRequest | onState
	onRequest  = inDecision | inAlert
	onProcess  = inProcess | inConn | onRequest
	onNetwork  = inConn | onRequest
	onState    = inLifecycle | inIntegrity
	onFinding  = onRequest | inIntegrity
)

// Fields is the whole schema, in the order of rendering. It must not be changed.
var Fields = fields()

// Lookup finds a field by its name.
func Lookup(name string) (index int, ok bool) {
	return slices.BinarySearchFunc(Fields, strings.Split(name, "."), func(f Field, parts []string) int {
		return slices.Compare(f.parts, parts)
	})
}

func text(s string) Value { return Value{Set: true, Text: s} }

// known is text, or no value for "".
func known(s string) Value { return Value{Set: s != "", Text: s} }

func texts(s ...string) Value { return Value{Set: len(s) > 0, Texts: s} }
func number(n int64) Value    { return Value{Set: true, Int: n} }
func flag(b bool) Value       { return Value{Set: true, Bool: b} }
func date(t time.Time) Value  { return Value{Set: !t.IsZero(), Time: t} }
func addr(a netip.Addr) Value { return Value{Set: a.IsValid(), Addr: a} }

// positive is a number, or no value for 0.
func positive(n int64) Value { return Value{Set: n > 0, Int: n} }

func fields() []Field {
	var all []Field
	add := func(d docs, t Type, name string, get func(*View) Value) *Field {
		all = append(all, Field{Name: name, Type: t, docs: d, get: get, parts: strings.Split(name, ".")})
		return &all[len(all)-1]
	}
	array := func(d docs, t Type, name string, get func(*View) Value) { add(d, t, name, get).Array = true }

	// In full, because sequences are about what came first, and in how long.
	add(everywhere, Date, "@timestamp", func(v *View) Value { return date(v.Timestamp()) }).exact = true
	add(everywhere, Keyword, "ecs.version", func(*View) Value { return text(ECSVersion) }).fixed = true
	message := add(everywhere, Keyword, "message", func(v *View) Value { return text(v.message()) })
	message.free, message.write = true, (*View).writeMessage
	add(onRequest|onState, Keyword, "log.level", func(v *View) Value { return text(v.level()) })
	add(everywhere, Keyword, "data_stream.type", func(*View) Value { return text("logs") }).fixed = true
	add(everywhere, Keyword, "data_stream.dataset", func(v *View) Value { return text(v.dataset()) })
	add(everywhere, Keyword, "data_stream.namespace", func(v *View) Value { return text(v.namespace()) })

	add(everywhere, Keyword, "agent.id", func(v *View) Value { return known(v.Host.AgentID) })
	add(everywhere, Keyword, "agent.type", func(*View) Value { return text("imdsgate") })
	add(everywhere, Keyword, "agent.version", func(v *View) Value { return known(v.Host.Version) })
	add(everywhere, Keyword, "host.id", func(v *View) Value { return known(v.Host.ID) })
	add(everywhere, Keyword, "host.name", func(v *View) Value { return known(v.Host.Name) })
	add(everywhere, Keyword, "host.hostname", func(v *View) Value { return known(v.Host.Name) })
	add(everywhere, Keyword, "host.architecture", func(v *View) Value { return known(v.Host.Architecture) })
	add(everywhere, Keyword, "host.boot.id", func(v *View) Value { return known(v.Host.BootID) })
	add(everywhere, Keyword, "host.os.type", func(*View) Value { return text("linux") })
	add(everywhere, Keyword, "host.os.name", func(v *View) Value { return known(v.Host.OSName) })
	add(everywhere, Keyword, "host.os.version", func(v *View) Value { return known(v.Host.OSVersion) })
	add(everywhere, Keyword, "host.os.platform", func(v *View) Value { return known(v.Host.OSPlatform) })
	add(everywhere, Keyword, "host.os.kernel", func(v *View) Value { return known(v.Host.Kernel) })
	add(onRequest|onState, Keyword, "observer.type", func(*View) Value { return text("proxy") })
	add(onRequest|onState, Keyword, "observer.vendor", func(*View) Value { return text("imdsgate") })
	add(onRequest|onState, Keyword, "observer.product", func(*View) Value { return text("imdsgate") })
	add(onRequest|onState, Keyword, "observer.version", func(v *View) Value { return known(v.Host.Version) })
	add(onRequest|onState, Keyword, "observer.hostname", func(v *View) Value { return known(v.Host.Name) })

	add(everywhere, Keyword, "event.id", func(v *View) Value { return known(v.ID) })
	add(everywhere, Long, "event.sequence", func(v *View) Value { return positive(int64(v.Sequence)) })
	add(everywhere, Date, "event.created", func(v *View) Value { return date(v.Created) })
	// Rules about requests are written for Elastic's network_traffic, whose fields these
	// documents have. What is written is who we are.
	module := add(everywhere, Keyword, "event.module", func(v *View) Value {
		if v.Document == RequestDecision {
			return texts(requestModules...)
		}
		return text(requestModules[0])
	})
	module.Array, module.first, module.fixed = true, true, true
	add(everywhere, Keyword, "event.dataset", func(v *View) Value { return text(v.dataset()) })
	add(everywhere, Keyword, "event.kind", func(v *View) Value { return text(v.kind()) }).fixed = true
	category := add(everywhere, Keyword, "event.category", func(v *View) Value { return texts(categories[v.Document]...) })
	category.Array, category.fixed = true, true
	array(everywhere, Keyword, "event.type", func(v *View) Value { return texts(v.types()...) })
	add(everywhere, Keyword, "event.action", func(v *View) Value { return text(v.action()) })
	add(everywhere, Keyword, "event.outcome", func(v *View) Value { return text(v.outcome()) })
	add(onRequest|onState, Keyword, "event.provider", func(v *View) Value { return text(providers[v.Document]) }).fixed = true
	add(onRequest|onState, Keyword, "event.code", func(v *View) Value { return text(v.code()) })
	add(onRequest|onState, Keyword, "event.reason", func(v *View) Value { return known(v.reason()) }).free = true
	add(onRequest, Date, "event.start", func(v *View) Value { return date(v.Start()) })
	add(inDecision, Date, "event.end", func(v *View) Value { return Value{Set: v.Repeats.Requests > 0, Time: v.Time} })
	add(onRequest|onState, Long, "event.duration", func(v *View) Value { return positive(v.duration().Nanoseconds()) })
	add(onFinding, Long, "event.severity", func(v *View) Value {
		if r := v.rule(); r != nil {
			n, err := SeverityNumber(r.Severity)
			return Value{Set: err == nil, Int: n}
		}
		return Value{}
	})
	add(onFinding, Long, "event.risk_score", func(v *View) Value {
		if r := v.rule(); r != nil {
			return number(r.RiskScore)
		}
		return Value{}
	})

	processFields(add, array, "process", func(v *View) *Process { return v.Subject })
	processFields(add, array, "process.parent", func(v *View) *Process {
		switch {
		case v.Subject == nil:
			return nil
		case v.Adopted:
			return v.Subject.ParentNow
		}
		return v.Subject.Parent
	})
	add(onProcess, Keyword, "user.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.UserID) }) })
	add(onProcess, Keyword, "user.name", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.UserName) }) })
	add(onProcess, Keyword, "container.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Container) }) })
	add(onProcess, Keyword, "container.runtime", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Runtime) }) })
	add(onProcess, Keyword, "orchestrator.resource.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Pod) }) })
	add(onProcess, Keyword, "orchestrator.resource.type", func(v *View) Value {
		return v.of(func(p *Process) Value {
			if p.Pod == "" {
				return Value{}
			}
			return text("pod")
		})
	})

	add(onNetwork, Keyword, "source.address", func(v *View) Value { return text(v.Connection.Source.Addr().String()) }).write = func(v *View, b []byte) ([]byte, loss) {
		return appendAddr(b, v.Connection.Source.Addr()), 0
	}
	add(onNetwork, IP, "source.ip", func(v *View) Value { return addr(v.Connection.Source.Addr()) })
	add(onNetwork, Long, "source.port", func(v *View) Value { return number(int64(v.Connection.Source.Port())) })
	add(onNetwork, Keyword, "destination.address", func(v *View) Value { return text(v.Connection.Destination.Addr().String()) }).write = func(v *View, b []byte) ([]byte, loss) {
		return appendAddr(b, v.Connection.Destination.Addr()), 0
	}
	add(onNetwork, IP, "destination.ip", func(v *View) Value { return addr(v.Connection.Destination.Addr()) })
	add(onNetwork, Long, "destination.port", func(v *View) Value { return number(int64(v.Connection.Destination.Port())) })
	add(onNetwork, Keyword, "network.direction", func(*View) Value { return text("egress") }).fixed = true
	add(onNetwork, Keyword, "network.transport", func(*View) Value { return text("tcp") }).fixed = true
	add(onNetwork, Keyword, "network.protocol", func(*View) Value { return text("http") }).fixed = true
	add(onNetwork, Keyword, "network.type", func(v *View) Value {
		if v.Connection.Destination.Addr().Is4() {
			return text("ipv4")
		}
		return text("ipv6")
	})

	add(onRequest, Keyword, "http.version", func(v *View) Value { return known(v.Request.HTTP) })
	add(onRequest, Keyword, "http.request.method", func(v *View) Value { return known(v.Request.Method) }).free = true
	add(onRequest, Long, "http.request.bytes", func(v *View) Value { return positive(v.Request.Bytes) })
	add(onRequest, Long, "http.response.status_code", func(v *View) Value { return positive(v.Response.Status) })
	add(onRequest, Long, "http.response.bytes", func(v *View) Value { return number(v.Response.Bytes) })
	add(onRequest, Keyword, "url.scheme", func(*View) Value { return text("http") }).fixed = true
	add(onRequest, Keyword, "url.domain", func(v *View) Value { return known(v.Request.Host) }).free = true
	add(onRequest, Long, "url.port", func(v *View) Value { return number(int64(v.Connection.Destination.Port())) })
	add(onRequest, Keyword, "url.path", func(v *View) Value { return known(v.Request.Path) }).free = true
	add(onRequest, Keyword, "url.original", func(v *View) Value {
		target := known(v.Request.Target)
		// A secret path is found where it is written as its owner writes it.
		target.hidden = v.Request.Container && v.Request.Evasive
		return target
	}).free = true
	add(onRequest, Keyword, "user_agent.original", func(v *View) Value { return known(v.Request.UserAgent) }).free = true

	ruleFields(add, array)
	related := add(onRequest, IP, "related.ip", func(v *View) Value {
		return texts(v.Connection.Source.Addr().String(), v.Connection.Destination.Addr().String())
	})
	related.Array, related.write = true, func(v *View, b []byte) ([]byte, loss) {
		b = appendAddr(append(b, '['), v.Connection.Source.Addr())
		b = appendAddr(append(b, ','), v.Connection.Destination.Addr())
		return append(b, ']'), 0
	}
	array(onRequest, Keyword, "related.hosts", func(v *View) Value { return texts(v.Host.Name) })
	array(onRequest, Keyword, "related.user", func(v *View) Value {
		return v.of(func(p *Process) Value {
			if p.UserName == "" {
				return Value{}
			}
			return texts(p.UserName)
		})
	})
	ownFields(add, array)
	tokenFields(add)
	stateFields(add)

	for i := range all {
		all[i].asked = ofRequest(all[i].Name)
		all[i].lasting = lasting(all[i].Name)
		all[i].rests = restsOf(all[i].Name)
		all[i].single = isSingle(all[i].Name)
		all[i].key = string(append(appendString(nil, all[i].parts[len(all[i].parts)-1]), ':'))
	}
	slices.SortFunc(all, func(a, b Field) int { return slices.Compare(a.parts, b.parts) })
	return all
}

var requestModules = []string{"imdsgate", "network_traffic"}

// lasting is the documents in which a field depends on nothing but the process, the host
// and the kind of document.
func lasting(name string) docs {
	switch name {
	case "ecs.version", "event.module", "event.dataset", "event.kind", "event.category", "event.provider":
		return everywhere
	case "event.type", "event.action":
		return inProcess | inConn
	}
	for _, prefix := range []string{"process.", "user.", "container.", "orchestrator.", "related.user", "related.hosts", "imdsgate.executable.",
		"imdsgate.process.", "imdsgate.ancestors.", "host.", "agent.", "observer.", "data_stream."} {
		if strings.HasPrefix(name, prefix) {
			return everywhere
		}
	}
	return 0
}

// ofRequest reports whether a field says something about a connection or a request.
func ofRequest(name string) bool {
	for _, prefix := range []string{"source.", "destination.", "network.", "http.", "url.", "user_agent.", "related.ip", "event.duration",
		"event.end", "imdsgate.repeats.", "imdsgate.request.", "imdsgate.response.", "imdsgate.credential.", "imdsgate.token.", "imdsgate.attribution.", "imdsgate.verdict", "imdsgate.audit_verdict", "imdsgate.latched"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

type adder func(d docs, t Type, name string, get func(*View) Value) *Field

func processFields(add adder, array func(docs, Type, string, func(*View) Value), prefix string, who func(*View) *Process) {
	of := func(get func(*Process) Value) func(*View) Value {
		return func(v *View) Value {
			if p := who(v); p != nil {
				return get(p)
			}
			return Value{}
		}
	}
	add(onProcess, Keyword, prefix+".entity_id", of(func(p *Process) Value { return known(p.EntityID) }))
	add(onProcess, Long, prefix+".pid", of(func(p *Process) Value { return number(p.PID) }))
	add(onProcess, Keyword, prefix+".name", of(func(p *Process) Value { return known(p.Name) })).free = true
	// A program started by a relative path is matched by the rules under that
	// path, too; the kernel only knows the absolute one.
	executable := add(onProcess, Keyword, prefix+".executable", of(func(p *Process) Value {
		if len(p.Args) > 0 && strings.HasPrefix(p.Args[0], "./") && p.Executable != "" {
			return texts(p.Executable, p.Args[0])
		}
		return known(p.Executable)
	}))
	executable.Array, executable.free, executable.first = true, true, true
	add(onProcess, Keyword, prefix+".thread.name", of(func(p *Process) Value { return known(p.Thread) })).free = true
	array(onProcess, Keyword, prefix+".args", of(func(p *Process) Value {
		return Value{Set: len(p.Args) > 0, Texts: p.Args, command: p}
	}))
	add(onProcess, Long, prefix+".args_count", of(func(p *Process) Value { return number(int64(len(p.Args))) }))
	add(onProcess, Keyword, prefix+".command_line", of(func(p *Process) Value {
		return Value{Set: p.CommandLine != "", Text: p.CommandLine, command: p}
	})).free = true
	add(onProcess, Keyword, prefix+".working_directory", of(func(p *Process) Value { return text(p.WorkingDir) })).free = true
	add(onProcess, Date, prefix+".start", of(func(p *Process) Value { return date(p.Start) }))
	add(onProcess, Boolean, prefix+".interactive", of(func(p *Process) Value { return flag(p.TTY) }))
	add(onProcess, Keyword, prefix+".user.id", of(func(p *Process) Value { return known(p.UserID) }))
	add(onProcess, Keyword, prefix+".user.name", of(func(p *Process) Value { return known(p.UserName) }))
	add(onProcess, Keyword, prefix+".real_user.id", of(func(p *Process) Value { return known(p.RealUserID) }))
	add(onProcess, Keyword, prefix+".saved_user.id", of(func(p *Process) Value { return known(p.SavedUserID) }))
	add(onProcess, Keyword, prefix+".real_group.id", of(func(p *Process) Value { return known(p.RealGroupID) }))
	add(onProcess, Keyword, prefix+".saved_group.id", of(func(p *Process) Value { return known(p.SavedGroupID) }))
	add(onProcess, Keyword, prefix+".group.id", of(func(p *Process) Value { return known(p.GroupID) }))
	add(onProcess, Keyword, prefix+".group.name", of(func(p *Process) Value { return known(p.GroupName) }))
	array(onProcess, Keyword, prefix+".supplemental_groups.id", of(func(p *Process) Value { return texts(p.SupplementalGroups...) }))
	add(onProcess, Long, prefix+".group_leader.pid", of(func(p *Process) Value { return positive(p.Group) }))
	add(onProcess, Long, prefix+".session_leader.pid", of(func(p *Process) Value { return positive(p.Session) }))
}

func ruleFields(add adder, array func(docs, Type, string, func(*View) Value)) {
	of := func(get func(*Rule) Value) func(*View) Value {
		return func(v *View) Value {
			if r := v.rule(); r != nil {
				return get(r)
			}
			return Value{}
		}
	}
	add(onFinding, Keyword, "rule.id", of(func(r *Rule) Value { return known(r.ID) }))
	add(onFinding, Keyword, "rule.uuid", of(func(r *Rule) Value { return known(r.ID) }))
	add(onFinding, Keyword, "rule.name", of(func(r *Rule) Value { return known(r.Name) }))
	add(onFinding, Keyword, "rule.ruleset", of(func(r *Rule) Value { return known(r.Ruleset) }))
	add(onFinding, Keyword, "rule.version", of(func(r *Rule) Value { return known(r.Version) }))
	add(onFinding, Keyword, "rule.reference", of(func(r *Rule) Value { return known(r.Reference) }))
	add(onFinding, Keyword, "threat.framework", of(func(r *Rule) Value {
		if len(r.Threat) == 0 {
			return Value{}
		}
		return known(r.Threat[0].Framework)
	}))
	for _, f := range []struct {
		name string
		get  func(Threat) []string
	}{
		{"threat.tactic.id", func(t Threat) []string { return []string{t.TacticID} }},
		{"threat.tactic.name", func(t Threat) []string { return []string{t.TacticName} }},
		{"threat.technique.id", func(t Threat) []string { return t.TechniqueIDs }},
		{"threat.technique.name", func(t Threat) []string { return t.TechniqueNames }},
		{"threat.technique.subtechnique.id", func(t Threat) []string { return t.SubtechniqueIDs }},
		{"threat.technique.subtechnique.name", func(t Threat) []string { return t.SubtechniqueNames }},
	} {
		array(onFinding, Keyword, f.name, of(func(r *Rule) Value {
			var all []string
			for _, t := range r.Threat {
				all = append(all, f.get(t)...)
			}
			return texts(all...)
		}))
	}
}

// ownFields are those that ECS has no name for.
func ownFields(add adder, array func(docs, Type, string, func(*View) Value)) {
	add(onRequest|onState, Keyword, "imdsgate.mode", func(v *View) Value {
		if v.Kind == Asked || v.Kind == Started {
			return known(v.Decision.Mode)
		}
		return known(v.State.Mode)
	})
	add(onRequest, Keyword, "imdsgate.verdict", func(v *View) Value { return text(v.Decision.Verdict.String()) })
	add(onRequest, Keyword, "imdsgate.audit_verdict", func(v *View) Value { return text(v.Decision.WouldBe.String()) })
	add(onRequest, Keyword, "imdsgate.deny", func(v *View) Value { return known(v.Decision.Deny) })
	add(onRequest, Keyword, "imdsgate.grant", func(v *View) Value { return known(v.Decision.Grant) })
	add(onRequest, Boolean, "imdsgate.latched", func(v *View) Value { return Value{Set: v.Decision.Latched, Bool: true} })
	add(onRequest|onState, Keyword, "imdsgate.decision.id", func(v *View) Value {
		if v.Kind == Asked || v.Kind == Started {
			return known(v.Decision.Operator)
		}
		return known(v.State.Decision)
	})
	array(inDecision, Keyword, "imdsgate.matched", func(v *View) Value {
		var all []string
		for _, m := range v.Decision.Matches {
			all = append(all, m.Rule.ID)
		}
		return texts(all...)
	})
	add(onNetwork, Boolean, "imdsgate.forwarded", func(v *View) Value { return flag(v.Connection.Forwarded) })
	add(onRequest, Keyword, "imdsgate.request.class", func(v *View) Value { return known(v.Request.Class) })
	add(onRequest, Boolean, "imdsgate.request.guarded", func(v *View) Value { return flag(v.Request.Guarded) })
	add(onRequest, Keyword, "imdsgate.request.api", func(v *View) Value { return known(v.Request.API()) })
	add(onRequest, Keyword, "imdsgate.request.token", func(v *View) Value {
		if v.Request.Token {
			return text("present")
		}
		return text("absent")
	})
	add(onRequest, Keyword, "imdsgate.request.version", func(v *View) Value { return known(v.Request.Version) })
	add(onRequest, Boolean, "imdsgate.request.evasive", func(v *View) Value { return flag(v.Request.Evasive) })
	add(onRequest, Boolean, "imdsgate.request.forwarded_for", func(v *View) Value { return flag(v.Request.Forwarded) })
	add(onRequest, Boolean, "imdsgate.request.public_host", func(v *View) Value { return flag(v.Request.HostIsOdd) })
	add(onRequest, Keyword, "imdsgate.request.malformed", func(v *View) Value { return known(v.Request.Malformed) }).free = true
	add(onRequest, Keyword, "imdsgate.response.failure", func(v *View) Value { return known(v.Response.Failed) })
	add(onRequest, Keyword, "imdsgate.credential.access_key_id", func(v *View) Value { return known(v.Response.AccessKeyID) })
	add(onRequest, Date, "imdsgate.credential.expiration", func(v *View) Value { return date(v.Response.Expiration) })

	add(onRequest|onState, Keyword, "imdsgate.attribution.level", func(v *View) Value {
		if v.Kind == Asked {
			return known(v.Attribution.Level)
		}
		return known(v.State.Level)
	})
	add(onRequest, Keyword, "imdsgate.attribution.confidence", func(v *View) Value { return known(v.Attribution.Confidence) })
	add(onRequest, Keyword, "imdsgate.attribution.via", func(v *View) Value { return known(v.Attribution.Via) })
	add(onRequest, Boolean, "imdsgate.attribution.complete", func(v *View) Value { return flag(v.Attribution.Complete) })
	add(onRequest, Boolean, "imdsgate.attribution.unawaited", func(v *View) Value { return Value{Set: v.Attribution.Unawaited, Bool: true} })
	add(onRequest, Keyword, "imdsgate.attribution.reason", func(v *View) Value { return known(v.Attribution.Reason) })
	add(onRequest, Long, "imdsgate.attribution.cookie", func(v *View) Value { return positive(int64(v.Attribution.Cookie)) })
	add(onRequest, Long, "imdsgate.attribution.latency_us", func(v *View) Value { return number(v.Attribution.Took.Microseconds()) })
	array(onRequest, Long, "imdsgate.attribution.unreadable", func(v *View) Value {
		return Value{Set: len(v.Attribution.Unreadable) > 0, Ints: v.Attribution.Unreadable}
	})

	of := func(get func(*Process) Value) func(*View) Value {
		return func(v *View) Value { return v.of(get) }
	}
	add(onProcess, Boolean, "imdsgate.executable.host_verified", of(func(p *Process) Value { return Value{Set: p.Known && !p.Unproven, Bool: p.HostVerified} }))
	add(onProcess, Boolean, "imdsgate.executable.root_owned", of(func(p *Process) Value { return Value{Set: p.Known && !p.Unproven, Bool: p.RootOwned} }))
	add(onProcess, Boolean, "imdsgate.executable.loader", of(func(p *Process) Value { return Value{Set: p.Known, Bool: p.Loader} }))
	add(onProcess, Boolean, "imdsgate.executable.deleted", of(func(p *Process) Value { return Value{Set: p.Known, Bool: p.Deleted} }))
	add(onProcess, Boolean, "imdsgate.executable.swapped", of(func(p *Process) Value { return Value{Set: p.Swapped, Bool: true} }))
	add(onProcess, Boolean, "imdsgate.process.ended", of(func(p *Process) Value { return Value{Set: p.Ended, Bool: true} }))
	add(onProcess, Keyword, "imdsgate.process.ancestry", of(func(p *Process) Value { return known(p.Ancestry) }))
	processFields(add, array, "imdsgate.process.parent_now", func(v *View) *Process {
		if v.Subject == nil {
			return nil
		}
		return v.Subject.ParentNow
	})
	// Grants look at the parent's file, too.
	parent := func(get func(*Process) Value) func(*View) Value {
		return of(func(p *Process) Value {
			if p.Parent == nil {
				return Value{}
			}
			return get(p.Parent)
		})
	}
	add(onProcess, Boolean, "imdsgate.process.parent.host_verified", parent(func(p *Process) Value { return flag(p.HostVerified) }))
	add(onProcess, Boolean, "imdsgate.process.parent.loader", parent(func(p *Process) Value { return flag(p.Loader) }))
	add(onProcess, Boolean, "imdsgate.process.parent.root_owned", parent(func(p *Process) Value { return flag(p.RootOwned) }))
	add(onProcess, Boolean, "imdsgate.process.parent.unproven", parent(func(p *Process) Value { return Value{Set: p.Unproven, Bool: true} }))
	add(onProcess, Boolean, "imdsgate.process.earlier_image", of(func(p *Process) Value { return flag(p.Earlier) }))
	add(onProcess, Keyword, "imdsgate.process.unit", of(func(p *Process) Value { return known(p.Unit) }))
	add(onProcess, Keyword, "imdsgate.process.user_unit", of(func(p *Process) Value { return known(p.UserUnit) })).free = true
	add(onProcess, Keyword, "imdsgate.process.cgroup", of(func(p *Process) Value { return known(p.Cgroup) })).free = true

	array(onProcess, Long, "imdsgate.ancestors.pid", of(func(p *Process) Value {
		var all []int64
		for a := p.Parent; a != nil; a = a.Parent {
			all = append(all, a.PID)
		}
		return Value{Set: len(all) > 0, Ints: all}
	}))
	ancestors := add(onProcess, Keyword, "imdsgate.ancestors.executable", of(func(p *Process) Value {
		var all []string
		for a := p.Parent; a != nil; a = a.Parent {
			all = append(all, a.Executable)
		}
		return texts(all...)
	}))
	ancestors.Array, ancestors.free = true, true
	add(inDecision, Long, "imdsgate.repeats.requests", func(v *View) Value { return positive(v.Repeats.Requests) })
	add(inDecision, Long, "imdsgate.repeats.connections", func(v *View) Value { return positive(v.Repeats.Connections) })
	add(inDecision, Keyword, "imdsgate.repeats.of", func(v *View) Value { return known(v.Repeats.Of) })
	array(inDecision, Long, "imdsgate.subjects.pid", func(v *View) Value {
		var all []int64
		for _, p := range v.Subjects {
			all = append(all, p.PID)
		}
		return Value{Set: len(all) > 0, Ints: all}
	})
	judged := add(inDecision, Keyword, "imdsgate.subjects.executable", func(v *View) Value {
		var all []string
		for _, p := range v.Subjects {
			all = append(all, p.Executable)
		}
		return texts(all...)
	})
	judged.Array, judged.free = true, true
	array(inDecision, Keyword, "imdsgate.subjects.role", func(v *View) Value { return texts(v.Roles...) })
	none := func(*View) Value { return Value{} } // of what is asked; the line tells
	add(everywhere, Boolean, "imdsgate.redacted", none).tells = altered
	add(everywhere, Boolean, "imdsgate.truncated", none).tells = cut
	add(inAlert, Keyword, "imdsgate.alert.match", func(v *View) Value {
		if v.Match.Literal {
			return text("literal")
		}
		return text("bound")
	})
	add(inAlert, Keyword, "imdsgate.alert.action", func(v *View) Value { return text(v.Match.Action) })
	array(inAlert, Keyword, "imdsgate.alert.correlated_event_ids", func(v *View) Value { return texts(v.Related...) })
}

// tokenFields are about the session token that a request carries, as far as it is
// known who got it.
func tokenFields(add adder) {
	add(onRequest, Keyword, "imdsgate.token.state", func(v *View) Value {
		issuer, _, _ := v.Token.closest(v.Subject)
		switch {
		case !v.Request.Token:
			return Value{}
		case issuer == nil:
			return text("unknown")
		case v.Token.Foreign(v.Subject):
			return text("foreign")
		}
		return text("own")
	})
	// The narrowest scope in which it is the process's own, whatever the policy's is.
	add(onRequest, Keyword, "imdsgate.token.scope", func(v *View) Value {
		switch issuer, scope, tied := v.Token.closest(v.Subject); {
		case issuer == nil:
			return Value{}
		case !tied:
			return text("none")
		default:
			return text(scope.String())
		}
	})
	add(onRequest, Date, "imdsgate.token.issued", func(v *View) Value { return date(v.Token.Issued) })
	add(onRequest, Date, "imdsgate.token.expires", func(v *View) Value { return date(v.Token.Expires) })
	of := func(get func(*Issuer) Value) func(*View) Value {
		return func(v *View) Value {
			if issuer, _, _ := v.Token.closest(v.Subject); issuer != nil {
				return get(issuer)
			}
			return Value{}
		}
	}
	add(onRequest, Keyword, "imdsgate.token.issuer.entity_id", of(func(i *Issuer) Value { return known(i.EntityID) }))
	add(onRequest, Long, "imdsgate.token.issuer.pid", of(func(i *Issuer) Value { return number(i.PID) }))
	add(onRequest, Keyword, "imdsgate.token.issuer.executable", of(func(i *Issuer) Value { return known(i.Executable) })).free = true
	add(onRequest, Keyword, "imdsgate.token.issuer.user.id", of(func(i *Issuer) Value { return known(i.UserID) }))
	add(onRequest, Keyword, "imdsgate.token.issuer.user.name", of(func(i *Issuer) Value { return known(i.UserName) }))
	add(onRequest, Keyword, "imdsgate.token.issuer.unit", of(func(i *Issuer) Value { return known(i.Unit) })).free = true
}

func stateFields(add adder) {
	add(onState, Keyword, "service.name", func(*View) Value { return text("imdsgate") })
	add(onState, Keyword, "service.type", func(*View) Value { return text("imdsgate") })
	add(onState, Keyword, "service.version", func(v *View) Value { return known(v.Host.Version) })
	add(onState, Keyword, "imdsgate.previous_mode", func(v *View) Value { return known(v.State.Previous) })
	add(onState, Date, "imdsgate.until", func(v *View) Value { return date(v.State.Until) })
	add(onState, Keyword, "imdsgate.actor.user.id", func(v *View) Value { return known(v.State.Actor.UserID) })
	add(onState, Keyword, "imdsgate.actor.user.name", func(v *View) Value { return known(v.State.Actor.UserName) })
	add(onState, Keyword, "imdsgate.actor.login", func(v *View) Value { return known(v.State.Actor.Login) })
	add(onState, Long, "imdsgate.actor.pid", func(v *View) Value { return positive(v.State.Actor.PID) })
	add(inIntegrity, Keyword, "imdsgate.actor.name", func(v *View) Value { return known(v.State.Actor.Name) }).free = true
	add(inIntegrity, Keyword, "imdsgate.actor.executable", func(v *View) Value { return known(v.State.Actor.Executable) }).free = true
	add(inIntegrity, Keyword, "imdsgate.actor.command_line", func(v *View) Value { return known(v.State.Actor.CommandLine) }).free = true
	add(inIntegrity, Keyword, "imdsgate.actor.parent.executable", func(v *View) Value { return known(v.State.Actor.Parent) }).free = true
	// Not as ECS has them, so that a rule about other people's files is refused, and not
	// asked of ours.
	add(inIntegrity, Keyword, "imdsgate.file.path", func(v *View) Value { return known(v.State.File.Path) }).free = true
	add(inIntegrity, Keyword, "imdsgate.file.sha256", func(v *View) Value { return known(v.State.File.SHA256) })
	add(inIntegrity, Date, "imdsgate.file.modified", func(v *View) Value { return date(v.State.File.Modified) })
	add(inIntegrity, Keyword, "imdsgate.file.uid", func(v *View) Value { return known(v.State.File.UID) })
	add(inIntegrity, Keyword, "imdsgate.file.owner", func(v *View) Value { return known(v.State.File.Owner) })
	add(inIntegrity, Keyword, "imdsgate.file.mode", func(v *View) Value { return known(v.State.File.Mode) })
	add(inIntegrity, Keyword, "imdsgate.file.loaded_sha256", func(v *View) Value { return known(v.State.File.Loaded) })
	add(onState, Keyword, "imdsgate.policy.digest", func(v *View) Value { return known(v.State.Policy) })
	add(inLifecycle, Long, "imdsgate.suppressed", func(v *View) Value { return positive(v.State.Suppressed) })
	add(onState, Long, "imdsgate.rules_loaded", func(v *View) Value { return positive(v.State.Rules) })
	add(onState, Long, "imdsgate.grants_loaded", func(v *View) Value { return positive(v.State.Grants) })
}

// of reads the subject.
func (v *View) of(get func(*Process) Value) Value {
	if v.Subject == nil {
		return Value{}
	}
	return get(v.Subject)
}
