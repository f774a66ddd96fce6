package main

import (
	"fmt"
	"runtime/debug"

	"github.com/prometheus/procfs"
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

// freeStart gives back what only the start has needed: of the heap, and of our own program,
// half of which is run once or never. What is needed again the kernel maps again from its
// page cache, 64 KiB at a time (MADV_DONTNEED in madvise(2), fault-around in mm/memory.c).
func freeStart() error {
	debug.FreeOSMemory()
	self, err := procfs.Self()
	if err != nil {
		return err
	}
	maps, err := self.ProcMaps()
	if err != nil {
		return err
	}
	exe, err := self.Executable()
	if err != nil {
		return err
	}
	for _, m := range maps {
		if m.Pathname != exe || m.Perms.Write {
			continue // what was written would be lost
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.StartAddr, m.EndAddr-m.StartAddr, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}
	return nil
}
