package ndjson

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
)

const (
	// blockSize is how much is read, and decoded by one goroutine, at a time.
	blockSize = 512 << 10
	// maxLine is the longest line that is taken. Less would lose events of programs that
	// are started with long arguments; each block that waits may be as long.
	maxLine = 16 << 20
)

// An Input is one place from which lines come.
type Input struct {
	Name string // for errors
	// Open begins at the first line. It is called several times for an input with
	// a size.
	Open func() (io.ReadCloser, error)
	// Size is how many bytes there are, or -1 if that is not known: then what is
	// there can be read only once, and may never end.
	Size int64
}

// File is an input by its path. What is no regular file can be read only once.
func File(path string) (Input, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Input{}, err
	}
	in := Input{Name: path, Size: -1, Open: func() (io.ReadCloser, error) { return os.Open(path) }}
	switch {
	case info.IsDir():
		return Input{}, errors.New("is a directory")
	case info.Mode().IsRegular():
		in.Size = info.Size()
	}
	return in, nil
}

// Stream is an input that is open already. A regular file is read from where it is;
// what is none can be read only once. It is not closed.
func Stream(name string, r io.Reader) Input {
	in := Input{Name: name, Size: -1, Open: func() (io.ReadCloser, error) { return io.NopCloser(r), nil }}
	file, ok := r.(*os.File)
	if !ok {
		return in
	}
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return in
	}
	if at, err := file.Seek(0, io.SeekCurrent); err == nil && at <= info.Size() {
		in.Size = info.Size() - at
		in.Open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(file, at, in.Size)), nil }
	}
	return in
}

// block is whole lines.
type block struct {
	input *Input
	data  []byte
	line  int   // number of the first
	read  int64 // bytes of the input until the end of it, compressed as they are
	long  int   // this line is longer than may be, and not in data
	err   error // the input ends here, because of it
}

// each calls f for each line with its number. Blanks around lines are not lines'.
func (b *block) each(f func(number int, line []byte)) {
	number := b.line
	for rest := b.data; len(rest) > 0; number++ {
		line := rest
		if i := bytes.IndexByte(rest, '\n'); i >= 0 {
			line, rest = rest[:i], rest[i+1:]
		} else {
			rest = nil
		}
		if line = bytes.Trim(line, " \t\r"); len(line) > 0 {
			f(number, line)
		}
	}
}

// read reads an input in blocks, until yield returns false. What ends an input before
// its time is in its last block.
func read(in *Input, buffer func() []byte, yield func(*block) bool) {
	r, err := in.Open()
	if err != nil {
		yield(&block{input: in, err: err})
		return
	}
	defer r.Close()
	counted := &counter{r: r}
	text, err := plain(counted)
	if err != nil {
		yield(&block{input: in, read: counted.n, err: err})
		return
	}
	next := &block{input: in, line: 1, data: buffer()}
	for {
		b := next
		if len(b.data) == cap(b.data) { // a long line
			if len(b.data) >= maxLine {
				if !skipLine(text, b, yield, &next) {
					return
				}
				continue
			}
			b.data = append(make([]byte, 0, min(2*len(b.data), maxLine)), b.data...)
		}
		n, err := text.Read(b.data[len(b.data):cap(b.data)])
		from := len(b.data)
		b.data = b.data[:from+n]
		b.read = counted.n
		if err != nil {
			if !errors.Is(err, io.EOF) {
				b.err = err
				b.data = b.data[:bytes.LastIndexByte(b.data, '\n')+1] // the rest is cut off
			}
			yield(b)
			return
		}
		end := from + bytes.LastIndexByte(b.data[from:], '\n') + 1
		if end == from {
			continue // no line ends here
		}
		next = &block{input: in, line: b.line + bytes.Count(b.data[:end], []byte{'\n'}), data: append(buffer(), b.data[end:]...)}
		b.data = b.data[:end]
		if !yield(b) {
			return
		}
	}
}

// skipLine passes over a line that is too long, of which b has the beginning.
func skipLine(text *bufio.Reader, b *block, yield func(*block) bool, next **block) bool {
	for {
		_, err := text.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		b.data, b.long = b.data[:0], b.line
		if err != nil && !errors.Is(err, io.EOF) {
			b.err = err
		}
		if !yield(b) || err != nil {
			return false
		}
		*next = &block{input: b.input, line: b.line + 1, data: make([]byte, 0, blockSize)}
		return true
	}
}

// compressions are told by how they begin.
var compressions = []struct{ magic, name, tool string }{
	{"\x28\xb5\x2f\xfd", "zstd", "zstdcat"},
	{"\xfd7zXZ\x00", "xz", "xzcat"},
	{"BZh", "bzip2", "bzcat"},
	{"\x04\x22\x4d\x18", "lz4", "lz4cat"},
}

// plain is the text of an input: unpacked, if it is of gzip, and without a byte order
// mark.
func plain(r io.Reader) (*bufio.Reader, error) {
	text := bufio.NewReaderSize(r, 64<<10)
	magic, _ := text.Peek(2) // an error comes again
	if string(magic) == "\x1f\x8b" {
		unpacked, err := gzip.NewReader(text)
		if err != nil {
			return nil, err
		}
		text = bufio.NewReaderSize(unpacked, 64<<10)
	}
	if string(magic) == "\xff\xfe" || string(magic) == "\xfe\xff" {
		return nil, errors.New("this is UTF-16; save it as UTF-8, or go through iconv -f UTF-16 -t UTF-8")
	}
	for _, c := range compressions {
		if len(magic) < 2 || c.magic[:2] != string(magic) {
			continue
		}
		if start, _ := text.Peek(len(c.magic)); string(start) == c.magic {
			return nil, fmt.Errorf("this is packed by %s; go through %s FILE | imdsgate eql QUERY", c.name, c.tool)
		}
	}
	if string(magic) == "\xef\xbb" {
		if bom, _ := text.Peek(3); string(bom) == "\xef\xbb\xbf" {
			text.Discard(3)
		}
	}
	return text, nil
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
