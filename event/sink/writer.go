package sink

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// writer is the file with its rotation. One goroutine uses it.
type writer struct {
	path    string
	maxSize int64
	maxAge  time.Duration // 0: any
	keep    int
	fsync   Fsync
	*counts

	file    *os.File // nil after a rotation that failed
	began   time.Time
	good    int64 // bytes of the file that are whole lines
	buf     []byte
	waiting int // documents in buf

	unsynced bool
	synced   time.Time
}

// name is that of the i-th file, 0 being the present one.
func (w *writer) name(i int) string { return rotatedName(w.path, i) }

func rotatedName(path string, i int) string {
	if i == 0 {
		return path
	}
	return fmt.Sprintf("%s.%d", path, i)
}

func (w *writer) open() error {
	file, err := openAppend(w.path)
	if err != nil {
		return fmt.Errorf("open the event file: %w", err)
	}
	size, torn, err := repair(file)
	if err != nil {
		file.Close()
		return fmt.Errorf("open the event file: %w", err)
	}
	if torn {
		w.failed.Add(1)
	}
	w.file, w.good, w.began = file, size, began(file)
	return nil
}

// repair takes away what a crash has left of the last line, so that the next begins where
// a line does.
func repair(file *os.File) (size int64, torn bool, err error) {
	size, err = file.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		return size, false, err
	}
	tail := make([]byte, min(size, maxLine))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil {
		return size, false, err
	}
	end := bytes.LastIndexByte(tail, '\n') + 1
	switch {
	case end == len(tail):
		return size, false, nil
	case end == 0 && size > maxLine:
		return size, false, fmt.Errorf("%s is no file of events: its last line has no end in %d bytes", file.Name(), maxLine)
	}
	size += int64(end - len(tail))
	return size, true, file.Truncate(size)
}

// tidy closes the gap in the names that a crash in the middle of a rotation has left, and
// removes the files that an earlier configuration has kept and this one does not.
func (w *writer) tidy() error {
	there := 0
	for i := 1; i <= w.keep+1 || there == i-1; i++ {
		if _, err := os.Lstat(w.name(i)); err != nil {
			continue
		}
		there++
		if there > w.keep {
			if err := os.Remove(w.name(i)); err != nil {
				return fmt.Errorf("remove an old event file: %w", err)
			}
		} else if there < i {
			if err := os.Rename(w.name(i), w.name(there)); err != nil {
				return fmt.Errorf("rotate the event file: %w", err)
			}
		}
	}
	return nil
}

func (w *writer) write(line []byte) error {
	if err := w.reopen(); err != nil {
		w.failed.Add(1)
		return err
	}
	if len(w.buf) > 0 && len(w.buf)+len(line) > bufferSize {
		if err := w.flush(); err != nil {
			w.failed.Add(1)
			return err
		}
	}
	size := w.good + int64(len(w.buf))
	if size > 0 && (size+int64(len(line)) > w.maxSize || w.maxAge > 0 && time.Since(w.began) > w.maxAge) {
		if err := w.rotate(); err != nil {
			w.failed.Add(1)
			return err
		}
	}
	w.buf = append(w.buf, line...)
	w.waiting++
	return nil
}

// reopen opens the file after it could not be.
func (w *writer) reopen() error {
	for w.file == nil {
		if err := w.open(); err != nil && (!noRoom(err) || !w.makeRoom()) {
			return err
		}
	}
	return nil
}

// flush writes what is waiting. On a full disk it makes room for it. What the disk does
// not take in spite of that is lost, and the next flush tries again with what comes then.
func (w *writer) flush() error {
	for len(w.buf) > 0 {
		err := w.reopen()
		if err == nil {
			err = w.push()
		}
		if err != nil && !(noRoom(err) && w.makeRoom()) {
			w.failed.Add(uint64(w.waiting))
			w.buf, w.waiting = w.buf[:0], 0
			return err
		}
	}
	return nil
}

// push writes as much as the disk takes of what is waiting, and leaves no part of a line.
func (w *writer) push() error {
	n, err := w.file.Write(w.buf)
	if err == nil {
		w.good += int64(n)
		w.written.Add(uint64(w.waiting))
		w.buf, w.waiting, w.unsynced = w.buf[:0], 0, true
		return nil
	}
	whole := bytes.LastIndexByte(w.buf[:n], '\n') + 1
	lines := bytes.Count(w.buf[:whole], []byte("\n"))
	w.good += int64(whole)
	w.written.Add(uint64(lines))
	w.buf, w.waiting = append(w.buf[:0], w.buf[whole:]...), w.waiting-lines
	return errors.Join(fmt.Errorf("write the event file: %w", err), w.file.Truncate(w.good))
}

func noRoom(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// makeRoom takes away the oldest documents, a file at a time, and reports whether there
// were some: rotated files, the last of which is the present one as it is then.
func (w *writer) makeRoom() bool {
	for i := w.keep; i > 0; i-- {
		lines, err := countLines(w.name(i))
		if err == nil && os.Remove(w.name(i)) == nil {
			w.removed.Add(lines)
			return true
		}
	}
	return w.file != nil && w.good > 0 && w.rotateFile() == nil
}

func countLines(name string) (lines uint64, err error) {
	file, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	block := make([]byte, bufferSize)
	for {
		n, err := file.Read(block)
		lines += uint64(bytes.Count(block[:n], []byte("\n")))
		if err == io.EOF {
			return lines, nil
		}
		if err != nil {
			return lines, err
		}
	}
}

// rotate begins a new file.
func (w *writer) rotate() error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.rotateFile()
}

// rotateFile begins a new file for what is waiting, too.
func (w *writer) rotateFile() error {
	err := w.sync(w.fsync != FsyncNever)
	err = errors.Join(err, w.file.Close())
	w.file = nil
	if err != nil {
		return fmt.Errorf("rotate the event file: %w", err)
	}
	for i := w.keep; i > 0; i-- {
		if err := os.Rename(w.name(i-1), w.name(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate the event file: %w", err)
		}
	}
	if err := w.open(); err != nil {
		return err
	}
	if w.fsync != FsyncNever {
		return syncDirectory(filepath.Dir(w.path))
	}
	return nil
}

// settle does at the end of a batch what Fsync asks for, and reports whether it should be
// called again a little later.
func (w *writer) settle() (again bool, err error) {
	switch w.fsync {
	case FsyncAlways:
		return false, w.sync(true)
	case FsyncInterval:
		if w.unsynced && time.Since(w.synced) < notMoreOften {
			return true, nil
		}
		return false, w.sync(true)
	}
	return false, nil
}

func (w *writer) sync(wanted bool) error {
	if !wanted || !w.unsynced || w.file == nil {
		return nil
	}
	w.unsynced, w.synced = false, time.Now()
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("bring the event file to the disk: %w", err)
	}
	return nil
}

func (w *writer) close() error {
	err := w.flush()
	if w.file == nil {
		return err
	}
	err = errors.Join(err, w.sync(w.fsync != FsyncNever), w.file.Close())
	w.file = nil
	return err
}
