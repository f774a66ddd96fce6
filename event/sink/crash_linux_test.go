package sink

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain is the program that TestCrash kills.
func TestMain(m *testing.M) {
	if path := os.Getenv("IMDSGATE_TEST_SPOOL"); path != "" {
		f, err := Open(crashing(path), here)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		for i := 0; ; i++ {
			f.Record(started(i))
			if i%100 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}
	os.Exit(m.Run())
}

func crashing(path string) Options { return Options{Path: path, MaxSize: 64 << 10, Keep: 1000} }

// Whenever the writer is killed, what is left of its line is taken away, and readers, who
// are killed as often, see each event once that was whole, and in order.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "events.ndjson"), filepath.Join(dir, "cursor")
	var last uint64
	read := 0
	for round := range 8 {
		before := size(dir)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "IMDSGATE_TEST_SPOOL="+path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); size(dir) < before+256<<10; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it does not write")
			}
		}
		time.Sleep(time.Duration(rand.IntN(10_000)) * time.Microsecond)
		half := func() { // read a part, and die without a word
			c, err := OpenCursor(path, state)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for i := range 1 + rand.IntN(300) {
				text, err := c.Next()
				if err == io.EOF {
					break
				}
				var l line
				if err != nil || json.Unmarshal(text, &l) != nil {
					t.Fatalf("round %d: %v in %q", round, err, text)
				}
				if l.Event.Sequence <= last {
					t.Fatalf("round %d, line %d: sequence %d after %d", round, i, l.Event.Sequence, last)
				}
				last = l.Event.Sequence
				read++
			}
			if err := c.Commit(); err != nil {
				t.Fatal(err)
			}
			if c.Missed() > 0 {
				t.Errorf("round %d: nothing was removed", round)
			}
		}
		half()
		cmd.Process.Kill()
		cmd.Wait()
		half()
		// The worst moment for a writer to end is one that cannot be hit on purpose.
		if round%2 == 0 {
			torn, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			torn.WriteString(`{"@timestamp":"2026-11-2`)
			torn.Close()
			half()
		}
	}
	f := open(t, crashing(path))
	f.Close()
	c, err := OpenCursor(path, state)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for {
		text, err := c.Next()
		if err == io.EOF {
			break
		}
		var l line
		if err != nil || json.Unmarshal(text, &l) != nil || l.Event.Sequence <= last {
			t.Fatalf("%v in %q after %d", err, text, last)
		}
		last = l.Event.Sequence
		read++
	}
	total := 0
	for i := 0; ; i++ {
		if _, err := os.Stat(rotatedName(path, i)); err != nil {
			break
		}
		total += len(lines(t, rotatedName(path, i))) // all of them whole
	}
	if read != total || total < 1000 {
		t.Errorf("%d of %d events were read", read, total)
	}
}

// size is that of all files of a directory.
func size(dir string) (n int64) {
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, name := range files {
		if info, err := os.Stat(name); err == nil {
			n += info.Size()
		}
	}
	return n
}

