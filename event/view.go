package event

import (
	"cmp"
	"fmt"
	"strconv"
	"time"
)

// Views lists the documents that are written for an event, in the order in which it
// happened: the starts of processes that no event has told of, the connection of each
// subject with the first request on it, the decision on the request, and an alert for
// each match that raises one; or the one of a state. They are what rules were asked
// about, so that a query over the file finds what a rule has found. IDs and sequence
// numbers are the sink's to give.
func (e *Event) Views() []View {
	switch e.Kind {
	case Lifecycle:
		return []View{{Event: e, Document: LifecycleChange}}
	case Integrity:
		return []View{{Event: e, Document: IntegrityFinding}}
	}
	if e.Repeats.Requests > 0 {
		return []View{{Event: e, Document: RequestDecision, Subject: e.subject()}}
	}
	views := make([]View, 0, len(e.Starts)+len(e.Subjects)+1+len(e.Decision.Matches))
	for _, p := range e.Starts {
		views = append(views, View{Event: e, Document: ProcessStart, Subject: p})
	}
	if e.Kind == Asked {
		if e.Connection.First {
			for _, p := range e.Subjects {
				views = append(views, View{Event: e, Document: ConnectionAttempt, Subject: p})
			}
			if len(e.Subjects) == 0 {
				views = append(views, View{Event: e, Document: ConnectionAttempt})
			}
		}
		views = append(views, View{Event: e, Document: RequestDecision, Subject: e.subject()})
	}
	for i := range e.Decision.Matches {
		if m := &e.Decision.Matches[i]; m.Alert {
			views = append(views, View{Event: e, Document: Alert, Subject: m.Subject, Match: m})
		}
	}
	return views
}

func (e *Event) subject() *Process {
	if len(e.Subjects) == 0 {
		return nil
	}
	return e.Subjects[0]
}

func (v *View) rule() *Rule {
	switch {
	case v.Match != nil:
		return v.Match.Rule
	case v.Document == IntegrityFinding:
		return findings[v.State.Action]
	}
	return v.Decision.Rule
}

// Timestamp is when the document says it happened.
func (v *View) Timestamp() time.Time {
	switch v.Document {
	case ProcessStart:
		switch {
		case v.Subject == nil:
		case !v.Subject.Executed.IsZero():
			return v.Subject.Executed
		default:
			return v.Subject.Start
		}
	case ConnectionAttempt:
		return v.Connection.Accepted
	}
	return v.Time
}

func (v *View) kind() string {
	switch v.Document {
	case Alert, IntegrityFinding:
		return "alert"
	}
	return "event"
}

// The values of event.category and event.type. They are shared, and not to be
// changed.
var (
	categories = [...][]string{
		ProcessStart: {"process"}, ConnectionAttempt: {"network"}, RequestDecision: {"network", "web"},
		Alert: {"intrusion_detection", "network"}, LifecycleChange: {"configuration"},
		IntegrityFinding: {"configuration", "intrusion_detection"},
	}
	typeStart    = []string{"start"}
	typeDecision = [...][]string{Allow: {"access", "protocol", "allowed"}, Deny: {"access", "protocol", "denied"}}
	typeAlert    = [...][]string{Allow: {"allowed"}, Deny: {"denied"}}
	datasets     = [...]string{
		ProcessStart: "imdsgate.process", ConnectionAttempt: "imdsgate.network", RequestDecision: "imdsgate.decision",
		Alert: "imdsgate.alert", LifecycleChange: "imdsgate.lifecycle", IntegrityFinding: "imdsgate.integrity",
	}
	compatible = [...]string{ProcessStart: "endpoint.events.process", ConnectionAttempt: "endpoint.events.network"}
	providers  = [...]string{RequestDecision: "proxy", Alert: "detection", LifecycleChange: "daemon", IntegrityFinding: "integrity"}
)

// dataset is the data stream that the document belongs to.
func (v *View) dataset() string {
	if v.compatible() {
		return compatible[v.Document]
	}
	return datasets[v.Document]
}

func (v *View) namespace() string {
	if v.compatible() {
		return "imdsgate"
	}
	return cmp.Or(v.Host.Namespace, "default")
}

// duration is that of the request, or from the first to the last of those that it stands for.
func (v *View) duration() time.Duration {
	if v.Repeats.Requests > 0 {
		return v.Time.Sub(v.Start())
	}
	return v.Duration
}

// compatible reports whether the document is in a stream of Elastic's own agent.
func (v *View) compatible() bool {
	return v.Host.Layout == Defend && (v.Document == ProcessStart || v.Document == ConnectionAttempt)
}

