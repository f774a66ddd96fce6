package event

import (
	"reflect"
	"testing"
)

// What is written once for a host, a process or a rule must be the same in every document.
func TestObjects(t *testing.T) {
	e := denied()
	full := View{Event: e, Document: Alert, Subject: e.Subjects[0], Match: &e.Decision.Matches[0], ID: "01KAT", Sequence: 1, Created: e.Time}
	check := func(list []object, bare View) {
		for _, o := range list {
			if len(o.rows) == 0 {
				t.Errorf("no field is below %v", o.path)
			}
			for _, r := range o.rows {
				if r.docs != o.docs || r.field.asked {
					t.Errorf("%s is not in all documents that have %v", r.field.Name, o.path)
				}
				if got, want := r.field.get(&bare), r.field.get(&full); !reflect.DeepEqual(got, want) {
					t.Errorf("%s: %+v without the event, %+v with it", r.field.Name, got, want)
				}
			}
		}
	}
	check(ofHost, View{Event: &Event{Host: e.Host}, Document: RequestDecision})
	check(ofProcess, View{Event: &Event{}, Document: RequestDecision, Subject: e.Subjects[0]})
	check(ofRule, View{Event: &Event{}, Document: RequestDecision, Match: &Match{Rule: e.Decision.Rule}})
}
