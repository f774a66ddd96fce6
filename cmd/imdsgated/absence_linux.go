package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
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
	// Open says that the redirect was taken away, be it for a part of the time, so that
	// clients reached the service itself. Otherwise they waited for a daemon, where the socket unit held the ports,
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

// wasOpen reports whether the way to the service is open now, though a time without a
// daemon is under way in which it should not be: an operator or a tool has taken away what
// enforce mode has left. It is asked before the redirect is made again.
func (d *daemon) wasOpen(ctx context.Context) bool {
	var a absence
	if err := absenceFile(d.config.Control.Socket).decode(&a); err != nil || a.Open {
		return false
	}
	_, noted := os.Lstat(d.config.Control.RemovedNote())
	_, enforcing, err := iptables.Installed(ctx)
	return noted == nil || err == nil && !enforcing
}

// returned tells for how long the guard was gone; open is what wasOpen has said.
func (d *daemon) returned(open bool) {
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
	case open:
		d.absent("requests-unguarded", fmt.Sprintf("for %v there was no daemon, and at the end of that nothing kept requests from the metadata service: somebody had removed what enforce mode had left", short(lasted)), a, lasted)
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

// amend remembers an absence that begins, or that it goes on. One that begins and that
// nobody misses is none.
func amend(socket string, begins absence, missed, givenUp bool) error {
	file := absenceFile(socket)
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
	a.Open = a.Open || begins.Open
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
