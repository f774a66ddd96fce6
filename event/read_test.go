package event

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// line is a document as the sink writes it.
func line(v View) []byte {
	v.ID, v.Sequence, v.Created = "01KAT", 7, time.Unix(3, 0)
	return v.AppendJSON(nil)
}

func decisionOf(e *Event) View {
	return View{Event: e, Document: RequestDecision, Subject: e.subject()}
}

// full has a value for everything that a decision tells.
func full() *Event {
	e := denied()
	e.Time, e.Duration = e.Time.Truncate(time.Millisecond), 1830*time.Microsecond
	for p := e.Subjects[0]; p != nil; p = p.Parent {
		p.Start, p.Thread, p.WorkingDir, p.TTY, p.Session, p.Group = time.Unix(1, 0).UTC(), "main", "/srv", true, 3, 4
		p.UserID, p.RealUserID, p.SavedUserID, p.UserName, p.GroupID, p.GroupName, p.SupplementalGroups = "1", "2", "3", "u", "4", "g", []string{"5", "6"}
	}
	p := e.Subjects[0]
	p.Parent.Known = false // which is not told of a parent
	p.Parent.Parent = &Process{PID: 1, Executable: "/sbin/init"}
	p.ParentNow = &Process{EntityID: "init", PID: 1, Executable: "/sbin/init", Name: "init", Start: time.Unix(1, 0).UTC(), Args: []string{"/sbin/init"}, CommandLine: "/sbin/init", UserID: "0"}
	p.Unit, p.UserUnit, p.Cgroup, p.Container, p.Runtime, p.Pod, p.Ancestry = "a.service", "b.service", "/c", "d", "docker", "pod", "birth"
	p.Loader, p.Deleted, p.Earlier, p.Swapped, p.Ended = true, true, true, true, true
	other := &Process{EntityID: "other", PID: 5000, Executable: p.Executable, Name: "x", Args: []string{"x"}, CommandLine: "x", Known: true, Unproven: true, Parent: p}
	e.Subjects, e.Roles = append(e.Subjects, other), []string{"connector", "holder"}
	e.Attribution = Attribution{Level: "L1", Confidence: "high", Via: "exact", Unawaited: true, Reason: "why", Cookie: 9, Took: 30 * time.Microsecond, Unreadable: []int64{4, 5}}
	e.Connection.Forwarded, e.Connection.Accepted = true, time.Time{}
	e.Request.Version, e.Request.Host, e.Request.UserAgent, e.Request.Bytes, e.Request.Token = "latest", "h", "curl/8", 99, true
	e.Request.Forwarded, e.Request.HostIsOdd, e.Request.Evasive, e.Request.Container = true, true, true, false
	e.Response.AccessKeyID, e.Response.Expiration, e.Response.Bytes, e.Response.Failed = "ASIAEXAMPLE", time.Unix(9, 0).UTC(), 12, "reset"
	e.Decision.Grant, e.Decision.Latched, e.Decision.Reason = "g", true, "because"
	e.Token.Issued, e.Token.Expires = time.Unix(5, 0).UTC(), time.Unix(6, 0).UTC()
	e.Token.Issuers = []*Issuer{{EntityID: "subject", PID: 3, Executable: "/usr/bin/curl", UserID: "1", UserName: "u", Unit: "a.service"}}
	return e
}

// TestRead reads back all that a decision tells, of each of those who were judged.
func TestRead(t *testing.T) {
	e := full()
	var got Record
	r := NewReader()
	if err := r.Read(line(decisionOf(e)), &got); err != nil {
		t.Fatal(err)
	}
	if got.ID != "01KAT" || got.Sequence != 7 || got.Document != RequestDecision || got.Duration != e.Duration || !reflect.DeepEqual(got.Response, e.Response) {
		t.Errorf("%+v", got)
	}
	d := got.Decision
	if d.Mode != "enforce" || d.Verdict != Deny || d.WouldBe != Deny || !d.Latched || d.Grant != "g" || d.Reason != "because" || d.Rule.ID != "rule-id" ||
		d.Rule.Severity != "medium" || d.Rule.RiskScore != 47 || len(d.Matches) != 1 || d.Matches[0].Rule.ID != "rule-id" {
		t.Errorf("%+v", d)
	}
	if got.Event.Gaps != GapTime|GapAnswer|GapOutcome {
		t.Errorf("gaps: %v", got.Event.Gaps)
	}
	for _, part := range []struct{ got, want any }{
		{got.Event.Request, e.Request}, {got.Event.Attribution, e.Attribution}, {got.Event.Connection.Source, e.Connection.Source},
		{got.Event.Connection.Forwarded, true}, {got.Event.Time, e.Time}, {got.Event.Roles, e.Roles}, {got.Event.Host.ID, e.Host.ID},
		{got.Event.Host.Version, e.Host.Version}, {got.Event.Token.Expires, e.Token.Expires},
	} {
		if !reflect.DeepEqual(part.got, part.want) {
			t.Errorf("%+v, want %+v", part.got, part.want)
		}
	}
	// As rules see them, which is all that matters.
	if len(got.Event.Subjects) != len(e.Subjects) {
		t.Fatalf("%d subjects", len(got.Event.Subjects))
	}
	e.Response, e.Duration, e.Decision = Response{}, 0, Decision{}
	for i := range e.Subjects {
		for _, adopted := range []bool{false, true} {
			was := View{Event: e, Document: RequestDecision, Subject: e.Subjects[i], Adopted: adopted}
			is := View{Event: &got.Event, Document: RequestDecision, Subject: got.Event.Subjects[i], Adopted: adopted}
			for k := range Fields {
				f := &Fields[k]
				a, b := f.Value(&was), f.Value(&is)
				a.command, b.command = nil, nil
				if f.Rests()&is.Gaps() == 0 && !reflect.DeepEqual(a, b) {
					t.Errorf("subject %d, %s: %+v, want %+v", i, f.Name, b, a)
				}
			}
		}
	}
	for _, scope := range []TokenScope{ScopeUnit, ScopeParent, ScopeProcess} {
		e.Token.Scope, got.Event.Token.Scope = scope, scope
		for i := range e.Subjects {
			if was, is := e.Token.Foreign(e.Subjects[i]), got.Event.Token.Foreign(got.Event.Subjects[i]); was != is {
				t.Errorf("subject %d, scope %v: foreign %v, want %v", i, scope, is, was)
			}
		}
	}
	again := Record{}
	if err := r.Read(line(decisionOf(full())), &again); err != nil || again.Event.Subjects[0] != got.Event.Subjects[0] || again.Event.Host != got.Event.Host {
		t.Errorf("%v: the same process is another", err)
	}
}

