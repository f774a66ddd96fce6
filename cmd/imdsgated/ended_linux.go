package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
)

// standing is the redirect of the last daemon that had one, or had none in mode off. It
// is kept beside what operators have decided, because a boot begins without rules, or
// with those that another tool has saved.
type standing struct {
	Boot  string          `json:"boot"` // boot_id of random(4)
	Mode  policy.Mode     `json:"mode"`
	Rules iptables.Config `json:"rules"`
}

func standingFile(dir string) kept { return kept{path: filepath.Join(dir, "redirect.json")} }

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// keepStanding remembers what the redirect is from now on.
func (d *daemon) keepStanding(mode policy.Mode) {
	if err := os.Remove(d.config.Control.RemovedNote()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn().Err(err).Msg("it is not forgotten that an operator had removed the redirect")
	}
	file := standingFile(d.config.State.Dir)
	boot, err := bootID()
	now := standing{boot, mode, d.rules}
	var was standing
	if err == nil && file.decode(&was) == nil && reflect.DeepEqual(was, now) {
		return
	}
	if err == nil {
		err = file.write(now)
	}
	if err != nil { // what is not true any more is worse than nothing
		err = errors.Join(err, file.remove())
		d.log.Warn().Err(err).Msg("if this daemon is killed, or the next boot has none, the configuration alone says what becomes of the redirect")
	}
}

// afterwards is what the unit runs, as root, when a daemon has ended, whatever ended it.
// In audit mode nothing of ours may stand between a client and the service from then
// on. In enforce mode the redirect stays, and is put back where it is not there, as after
// a boot. givenUp says that systemd will not start another one, and has closed the ports:
// then it runs once more, since the first may have been killed with the daemon.
func (d *daemon) afterwards(ctx context.Context, stdout io.Writer, givenUp bool) error {
	why := os.Getenv("SERVICE_RESULT")
	switch status := os.Getenv("EXIT_STATUS"); {
	case why == "":
		why = "for a reason that is not known"
	case why != bySuccess && status != "":
		why += ", " + os.Getenv("EXIT_CODE") + " " + status
	}
	since := bootTime() // a moment after its end: as soon as systemd knew
	c, refused := config.Load(d.path)
	if d.mode != nil {
		c.Mode = *d.mode
	}
	mode, rules, err := without(c, refused)
	if err != nil {
		fmt.Fprintf(stdout, "what the last daemon had is not known: %v\n", err)
	}
	wanted := func() bool { // until an operator has removed it
		_, err := os.Lstat(c.Control.RemovedNote())
		return mode == policy.Enforce && errors.Is(err, fs.ErrNotExist)
	}
	enforcing, removed := false, false
	if wanted() {
		if err := stay(ctx, stdout, rules, givenUp); err != nil {
			fmt.Fprintf(stdout, "enforce mode does not hold without a daemon, and clients reach the service itself: %v\n", err)
		} else {
			enforcing = wanted() // still
		}
	}
	if !enforcing {
		if removed, err = takeAway(ctx, stdout, givenUp || why == bySuccess); err != nil {
			return err
		}
		since = bootTime() // until then they waited
	}
	if !enforcing || givenUp {
		if err := attribution.Untime(c.Control.TimedNote()); err != nil {
			fmt.Fprintln(stdout, err)
		}
	}
	// A daemon in mode off had nothing to take away, and is not missed.
	missed := why != bySuccess || removed || enforcing
	if err := d.amend(absence{Since: since, Open: !enforcing, Why: why}, missed, givenUp); err != nil { // which is no reason for the unit to fail
		fmt.Fprintf(stdout, "how long there is no daemon will not be known: %v\n", err)
	}
	return nil
}

// stay has the redirect of enforce mode in place. When nobody holds its ports any more,
// where anybody could answer in the daemon's place, it leads nowhere: the guard refuses.
func stay(ctx context.Context, stdout io.Writer, rules iptables.Config, givenUp bool) error {
	_, enforcing, err := iptables.Installed(ctx)
	if err != nil {
		return err
	}
	if !enforcing {
		rules.Cgroup = ownCgroup() // in which no daemon is, and nobody is exempt
		rules.Enforce = true
		r, err := iptables.Open(ctx, rules)
		if err != nil {
			return err
		}
		defer r.Close()
		found, err := r.Install(ctx)
		if err != nil {
			return err
		}
		for _, l := range found.Locks {
			fmt.Fprintf(stdout, "not taken: %s\n", l.Message())
		}
		fmt.Fprintln(stdout, "the redirect is put back, as enforce mode asks for")
	}
	if givenUp {
		if err := iptables.Release(ctx); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "requests are refused, as enforce mode asks for")
	} else if enforcing {
		fmt.Fprintln(stdout, "the redirect stays: its rules are those of enforce mode")
	}
	return nil
}

// takeAway ends what stands between clients and the service. Unless that is for good, who
// waits for the next daemon in the backlog of the ports would be reset if all of it went.
func takeAway(ctx context.Context, stdout io.Writer, forGood bool) (removed bool, err error) {
	_, enforcing, err := iptables.Installed(ctx)
	if err != nil {
		return false, err
	}
	if !forGood && !enforcing { // of which Release would leave what refuses
		if err := iptables.Release(ctx); err != nil {
			return false, err
		}
		fmt.Fprintln(stdout, "the redirect is released: new connections reach the service itself")
		return false, nil
	}
	if removed, err = iptables.Remove(ctx); err != nil {
		return removed, err
	}
	fmt.Fprintln(stdout, "the redirect is removed")
	return removed, nil
}

// without is which mode counts for as long as there is no daemon, and its redirect. In a
// boot that had a daemon it is that of the last one. Else it is what the configuration
// asks for, or an operator has set for a time; but not enforce mode if the last daemon
// had another: what has never been in force on this host keeps nobody out. If the
// configuration is refused, that of the last daemon counts, and before there was one what
// is right of it (see config.Load).
func without(c config.Config, refused error) (policy.Mode, iptables.Config, error) {
	rules := c.Redirect.WithDefaults()
	rules.SocketActivated = true
	dir, err := os.Stat(c.State.Dir)
	if errors.Is(err, fs.ErrNotExist) { // no daemon was ever started
		return policy.Off, rules, nil
	}
	boot, bootErr := bootID()
	if err = errors.Join(err, bootErr); err != nil {
		return policy.Off, rules, err
	}
	rules.UID = dir.Sys().(*syscall.Stat_t).Uid // the daemon's
	var last standing
	file := standingFile(c.State.Dir)
	file.owner = rules.UID
	lastErr := file.decode(&last)
	switch {
	case errors.Is(lastErr, fs.ErrNotExist):
		return c.Mode, rules, nil
	case lastErr != nil:
		return c.Mode, rules, lastErr
	case last.Boot == boot:
		return last.Mode, last.Rules, nil
	case refused != nil:
		rules = last.Rules
	}

	var set report.SetMode
	file = modeFile(c.State.Dir)
	file.owner = rules.UID
	isSet := file.decode(&set) == nil
	switch {
	case refused == nil:
	case isSet:
		c.Mode = set.Configured
	default:
		c.Mode = last.Mode
	}
	inForce := last.Mode == policy.Enforce || isSet && set.Configured == policy.Enforce
	if isSet && over(&set, c.Mode, time.Now()) == "" {
		c.Mode = set.Mode
	}
	if c.Mode == policy.Enforce && !inForce {
		c.Mode = last.Mode
	}
	return c.Mode, rules, nil
}
