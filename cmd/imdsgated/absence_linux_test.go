package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/rs/zerolog"
)

// The time without a daemon begins with its first end, however often it ends then, and
// whatever the clock says.
func TestAbsence(t *testing.T) {
	dir := t.TempDir()
	d := &daemon{path: filepath.Join(dir, "config.yaml")}
	file := absenceFile(filepath.Join(dir, "control.sock"))
	if err := os.WriteFile(d.path, []byte("control:\n  socket: "+dir+"/control.sock\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	amend := func(enforcing, missed bool, why string, givenUp bool) (a absence) {
		t.Helper()
		if err := d.amend(absence{Since: bootTime(), Open: !enforcing, Why: why}, missed, givenUp); err != nil {
			t.Fatal(err)
		}
		if err := file.read(&a); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return a
	}
	if a := amend(false, false, bySuccess, false); a != (absence{}) {
		t.Errorf("a daemon that nobody misses: %+v", a)
	}
	before := bootTime()
	first := amend(true, true, "signal, killed KILL", false)
	if first.Since < before || first.Open || first.Ends != 1 || first.Refused != 0 {
		t.Errorf("killed: %+v", first)
	}
	if a := amend(true, true, "exit-code, exited 1", false); a.Since != first.Since || a.Ends != 2 || a.Why != first.Why {
		t.Errorf("again: %+v", a)
	}
	given := amend(true, true, "", true)
	if given.Since != first.Since || given.Refused < first.Since || given.Ends != 2 {
		t.Errorf("given up: %+v", given)
	}
	time.Sleep(time.Millisecond)
	if a := amend(true, true, "", true); a.Refused != given.Refused {
		t.Errorf("given up again: %+v", a)
	}
}

// What a boot has where no daemon starts: see also TestDoesNotStart of test/boot.
func TestEnforced(t *testing.T) {
	const nobody = 65534
	now := time.Now()
	last := iptables.Config{HostPort: 1, UID: nobody, Enforce: true}.WithDefaults()
	set := func(to, configured policy.Mode, until time.Time) *report.SetMode {
		return &report.SetMode{Mode: to, Configured: configured, Since: until.Add(-time.Hour), Until: until}
	}
	for name, c := range map[string]struct {
		config string
		last   bool
		set    *report.SetMode
		port   uint16 // of the redirect; 0 if there is none
	}{
		"enforce":                             {config: "mode: enforce\n", port: 254},
		"enforce, at other ports":             {config: "mode: enforce\nredirect:\n  host_port: 2\n", last: true, port: 2},
		"audit":                               {config: "mode: audit\n"},
		"audit since the last daemon":         {config: "mode: audit\n", last: true},
		"audit for a time":                    {config: "mode: enforce\n", set: set(policy.Audit, policy.Enforce, now.Add(time.Minute))},
		"audit for a time that is over":       {config: "mode: enforce\n", set: set(policy.Audit, policy.Enforce, now.Add(-time.Minute)), port: 254},
		"enforce for a time":                  {config: "mode: audit\n", last: true, set: set(policy.Enforce, policy.Audit, now.Add(time.Minute)), port: 254},
		"refused, first":                      {config: "mod: enforce\n"},
		"refused":                             {config: "mod: audit\n", last: true, port: 1},
		"refused, audit for a time":           {config: "mod: enforce\n", set: set(policy.Audit, policy.Enforce, now.Add(time.Minute))},
		"refused, enforce for a time":         {config: "mod: audit\n", last: true, set: set(policy.Enforce, policy.Audit, now.Add(time.Minute)), port: 1},
		"refused, enforce for a time, over":   {config: "mod: audit\n", last: true, set: set(policy.Enforce, policy.Audit, now.Add(-time.Minute))},
		"refused, audit in a mode of enforce": {config: "mod: audit\n", last: true, set: set(policy.Audit, policy.Enforce, now.Add(-time.Minute)), port: 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			conf, refused := config.Parse("config.yaml", []byte(c.config))
			conf.State.Dir = dir
			d := &daemon{config: conf, rules: last, log: zerolog.Nop()}
			d.keepRedirect(true)
			if !c.last {
				d.keepRedirect(false)
			}
			if c.set != nil {
				if err := modeFile(dir).write(c.set); err != nil {
					t.Fatal(err)
				}
			}
			if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				return errors.Join(err, os.Chown(path, nobody, -1))
			}); err != nil {
				t.Fatal(err)
			}
			rules, err := enforced(conf, refused)
			if err != nil || (rules == nil) != (c.port == 0) {
				t.Fatalf("%+v, %v", rules, err)
			}
			if rules != nil && (rules.HostPort != c.port || rules.UID != nobody || !rules.Enforce) {
				t.Errorf("%+v", rules)
			}
		})
	}
}
