package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"golang.org/x/sys/unix"
)

func started(n int) *event.Event {
	return &event.Event{Kind: event.Lifecycle, Host: &event.Host{ID: "host"}, Time: time.Now(),
		State: event.State{Action: "daemon-started", Type: "info", Message: fmt.Sprint("number ", n)}}
}

func here() *event.Host { return &event.Host{ID: "host"} }

func open(t *testing.T, o Options) *File {
	t.Helper()
	f, err := Open(o, here)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

type line struct {
	Message string
	Event   struct {
		ID       string
		Action   string
		Sequence uint64
	}
	Imdsgate struct{ Suppressed int64 }
}

func lines(t *testing.T, path string) []line {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []line
	for l := range bytes.Lines(b) {
		var one line
		if err := json.Unmarshal(l, &one); err != nil {
			t.Fatalf("%s: %v in %q", path, err, l)
		}
		all = append(all, one)
	}
	return all
}

func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, MaxSize: 4096, Keep: 2})
	const n = 100
	for i := range n {
		f.Record(started(i))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if s := f.Stats(); s.Written != n || s.Dropped != 0 || s.Failed != 0 {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(path + ".3"); err == nil {
		t.Error("more files than are to be kept")
	}
	var all []line
	for _, name := range []string{path + ".2", path + ".1", path} {
		if info, err := os.Stat(name); err != nil || info.Size() > 4096 || info.Mode().Perm() != 0o640 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
		all = append(all, lines(t, name)...)
	}
	for i, l := range all {
		if want := fmt.Sprint("number ", n-len(all)+i); l.Message != want {
			t.Fatalf("line %d is %q, want %q", i, l.Message, want)
		}
		if i > 0 && (l.Event.Sequence != all[i-1].Event.Sequence+1 || l.Event.ID <= all[i-1].Event.ID) {
			t.Errorf("%+v after %+v", l, all[i-1])
		}
	}
	// A later run goes on behind the earlier one, with a greater sequence.
	f = open(t, Options{Path: path, MaxSize: 1 << 20})
	f.Record(started(n))
	f.Close()
	again := lines(t, path)
	if last, before := again[len(again)-1], again[len(again)-2]; last.Event.Sequence <= before.Event.Sequence {
		t.Errorf("sequence %d after %d", last.Event.Sequence, before.Event.Sequence)
	}
}

func TestDropsRatherThanWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Queue: 8})
	const n = 20000
	for i := range n {
		f.Record(started(i))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.Record(started(n))
	s := f.Stats()
	all := lines(t, path)
	events, missing := 0, int64(0)
	for _, l := range all {
		if missing += l.Imdsgate.Suppressed; l.Imdsgate.Suppressed == 0 {
			events++
		}
	}
	if s.Dropped == 0 || uint64(events)+s.Dropped != n+1 || int(s.Written) != len(all) || missing != int64(s.Dropped)-1 {
		t.Errorf("%+v of %d, %d lines, %d told missing", s, n, len(all), missing)
	}
}

// Who floods the log with ordinary requests does not keep an alert out of it.
func TestKeepsRoomForWhatIsUrgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Queue: 64})
	rule := &event.Rule{ID: "rule", Name: "rule"}
	program := &event.Event{Kind: event.Started, Host: &event.Host{ID: "host"}, Time: time.Now(), Subjects: []*event.Process{{PID: 1}},
		Decision: event.Decision{Matches: []event.Match{{Rule: rule, Alert: true}}}}
	const rounds = 100
	for i := range rounds {
		for range 200 {
			f.Record(&event.Event{Host: &event.Host{ID: "host"}, Time: time.Now()})
			f.Record(program) // with an alert: anybody can start as many as he likes
		}
		f.Record(started(i))
		time.Sleep(time.Millisecond)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, l := range lines(t, path) {
		if strings.HasPrefix(l.Message, "number ") {
			kept++
		}
	}
	if kept != rounds || f.Stats().Dropped == 0 {
		t.Errorf("%d of %d are in the file; %+v", kept, rounds, f.Stats())
	}
}

