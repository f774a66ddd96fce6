package ndjson_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
)

// TestWalk goes through files in the order of what is in them, packed or not, and says
// what is too long and what is broken.
func TestWalk(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	fmt.Fprint(z, `{"@timestamp":"2026-01-01T00:00:00Z","n":1}`+"\n"+`{"n":2}`)
	z.Close()
	long := strings.Repeat("x", 17<<20)
	var got, bad, failed []string
	var last ndjson.Progress
	w := ndjson.Walk{
		Inputs: []ndjson.Input{
			input("late", []byte(`{"@timestamp":"2026-01-02T00:00:00Z","n":3}`+"\n\n  "+`{"n":4}`+"\n"+long+"\n{}\n")),
			input("early", packed.Bytes()),
			input("broken", packed.Bytes()[:packed.Len()-10]),
		},
		Roles: roles,
		Line: func(name string, number int, line []byte) error {
			got = append(got, fmt.Sprintf("%s:%d %s", name, number, line))
			return nil
		},
		Bad:      func(b ndjson.BadLine) { bad = append(bad, fmt.Sprintf("%s:%d", b.Input, b.Number)) },
		Failed:   func(name string, err error) { failed = append(failed, name) },
		Progress: func(p ndjson.Progress) { last = p },
	}
	if err := w.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	got = slices.DeleteFunc(got, func(s string) bool { return strings.HasPrefix(s, "broken") })
	want := []string{`early:1 {"@timestamp":"2026-01-01T00:00:00Z","n":1}`, `early:2 {"n":2}`, `late:1 {"@timestamp":"2026-01-02T00:00:00Z","n":3}`, `late:3 {"n":4}`, `late:5 {}`}
	if !slices.Equal(got, want) || !slices.Equal(bad, []string{"late:4"}) || !slices.Equal(failed, []string{"broken"}) {
		t.Errorf("%q\nbad %q, failed %q", got, bad, failed)
	}
	if last.Read != last.Size || last.Size == 0 {
		t.Errorf("%+v", last)
	}
	stop := errors.New("enough")
	w.Line = func(string, int, []byte) error { return stop }
	if err := w.Run(context.Background()); !errors.Is(err, stop) {
		t.Error(err)
	}
}
