package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// kept is a small file with what the daemon must know after a restart, as JSON. It is
// replaced whole, so that a crash leaves the old one or the new one. Its methods are not
// called at the same time.
type kept struct {
	path string
	// owner may have written it, too, beside root and who reads it.
	owner uint32
}

// maxKept bounds what a file may make us read: far more than as many decisions as there
// may be.
const maxKept = 64 << 20

// read is fs.ErrNotExist if there is no file. After any other error the file is put
// aside, since it is evidence, and is not to be overwritten.
func (k kept) read(v any) error {
	err := k.decode(v)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return k.aside(err)
}

// aside puts a file away that was read and is wrong.
func (k kept) aside(why error) error {
	to := k.path + ".damaged"
	if err := os.Rename(k.path, to); err != nil {
		return errors.Join(why, err)
	}
	return fmt.Errorf("%w; it was put aside as %s", why, to)
}

func (k kept) decode(v any) error {
	// Not through a link, and without waiting for the other end of a pipe.
	f, err := os.OpenFile(k.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", k.path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("read %s: it is no regular file", k.path)
	case st.Uid != 0 && st.Uid != uint32(os.Geteuid()) && st.Uid != k.owner, st.Mode&0o022 != 0:
		return fmt.Errorf("read %s: others may have written it (uid %d, mode %04o)", k.path, st.Uid, st.Mode&0o7777)
	case st.Size > maxKept:
		return fmt.Errorf("read %s: it has %d bytes, more than %d", k.path, st.Size, maxKept)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxKept))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", k.path, err)
	}
	return nil
}

// write replaces the file, and returns when the disk has it.
func (k kept) write(v any) error {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return fmt.Errorf("write %s: %w", k.path, err)
	}
	dir := filepath.Dir(k.path)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	next := k.path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) { // of one who crashed
		return err
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, k.path)
	}
	if err != nil {
		os.Remove(next)
		return err
	}
	return syncDir(dir)
}

// remove is no error if there is none.
func (k kept) remove() error {
	switch err := os.Remove(k.path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return syncDir(filepath.Dir(k.path))
}

// syncDir makes the disk have what was renamed or removed.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
