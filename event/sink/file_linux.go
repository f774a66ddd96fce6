package sink

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// openAppend opens the spool. A link at its place, or a file that is none, is
// refused: the directory belongs to us, and whoever put it there did not.
func openAppend(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
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

// began is when the file was made (statx(2)), or where the file system does not know
// that, when it was changed last.
func began(file *os.File) time.Time {
	var st unix.Statx_t
	err := unix.Statx(int(file.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BTIME|unix.STATX_MTIME, &st)
	switch {
	case err != nil:
		return time.Now()
	case st.Mask&unix.STATX_BTIME != 0:
		return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec))
	}
	return time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec))
}

// syncDirectory makes the names of files last.
func syncDirectory(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// syncRead brings what others have written to a file to the disk; fsync(2) does that also
// for one who only reads it.
func syncRead(file *os.File) error { return file.Sync() }

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
