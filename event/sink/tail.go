package sink

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

const (
	// maxLine bounds one line of the spool; ours are far shorter.
	maxLine = 1 << 20
	// lookAgain is how often a reader looks for new lines.
	lookAgain = 100 * time.Millisecond
)

// Tail calls fn with each line of the spool at path, without its newline: the
// last ones that are there, and with follow those to come, through rotations,
// until ctx is done or fn returns an error. A line that is not finished yet is
// waited for.
func Tail(ctx context.Context, path string, last int, follow bool, fn func(line []byte) error) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer func() { file.Close() }()
	if err := seekLast(file, last); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	r := bufio.NewReaderSize(file, 64<<10)
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case err == nil:
			if err := fn(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
				return err
			}
			line = line[:0]
			continue
		case errors.Is(err, bufio.ErrBufferFull):
			if len(line) > maxLine {
				return fmt.Errorf("read events: a line of %s is longer than %d bytes", path, maxLine)
			}
			continue
		case !errors.Is(err, io.EOF):
			return fmt.Errorf("read events: %w", err)
		case !follow:
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookAgain):
		}
		next, err := rotated(file, path)
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		if next != nil {
			// What was written before the rotation has been read: the writer
			// flushes before it renames, and we were at the end after that.
			if rest, _ := io.ReadAll(r); len(rest) > 0 {
				for _, l := range bytes.Split(bytes.TrimSuffix(append(line, rest...), []byte("\n")), []byte("\n")) {
					if err := fn(l); err != nil {
						next.Close()
						return err
					}
				}
				line = line[:0]
			}
			file.Close()
			file = next
			r.Reset(file)
		}
	}
}

// rotated opens the file that follows ours, if ours is not the present one any
// more: rotation renames path.1 to path.2 and so on, beginning with the oldest, and at
// last path to path.1. If ours is gone altogether, what follows is the oldest that
// there is.
func rotated(file *os.File, path string) (*os.File, error) {
	ours, err := file.Stat()
	if err != nil {
		return nil, err
	}
	is := func(name string) (same, there bool) {
		info, err := os.Stat(name)
		return err == nil && os.SameFile(info, ours), err == nil
	}
	for range 10 { // as often as a rotation may come in between
		if same, there := is(path); same || !there {
			return nil, nil // ours, or between rename and open
		}
		next, older, i := path, path+".1", 1
		same, there := is(older)
		for ; there && !same; same, there = is(older) {
			i++
			next, older = older, fmt.Sprintf("%s.%d", path, i)
		}
		if _, behind := is(fmt.Sprintf("%s.%d", path, i+1)); !there && behind {
			continue // in the middle of a rotation
		}
		f, err := os.Open(next)
		if err != nil {
			continue
		}
		// If anything was renamed meanwhile, that is a later one.
		if stillSame, stillThere := is(older); stillSame == same && stillThere == there {
			return f, nil
		}
		f.Close()
	}
	return nil, nil
}

// seekLast puts the offset to the beginning of the last n lines.
func seekLast(file *os.File, n int) error {
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil || n <= 0 {
		return err
	}
	const block = 64 << 10
	buf := make([]byte, block)
	lines := 0
	for at := end; at > 0; {
		size := min(block, at)
		at -= size
		if _, err := file.ReadAt(buf[:size], at); err != nil {
			return err
		}
		for i := int(size) - 1; i >= 0; i-- {
			if buf[i] != '\n' || at+int64(i) == end-1 {
				continue
			}
			if lines++; lines == n {
				_, err := file.Seek(at+int64(i)+1, io.SeekStart)
				return err
			}
		}
	}
	_, err = file.Seek(0, io.SeekStart)
	return err
}
