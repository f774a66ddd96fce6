package sink

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Cursor reads the spool from where it was, in a file of its own, before a restart of
// whoever reads: each line at least once, and in order. It is for one goroutine.
//
//	for {
//		line, err := c.Next()
//		if err == io.EOF { wait, or stop }
//		...
//		err = c.Commit() // lines up to this one will not come again
//	}
type Cursor struct {
	*reader
	state string
}

// place is where a reader is, as it stands in the file of a Cursor. A file of events is
// known by its first line, which has an ID that no other has: names change with
// rotations, and numbers of inodes are given again.
type place struct {
	File   string `json:"file"` // SHA-256 of its first line
	Offset int64  `json:"offset"`
}

// OpenCursor opens the spool at path where the file state says, which Commit has written,
// or at its beginning. It never follows a link to that file.
func OpenCursor(path, state string) (*Cursor, error) {
	c := &Cursor{reader: &reader{path: path}, state: state}
	text, err := os.ReadFile(state)
	if errors.Is(err, fs.ErrNotExist) {
		return c, c.oldest()
	}
	if err != nil {
		return nil, fmt.Errorf("read the cursor: %w", err)
	}
	var at place
	if err := json.Unmarshal(text, &at); err != nil || at.Offset < 0 || at.File == "" {
		return nil, fmt.Errorf("%s is no cursor: remove it to begin with the oldest event", state)
	}
	for i, missing := 0, 0; missing < 2; i++ { // in the middle of a rotation is one missing
		file, err := os.Open(rotatedName(path, i))
		if errors.Is(err, fs.ErrNotExist) {
			missing++
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read events: %w", err)
		}
		if first, err := firstLine(file); err == nil && first == at.File {
			return c, c.begin(file, at.Offset)
		}
		file.Close()
	}
	c.missed++
	return c, c.oldest()
}

// Missed is how often events were removed before they were read. It goes on with the
// oldest that there is then.
func (c *Cursor) Missed() int { return c.missed }

// Commit makes the next Cursor begin behind the line that was read last. What it has
// written survives the end of the host.
func (c *Cursor) Commit() error {
	if c.file == nil {
		return nil
	}
	first, err := firstLine(c.file)
	if errors.Is(err, io.EOF) {
		return nil // nothing was read
	}
	if err == nil {
		// The kernel may not have written yet what was read. A host that ends then has a
		// shorter file than before, and other lines where the cursor is.
		err = syncRead(c.file)
	}
	if err == nil {
		var text []byte
		if text, err = json.Marshal(place{first, c.offset}); err == nil {
			err = replaceFile(c.state, append(text, '\n'))
		}
	}
	if err != nil {
		return fmt.Errorf("write the cursor: %w", err)
	}
	return nil
}

// replaceFile writes a file that is either the old one or the new one, whenever the host
// ends.
func replaceFile(name string, text []byte) error {
	file, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncDirectory(filepath.Dir(name))
}

// firstLine names a file by its first line; io.EOF if that is not whole.
func firstLine(file *os.File) (string, error) {
	line, err := bufio.NewReader(io.NewSectionReader(file, 0, maxLine)).ReadBytes('\n')
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:]), nil
}

// reader reads whole lines of the spool, through rotations.
type reader struct {
	path   string
	file   *os.File // nil: there is none yet
	buf    *bufio.Reader
	offset int64 // behind the last line
	line   []byte
	missed int // how often files were removed before they were read
}

// begin goes on with a file.
func (r *reader) begin(file *os.File, offset int64) error {
	r.Close()
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		file.Close()
		return fmt.Errorf("read events: %w", err)
	}
	r.file, r.offset, r.buf = file, offset, bufio.NewReaderSize(file, bufferSize)
	return nil
}

// oldest begins with the oldest file. That there is none is no error yet.
func (r *reader) oldest() error {
	for range attempts {
		i := 0
		for ; ; i++ {
			if _, err := os.Stat(rotatedName(r.path, i+1)); err != nil {
				break
			}
		}
		file, err := os.Open(rotatedName(r.path, i))
		if err == nil {
			return r.begin(file, 0)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read events: %w", err)
		}
	}
	return nil
}

// attempts is as often as a rotation may come between two looks at the names of files.
const attempts = 10

// Next returns a line, without its newline, that is good until the next call, or io.EOF
// when there is none yet. What is not finished is not read: it may be taken away.
func (r *reader) Next() ([]byte, error) {
	var next *os.File // once ours is finished
	gone := false     // what was between them
	for {
		if r.file == nil {
			if err := r.oldest(); err != nil {
				return nil, err
			}
			if r.file == nil {
				return nil, io.EOF
			}
		}
		line, err := r.whole()
		switch {
		case err != io.EOF:
			if next != nil {
				next.Close() // and found again
			}
			return line, err
		case next != nil:
			if err := r.begin(next, 0); err != nil {
				return nil, err
			}
			if next = nil; gone {
				r.missed++
			}
			continue
		}
		if next, gone, err = rotated(r.file, r.path); err != nil {
			return nil, fmt.Errorf("read events: %w", err)
		}
		if _, err := r.file.Seek(r.offset, io.SeekStart); err != nil {
			return nil, fmt.Errorf("read events: %w", err)
		}
		r.buf.Reset(r.file)
		if next == nil {
			return nil, io.EOF
		}
		// Until it has a line, it has no name by which a Cursor finds it.
		if _, err := firstLine(next); err == io.EOF {
			next.Close()
			return nil, io.EOF
		}
		// Something may have been written between our end and the rotation.
	}
}

// whole reads a line to its end, or returns io.EOF.
func (r *reader) whole() ([]byte, error) {
	r.line = r.line[:0]
	for {
		part, err := r.buf.ReadSlice('\n')
		r.line = append(r.line, part...)
		switch {
		case err == nil:
			r.offset += int64(len(r.line))
			return r.line[:len(r.line)-1], nil
		case err == io.EOF:
			return nil, io.EOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("read events: %w", err)
		case len(r.line) > maxLine:
			return nil, fmt.Errorf("read events: a line of %s is longer than %d bytes", r.file.Name(), maxLine)
		}
	}
}

// Close ends the reading.
func (r *reader) Close() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}