// TestReadGaps is about what a document does not tell as it was.
func TestReadGaps(t *testing.T) {
	for _, test := range []struct {
		change func(*Event)
		want   Gaps // of the document
	}{
		{func(e *Event) {}, 0},
		{func(e *Event) { e.Subjects[0].Args = []string{"curl", "--password", "hunter22"} }, GapArgs},
		{func(e *Event) { e.Subjects[0].Parent.WorkingDir = "/tmp/\xff" }, GapWorkingDir << parentGaps},
		{func(e *Event) { e.Subjects[0].Args = make([]string, 100) }, GapArgs | GapArgsCount},
		{func(e *Event) { e.Subjects[0].Executable = strings.Repeat("x", maxText+1) }, GapExecutable},
		{func(e *Event) { e.Subjects[0].UserName = "\xff" }, GapUser},
		{func(e *Event) { e.Request.UserAgent = "Bearer hunter22" }, GapUserAgent},
		{func(e *Event) { e.Request.Container, e.Request.Evasive = true, true }, GapTarget},
		{func(e *Event) { e.Subjects[0].Parent.Parent = &Process{Executable: "/x/\xff"} }, GapAncestors},
		{func(e *Event) {
			for i := range maxOthers + 1 {
				e.Subjects = append(e.Subjects, &Process{EntityID: "e", PID: int64(i)})
			}
		}, GapSubjects},
	} {
		e := denied()
		p := e.Subjects[0].Parent
		e.Subjects[0].Parent = &Process{EntityID: p.EntityID, PID: p.PID, Name: p.Name, Executable: p.Executable, Known: true}
		test.change(e)
		for _, p := range e.Subjects {
			p.CommandLine = strings.Join(p.Args, " ")
		}
		var got Record
		if err := NewReader().Read(line(decisionOf(e)), &got); err != nil {
			t.Fatal(err)
		}
		v := decisionOf(&got.Event)
		gaps := v.Gaps() &^ (GapTime | GapAnswer)
		if test.want == 0 && gaps != 0 || gaps&test.want != test.want {
			t.Errorf("gaps: %v; want %v", gaps, test.want)
		}
	}
}

// TestReadHuge is a document that somebody has made: what is kept of it is bounded.
func TestReadHuge(t *testing.T) {
	const many = 200_000
	long := string(line(decisionOf(denied())))
	pids := strings.Repeat("7,", many) + "7"
	texts := strings.Repeat(`"x",`, many) + `"x"`
	long = strings.Replace(long, `"pid":[4710]`, `"pid":[`+pids+`]`, 1)
	long = strings.Replace(long, `"executable":["/usr/bin/bash"]`, `"executable":[`+texts+`]`, 1)
	long = strings.Replace(long, `"args":["curl",`, `"args":[`+texts+`,"curl",`, 1)
	long = strings.Replace(long, `"latency_us":`, `"unreadable":[`+pids+`],"latency_us":`, 1)
	var got Record
	r := NewReader()
	if err := r.Read([]byte(long), &got); err != nil {
		t.Fatal(err)
	}
	p := got.Event.Subjects[0]
	chain := 0
	for a := p.Parent; a != nil; a = a.Parent {
		chain++
	}
	if len(p.Args) != maxTexts || chain != maxTexts || len(got.Event.Attribution.Unreadable) != maxTexts {
		t.Errorf("%d arguments, %d ancestors, %d unreadable", len(p.Args), chain, len(got.Event.Attribution.Unreadable))
	}
	if want := GapArgs | GapArgsCount | GapAncestors; p.Gaps&want != want {
		t.Errorf("gaps: %v", p.Gaps)
	}
	if len(r.processes.young)+len(r.processes.old) != 0 && len(long) > r.processes.max {
		t.Error("it is remembered")
	}
}

