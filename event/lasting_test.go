package event

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// TestLasting: a lasting field says the same in two events that have nothing in common
// but the process and the host, and in one that has nothing else.
func TestLasting(t *testing.T) {
	host, p := &Host{}, &Process{}
	fill(reflect.ValueOf(host), 1)
	fill(reflect.ValueOf(p), 1)
	p.Args, p.Parent, p.ParentNow = []string{"./a", "b"}, &Process{PID: 5, Executable: "/usr/bin/bash"}, &Process{PID: 6, Name: "init"}
	var events []*Event
	for n := range 3 {
		e := &Event{}
		if n > 0 {
			fill(reflect.ValueOf(e), n)
			e.Decision.Rule = &Rule{ID: fmt.Sprint(n), Severity: "low"}
			e.Decision.Verdict, e.Decision.WouldBe = Verdict(n-1), Verdict(n-1)
			e.Connection.Source = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), uint16(n))
			e.Connection.Destination = netip.AddrPortFrom(netip.IPv6Loopback(), uint16(n))
			e.Subjects = []*Process{p, {PID: int64(n)}}
		}
		e.Host, e.Kind = host, Kind(n%2) // Asked and Started: rules see no others
		events = append(events, e)
	}
	lasting := 0
	for _, d := range []Document{ProcessStart, ConnectionAttempt, RequestDecision} {
		for _, adopted := range []bool{false, true} {
			for i := range Fields {
				f := &Fields[i]
				if !f.Lasting(d) {
					continue
				}
				lasting++
				first := f.Value(&View{Event: events[0], Document: d, Subject: p, Adopted: adopted})
				for n, e := range events[1:] {
					v := View{Event: e, Document: d, Subject: p, Adopted: adopted, ID: fmt.Sprint(n), Sequence: uint64(n), Created: time.Unix(int64(n), 0)}
					if got := f.Value(&v); !reflect.DeepEqual(got, first) {
						t.Errorf("%s in document %d: %+v, and %+v in another event", f.Name, d, first, got)
					}
				}
			}
		}
	}
	if lasting < 200 {
		t.Errorf("only %d fields last", lasting)
	}
}

// fill sets what can be set to values that depend on n.
func fill(v reflect.Value, n int) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			fill(v.Elem(), n)
		}
	case reflect.Struct:
		if at, ok := v.Addr().Interface().(*time.Time); ok {
			*at = time.Unix(int64(n), 0)
			return
		}
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(v.Field(i), n)
			}
		}
	case reflect.String:
		v.SetString(fmt.Sprint("text ", n))
	case reflect.Bool:
		v.SetBool(n%2 == 1)
	case reflect.Int64:
		v.SetInt(int64(n))
	case reflect.Uint64:
		v.SetUint(uint64(n))
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.String || v.Type().Elem().Kind() == reflect.Int64 {
			v.Set(reflect.MakeSlice(v.Type(), n, n))
			for i := range n {
				fill(v.Index(i), n)
			}
		}
	}
}
