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
	text    func(*View) string                 // the value, if it is one text; "" for none
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

// Text is Value, of a field that is one text: "" for none. It reports false of any other.
func (f *Field) Text(v *View) (text string, is bool) {
	switch {
	case f.text == nil:
		return "", false
	case f.docs&(1<<v.Document) == 0 || f.asked && v.Kind == Started:
		return "", true
	}
	return f.text(v), true
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

// schema is Fields while they are added.
type schema []Field

func (s *schema) add(d docs, t Type, name string, get func(*View) Value) *Field {
	*s = append(*s, Field{Name: name, Type: t, docs: d, get: get, parts: strings.Split(name, ".")})
	return &(*s)[len(*s)-1]
}

func (s *schema) array(d docs, t Type, name string, get func(*View) Value) {
	s.add(d, t, name, get).Array = true
}

// word adds a field that is one text; "" is no value.
func (s *schema) word(d docs, name string, get func(*View) string) *Field {
	f := s.add(d, Keyword, name, func(v *View) Value { return known(get(v)) })
	f.text = get
	return f
}

func fields() []Field {
	var s schema

	// In full, because sequences are about what came first, and in how long.
	s.add(everywhere, Date, "@timestamp", func(v *View) Value { return date(v.Timestamp()) }).exact = true
	s.word(everywhere, "ecs.version", func(*View) string { return ECSVersion }).fixed = true
	message := s.add(everywhere, Keyword, "message", func(v *View) Value { return text(v.message()) })
	message.free, message.write = true, (*View).writeMessage
	s.word(onRequest|onState, "log.level", func(v *View) string { return v.level() })
	s.word(everywhere, "data_stream.type", func(*View) string { return "logs" }).fixed = true
	s.word(everywhere, "data_stream.dataset", func(v *View) string { return v.dataset() })
	s.word(everywhere, "data_stream.namespace", func(v *View) string { return v.namespace() })

	s.word(everywhere, "agent.id", func(v *View) string { return v.Host.AgentID })
	s.word(everywhere, "agent.type", func(*View) string { return "imdsgate" })
	s.word(everywhere, "agent.version", func(v *View) string { return v.Host.Version })
	s.word(everywhere, "host.id", func(v *View) string { return v.Host.ID })
	s.word(everywhere, "host.name", func(v *View) string { return v.Host.Name })
	s.word(everywhere, "host.hostname", func(v *View) string { return v.Host.Name })
	s.word(everywhere, "host.architecture", func(v *View) string { return v.Host.Architecture })
	s.word(everywhere, "host.boot.id", func(v *View) string { return v.Host.BootID })
	s.word(everywhere, "host.os.type", func(*View) string { return "linux" })
	s.word(everywhere, "host.os.name", func(v *View) string { return v.Host.OSName })
	s.word(everywhere, "host.os.version", func(v *View) string { return v.Host.OSVersion })
	s.word(everywhere, "host.os.platform", func(v *View) string { return v.Host.OSPlatform })
	s.word(everywhere, "host.os.kernel", func(v *View) string { return v.Host.Kernel })
	s.word(onRequest|onState, "observer.type", func(*View) string { return "proxy" })
	s.word(onRequest|onState, "observer.vendor", func(*View) string { return "imdsgate" })
	s.word(onRequest|onState, "observer.product", func(*View) string { return "imdsgate" })
	s.word(onRequest|onState, "observer.version", func(v *View) string { return v.Host.Version })
	s.word(onRequest|onState, "observer.hostname", func(v *View) string { return v.Host.Name })

	s.word(everywhere, "event.id", func(v *View) string { return v.ID })
	s.add(everywhere, Long, "event.sequence", func(v *View) Value { return positive(int64(v.Sequence)) })
	s.add(everywhere, Date, "event.created", func(v *View) Value { return date(v.Created) })
	// Rules about requests are written for Elastic's network_traffic, whose fields these
	// documents have. What is written is who we are.
	module := s.add(everywhere, Keyword, "event.module", func(v *View) Value {
		if v.Document == RequestDecision {
			return texts(requestModules...)
		}
		return text(requestModules[0])
	})
	module.Array, module.first, module.fixed = true, true, true
	s.word(everywhere, "event.dataset", func(v *View) string { return v.dataset() })
	s.word(everywhere, "event.kind", func(v *View) string { return v.kind() }).fixed = true
	category := s.add(everywhere, Keyword, "event.category", func(v *View) Value { return texts(categories[v.Document]...) })
	category.Array, category.fixed = true, true
	s.array(everywhere, Keyword, "event.type", func(v *View) Value { return texts(v.types()...) })
	s.word(everywhere, "event.action", func(v *View) string { return v.action() })
	s.word(everywhere, "event.outcome", func(v *View) string { return v.outcome() })
	s.word(onRequest|onState, "event.provider", func(v *View) string { return providers[v.Document] }).fixed = true
	s.word(onRequest|onState, "event.code", func(v *View) string { return v.code() })
	s.word(onRequest|onState, "event.reason", func(v *View) string { return v.reason() }).free = true
	s.add(onRequest, Date, "event.start", func(v *View) Value { return date(v.Start()) })
	s.add(inDecision, Date, "event.end", func(v *View) Value { return Value{Set: v.Repeats.Requests > 0, Time: v.Time} })
	s.add(onRequest|onState, Long, "event.duration", func(v *View) Value { return positive(v.duration().Nanoseconds()) })
	s.add(onFinding, Long, "event.severity", func(v *View) Value {
		if r := v.rule(); r != nil {
			n, err := SeverityNumber(r.Severity)
			return Value{Set: err == nil, Int: n}
		}
		return Value{}
	})
	s.add(onFinding, Long, "event.risk_score", func(v *View) Value {
		if r := v.rule(); r != nil {
			return number(r.RiskScore)
		}
		return Value{}
	})

	s.processFields("process", func(v *View) *Process { return v.Subject })
	s.processFields("process.parent", func(v *View) *Process {
		switch {
		case v.Subject == nil:
			return nil
		case v.Adopted:
			return v.Subject.ParentNow
		}
		return v.Subject.Parent
	})
	s.add(onProcess, Keyword, "user.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.UserID) }) })
	s.add(onProcess, Keyword, "user.name", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.UserName) }) })
	s.add(onProcess, Keyword, "container.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Container) }) })
	s.add(onProcess, Keyword, "container.runtime", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Runtime) }) })
	s.add(onProcess, Keyword, "orchestrator.resource.id", func(v *View) Value { return v.of(func(p *Process) Value { return known(p.Pod) }) })
	s.add(onProcess, Keyword, "orchestrator.resource.type", func(v *View) Value {
		return v.of(func(p *Process) Value {
			if p.Pod == "" {
				return Value{}
			}
			return text("pod")
		})
	})

	s.word(onNetwork, "source.address", func(v *View) string { return v.Connection.Source.Addr().String() }).write = func(v *View, b []byte) ([]byte, loss) {
		return appendAddr(b, v.Connection.Source.Addr()), 0
	}
	s.add(onNetwork, IP, "source.ip", func(v *View) Value { return addr(v.Connection.Source.Addr()) })
	s.add(onNetwork, Long, "source.port", func(v *View) Value { return number(int64(v.Connection.Source.Port())) })
	s.word(onNetwork, "destination.address", func(v *View) string { return v.Connection.Destination.Addr().String() }).write = func(v *View, b []byte) ([]byte, loss) {
		return appendAddr(b, v.Connection.Destination.Addr()), 0
	}
	s.add(onNetwork, IP, "destination.ip", func(v *View) Value { return addr(v.Connection.Destination.Addr()) })
	s.add(onNetwork, Long, "destination.port", func(v *View) Value { return number(int64(v.Connection.Destination.Port())) })
	s.word(onNetwork, "network.direction", func(*View) string { return "egress" }).fixed = true
	s.word(onNetwork, "network.transport", func(*View) string { return "tcp" }).fixed = true
	s.word(onNetwork, "network.protocol", func(*View) string { return "http" }).fixed = true
	s.word(onNetwork, "network.type", func(v *View) string {
		if v.Connection.Destination.Addr().Is4() {
			return "ipv4"
		}
		return "ipv6"
	})

	s.word(onRequest, "http.version", func(v *View) string { return v.Request.HTTP })
	s.word(onRequest, "http.request.method", func(v *View) string { return v.Request.Method }).free = true
	s.add(onRequest, Long, "http.request.bytes", func(v *View) Value { return positive(v.Request.Bytes) })
	s.add(onRequest, Long, "http.response.status_code", func(v *View) Value { return positive(v.Response.Status) })
	s.add(onRequest, Long, "http.response.bytes", func(v *View) Value { return number(v.Response.Bytes) })
	s.word(onRequest, "url.scheme", func(*View) string { return "http" }).fixed = true
	s.word(onRequest, "url.domain", func(v *View) string { return v.Request.Host }).free = true
	s.add(onRequest, Long, "url.port", func(v *View) Value { return number(int64(v.Connection.Destination.Port())) })
	s.word(onRequest, "url.path", func(v *View) string { return v.Request.Path }).free = true
	s.add(onRequest, Keyword, "url.original", func(v *View) Value {
		target := known(v.Request.Target)
		// A secret path is found where it is written as its owner writes it.
		target.hidden = v.Request.Container && v.Request.Evasive
		return target
	}).free = true
	s.word(onRequest, "user_agent.original", func(v *View) string { return v.Request.UserAgent }).free = true

	s.ruleFields()
	related := s.add(onRequest, IP, "related.ip", func(v *View) Value {
		return texts(v.Connection.Source.Addr().String(), v.Connection.Destination.Addr().String())
	})
	related.Array, related.write = true, func(v *View, b []byte) ([]byte, loss) {
		b = appendAddr(append(b, '['), v.Connection.Source.Addr())
		b = appendAddr(append(b, ','), v.Connection.Destination.Addr())
		return append(b, ']'), 0
	}
	s.array(onRequest, Keyword, "related.hosts", func(v *View) Value { return texts(v.Host.Name) })
	s.array(onRequest, Keyword, "related.user", func(v *View) Value {
		return v.of(func(p *Process) Value {
			if p.UserName == "" {
				return Value{}
			}
			return texts(p.UserName)
		})
	})
	s.ownFields()
	s.tokenFields()
	s.stateFields()

	all := []Field(s)
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