// TestReadOthers recognises the documents that are about no request.
func TestReadOthers(t *testing.T) {
	e := denied()
	for d := range IntegrityFinding + 1 {
		v := View{Event: e, Document: d, Subject: e.subject()}
		switch d {
		case Alert:
			v.Match = &e.Decision.Matches[0]
		case LifecycleChange:
			v.Event = &Event{Kind: Lifecycle, Host: testHost, Time: e.Time, State: State{Action: "policy-reloaded", Mode: "audit", Policy: "sha256:1"}}
		}
		var got Record
		if err := NewReader().Read(line(v), &got); err != nil || got.Document != d || got.Event.Host.ID != testHost.ID {
			t.Errorf("document %d: %v, %+v", d, err, got)
		}
		if d == LifecycleChange && got.Event.State != (State{Action: "policy-reloaded", Mode: "audit", Policy: "sha256:1"}) {
			t.Errorf("%+v", got.Event.State)
		}
	}
}

// TestReadWrong is what files have in them, too.
func TestReadWrong(t *testing.T) {
	whole := string(line(decisionOf(denied())))
	for _, test := range []struct{ text, want string }{
		{"", "byte 1: the line ends where { should be"},
		{"hello", `byte 1: 'h' where { should be`},
		{"{}", ErrForeign.Error()},
		{`{"data_stream":{"dataset":"nginx.access"}}`, ErrForeign.Error()},
		{whole[:len(whole)/2], "the line ends"},
		{whole + "}", `'}' where the end of the line should be`},
		{strings.Replace(whole, `"imdsgate":{`, `"imdsgate":[`, 1), `'[' where { should be`},
		{strings.Replace(whole, `"pid":4711`, `"pid":"4711"`, 2), "a number should be"},
		{strings.Replace(whole, `"port":80`, `"port":80000`, 1), "80000 is no port"},
		{strings.Replace(whole, `"audit_verdict":"deny"`, `"audit_verdict":"perhaps"`, 1), "a verdict is allow or deny"},
		{strings.Replace(whole, `"audit_verdict":"deny",`, ``, 1), "the document lacks imdsgate.audit_verdict"},
		{strings.Replace(whole, `"@timestamp":"2026`, `"@timestamp":"x026`, 1), "no time"},
		{`{"x":` + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20) + `}`, "more than 64"},
	} {
		var got Record
		if err := NewReader().Read([]byte(test.text), &got); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.80s: %v, want %q", test.text, err, test.want)
		}
	}
}

// FuzzRead reads what may be anything. What is taken is JSON, and a record of it can be
// written and read again.
func FuzzRead(f *testing.F) {
	for _, e := range []*Event{denied(), full()} {
		f.Add(line(decisionOf(e)))
	}
	f.Add(bytes.Replace(line(decisionOf(full())), []byte(`"sequence":7`), []byte(`"sequence":8,"sequence":null,"id":"x\u0041"`), 1))
	f.Add([]byte(`{"@timestamp":"2026-01-01T00:00:00Z","a":-0.1e+5,"b":"\u00e9\ud83d","data_stream":{"dataset":"imdsgate.network"},"host":{"id":"h"}}`))
	r, knowing := NewReader(), NewReader()
	f.Fuzz(func(t *testing.T, text []byte) {
		before := bytes.Clone(text)
		var got Record
		err := r.Read(text, &got)
		if !bytes.Equal(before, text) {
			t.Fatal("the line was written over")
		}
		// It says the same to a reader that knows nothing, and to one that knows others, and it.
		var alone Record
		want := NewReader().Read(text, &alone)
		for range 3 {
			var among Record
			if err := knowing.Read(text, &among); fmt.Sprint(err) != fmt.Sprint(want) || !reflect.DeepEqual(among, alone) {
				t.Errorf("%q: %v, %+v; read alone %v, %+v", text, err, among, want, alone)
			}
		}
		if err != nil {
			if !errors.Is(err, ErrForeign) && err.Error() == "" {
				t.Error("no reason")
			}
			return
		}
		if !json.Valid(text) {
			t.Fatalf("taken, and no JSON: %q", text)
		}
		if got.Document != RequestDecision {
			return
		}
		var again Record
		v := decisionOf(&got.Event)
		v.ID = got.ID
		if err := r.Read(v.AppendJSON(nil), &again); err != nil {
			t.Fatalf("%v in what was written of %q", err, text)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	var lines [][]byte
	for i := range 64 {
		e := full()
		e.Subjects = e.Subjects[:1]
		e.Subjects[0].PID, e.Subjects[0].EntityID = int64(4000+i), strings.Repeat("e", 8+r.IntN(3))
		e.Connection.Source = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 1}), uint16(i))
		lines = append(lines, line(decisionOf(e)))
	}
	reader, rec := NewReader(), Record{}
	b.SetBytes(int64(len(lines[0])))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := reader.Read(lines[i%len(lines)], &rec); err != nil {
			b.Fatal(err)
		}
	}
}
