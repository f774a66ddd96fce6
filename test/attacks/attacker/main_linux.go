// Command attacker is an ordinary user's program that wants the credentials for
// which another program has a grant. Each attack is one word; it says "ready"
// when all that it needs is in place, right before the request that matters, and
// "result" with what it got. An attack that could not be set up ends with
// "failed", and one that this kernel has no means for with "unavailable".
//
// It attacks nothing but the lab in which the tests run it: it connects to the
// metadata service's addresses and to nowhere else.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

func init() { runtime.LockOSThread() } // main is the first thread of the process

var errUnavailable = errors.New("unavailable")

var ways = map[string]func([]string) error{
	// inherit_linux.go
	"plain": plain, "exec": execs, "delayed-exec": delayedExec, "vfork": vfork, "launder": launder, "launder-uring": launderUring, "evict": evict, "child": child, "orphan": orphan, "sibling": sibling,
	// hide_linux.go
	"flight": flight, "uring": uring, "thread": thread, "leader": leader, "pass": pass, "pass-uring": passUring,
	// steal_linux.go
	"theft": theft, "theft-flight": theftFlight, "theft-uring": theftUring, "theft-read": theftRead, "theft-reconnect": theftReconnect, "theft-sibling": theftSibling,
	// image_linux.go
	"lies": lies, "memfd": memfd, "deleted": deleted, "mount": mount, "mounted": mounted, "loader": loader, "applet": applet, "curl": curl, "argv": argv, "shebang": plain,
	// preload_linux.go
	"preload": preload,
	// swap_linux.go
	"swap": swap, "swapped": swapped, "swap-root": swapRoot, "swap-shared": swapShared, "swap-forked": swapForked, "swap-root-forked": swapRootForked,
	// tuple_linux.go
	"from": from, "listener": listener, "device": device, "multipath": multipath, "mapped": mapped, "ipv6": ipv6, "fastopen": fastopen,
	"reconnect": reconnect, "leave": leave,
	// flood_linux.go
	"storm": storm, "connects": connects, "hoard": hoard, "descriptors": descriptors,
	// root_linux.go
	"mixed": mixed, "pid": pid, "heir": heir, "on": on, "unit": unit, "entered": entered,
}

func main() {
	debug.SetGCPercent(-1) // see ask.Fork
	if len(os.Args) < 2 || ways[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "no such way")
		os.Exit(2)
	}
	switch err := ways[os.Args[1]](os.Args[2:]); {
	case errors.Is(err, errUnavailable):
		fmt.Println(err)
	case err != nil:
		fmt.Println("failed", os.Args[1]+":", err)
		os.Exit(1)
	}
}

func ready() { fmt.Println("ready") }

// try is an exchange that matters.
func try(fd int) {
	ready()
	ask.Exchange(fd, ask.Mine()).Tell()
}

func granted() string { return os.Getenv(ask.Granted) }

// plain asks.
func plain([]string) error { return asks(ask.Client{}) }

func asks(c ask.Client) error {
	fd, err := c.Connect()
	if err != nil {
		return err
	}
	try(fd)
	return nil
}
