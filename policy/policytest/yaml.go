package policytest

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// Read reads a file of cases from the disk.
func Read(name string) (*File, error) {
	src, err := yamlfile.Read(name)
	if err != nil {
		return nil, fmt.Errorf("read cases: %w", err)
	}
	return Parse(name, src)
}

// Parse reads a file of cases; name is for errors, which have line and caret. Keys that
// there are not are errors, and so is a case that expects nothing.
func Parse(name string, src []byte) (*File, error) {
	source, err := yamlfile.Parse(name, src)
	if err != nil {
		return nil, err
	}
	f := &File{Name: name, source: source}
	if err := source.Decode(f); err != nil {
		return nil, err
	}
	if f.Policy != nil { // whose paths are from where it is written
		for _, paths := range [][]string{f.Policy.Rules.Paths, f.Policy.ProfilePaths} {
			for i, p := range paths {
				if !filepath.IsAbs(p) {
					paths[i] = filepath.Join(filepath.Dir(name), p)
				}
			}
		}
	}
	return f, f.check()
}

// wrong is an error about the value of a key.
func (f *File) wrong(key, format string, args ...any) error {
	return f.source.Locate(yamlfile.Path(key), fmt.Errorf(format, args...))
}

// named reads one of an enumeration's names.
func named[T ~uint8](to *T, what string, names []string, text []byte) error {
	i := slices.Index(names, string(text))
	if i < 0 {
		return fmt.Errorf("unknown %s %q; there are %s", what, text, strings.Join(names, ", "))
	}
	*to = T(i)
	return nil
}

// UnmarshalYAML reads a verdict alone, or a mapping.
func (e *Expect) UnmarshalYAML(decode func(any) error) error {
	if decode(new(string)) == nil {
		return decode(&e.Verdict)
	}
	type plain Expect
	return decode((*plain)(e))
}

// OrOne lets one name stand for a list.
func (*Names) OrOne() {}

// UnmarshalYAML reads true, false, or the names of rules.
func (a *Alert) UnmarshalYAML(decode func(any) error) error {
	if decode(&a.Any) == nil {
		return nil
	}
	return decode(&a.Rules)
}
