package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

func TestKept(t *testing.T) {
	k := kept{path: filepath.Join(t.TempDir(), "state", "x.json")}
	var got map[string]int
	if err := k.read(&got); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for i := range 2 {
		// What a crash has left is no obstacle, and neither is a link that leads elsewhere.
		if i == 1 {
			if err := os.Symlink("/etc/passwd", k.path+".new"); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.write(map[string]int{"n": i}); err != nil {
			t.Fatal(err)
		}
		if err := k.read(&got); err != nil || got["n"] != i {
			t.Errorf("%v, %v", got, err)
		}
	}
	if st, err := os.Stat(k.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	whole, err := os.ReadFile(k.path)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func() error{
		"cut off":           func() error { return os.WriteFile(k.path, whole[:len(whole)-4], 0o600) },
		"empty":             func() error { return os.WriteFile(k.path, nil, 0o600) },
		"two":               func() error { return os.WriteFile(k.path, append(whole, whole...), 0o600) },
		"writable to all":   func() error { return errors.Join(os.WriteFile(k.path, whole, 0o600), os.Chmod(k.path, 0o666)) },
		"a link":            func() error { return os.Symlink("/etc/passwd", k.path) },
		"a pipe":            func() error { return unix.Mkfifo(k.path, 0o600) },
		"a directory":       func() error { return os.Mkdir(k.path, 0o700) },
		"larger than usual": func() error { return errors.Join(os.WriteFile(k.path, whole, 0o600), os.Truncate(k.path, maxKept+1)) },
	} {
		os.Remove(k.path)
		os.RemoveAll(k.path + ".damaged")
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if err := k.read(&got); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), ".damaged") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(k.path + ".damaged"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := k.read(&got); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s, again: %v", name, err)
		}
	}
	if err := errors.Join(k.write(got), k.remove(), k.remove()); err != nil {
		t.Error(err)
	}
}

// recalling is a daemon that has just begun to start, over what another has left in dir.
func recalling(t *testing.T, dir string, configured policy.Mode) *daemon {
	t.Helper()
	p, err := policy.Compile(policy.Config{Mode: configured}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{log: zerolog.Nop(), engine: policy.NewEngine(p), since: time.Now()}
	d.host.Store(&event.Host{ID: "host"})
	d.spool, err = sink.Open(sink.Options{Path: filepath.Join(t.TempDir(), "events")}, d.host.Load)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.spool.Close() })
	d.recallDecisions(dir)
	d.recallMode(dir)
	return d
}

// A mode outlives a restart until its time is over, by whatever clock: one that is
// behind makes nothing weaker.
func TestRecallMode(t *testing.T) {
	now := time.Now()
	set := func(m, configured policy.Mode, since, until time.Duration) report.SetMode {
		s := report.SetMode{Mode: m, Configured: configured, Since: now.Add(since), By: policy.Actor{Name: "root"}, Reason: "x"}
		if until != 0 {
			s.Until = now.Add(until)
		}
		return s
	}
	for _, c := range []struct {
		name       string
		configured policy.Mode
		set        report.SetMode
		want       policy.Mode
	}{
		{"in its time", policy.Enforce, set(policy.Off, policy.Enforce, -time.Minute, time.Minute), policy.Off},
		{"over", policy.Enforce, set(policy.Off, policy.Enforce, -time.Hour, -time.Minute), policy.Enforce},
		{"a clock that is behind", policy.Enforce, set(policy.Off, policy.Enforce, time.Hour, 2*time.Hour), policy.Enforce},
		{"a clock that is behind, and more is protected", policy.Audit, set(policy.Enforce, policy.Audit, time.Hour, 2*time.Hour), policy.Enforce},
		{"for a year", policy.Enforce, set(policy.Off, policy.Enforce, -time.Minute, 365*24*time.Hour), policy.Enforce},
		{"without an end", policy.Audit, set(policy.Enforce, policy.Audit, -time.Hour, 0), policy.Enforce},
		{"without an end, and weaker", policy.Enforce, set(policy.Audit, policy.Enforce, -time.Hour, 0), policy.Enforce},
		{"without an end, and the configuration has changed", policy.Off, set(policy.Enforce, policy.Audit, -time.Hour, 0), policy.Off},
		{"another configuration, and a time", policy.Enforce, set(policy.Off, policy.Audit, -time.Minute, time.Minute), policy.Off},
	} {
		dir := t.TempDir()
		if err := (kept{path: filepath.Join(dir, "mode.json")}).write(c.set); err != nil {
			t.Fatal(err)
		}
		d := recalling(t, dir, c.configured)
		if got := d.engine.Mode(); got != c.want || (d.modesNow().Set != nil) != (c.want != c.configured) {
			t.Errorf("%s: %v, %+v", c.name, got, d.modesNow())
		}
		if _, err := os.Stat(filepath.Join(dir, "mode.json")); (err == nil) != (c.want != c.configured) {
			t.Errorf("%s: the file: %v", c.name, err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mode.json"), []byte(`{"mode": "none"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := recalling(t, dir, policy.Enforce); d.engine.Mode() != policy.Enforce || !strings.Contains(d.modesNow().Error, ".damaged") {
		t.Errorf("%+v", d.modesNow())
	}
}

// Decisions outlive a restart until they are over; what is over leaves the file, so that
// no clock brings it back.
func TestRecallDecisions(t *testing.T) {
	now := time.Now()
	one := func(id string, e policy.Effect, added, expires time.Duration) policy.Decision {
		return policy.Decision{ID: id, Effect: e, Executable: "/usr/bin/" + id, Unit: "x.service", Reason: "x", Added: now.Add(added), Expires: now.Add(expires)}
	}
	ids := func(d *daemon) string {
		var all []string
		for _, one := range d.engine.Decisions().All() {
			all = append(all, one.ID)
		}
		return fmt.Sprint(all)
	}
	dir := t.TempDir()
	file := kept{path: filepath.Join(dir, "decisions.json")}
	if err := file.write(decisionsFile{[]policy.Decision{
		one("over", policy.Allows, -time.Hour, -time.Minute), one("now", policy.Allows, -time.Minute, time.Hour), one("ahead", policy.Denies, time.Minute, time.Hour),
	}}); err != nil {
		t.Fatal(err)
	}
	if d := recalling(t, dir, policy.Enforce); ids(d) != "[now ahead]" || d.decisionsNow().Error != "" {
		t.Errorf("%s, %+v", ids(d), d.decisionsNow())
	}
	var f decisionsFile
	if err := file.read(&f); err != nil || len(f.Decisions) != 2 {
		t.Errorf("the file has %+v, %v", f, err)
	}
	// While the daemon runs, setting the clock back prolongs nothing.
	d := recalling(t, dir, policy.Enforce)
	d.sweepDecisions(now.Add(59 * time.Minute))
	if ids(d) != "[now ahead]" {
		t.Errorf("%s", ids(d))
	}
	d.decisions.ends["now"] = now
	d.sweepDecisions(now.Add(time.Second))
	if ids(d) != "[ahead]" {
		t.Errorf("%s", ids(d))
	}

	// A file that says what nobody could have decided is not believed in part.
	forged := one("forged", policy.Allows, 0, time.Hour)
	forged.Unit = ""
	b, err := json.Marshal(decisionsFile{[]policy.Decision{one("now", policy.Denies, 0, time.Hour), forged}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file.path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if d := recalling(t, dir, policy.Enforce); ids(d) != "[]" || !strings.Contains(d.decisionsNow().Error, ".damaged") {
		t.Errorf("%s, %+v", ids(d), d.decisionsNow())
	}
}
