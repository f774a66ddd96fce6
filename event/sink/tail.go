package sink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"time"
)

const (
	// maxLine bounds one line of the spool; ours are far shorter.
	maxLine = 1 << 20
	// lookAgain is how often a reader looks for new lines.
	lookAgain = 100 * time.Millisecond
)

// All is how many lines there are.
const All = math.MaxInt

// Tail calls fn with each line of the spool at path, without its newline: the
// last ones that are there, in rotated files, too, and with follow those to come,
// through rotations, until ctx is done or fn returns an error. A line that is not
// finished yet is waited for.
func Tail(ctx context.Context, path string, last int, follow bool, fn func(line []byte) error) error {
	return tail(ctx, path, last, All, follow, fn)
}

// TailFile is Tail without what was rotated before.
func TailFile(ctx context.Context, path string, last int, follow bool, fn func(line []byte) error) error {
	return tail(ctx, path, last, 1, follow, fn)
}

func tail(ctx context.Context, path string, last, files int, follow bool, fn func(line []byte) error) error {
	r := &reader{path: path}
	defer r.Close()
	if err := r.beginLast(last, files); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	for {
		line, err := r.Next()
		switch {
		case err == nil:
			if err := fn(line); err != nil {
				return err
			}
			continue
		case err != io.EOF:
			return err
		case !follow:
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookAgain):
		}
	}
}

// rotated opens the file that follows ours, if ours is not the present one any
// more: rotation renames path.1 to path.2 and so on, beginning with the oldest, and at
// last path to path.1. If ours is gone altogether, what follows is the oldest that
// there is, and gone says so.
func rotated(file *os.File, path string) (next *os.File, gone bool, err error) {
	ours, err := file.Stat()
	if err != nil {
		return nil, false, err
	}
	is := func(name string) (same, there bool) {
		info, err := os.Stat(name)
		return err == nil && os.SameFile(info, ours), err == nil
	}
	for range attempts {
		if same, there := is(path); same || !there {
			return nil, false, nil // ours, or between rename and open
		}
		next, older, i := path, rotatedName(path, 1), 1
		same, there := is(older)
		for ; there && !same; same, there = is(older) {
			i++
			next, older = older, rotatedName(path, i)
		}
		if _, behind := is(rotatedName(path, i+1)); !there && behind {
			continue // in the middle of a rotation
		}
		f, err := os.Open(next)
		if err != nil {
			continue
		}
		// If anything was renamed meanwhile, that is a later one.
		if stillSame, stillThere := is(older); stillSame == same && stillThere == there {
			return f, !there, nil
		}
		f.Close()
	}
	return nil, false, nil
}

// beginLast begins with the last n lines, in so many files at most.
func (r *reader) beginLast(n, files int) error {
	var from *os.File
	var offset int64
	missing := false
	for i := 0; i < files && (n > 0 || from == nil); i++ {
		file, err := os.Open(rotatedName(r.path, i))
		if errors.Is(err, fs.ErrNotExist) && from != nil && !missing {
			missing = true // in the middle of a rotation there may be more behind it
			continue
		}
		if errors.Is(err, fs.ErrNotExist) && from != nil {
			break
		}
		if err != nil {
			return err
		}
		if same(file, from) { // it was rotated meanwhile
			file.Close()
			continue
		}
		if from != nil {
			from.Close()
		}
		from = file
		at, found, err := lastLines(file, n)
		if err != nil {
			file.Close()
			return err
		}
		offset = at
		n -= found
	}
	return r.begin(from, offset)
}

func same(a, b *os.File) bool {
	if b == nil {
		return false
	}
	x, errA := a.Stat()
	y, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(x, y)
}

// lastLines is the offset of the beginning of the last n whole lines, and how many there
// are.
func lastLines(file *os.File, n int) (offset int64, found int, err error) {
	if n == All {
		return 0, 0, nil
	}
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, 0, err
	}
	const block = 64 << 10
	buf := make([]byte, block)
	newlines := -1 // behind which a line begins, but for the last
	for at := end; at > 0; {
		size := min(block, at)
		at -= size
		if _, err := file.ReadAt(buf[:size], at); err != nil {
			return 0, 0, err
		}
		for i := int(size) - 1; i >= 0; i-- {
			if buf[i] != '\n' {
				continue
			}
			if newlines++; newlines == max(n, 0) {
				return at + int64(i) + 1, newlines, nil
			}
		}
	}
	return 0, newlines + 1, nil
}