func TestCursor(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "events.ndjson"), filepath.Join(dir, "cursor")
	c, err := OpenCursor(path, state)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Next(); err != io.EOF {
		t.Errorf("of no file: %v", err)
	}
	if err := c.Commit(); err != nil {
		t.Error(err)
	}
	next := func(want string) {
		t.Helper()
		text, err := c.Next()
		if want == "" {
			if err != io.EOF {
				t.Errorf("%s, %v", text, err)
			}
			return
		}
		if err != nil || string(text) != want {
			t.Errorf("%q, %v; want %q", text, err, want)
		}
	}
	write := func(text string) {
		t.Helper()
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	write("a\nb\nhal")
	next("a")
	next("b")
	next("")
	// Half a line is taken away, and another comes, and a rotation.
	if err := os.Truncate(path, 4); err != nil {
		t.Fatal(err)
	}
	write("c\n")
	next("c")
	if err := c.Commit(); err != nil {
		t.Fatal(err)
	}
	os.Rename(path, path+".1") // and nothing is in the new file yet
	write("")
	next("")
	if err := c.Commit(); err != nil {
		t.Fatal(err)
	}
	write("d\n") // and read by nobody, before two rotations
	for _, text := range []string{"e\nf\n", "g\n"} {
		os.Rename(path+".2", path+".3")
		os.Rename(path+".1", path+".2")
		os.Rename(path, path+".1")
		write(text)
	}
	c.Close()
	if c, err = OpenCursor(path, state); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"d", "e", "f", "g", ""} {
		next(want)
	}
	if c.Missed() > 0 {
		t.Error("nothing was missed")
	}
	// What is not committed comes again; what is removed meanwhile is missed.
	c.Close()
	if c, err = OpenCursor(path, state); err != nil {
		t.Fatal(err)
	}
	next("d")
	os.Remove(path + ".3")
	os.Remove(path + ".2")
	os.Remove(path + ".1")
	os.Rename(path, path+".1")
	write("h\n")
	next("g")
	next("h")
	if c.Missed() == 0 {
		t.Error("e and f were missed")
	}
	c.Close()
	os.WriteFile(state, []byte("nonsense"), 0o600)
	if _, err := OpenCursor(path, state); err == nil || !strings.Contains(err.Error(), "no cursor") {
		t.Errorf("%v", err)
	}
	os.Remove(state)
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), state); err != nil {
		t.Fatal(err)
	}
	if c, err = OpenCursor(path, state); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	next("g")
	if err := c.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "elsewhere")); err == nil {
		t.Error("it wrote through a link")
	}
}

// The file is rotated when it has the age, also that of an earlier run. What a narrower
// configuration does not keep is removed, and where a crash has left a gap in the names is
// none any more.
func TestAge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	for _, old := range []string{".1", ".2", ".3", ".4"} {
		os.WriteFile(path+old, nil, 0o600)
	}
	os.Remove(path + ".2")
	for i := range 3 {
		f := open(t, Options{Path: path, MaxAge: 200 * time.Millisecond, Keep: 2})
		f.Record(started(i))
		f.Close()
		time.Sleep(250 * time.Millisecond)
	}
	for i, name := range []string{path + ".2", path + ".1", path} {
		if all := lines(t, name); len(all) != 1 || all[0].Message != fmt.Sprint("number ", i) {
			t.Errorf("%s: %+v", name, all)
		}
	}
	if _, err := os.Stat(path + ".3"); err == nil {
		t.Error("more files than are to be kept")
	}
}

// Each policy leaves to the kernel what it should, and no more.
func TestFsync(t *testing.T) {
	for _, c := range []struct {
		fsync        Fsync
		unsynced     bool // after a batch
		afterASecond bool
	}{{FsyncNever, true, true}, {FsyncRotate, true, true}, {FsyncInterval, true, false}, {FsyncAlways, false, false}} {
		var n counts
		w := &writer{path: filepath.Join(t.TempDir(), "events.ndjson"), maxSize: 1 << 20, keep: 1, fsync: c.fsync, counts: &n, synced: time.Now()}
		if err := w.open(); err != nil {
			t.Fatal(err)
		}
		if err := w.write([]byte("{}\n")); err != nil {
			t.Fatal(err)
		}
		if err := w.flush(); err != nil {
			t.Fatal(err)
		}
		again, err := w.settle()
		if err != nil || w.unsynced != c.unsynced || again != (c.fsync == FsyncInterval) {
			t.Errorf("%v: %v, unsynced %v, again %v", c.fsync, err, w.unsynced, again)
		}
		w.synced = w.synced.Add(-time.Hour)
		if again, err := w.settle(); err != nil || again || w.unsynced != c.afterASecond {
			t.Errorf("%v, later: %v, unsynced %v, again %v", c.fsync, err, w.unsynced, again)
		}
		if err := w.rotate(); err != nil || w.unsynced != (c.fsync == FsyncNever) {
			t.Errorf("%v, rotated: %v, unsynced %v", c.fsync, err, w.unsynced)
		}
		w.close()
		var f Fsync
		if err := f.UnmarshalText([]byte([]string{"rotate", "never", "interval", "always"}[c.fsync])); err != nil || f != c.fsync {
			t.Errorf("%v, %v", f, err)
		}
	}
	if err := new(Fsync).UnmarshalText([]byte("sometimes")); err == nil {
		t.Error("no error for a value that there is not")
	}
}
