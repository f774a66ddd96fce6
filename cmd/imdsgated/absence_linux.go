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
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"golang.org/x/sys/unix"
)

// absence is a time without a daemon. Whoever ends the guard writes when that was: the
// daemon itself if it can, or else what systemd runs after it, however it ended
// (ExecStopPost=). The next daemon tells how long it took, when it guards again. It is
// kept beside the control socket, in /run: a boot begins without one.
type absence struct {
	// Since and Refused are of CLOCK_BOOTTIME, which nobody sets, and which goes on while
	// the host is suspended.
	Since time.Duration `json:"since"`
	// Open says that the redirect was taken away, so that clients reached the service
	// itself. Otherwise they waited for a daemon, where the socket unit held the ports,
	// or were refused.
	Open bool `json:"open"`
	// Refused is since when nobody holds the ports; 0 if somebody does.
	Refused time.Duration `json:"refused,omitempty"`
	// Why is the first reason, and Ends how many daemons have ended since.
	Why  string `json:"why"`
	Ends int    `json:"ends"`
}

// bySuccess is what systemd says of a service that was stopped, or ended by itself as it
// should (SERVICE_RESULT of systemd.exec(5)).
const bySuccess = "success"

func absenceFile(socket string) kept {
	return kept{path: filepath.Join(filepath.Dir(socket), "absence.json")}
}

// bootTime is the time since the boot, with that in which the host was suspended.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // there since Linux 2.6.39
	}
	return time.Duration(t.Nano())
}

// leaves remembers that the guard ends now. What it cannot write, the next daemon does
// not tell.
func (d *daemon) leaves(open bool) {
	a := absence{Since: bootTime(), Open: open, Why: bySuccess}
	if err := absenceFile(d.config.Control.Socket).write(a); err != nil {
		d.log.Warn().Err(err).Msg("how long the guard is gone will not be known")
	}
}

// returned tells for how long the guard was gone.
func (d *daemon) returned() {
	file := absenceFile(d.config.Control.Socket)
	var a absence
	err := file.read(&a)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	err = errors.Join(err, file.remove())
	now := bootTime()
	if err != nil || a.Since <= 0 || a.Since > now {
		d.log.Warn().Err(err).Msg("how long the guard was gone is not known")
		return
	}
	lasted := now - a.Since
	switch {
	case a.Open:
		d.absent("requests-unguarded", fmt.Sprintf("for %v requests reached the metadata service unguarded: the redirect was removed", short(lasted)), a, lasted)
	case a.Refused != 0:
		d.absent("requests-refused", fmt.Sprintf("for %v requests were refused, after they had waited for %v: the redirect stayed, as enforce mode asks for",
			short(now-a.Refused), short(a.Refused-a.Since)), a, lasted)
	default:
		d.absent("requests-held", fmt.Sprintf("for %v requests waited for the daemon: the redirect stayed, as enforce mode asks for", short(lasted)), a, lasted)
	}
}

