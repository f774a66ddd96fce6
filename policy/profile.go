package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// ProfilePaths are where profiles are looked for unless Config.ProfilePaths names others:
// those of the site, those of an installation below /usr/local, and those of the package.
var ProfilePaths = []string{"/etc/imdsgate/profiles", "/usr/local/lib/imdsgate/profiles", "/usr/lib/imdsgate/profiles"}

// Profile is what a program that comes with a platform needs of the metadata service:
// a file that is named after it, with grants.
type Profile struct {
	Name string `yaml:"-"` // of the file, without ".yaml"
	File string `yaml:"-"`

	Program string `yaml:"program"` // what it is for, in a few words
	// Without is what does not work where the program gets nothing that is guarded.
	Without string `yaml:"without"`
	// Checked is the day on which the grants were last compared with the sources.
	Checked Date     `yaml:"checked"`
	Sources []string `yaml:"sources"`
	Grants  []Grant  `yaml:"grants"`

	source *yamlfile.File
}

// LoadProfile reads the profile of a name from the first of the directories that has it.
// An error about what is in a file has line and caret; without such a profile it is
// fs.ErrNotExist, with the names of those that there are.
func LoadProfile(name string, dirs []string) (*Profile, error) {
	if name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return nil, fmt.Errorf("%q is not the name of a profile, as in amazon-ssm-agent", name)
	}
	for _, dir := range dirs {
		file := filepath.Join(dir, name+".yaml")
		src, err := yamlfile.Read(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, fmt.Errorf("read a profile: %w", err)
		}
		return ParseProfile(file, src)
	}
	names, err := ProfileNames(dirs)
	if err != nil {
		return nil, err
	}
	there := "there are " + strings.Join(names, ", ")
	if len(names) == 0 {
		there = "there are none"
	}
	return nil, fmt.Errorf("no profile %q: %s, in %s (%w)", name, there, strings.Join(dirs, ", "), fs.ErrNotExist)
}

// ParseProfile reads a profile from bytes; file is its name.
func ParseProfile(file string, src []byte) (*Profile, error) {
	source, err := yamlfile.Parse(file, src)
	if err != nil {
		return nil, err
	}
	p := &Profile{Name: strings.TrimSuffix(filepath.Base(file), ".yaml"), File: file, source: source}
	return p, source.Decode(p)
}

// ProfileNames lists the profiles of directories, of which some may not exist.
func ProfileNames(dirs []string) ([]string, error) {
	var names []string
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("look for profiles: %w", err)
		}
		for _, e := range entries {
			if name, ok := strings.CutSuffix(e.Name(), ".yaml"); ok && !strings.HasSuffix(name, "_test") {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// profileDirs are where profiles are looked for.
func (c *Config) profileDirs() []string {
	if len(c.ProfilePaths) > 0 {
		return c.ProfilePaths
	}
	return ProfilePaths
}

// profiles reads those that a configuration names, one for each name: empty where the
// name is there before, or has no profile.
func (c *Config) profiles() (all []*Profile, errs []error) {
	dirs := c.profileDirs()
	for i, name := range c.Profiles {
		p := &Profile{}
		if !slices.Contains(c.Profiles[:i], name) {
			var err error
			if p, err = LoadProfile(name, dirs); err != nil {
				if !errors.As(err, new(*yamlfile.Fault)) { // which has a place of its own
					err = &KeyError{Key: fmt.Sprintf("profiles[%d]", i), Err: err}
				}
				errs, p = append(errs, err), &Profile{}
			}
		}
		all = append(all, p)
	}
	return all, errs
}
