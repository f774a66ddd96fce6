package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// hideMemory keeps tokens and credentials that pass through our memory out of core dumps
// and from other processes of our user (PR_SET_DUMPABLE in prctl(2)). Our own files in
// /proc are root's then, and a thread may read them all the same.
func hideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep our memory out of core dumps: %w", err)
	}
	return nil
}
