package event

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestLikeness says what tells requests apart: all that a decision has in it, other than
// what is new in each.
func TestLikeness(t *testing.T) {
	e := full()
	e.Subjects[0].Pod = "pod"
	var doc, like map[string]any
	if err := json.Unmarshal(line(decisionOf(e)), &doc); err != nil {
		t.Fatal(err)
	}
	text, whole := e.AppendLikeness(nil)
	if err := json.Unmarshal(text, &like); err != nil || !whole {
		t.Fatal(whole, err)
	}
	both := 0
	for i := range Fields {
		name := Fields[i].Name
		has, told := at(doc, name) != nil, at(like, name) != nil
		switch {
		case slices.Contains(single, name):
			if told {
				t.Errorf("%s tells requests apart that are alike", name)
			}
		case has != told:
			t.Errorf("%s does not tell requests apart", name)
		case has:
			both++
		}
	}
	if both < 100 {
		t.Errorf("only %d fields tell requests apart", both)
	}
	if others, _ := at(like, "imdsgate.others").([]any); len(others) != 1 {
		t.Errorf("who else is judged does not tell requests apart: %v", others)
	}
	for _, name := range single {
		if _, ok := Lookup(name); !ok {
			t.Errorf("there is no field %s", name)
		}
	}
}

// TestLikenessOfLongText has two requests differ in what a document has no room for: a
// client must not hide one behind the other.
func TestLikenessOfLongText(t *testing.T) {
	for _, end := range []string{"a", "b"} {
		e := full()
		e.Request.Path = "/latest/meta-data/" + strings.Repeat("x", maxText) + end
		if _, whole := e.AppendLikeness(nil); whole {
			t.Error("a path that is cut is taken for one that others can be like")
		}
	}
}

// TestRepeats writes what was counted, and reads it back.
func TestRepeats(t *testing.T) {
	e := denied()
	e.Connection.First, e.Decision = true, Decision{Mode: "audit"}
	first := e.Time.Add(-41 * time.Second)
	e.Repeats = Repeats{Requests: 42, Connections: 7, First: first, Of: "01KAT"}
	docs := render(t, e)
	if len(docs) != 1 {
		t.Fatalf("%d documents", len(docs))
	}
	for name, want := range map[string]any{
		"event.action": "imds-request-allowed", "event.start": "2026-11-23T18:03:24.164Z", "event.end": "2026-11-23T18:04:05.164Z", "event.duration": 41e9,
		"imdsgate.repeats.requests": 42.0, "imdsgate.repeats.connections": 7.0, "imdsgate.repeats.of": "01KAT",
		"message": "allowed GET /latest/meta-data/iam/security-credentials/ for curl (pid 4711, uid 48), 42 times more",
	} {
		if got := at(docs[0], name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	var got Record
	r := NewReader()
	if err := r.Read(line(decisionOf(e)), &got); err != nil || got.Event.Repeats != e.Repeats || got.Event.Requests() != 42 || !got.Event.Start().Equal(first) || !got.Event.Time.Equal(e.Time) {
		t.Errorf("%v: %+v", err, got.Event)
	}
	if err := r.Read(line(decisionOf(denied())), &got); err != nil || got.Event.Requests() != 1 || !got.Event.Start().Equal(got.Event.Time) {
		t.Errorf("%v: %+v", err, got.Event.Repeats)
	}
	for _, n := range []int64{-1, maxCount + 1} {
		text := line(decisionOf(e))
		text = slices.Concat(text[:len(text)-1], []byte(`,"imdsgate":{"repeats":{"requests":`), strconv.AppendInt(nil, n, 10), []byte(`}}}`))
		if err := r.Read(text, &got); err == nil {
			t.Errorf("%d requests are taken", n)
		}
	}
}
