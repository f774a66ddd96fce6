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

// What a host has while there is no daemon: see also TestDoesNotStart of test/boot.
func TestWithout(t *testing.T) {
	const nobody = 65534
	const (
		none    = iota // no daemon ever
		before         // in the boot before
		earlier        // in this boot
	)
	now := time.Now()
	until := func(to, configured policy.Mode, until time.Time) *report.SetMode {
		return &report.SetMode{Mode: to, Configured: configured, Since: until.Add(-time.Hour), Until: until}
	}
	soon, past := now.Add(time.Minute), now.Add(-time.Minute)
	for name, c := range map[string]struct {
		config string
		when   int
		last   policy.Mode
		set    *report.SetMode
		want   policy.Mode
		port   uint16 // of the redirect, in enforce mode: 1 is that of the last daemon
	}{
		"first: enforce":                     {config: "mode: enforce\n", want: policy.Enforce, port: 254},
		"first: audit":                       {config: "mode: audit\n"},
		"first: refused":                     {config: "mod: enforce\n"},
		"first: refused, with what is right": {config: "mode: enforce\nposture: stern\n", want: policy.Enforce, port: 254},

		"enforce":                       {config: "mode: enforce\nredirect:\n  host_port: 2\n", when: before, last: policy.Enforce, want: policy.Enforce, port: 2},
		"enforce, and audit before":     {config: "mode: enforce\n", when: before, last: policy.Audit},
		"enforce, and off before":       {config: "mode: enforce\n", when: before, last: policy.Off, want: policy.Off},
		"audit, and enforce before":     {config: "mode: audit\n", when: before, last: policy.Enforce},
		"audit for a time":              {config: "mode: enforce\n", when: before, last: policy.Audit, set: until(policy.Audit, policy.Enforce, soon)},
		"audit for a time that is over": {config: "mode: enforce\n", when: before, last: policy.Audit, set: until(policy.Audit, policy.Enforce, past), want: policy.Enforce, port: 254},
		"enforce for a time":            {config: "mode: audit\n", when: before, last: policy.Enforce, set: until(policy.Enforce, policy.Audit, soon), want: policy.Enforce, port: 254},

		"refused":                          {config: "mod: audit\n", when: before, last: policy.Enforce, want: policy.Enforce, port: 1},
		"refused, audit before":            {config: "mode: enforce\nposture: stern\n", when: before, last: policy.Audit},
		"refused, audit for a time":        {config: "mod: x\n", when: before, last: policy.Audit, set: until(policy.Audit, policy.Enforce, soon)},
		"refused, audit for a time, over":  {config: "mod: x\n", when: before, last: policy.Audit, set: until(policy.Audit, policy.Enforce, past), want: policy.Enforce, port: 1},
		"refused, enforce for a time":      {config: "mod: x\n", when: before, last: policy.Enforce, set: until(policy.Enforce, policy.Audit, soon), want: policy.Enforce, port: 1},
		"refused, enforce for a time over": {config: "mod: x\n", when: before, last: policy.Enforce, set: until(policy.Enforce, policy.Audit, past)},

		"refused by the policy":            {config: "mode: audit\nname: \"\\e\"\n", when: before, last: policy.Enforce, want: policy.Enforce, port: 1},
		"refused by the redirect":          {config: "mode: enforce\nredirect:\n  host_port: 2000\n", when: before, last: policy.Enforce, want: policy.Enforce, port: 1},
		"first: refused by the redirect":   {config: "mode: enforce\nredirect:\n  host_port: 2000\n", want: policy.Enforce, port: 254},
		"first: audit for a time":          {config: "mode: enforce\n", set: until(policy.Audit, policy.Enforce, soon)},
		"of this boot, audit, over":        {config: "mode: enforce\n", when: earlier, last: policy.Audit, set: until(policy.Audit, policy.Enforce, past), want: policy.Enforce, port: 1},
		"of this boot, enforce, over":      {config: "mode: audit\n", when: earlier, last: policy.Enforce, set: until(policy.Enforce, policy.Audit, past)},
		"of this boot, audit for a time":   {config: "mode: enforce\n", when: earlier, last: policy.Audit, set: until(policy.Audit, policy.Enforce, soon)},
		"a daemon of this boot in enforce": {config: "mode: audit\n", when: earlier, last: policy.Enforce, want: policy.Enforce, port: 1},
		"a daemon of this boot in audit":   {config: "mode: enforce\n", when: earlier, last: policy.Audit},
		"a daemon of this boot in off":     {config: "mode: enforce\n", when: earlier, last: policy.Off, want: policy.Off},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "config.yaml")
			if err := os.WriteFile(path, []byte(c.config+"state:\n  dir: "+dir+"/state\ncontrol:\n  socket: "+dir+"/run/socket\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			conf, refused := config.Load(path) // which knows the directories also of one that is refused
			d := &daemon{config: conf, rules: iptables.Config{HostPort: 1, UID: nobody}.WithDefaults(), log: zerolog.Nop()}
			if d.modes.configured = c.last; c.set != nil {
				d.modes.configured = c.set.Configured
			}
			switch {
			case c.when != none:
				d.modes.set = c.set
				d.keepStanding(c.last)
			case c.set != nil:
				if err := modeFile(conf.State.Dir).write(c.set); err != nil {
					t.Fatal(err)
				}
			}
			if c.when != earlier {
				if err := errors.Join(os.RemoveAll(filepath.Join(dir, "run")), os.MkdirAll(conf.State.Dir, 0o750)); err != nil {
					t.Fatal(err)
				}
			}
			if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				return errors.Join(err, os.Chown(path, nobody, -1))
			}); err != nil {
				t.Fatal(err)
			}
			mode, rules, err := without(conf, refused)
			if err != nil || mode != c.want {
				t.Fatalf("%v, %v", mode, err)
			}
			if mode == policy.Enforce && (rules.HostPort != c.port || rules.UID != nobody) {
				t.Errorf("%+v", rules)
			}
		})
	}
}