func TestRefusesLink(t *testing.T) {
	dir := t.TempDir()
	victim, path := filepath.Join(dir, "victim"), filepath.Join(dir, "events.ndjson")
	if err := os.WriteFile(victim, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	if f, err := Open(Options{Path: path}, here); err == nil {
		f.Close()
		t.Error("wrote through a symbolic link")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := Open(Options{Path: fifo}, here); err == nil {
		f.Close()
		t.Error("wrote into a pipe")
	}
}

// On a full disk the oldest events make room for what comes, as often as it takes, and
// the file says how many are gone. Whoever reads with a cursor knows.
func TestDiskFull(t *testing.T) {
	labtest.RequireRoot(t)
	dir := tmpfs(t, "64k")
	path := filepath.Join(dir, "events.ndjson")
	f := open(t, Options{Path: path, MaxSize: 8 << 10, Keep: 20})
	defer f.Close()
	record := func(from, to int) {
		t.Helper()
		before := f.Stats().Written
		for i := from; i < to; i++ {
			f.Record(started(i))
		}
		for end := time.Now().Add(5 * time.Second); f.Stats().Written < before+uint64(to-from); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not all are written: %+v", f.Stats())
			}
		}
	}
	record(0, 20)
	state := filepath.Join(t.TempDir(), "cursor")
	c, err := OpenCursor(path, state)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := c.Next(); err != nil || !strings.Contains(string(l), "number 0") {
		t.Fatalf("%s, %v", l, err)
	}
	if err := c.Commit(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 28<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	record(20, 500)
	f.Close()
	s := f.Stats()
	if s.Failed != 0 || s.Dropped != 0 || s.Removed == 0 || s.Error != "" {
		t.Errorf("%+v", s)
	}
	c, err = OpenCursor(path, state)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Missed() == 0 {
		t.Error("the cursor's file is gone, and it does not say so")
	}
	last, missing, there := -1, int64(0), uint64(0)
	for {
		text, err := c.Next()
		if err == io.EOF {
			break
		}
		var l line
		if err != nil || json.Unmarshal(text, &l) != nil {
			t.Fatalf("%v in %q", err, text)
		}
		if there++; l.Event.Action == "events-suppressed" {
			missing += l.Imdsgate.Suppressed
			continue
		}
		var n int
		if fmt.Sscanf(l.Message, "number %d", &n); last >= 0 && n != last+1 {
			t.Errorf("%d comes after %d", n, last)
		}
		last = n
	}
	if last != 499 || s.Written != there+s.Removed || missing == 0 || uint64(missing) > s.Removed {
		t.Errorf("the last is %d, %d are there, %d are told missing; %+v", last, there, missing, s)
	}
}

// When nothing of ours is left that could make room, events are lost, and are told as soon
// as there is some.
func TestDiskFullOfOthers(t *testing.T) {
	labtest.RequireRoot(t)
	dir := tmpfs(t, "64k")
	path := filepath.Join(dir, "events.ndjson")
	f := open(t, Options{Path: path})
	defer f.Close()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 40 {
		f.Record(started(i))
	}
	for end := time.Now().Add(5 * time.Second); f.Stats().Failed < 40; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("a full disk is not reported: %+v", f.Stats())
		}
	}
	if !strings.Contains(f.Stats().Error, "no space left") {
		t.Errorf("%+v", f.Stats())
	}
	os.Remove(ballast)
	f.Record(started(1000))
	f.Close()
	there, missing := 0, int64(0)
	for _, l := range lines(t, path) { // all of them whole
		switch {
		case l.Event.Action == "events-suppressed" && strings.Contains(l.Message, "the disk did not take them"):
			missing += l.Imdsgate.Suppressed
		default: // number 1000, and perhaps one that waited while telling of the others failed
			there++
		}
	}
	if there == 0 || missing < 30 || there+int(missing) != 41 {
		t.Errorf("%d are there, %d are told missing; %+v", there, missing, f.Stats())
	}
}