func short(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// absent records a time without a guard. Unless somebody has stopped the daemon as it
// should be, that is a finding.
func (d *daemon) absent(action, message string, a absence, lasted time.Duration) {
	message += fmt.Sprintf("; the daemon had ended (%s)", a.Why)
	if a.Ends > 1 {
		message += fmt.Sprintf(", and %d times in all", a.Ends)
	}
	d.log.Warn().Dur("lasted", lasted).Str("why", a.Why).Msg(message)
	ev := &event.Event{Kind: event.Lifecycle, Host: d.host.Load(), Time: time.Now(), Duration: lasted, State: event.State{
		Action: action, Type: "info", Message: message, Mode: d.engine.Mode().String(), Level: d.levelNow(),
	}}
	if a.Why != bySuccess {
		ev.Kind = event.Integrity
	}
	d.record(ev)
}

// afterwards is what the unit runs, as root, when a daemon has ended, whatever ended it.
// In audit mode nothing of ours may stand between a client and the service from then
// on. In enforce mode the redirect stays, and is put back where it is not there, as after
// a boot. givenUp says that systemd will not start
// another one, and has closed the ports: then it runs once more, since the first may have
// been killed with the daemon.
func (d *daemon) afterwards(ctx context.Context, stdout io.Writer, givenUp bool) error {
	why := os.Getenv("SERVICE_RESULT")
	switch status := os.Getenv("EXIT_STATUS"); {
	case why == "":
		why = "for a reason that is not known"
	case why != bySuccess && status != "":
		why += ", " + os.Getenv("EXIT_CODE") + " " + status
	}
	since := bootTime() // a moment after its end: as soon as systemd knew
	installed, enforcing, err := iptables.Installed(ctx)
	if err != nil {
		return err
	}
	removed, back := false, false
	if !installed && (givenUp || why != bySuccess) {
		if back, err = d.putBack(ctx, stdout); err != nil {
			fmt.Fprintf(stdout, "the redirect of enforce mode cannot be put back, and clients reach the service itself: %v\n", err)
		}
		enforcing = back
	}
	switch {
	case back:
		fmt.Fprintln(stdout, "the redirect is put back, as enforce mode asks for")
	case enforcing:
		fmt.Fprintln(stdout, "the redirect stays: its rules are those of enforce mode")
	case givenUp || why == bySuccess:
		if removed, err = iptables.Remove(ctx); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "the redirect is removed")
	default:
		// Who waits for the next daemon in the backlog of the ports would be reset if all
		// of it went.
		if err := iptables.Release(ctx); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "the redirect is released: new connections reach the service itself")
	}
	if !enforcing {
		since = bootTime() // until then they waited
	}
	if !enforcing || givenUp {
		if err := attribution.Untime(timedNote(d.socket())); err != nil {
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

// redirectFile has the redirect, for as long as it is that of enforce mode.
func redirectFile(dir string) kept { return kept{path: filepath.Join(dir, "redirect.json")} }

// keepRedirect remembers the redirect for a boot in which no daemon starts. What it
// cannot write, such a boot does not have.
func (d *daemon) keepRedirect(enforce bool) {
	file := redirectFile(d.config.State.Dir)
	var was iptables.Config
	rules := d.rules
	rules.Enforce = true
	err := file.read(&was)
	switch {
	case !enforce:
		err = file.remove()
	case err != nil || !reflect.DeepEqual(was, rules):
		err = file.write(rules)
	}
	if err != nil {
		d.log.Warn().Err(err).Msg("a boot in which the daemon does not start may have another redirect than this one")
	}
}

// putBack installs the redirect of enforce mode where a daemon would have been in that
// mode, and reports whether it has: a boot begins without rules.
func (d *daemon) putBack(ctx context.Context, stdout io.Writer) (bool, error) {
	rules, err := enforced(config.Load(d.path))
	if err != nil || rules == nil {
		return false, err
	}
	rules.Cgroup = ownCgroup() // in which no daemon is, and nobody is exempt
	r, err := iptables.Open(ctx, *rules)
	if err != nil {
		return false, err
	}
	defer r.Close()
	found, err := r.Install(ctx)
	if err != nil {
		return false, err
	}
	for _, l := range found.Locks {
		fmt.Fprintf(stdout, "not taken: %s\n", l)
	}
	return true, nil
}

// enforced is the redirect of a daemon that would have been in enforce mode, or nil. If
// the configuration is refused, what the last daemon had counts, and before there was
// one, those files of it that are right.
func enforced(c config.Config, refused error) (*iptables.Config, error) {
	dir, err := os.Stat(c.State.Dir)
	if errors.Is(err, fs.ErrNotExist) { // no daemon was ever started
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	owner := dir.Sys().(*syscall.Stat_t).Uid // the daemon's
	var set report.SetMode
	file := modeFile(c.State.Dir)
	file.owner = owner
	unset := file.decode(&set)

	rules := c.Redirect.WithDefaults()
	rules.UID, rules.SocketActivated, rules.Enforce = owner, true, true
	if refused != nil {
		file := redirectFile(c.State.Dir)
		file.owner = owner
		var last iptables.Config
		switch err := file.decode(&last); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		case unset == nil:
			rules, c.Mode = last, set.Configured
		default:
			rules, c.Mode = last, policy.Enforce
		}
	}
	if unset == nil && over(&set, c.Mode, time.Now()) == "" {
		c.Mode = set.Mode
	}
	if c.Mode != policy.Enforce {
		return nil, nil
	}
	return &rules, nil
}

// socket is the control socket of the daemon that has ended.
func (d *daemon) socket() string {
	if c, err := config.Load(d.path); err == nil { // or else it may be why it has ended
		return c.Control.Socket
	}
	return control.DefaultSocket
}

// amend remembers an absence that begins, or that it goes on. One that begins and that
// nobody misses is none.
func (d *daemon) amend(begins absence, missed, givenUp bool) error {
	file := absenceFile(d.socket())
	var dir unix.Stat_t
	if err := unix.Stat(filepath.Dir(file.path), &dir); err == nil {
		file.owner = dir.Uid // the daemon's, who could replace what is in there
	}
	var a absence
	switch err := file.read(&a); {
	case err == nil:
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case !missed:
		return nil
	default:
		a = begins
	}
	switch {
	case !givenUp:
		a.Ends++
		if a.Why == bySuccess {
			a.Why = begins.Why
		}
	case !a.Open && a.Refused == 0:
		a.Refused = bootTime()
	}
	return file.write(a)
}