func (s *schema) processFields(prefix string, who func(*View) *Process) {
	of := func(get func(*Process) Value) func(*View) Value {
		return func(v *View) Value {
			if p := who(v); p != nil {
				return get(p)
			}
			return Value{}
		}
	}
	s.add(onProcess, Keyword, prefix+".entity_id", of(func(p *Process) Value { return known(p.EntityID) }))
	s.add(onProcess, Long, prefix+".pid", of(func(p *Process) Value { return number(p.PID) }))
	s.add(onProcess, Keyword, prefix+".name", of(func(p *Process) Value { return known(p.Name) })).free = true
	// A program started by a relative path is matched by the rules under that
	// path, too; the kernel only knows the absolute one.
	executable := s.add(onProcess, Keyword, prefix+".executable", of(func(p *Process) Value {
		if len(p.Args) > 0 && strings.HasPrefix(p.Args[0], "./") && p.Executable != "" {
			return texts(p.Executable, p.Args[0])
		}
		return known(p.Executable)
	}))
	executable.Array, executable.free, executable.first = true, true, true
	s.add(onProcess, Keyword, prefix+".thread.name", of(func(p *Process) Value { return known(p.Thread) })).free = true
	s.array(onProcess, Keyword, prefix+".args", of(func(p *Process) Value {
		return Value{Set: len(p.Args) > 0, Texts: p.Args, command: p}
	}))
	s.add(onProcess, Long, prefix+".args_count", of(func(p *Process) Value { return number(int64(len(p.Args))) }))
	s.add(onProcess, Keyword, prefix+".command_line", of(func(p *Process) Value {
		return Value{Set: p.CommandLine != "", Text: p.CommandLine, command: p}
	})).free = true
	s.add(onProcess, Keyword, prefix+".working_directory", of(func(p *Process) Value { return text(p.WorkingDir) })).free = true
	s.add(onProcess, Date, prefix+".start", of(func(p *Process) Value { return date(p.Start) }))
	s.add(onProcess, Boolean, prefix+".interactive", of(func(p *Process) Value { return flag(p.TTY) }))
	s.add(onProcess, Keyword, prefix+".user.id", of(func(p *Process) Value { return known(p.UserID) }))
	s.add(onProcess, Keyword, prefix+".user.name", of(func(p *Process) Value { return known(p.UserName) }))
	s.add(onProcess, Keyword, prefix+".real_user.id", of(func(p *Process) Value { return known(p.RealUserID) }))
	s.add(onProcess, Keyword, prefix+".saved_user.id", of(func(p *Process) Value { return known(p.SavedUserID) }))
	s.add(onProcess, Keyword, prefix+".real_group.id", of(func(p *Process) Value { return known(p.RealGroupID) }))
	s.add(onProcess, Keyword, prefix+".saved_group.id", of(func(p *Process) Value { return known(p.SavedGroupID) }))
	s.add(onProcess, Keyword, prefix+".group.id", of(func(p *Process) Value { return known(p.GroupID) }))
	s.add(onProcess, Keyword, prefix+".group.name", of(func(p *Process) Value { return known(p.GroupName) }))
	s.array(onProcess, Keyword, prefix+".supplemental_groups.id", of(func(p *Process) Value { return texts(p.SupplementalGroups...) }))
	s.add(onProcess, Long, prefix+".group_leader.pid", of(func(p *Process) Value { return positive(p.Group) }))
	s.add(onProcess, Long, prefix+".session_leader.pid", of(func(p *Process) Value { return positive(p.Session) }))
}

