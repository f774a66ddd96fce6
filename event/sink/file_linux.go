package sink

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openAppend opens the spool. A link at its place, or a file that is none, is
// refused: the directory belongs to us, and whoever put it there did not.
func openAppend(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sinceBoot is in microseconds. A sequence that starts from it is greater than
// that of an earlier run in the same boot, which cannot have written a million
// documents a second.
func sinceBoot() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return uint64(ts.Nano()) / 1000
}
