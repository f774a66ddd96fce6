package policy

import (
	"bytes"
	"io"
	"os"
)

// Bounds of a file in YAML, whoever wrote it: the library goes down into what is nested
// by calling itself, and takes gigabytes for some ten thousand brackets.
const (
	// MaxYAML is of its bytes. A thousand grants take a fifth of it.
	MaxYAML = 1 << 20
	// MaxDepth is of the levels that are in each other. No file has ten.
	MaxDepth = 64
)

// ReadYAML reads a file, and not much more than one may have.
func ReadYAML(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxYAML+1))
}

// TooDeep is where a text may be nested too deeply, from 1: by brackets, whatever they
// are in, or by what a line begins with.
func TooDeep(text []byte) (line, column int, ok bool) {
	open := 0
	for row := range bytes.Lines(text) {
		line++
		begin := row[:len(row)-len(bytes.TrimLeft(row, " -?"))]
		if len(begin) > 4*MaxDepth || bytes.Count(begin, []byte("-"))+bytes.Count(begin, []byte("?")) > MaxDepth {
			return line, len(begin), true
		}
		for i, c := range row {
			switch c {
			case '[', '{':
				if open++; open > MaxDepth {
					return line, i + 1, true
				}
			case ']', '}':
				open = max(open-1, 0)
			}
		}
	}
	return 0, 0, false
}