func (s *schema) ruleFields() {
	of := func(get func(*Rule) Value) func(*View) Value {
		return func(v *View) Value {
			if r := v.rule(); r != nil {
				return get(r)
			}
			return Value{}
		}
	}
	s.add(onFinding, Keyword, "rule.id", of(func(r *Rule) Value { return known(r.ID) }))
	s.add(onFinding, Keyword, "rule.uuid", of(func(r *Rule) Value { return known(r.ID) }))
	s.add(onFinding, Keyword, "rule.name", of(func(r *Rule) Value { return known(r.Name) }))
	s.add(onFinding, Keyword, "rule.ruleset", of(func(r *Rule) Value { return known(r.Ruleset) }))
	s.add(onFinding, Keyword, "rule.version", of(func(r *Rule) Value { return known(r.Version) }))
	s.add(onFinding, Keyword, "rule.reference", of(func(r *Rule) Value { return known(r.Reference) }))
	s.add(onFinding, Keyword, "threat.framework", of(func(r *Rule) Value {
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
		s.array(onFinding, Keyword, f.name, of(func(r *Rule) Value {
			var all []string
			for _, t := range r.Threat {
				all = append(all, f.get(t)...)
			}
			return texts(all...)
		}))
	}
}

// ownFields are those that ECS has no name for.
func (s *schema) ownFields() {
	s.word(onRequest|onState, "imdsgate.mode", func(v *View) string {
		if v.Kind == Asked || v.Kind == Started {
			return v.Decision.Mode
		}
		return v.State.Mode
	})
	s.word(onRequest, "imdsgate.verdict", func(v *View) string { return v.Decision.Verdict.String() })
	s.word(onRequest, "imdsgate.audit_verdict", func(v *View) string { return v.Decision.WouldBe.String() })
	s.word(onRequest, "imdsgate.deny", func(v *View) string { return v.Decision.Deny })
	s.word(onRequest, "imdsgate.grant", func(v *View) string { return v.Decision.Grant })
	s.add(onRequest, Boolean, "imdsgate.latched", func(v *View) Value { return Value{Set: v.Decision.Latched, Bool: true} })
	s.word(onRequest|onState, "imdsgate.decision.id", func(v *View) string {
		if v.Kind == Asked || v.Kind == Started {
			return v.Decision.Operator
		}
		return v.State.Decision
	})
	s.array(inDecision, Keyword, "imdsgate.matched", func(v *View) Value {
		var all []string
		for _, m := range v.Decision.Matches {
			all = append(all, m.Rule.ID)
		}
		return texts(all...)
	})
	s.add(onNetwork, Boolean, "imdsgate.forwarded", func(v *View) Value { return flag(v.Connection.Forwarded) })
	s.word(onRequest, "imdsgate.request.class", func(v *View) string { return v.Request.Class })
	s.add(onRequest, Boolean, "imdsgate.request.guarded", func(v *View) Value { return flag(v.Request.Guarded) })
	s.word(onRequest, "imdsgate.request.api", func(v *View) string { return v.Request.API() })
	s.word(onRequest, "imdsgate.request.token", func(v *View) string {
		if v.Request.Token {
			return "present"
		}
		return "absent"
	})
	s.word(onRequest, "imdsgate.request.version", func(v *View) string { return v.Request.Version })
	s.add(onRequest, Boolean, "imdsgate.request.evasive", func(v *View) Value { return flag(v.Request.Evasive) })
	s.add(onRequest, Boolean, "imdsgate.request.forwarded_for", func(v *View) Value { return flag(v.Request.Forwarded) })
	s.add(onRequest, Boolean, "imdsgate.request.public_host", func(v *View) Value { return flag(v.Request.HostIsOdd) })
	s.word(onRequest, "imdsgate.request.malformed", func(v *View) string { return v.Request.Malformed }).free = true
	s.word(onRequest, "imdsgate.response.failure", func(v *View) string { return v.Response.Failed })
	s.word(onRequest, "imdsgate.credential.access_key_id", func(v *View) string { return v.Response.AccessKeyID })
	s.add(onRequest, Date, "imdsgate.credential.expiration", func(v *View) Value { return date(v.Response.Expiration) })

	s.word(onRequest|onState, "imdsgate.attribution.level", func(v *View) string {
		if v.Kind == Asked {
			return v.Attribution.Level
		}
		return v.State.Level
	})
	s.word(onRequest, "imdsgate.attribution.confidence", func(v *View) string { return v.Attribution.Confidence })
	s.word(onRequest, "imdsgate.attribution.via", func(v *View) string { return v.Attribution.Via })
	s.add(onRequest, Boolean, "imdsgate.attribution.complete", func(v *View) Value { return flag(v.Attribution.Complete) })
	s.add(onRequest, Boolean, "imdsgate.attribution.unawaited", func(v *View) Value { return Value{Set: v.Attribution.Unawaited, Bool: true} })
	s.word(onRequest, "imdsgate.attribution.reason", func(v *View) string { return v.Attribution.Reason })
	s.add(onRequest, Long, "imdsgate.attribution.cookie", func(v *View) Value { return positive(int64(v.Attribution.Cookie)) })
	s.add(onRequest, Long, "imdsgate.attribution.latency_us", func(v *View) Value { return number(v.Attribution.Took.Microseconds()) })
	s.array(onRequest, Long, "imdsgate.attribution.unreadable", func(v *View) Value {
		return Value{Set: len(v.Attribution.Unreadable) > 0, Ints: v.Attribution.Unreadable}
	})

	of := func(get func(*Process) Value) func(*View) Value {
		return func(v *View) Value { return v.of(get) }
	}
	s.add(onProcess, Boolean, "imdsgate.executable.host_verified", of(func(p *Process) Value { return Value{Set: p.Known && !p.Unproven, Bool: p.HostVerified} }))
	s.add(onProcess, Boolean, "imdsgate.executable.root_owned", of(func(p *Process) Value { return Value{Set: p.Known && !p.Unproven, Bool: p.RootOwned} }))
	s.add(onProcess, Boolean, "imdsgate.executable.loader", of(func(p *Process) Value { return Value{Set: p.Known, Bool: p.Loader} }))
	s.add(onProcess, Boolean, "imdsgate.executable.deleted", of(func(p *Process) Value { return Value{Set: p.Known, Bool: p.Deleted} }))
	s.add(onProcess, Boolean, "imdsgate.executable.swapped", of(func(p *Process) Value { return Value{Set: p.Swapped, Bool: true} }))
	s.add(onProcess, Boolean, "imdsgate.process.ended", of(func(p *Process) Value { return Value{Set: p.Ended, Bool: true} }))
	s.add(onProcess, Keyword, "imdsgate.process.ancestry", of(func(p *Process) Value { return known(p.Ancestry) }))
	s.processFields("imdsgate.process.parent_now", func(v *View) *Process {
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
	s.add(onProcess, Boolean, "imdsgate.process.parent.host_verified", parent(func(p *Process) Value { return flag(p.HostVerified) }))
	s.add(onProcess, Boolean, "imdsgate.process.parent.loader", parent(func(p *Process) Value { return flag(p.Loader) }))
	s.add(onProcess, Boolean, "imdsgate.process.parent.root_owned", parent(func(p *Process) Value { return flag(p.RootOwned) }))
	s.add(onProcess, Boolean, "imdsgate.process.parent.unproven", parent(func(p *Process) Value { return Value{Set: p.Unproven, Bool: true} }))
	s.add(onProcess, Boolean, "imdsgate.process.earlier_image", of(func(p *Process) Value { return flag(p.Earlier) }))
	s.add(onProcess, Keyword, "imdsgate.process.unit", of(func(p *Process) Value { return known(p.Unit) }))
	s.add(onProcess, Keyword, "imdsgate.process.user_unit", of(func(p *Process) Value { return known(p.UserUnit) })).free = true
	s.add(onProcess, Keyword, "imdsgate.process.cgroup", of(func(p *Process) Value { return known(p.Cgroup) })).free = true

	s.array(onProcess, Long, "imdsgate.ancestors.pid", of(func(p *Process) Value {
		var all []int64
		for a := p.Parent; a != nil; a = a.Parent {
			all = append(all, a.PID)
		}
		return Value{Set: len(all) > 0, Ints: all}
	}))
	ancestors := s.add(onProcess, Keyword, "imdsgate.ancestors.executable", of(func(p *Process) Value {
		var all []string
		for a := p.Parent; a != nil; a = a.Parent {
			all = append(all, a.Executable)
		}
		return texts(all...)
	}))
	ancestors.Array, ancestors.free = true, true
	s.add(inDecision, Long, "imdsgate.repeats.requests", func(v *View) Value { return positive(v.Repeats.Requests) })
	s.add(inDecision, Long, "imdsgate.repeats.connections", func(v *View) Value { return positive(v.Repeats.Connections) })
	s.word(inDecision, "imdsgate.repeats.of", func(v *View) string { return v.Repeats.Of })
	s.array(inDecision, Long, "imdsgate.subjects.pid", func(v *View) Value {
		var all []int64
		for _, p := range v.Subjects {
			all = append(all, p.PID)
		}
		return Value{Set: len(all) > 0, Ints: all}
	})
	judged := s.add(inDecision, Keyword, "imdsgate.subjects.executable", func(v *View) Value {
		var all []string
		for _, p := range v.Subjects {
			all = append(all, p.Executable)
		}
		return texts(all...)
	})
	judged.Array, judged.free = true, true
	s.array(inDecision, Keyword, "imdsgate.subjects.role", func(v *View) Value { return texts(v.Roles...) })
	none := func(*View) Value { return Value{} } // of what is asked; the line tells
	s.add(everywhere, Boolean, "imdsgate.redacted", none).tells = altered
	s.add(everywhere, Boolean, "imdsgate.truncated", none).tells = cut
	s.add(inAlert, Keyword, "imdsgate.alert.match", func(v *View) Value {
		if v.Match.Literal {
			return text("literal")
		}
		return text("bound")
	})
	s.word(inAlert, "imdsgate.alert.action", func(v *View) string { return v.Match.Action })
	s.array(inAlert, Keyword, "imdsgate.alert.correlated_event_ids", func(v *View) Value { return texts(v.Related...) })
}

// tokenFields are about the session token that a request carries, as far as it is
// known who got it.
func (s *schema) tokenFields() {
	s.add(onRequest, Keyword, "imdsgate.token.state", func(v *View) Value {
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
	s.add(onRequest, Keyword, "imdsgate.token.scope", func(v *View) Value {
		switch issuer, scope, tied := v.Token.closest(v.Subject); {
		case issuer == nil:
			return Value{}
		case !tied:
			return text("none")
		default:
			return text(scope.String())
		}
	})
	s.add(onRequest, Date, "imdsgate.token.issued", func(v *View) Value { return date(v.Token.Issued) })
	s.add(onRequest, Date, "imdsgate.token.expires", func(v *View) Value { return date(v.Token.Expires) })
	of := func(get func(*Issuer) Value) func(*View) Value {
		return func(v *View) Value {
			if issuer, _, _ := v.Token.closest(v.Subject); issuer != nil {
				return get(issuer)
			}
			return Value{}
		}
	}
	s.add(onRequest, Keyword, "imdsgate.token.issuer.entity_id", of(func(i *Issuer) Value { return known(i.EntityID) }))
	s.add(onRequest, Long, "imdsgate.token.issuer.pid", of(func(i *Issuer) Value { return number(i.PID) }))
	s.add(onRequest, Keyword, "imdsgate.token.issuer.executable", of(func(i *Issuer) Value { return known(i.Executable) })).free = true
	s.add(onRequest, Keyword, "imdsgate.token.issuer.user.id", of(func(i *Issuer) Value { return known(i.UserID) }))
	s.add(onRequest, Keyword, "imdsgate.token.issuer.user.name", of(func(i *Issuer) Value { return known(i.UserName) }))
	s.add(onRequest, Keyword, "imdsgate.token.issuer.unit", of(func(i *Issuer) Value { return known(i.Unit) })).free = true
}

func (s *schema) stateFields() {
	s.word(onState, "service.name", func(*View) string { return "imdsgate" })
	s.word(onState, "service.type", func(*View) string { return "imdsgate" })
	s.word(onState, "service.version", func(v *View) string { return v.Host.Version })
	s.word(onState, "imdsgate.previous_mode", func(v *View) string { return v.State.Previous })
	s.add(onState, Date, "imdsgate.until", func(v *View) Value { return date(v.State.Until) })
	s.word(onState, "imdsgate.actor.user.id", func(v *View) string { return v.State.Actor.UserID })
	s.word(onState, "imdsgate.actor.user.name", func(v *View) string { return v.State.Actor.UserName })
	s.word(onState, "imdsgate.actor.login", func(v *View) string { return v.State.Actor.Login })
	s.add(onState, Long, "imdsgate.actor.pid", func(v *View) Value { return positive(v.State.Actor.PID) })
	s.word(inIntegrity, "imdsgate.actor.name", func(v *View) string { return v.State.Actor.Name }).free = true
	s.word(inIntegrity, "imdsgate.actor.executable", func(v *View) string { return v.State.Actor.Executable }).free = true
	s.word(inIntegrity, "imdsgate.actor.command_line", func(v *View) string { return v.State.Actor.CommandLine }).free = true
	s.word(inIntegrity, "imdsgate.actor.parent.executable", func(v *View) string { return v.State.Actor.Parent }).free = true
	// Not as ECS has them, so that a rule about other people's files is refused, and not
	// asked of ours.
	s.word(inIntegrity, "imdsgate.file.path", func(v *View) string { return v.State.File.Path }).free = true
	s.word(inIntegrity, "imdsgate.file.sha256", func(v *View) string { return v.State.File.SHA256 })
	s.add(inIntegrity, Date, "imdsgate.file.modified", func(v *View) Value { return date(v.State.File.Modified) })
	s.word(inIntegrity, "imdsgate.file.uid", func(v *View) string { return v.State.File.UID })
	s.word(inIntegrity, "imdsgate.file.owner", func(v *View) string { return v.State.File.Owner })
	s.word(inIntegrity, "imdsgate.file.mode", func(v *View) string { return v.State.File.Mode })
	s.word(inIntegrity, "imdsgate.file.loaded_sha256", func(v *View) string { return v.State.File.Loaded })
	s.word(onState, "imdsgate.policy.digest", func(v *View) string { return v.State.Policy })
	s.add(inLifecycle, Long, "imdsgate.suppressed", func(v *View) Value { return positive(v.State.Suppressed) })
	s.add(onState, Long, "imdsgate.rules_loaded", func(v *View) Value { return positive(v.State.Rules) })
	s.add(onState, Long, "imdsgate.grants_loaded", func(v *View) Value { return positive(v.State.Grants) })
}

// of reads the subject.
func (v *View) of(get func(*Process) Value) Value {
	if v.Subject == nil {
		return Value{}
	}
	return get(v.Subject)
}
