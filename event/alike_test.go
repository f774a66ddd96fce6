package event

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// TestAlike reads documents that differ in nothing but what is new in each, and one that
// differs in something else.
func TestAlike(t *testing.T) {
	document := func(n int) []byte {
		e := full()
		e.Time, e.Duration = e.Time.Add(time.Duration(n)*time.Second), time.Duration(n)*time.Microsecond
		e.Connection.Source = netip.AddrPortFrom(e.Connection.Source.Addr(), uint16(n))
		e.Attribution.Cookie, e.Attribution.Took = uint64(n), time.Duration(n)*time.Microsecond
		e.Token.Issued, e.Token.Expires = e.Time, e.Time.Add(time.Hour)
		e.Response.Expiration = e.Time
		v := decisionOf(e)
		v.ID, v.Sequence, v.Created = fmt.Sprint("01K", n), uint64(n), e.Time
		return v.AppendJSON(nil)
	}
	r := NewReader()
	var got Record
	for range 2 { // once is not enough
		if r.recognise(document(1), &got) {
			t.Fatal("recognised before it was read")
		}
		if err := r.Read(document(1), &got); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{2, 65_535} {
		if !r.recognise(document(n), &got) {
			t.Fatalf("document %d is not recognised", n)
		}
		var want Record
		if err := NewReader().Read(document(n), &want); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v, %v", got, want, err)
		}
		got.Event.Subjects[0], got.Event.Subjects[1] = got.Event.Subjects[1], got.Event.Subjects[0] // which is the caller's to do
	}
	other := full()
	other.Subjects[0].PID++
	if r.recognise(line(decisionOf(other)), &got) {
		t.Error("another process is recognised")
	}
	if r.recognise(document(3)[:2000], &got) || r.recognise(append(document(3), '}'), &got) {
		t.Error("half or more of a document is recognised")
	}
}

// TestAlikeBound reads the documents of ever new processes, each twice.
func TestAlikeBound(t *testing.T) {
	r, e := NewReader(), full()
	var got Record
	most := 0
	defer func() {
		if most < maxKnown/2 {
			t.Errorf("no more than %d bytes were known", most)
		}
	}()
	for n := range 8000 {
		e.Subjects[0].PID = int64(n / 2)
		if err := r.Read(line(decisionOf(e)), &got); err != nil {
			t.Fatal(err)
		}
		if most = max(most, r.known.size); most > maxKnown+longestKnown+recordCost+2*mostNovelties*nodeCost {
			t.Fatalf("%d bytes are known", most)
		}
	}
}