func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// Ordinary requests wait for each other, and all of them arrive without
// anything urgent to take them along, again and again.
func TestBatches(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Queue: 8})
	defer f.Close()
	for round := range uint64(3) {
		for range 4 {
			f.Record(&event.Event{Host: &event.Host{ID: "host"}, Time: time.Now()})
		}
		want := 4 * (round + 1)
		for end := time.Now().Add(5 * time.Second); f.Stats().Written < want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("round %d: %+v", round, f.Stats())
			}
		}
		if n := len(lines(t, path)); n < int(want) {
			t.Errorf("%d lines of at least %d are in the file", n, want)
		}
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, MaxSize: 2200, Keep: 50})
	for i := range 3 {
		f.Record(started(i))
	}
	for end := time.Now().Add(5 * time.Second); f.Stats().Written < 3 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}

	var last []string
	collect := func(b []byte) error {
		var l line
		if err := json.Unmarshal(b, &l); err != nil {
			return err
		}
		last = append(last, l.Message)
		return nil
	}
	if err := Tail(context.Background(), path, 2, false, collect); err != nil {
		t.Fatal(err)
	}
	if strings.Join(last, ",") != "number 1,number 2" {
		t.Errorf("the last two are %q", last)
	}

	// Following loses nothing over rotations and says nothing twice.
	last = nil
	done := errors.New("seen enough")
	const n = 60
	go func() {
		for i := 3; i < n; i++ {
			f.Record(started(i))
			time.Sleep(5 * time.Millisecond)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := Tail(ctx, path, 0, true, func(b []byte) error {
		if err := collect(b); err != nil {
			return err
		}
		if last[len(last)-1] == fmt.Sprint("number ", n-1) {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatalf("%v after %q", err, last)
	}
	for i, m := range last {
		if want := fmt.Sprint("number ", n-len(last)+i); m != want {
			t.Fatalf("line %d is %q, want %q", i, m, want)
		}
	}
	f.Close()
	if _, err := os.Stat(path + ".1"); err != nil {
		t.Error("there was no rotation to follow")
	}
	// The past goes through rotations, too, and no file is read twice that is named.
	for _, c := range []struct {
		tail        func(context.Context, string, int, bool, func([]byte) error) error
		last, first int
	}{{Tail, All, 0}, {Tail, n + 5, 0}, {Tail, n, 0}, {Tail, n - 1, 1}, {Tail, 20, n - 20}, {Tail, 0, n}, {TailFile, 1, n - 1}} {
		last = nil
		if err := c.tail(context.Background(), path, c.last, false, collect); err != nil {
			t.Fatal(err)
		}
		if len(last) != n-c.first || len(last) > 0 && last[0] != fmt.Sprint("number ", c.first) {
			t.Errorf("the last %d are %d: %q", c.last, len(last), last)
		}
	}
	last = nil
	if err := TailFile(context.Background(), path, All, false, collect); err != nil || len(last) == 0 || len(last) == n {
		t.Errorf("%v: the present file has %d", err, len(last))
	}
	if err := Tail(context.Background(), filepath.Join(t.TempDir(), "none"), 1, false, collect); err == nil {
		t.Error("no error for a file that is not there")
	}
}

// BenchmarkRecord includes the writing: it waits for what was recorded.
func BenchmarkRecord(b *testing.B) {
	f, err := Open(Options{Path: filepath.Join(b.TempDir(), "events.ndjson")}, here)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	e := started(1)
	b.ReportAllocs()
	n := uint64(0)
	for b.Loop() {
		f.Record(e)
		if n++; n%1024 == 0 {
			for f.Stats().Written < n {
				time.Sleep(10 * time.Microsecond)
			}
		}
	}
	b.ReportMetric(float64(f.Stats().Dropped), "dropped")
}
