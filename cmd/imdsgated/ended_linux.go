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
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"golang.org/x/sys/unix"
)

// standing is the redirect of the last daemon, and in which mode it was and is to be. It
// is kept in two places: beside the control socket, where it ends with the boot, and
// beside what operators have decided, for a boot in which no daemon starts.
type standing struct {
	Mode       policy.Mode     `json:"mode"`
	Configured policy.Mode     `json:"configured"`
	Set        *report.SetMode `json:"set,omitempty"` // by an operator
	Rules      iptables.Config `json:"rules"`
}

func standingFile(dir string) kept { return kept{path: filepath.Join(dir, "redirect.json")} }

// keepStanding remembers what the redirect is from now on.
func (d *daemon) keepStanding(mode policy.Mode) {
	m := &d.modes
	m.mu.Lock()
	now := standing{mode, m.configured, m.set, d.rules}
	m.mu.Unlock()
	for _, dir := range []string{filepath.Dir(d.config.Control.Socket), d.config.State.Dir} {
		file := standingFile(dir)
		var was standing
		if file.decode(&was) == nil && reflect.DeepEqual(was, now) {
			continue
		}
		if err := file.write(now); err != nil { // what is not true any more is worse than nothing
			err = errors.Join(err, file.remove())
			d.log.Warn().Err(err).Msg("what becomes of the redirect without this daemon is known less well")
		}
	}
	if err := os.Remove(d.config.Control.RemovedNote()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn().Err(err).Msg("it is not forgotten that an operator had removed the redirect")
	}
}

// readStanding trusts whom the directory belongs to, the daemon's user, who could replace
// what is in there.
func readStanding(dir string) (s standing, owner uint32, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return s, 0, fmt.Errorf("stat %s: %w", dir, err)
	}
	file := standingFile(dir)
	file.owner = st.Uid
	err = file.decode(&s)
	return s, st.Uid, err
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
	removed, stands := false, true
	if wanted() {
		if err := stay(ctx, stdout, rules, givenUp); err != nil { // and what is there stays
			fmt.Fprintf(stdout, "the redirect of enforce mode cannot be made as it should be: %v\n", err)
			_, stands, _ = iptables.Installed(ctx)
		}
	}
	enforcing := wanted() // still
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
	missed := enforcing || removed || why != bySuccess && mode != policy.Off
	if err := amend(c.Control.Socket, absence{Since: since, Open: !enforcing || !stands, Why: why}, missed, givenUp); err != nil { // which is no reason for the unit to fail
		fmt.Fprintf(stdout, "how long there is no daemon will not be known: %v\n", err)
	}
	return nil
}

// stay has the redirect of enforce mode in place. When nobody holds its ports any more,
// where anybody could answer in the daemon's place, it leads nowhere: the guard refuses.
func stay(ctx context.Context, stdout io.Writer, rules iptables.Config, givenUp bool) error {
	rules.Enforce = true
	rules.Cgroup = ownCgroup() // in which no daemon is, and nobody is exempt
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
	if givenUp {
		err = iptables.Release(ctx)
	}
	if err == nil {
		fmt.Fprintln(stdout, map[bool]string{false: "the redirect stays, as enforce mode asks for", true: "requests are refused, as enforce mode asks for"}[givenUp])
	}
	return err
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
// was not to be in it: what has never been in force on this host keeps nobody out. If the
// configuration is refused, that of the last daemon counts, and before there was one what
// is right of it (see config.Load).
func without(c config.Config, refused error) (policy.Mode, iptables.Config, error) {
	now := time.Now()
	if last, _, err := readStanding(filepath.Dir(c.Control.Socket)); err == nil {
		mode := last.Mode
		if set := last.Set; set != nil && over(set, last.Configured, now) != "" {
			mode = last.Configured
		}
		return mode, last.Rules, nil
	}
	if refused == nil {
		_, refused = c.Policy()
	}
	last, owner, err := readStanding(c.State.Dir)
	rules := c.Redirect.WithDefaults()
	rules.UID, rules.SocketActivated = owner, true
	if rules.Validate() != nil {
		rules = iptables.Config{UID: owner, SocketActivated: true}.WithDefaults()
	}
	set := last.Set
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if owner == 0 { // no daemon was ever started
			return policy.Off, rules, err
		}
		set = new(report.SetMode)
		file := modeFile(c.State.Dir)
		file.owner = owner
		if file.decode(set) != nil {
			set = nil
		}
		last.Mode = policy.Enforce // it may have been
	} else if refused != nil {
		c.Mode, rules = last.Configured, last.Rules
	}
	if set != nil && over(set, c.Mode, now) == "" {
		c.Mode = set.Mode
	}
	if c.Mode == policy.Enforce && last.Mode != policy.Enforce && last.Configured != policy.Enforce {
		c.Mode = last.Mode
	}
	return c.Mode, rules, err
}