func (v *View) types() []string {
	switch v.Document {
	case ProcessStart, ConnectionAttempt:
		return typeStart
	case RequestDecision:
		return typeDecision[v.Decision.Verdict]
	case Alert:
		return typeAlert[v.Decision.Verdict]
	}
	return []string{v.State.Type}
}

func (v *View) action() string {
	switch v.Document {
	case ProcessStart:
		return "exec"
	case ConnectionAttempt:
		return "connection_attempted"
	case RequestDecision:
		switch {
		case v.Decision.Verdict == Deny:
			return "imds-request-denied"
		case v.Decision.WouldBe == Deny:
			return "imds-request-would-deny"
		}
		return "imds-request-allowed"
	case Alert:
		switch {
		case v.Kind == Started:
			return "process-start-detected"
		case v.Decision.Verdict == Deny:
			return "imds-credential-access-blocked"
		}
		return "imds-credential-access-detected"
	}
	return v.State.Action
}

// outcome is seen from the control: a denied request is its success.
func (v *View) outcome() string {
	switch {
	case v.Document == ConnectionAttempt:
		return "unknown"
	case v.Document == RequestDecision && v.Response.Failed != "", v.State.Failed:
		return "failure"
	}
	return "success"
}

// code is for filters and for the documentation: stable, one per kind of document
// and outcome.
func (v *View) code() string {
	switch v.Document {
	case RequestDecision:
		switch {
		case v.Request.Malformed != "":
			return "IG1004"
		case v.Decision.Verdict == Deny:
			return "IG1002"
		case v.Decision.WouldBe == Deny:
			return "IG1003"
		}
		return "IG1001"
	case Alert:
		return "IG2001"
	case IntegrityFinding:
		return "IG3001"
	}
	return "IG4001"
}

func (v *View) reason() string {
	if v.Kind == Asked {
		return v.Decision.Reason
	}
	return v.State.Reason
}

func (v *View) level() string {
	switch {
	case v.Kind == Integrity || v.State.Failed:
		return "error"
	case v.Document == Alert, v.Kind == Asked && v.Decision.WouldBe == Deny:
		return "warn"
	}
	return "info"
}

func (v *View) message() string {
	b := make([]byte, 0, 256) // not allocated, if that is enough
	return string(v.appendMessage(b))
}

// writeMessage renders the message, which is free text.
func (v *View) writeMessage(b []byte) (_ []byte, lost loss) {
	buf := make([]byte, 0, 512)
	m := v.appendMessage(buf)
	if suspicious(m) {
		clean := Redact(string(m))
		if clean != string(m) {
			lost = altered
		}
		b, more := appendCut(b, clean, maxText)
		return b, lost | more
	}
	return appendCut(b, m, maxText)
}

func (v *View) appendMessage(b []byte) []byte {
	switch v.Document {
	case ProcessStart:
		return v.appendWho(append(b, "process start: "...))
	case ConnectionAttempt:
		b = v.appendWho(append(b, "connection attempted: "...))
		return append(append(b, " to "...), v.Connection.Destination.String()...)
	case Alert:
		return append(b, v.Match.Rule.Name...)
	case LifecycleChange, IntegrityFinding:
		return append(b, v.State.Message...)
	}
	switch {
	case v.Decision.Verdict == Deny:
		b = append(b, "denied "...)
	case v.Decision.WouldBe == Deny:
		b = append(b, "would deny "...)
	default:
		b = append(b, "allowed "...)
	}
	if v.Request.Malformed != "" {
		b = append(b, "a malformed request"...)
	} else {
		b = append(append(append(b, v.Request.Method...), ' '), v.Request.Path...)
	}
	b = v.appendWho(append(b, " for "...))
	if v.Decision.Rule != nil {
		b = append(append(b, " by rule "...), v.Decision.Rule.Name...)
	}
	if n := v.Repeats.Requests; n > 0 {
		b = append(strconv.AppendInt(append(b, ", "...), n, 10), " times more"...)
	}
	return b
}

func (v *View) appendWho(b []byte) []byte {
	if v.Subject == nil {
		return fmt.Appendf(b, "an unknown process (%s)", v.Attribution.Reason)
	}
	b = append(b, cmp.Or(v.Subject.Name, "?")...)
	b = strconv.AppendInt(append(b, " (pid "...), v.Subject.PID, 10)
	b = append(append(b, ", uid "...), v.Subject.UserID...)
	return append(b, ')')
}
