package event

import (
	"slices"
	"time"
)

// Repeats are requests that were counted instead of written, because each was like one
// that was. The event that has them is the last of them, and its document the one for all.
type Repeats struct {
	Requests    int64 // 0 for an event that stands for itself
	Connections int64 // of them, those that were the first on a connection
	First       time.Time
	Of          string // event.id of the decision that was written
}

// Requests is how many requests an event stands for.
func (e *Event) Requests() uint64 { return uint64(max(1, e.Repeats.Requests)) }

// Start is when the first of the requests came for which an event stands; Time is when
// the last did.
func (e *Event) Start() time.Time {
	if e.Repeats.Requests > 0 && !e.Repeats.First.IsZero() {
		return e.Repeats.First
	}
	return e.Time
}

// single are the fields in which requests may differ, and be alike all the same. Everything
// else tells them apart, whatever is added to documents.
var single = []string{
	"@timestamp", "message", "event.id", "event.sequence", "event.created", "event.start", "event.end", "event.duration",
	"source.port", "imdsgate.attribution.cookie", "imdsgate.attribution.latency_us", "imdsgate.token.issued", "imdsgate.token.expires",
	"imdsgate.repeats.requests", "imdsgate.repeats.connections", "imdsgate.repeats.of",
}

func isSingle(name string) bool { return slices.Contains(single, name) }

// AppendLikeness appends what the decision on a request has in common with those on requests
// that are its repeats: the document, without what is new in each. Requests that differ in
// who asked for what, how it was found out, what was decided and why, or in the answer, have
// different ones. It reports false where the document lacks the end of a text, in which
// a request could differ from others unseen.
func (e *Event) AppendLikeness(b []byte) (_ []byte, whole bool) {
	v := View{Event: e, Document: RequestDecision, Subject: e.subject(), likeness: true}
	b, lost := v.appendRows(append(b, '{'), rows[v.Document], 0)
	return append(b, '}'), lost&cut == 0
}
