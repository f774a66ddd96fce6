package event

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
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
				if r.field.docs != o.docs || r.field.asked {
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

// TestLine compares lines with the table of fields, written one field after the other:
// what is kept for a host, a process, a rule or a document changes no byte of them.
func TestLine(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 0))
		e := &Event{Host: &Host{}}
		fillSome(r, reflect.ValueOf(e))
		for range r.IntN(3) {
			p := &Process{Parent: &Process{}, ParentNow: &Process{}}
			fillSome(r, reflect.ValueOf(p))
			e.Subjects = append(e.Subjects, p)
		}
		if r.IntN(2) == 0 {
			e.Decision.Rule = &Rule{Threat: []Threat{{TechniqueIDs: []string{"T1"}}}}
			fillSome(r, reflect.ValueOf(e.Decision.Rule))
		}
		e.Decision.Verdict, e.Decision.WouldBe = Verdict(r.IntN(2)), Verdict(r.IntN(2))
		e.Connection.Source = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 1}), 5)
		e.Connection.Destination = netip.AddrPortFrom(netip.IPv6Loopback(), 80)
		for d := range IntegrityFinding + 1 {
			for _, kind := range []Kind{Asked, Started, Lifecycle, Integrity} {
				e.Kind = kind
				v := View{Event: e, Document: d, Subject: e.subject(), ID: "id", Sequence: seed, Created: time.Unix(int64(seed), 0)}
				if d == Alert {
					v.Match = &Match{Rule: &Rule{ID: "r", Name: "n", Severity: "low"}, Action: "alert", Alert: true}
				}
				want := lineOfTable(&v)
				for range 2 { // writes what is kept, and reads it
					got := string(v.AppendJSON(nil))
					if d == RequestDecision && len(e.Subjects) > 1 { // which are no fields
						others, _ := v.appendOthers(nil)
						got = strings.Replace(got, ","+string(others), "", 1)
					}
					if got != want {
						t.Fatalf("seed %d, document %d:\n%s\nwant\n%s", seed, d, got, want)
					}
				}
			}
		}
	}
}

func lineOfTable(v *View) string {
	b, lost := []byte{'{'}, loss(0)
	if v.Document == RequestDecision && len(v.Subjects) > 1 {
		_, lost = v.appendOthers(nil)
	}
	var open []string
	fields := make([]*Field, len(Fields))
	for i := range Fields {
		fields[i] = &Fields[i]
	}
	// Our own come last, and what they lack at the very end.
	slices.SortStableFunc(fields, func(x, y *Field) int {
		own := func(f *Field) int {
			if f.Name == "imdsgate.redacted" || f.Name == "imdsgate.truncated" {
				return 2
			}
			return strings.Count(f.Name[:min(len(f.Name), 9)], "imdsgate.")
		}
		return own(x) - own(y)
	})
	for _, f := range fields {
		value := f.Value(v)
		if f.tells != 0 {
			value = Value{Set: lost&f.tells != 0, Bool: true}
		}
		if !value.Set {
			continue
		}
		objects := f.parts[:len(f.parts)-1]
		same := 0
		for same < min(len(open), len(objects)) && open[same] == objects[same] {
			same++
		}
		for range open[same:] {
			b = append(b, '}')
		}
		if b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		for _, name := range objects[same:] {
			b = fmt.Appendf(b, "%q:{", name)
		}
		open = slices.Clone(objects)
		var more loss
		b, more = f.append(fmt.Appendf(b, "%q:", f.parts[len(f.parts)-1]), &value)
		lost |= more
	}
	for range open {
		b = append(b, '}')
	}
	return string(append(b, '}'))
}

// fillSome sets some of what can be set.
func fillSome(r *rand.Rand, v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			fillSome(r, v.Elem())
		}
	case reflect.Struct:
		if _, ok := v.Addr().Interface().(*time.Time); ok {
			fill(v, r.IntN(3))
			return
		}
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fillSome(r, v.Field(i))
			}
		}
	default:
		switch r.IntN(6) {
		case 0, 1:
		case 2:
			if v.Kind() == reflect.String {
				v.SetString([]string{"a \"quoted\" \x00\u2028 text", "curl -u user:secret", string(make([]byte, maxText+1)), "\xff"}[r.IntN(4)])
			}
		default:
			fill(v, 1+r.IntN(3))
		}
	}
}
