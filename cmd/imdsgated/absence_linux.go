package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/control"
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
	return kept{filepath.Join(filepath.Dir(socket), "absence.json")}
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
	action, message := "requests-held", ""
	switch lasted := (now - a.Since).Round(time.Millisecond); {
	case a.Open:
		action, message = "requests-unguarded", fmt.Sprintf("for %v requests reached the metadata service unguarded: the redirect was removed", lasted)
	case a.Refused != 0:
		action = "requests-refused"
		message = fmt.Sprintf("for %v requests were refused, after they had waited for %v: the redirect stayed, as enforce mode asks for",
			(now - a.Refused).Round(time.Millisecond), (a.Refused - a.Since).Round(time.Millisecond))
	default:
		message = fmt.Sprintf("for %v requests waited for the daemon: the redirect stayed, as enforce mode asks for", lasted)
	}
	message += fmt.Sprintf("; the daemon had ended (%s)", a.Why)
	if a.Ends > 1 {
		message += fmt.Sprintf(", and %d times in all", a.Ends)
	}
	d.log.Warn().Dur("lasted", now-a.Since).Str("why", a.Why).Msg(message)
	ev := &event.Event{Kind: event.Lifecycle, Host: d.host, Time: time.Now(), Duration: now - a.Since, State: event.State{
		Action: action, Type: "info", Message: message, Mode: d.engine.Mode().String(), Level: d.levelNow(),
	}}
	if a.Why != bySuccess {
		ev.Kind = event.Integrity // somebody may have done it
	}
	d.spool.Record(ev)
}

// afterwards is what the unit runs, as root, when a daemon has ended, whatever ended it.
// In audit mode nothing of ours may stand between a client and the service from then
// on. In enforce mode the redirect stays.
func (d *daemon) afterwards(ctx context.Context, stdout io.Writer) error {
	enforcing, err := iptables.Enforcing(ctx)
	if err != nil {
		return err
	}
	removed := false
	if !enforcing {
		if removed, err = iptables.Remove(ctx); err != nil {
			return err
		}
	}
	why := os.Getenv("SERVICE_RESULT")
	if status := os.Getenv("EXIT_STATUS"); why != bySuccess && status != "" {
		why += ", " + os.Getenv("EXIT_CODE") + " " + status
	}
	now := bootTime()
	err = d.amend(func(a *absence, there bool) bool {
		if !there {
			// A daemon in mode off had nothing to take away, and is not missed.
			if why == bySuccess && !removed && !enforcing {
				return false
			}
			*a = absence{Since: now, Open: !enforcing, Why: why}
		}
		if a.Why == bySuccess {
			a.Why = why
		}
		a.Ends++
		return true
	})
	switch {
	case enforcing:
		fmt.Fprintln(stdout, "the redirect stays: its rules are those of enforce mode")
	case removed:
		fmt.Fprintln(stdout, "the redirect is removed")
	}
	return err
}

// givenUp is what systemd runs when it will not start the daemon again, and has given
// up its ports: who is led to them is refused from now on.
func (d *daemon) givenUp() error {
	return d.amend(func(a *absence, there bool) bool {
		if !there || a.Open || a.Refused != 0 {
			return false
		}
		a.Refused = bootTime()
		return true
	})
}

// amend changes what is remembered, if the function says so.
func (d *daemon) amend(change func(a *absence, there bool) bool) error {
	socket := control.DefaultSocket
	if c, err := config.Load(d.path); err == nil { // or else it may be why the daemon has ended
		socket = c.Control.Socket
	}
	file := absenceFile(socket)
	var a absence
	err := file.read(&a)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !change(&a, err == nil) {
		return nil
	}
	return file.write(a)
}
