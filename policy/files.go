package policy

import (
	"crypto/sha256"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// A File is one that a policy was read from, as it was then.
type File struct {
	Path   string
	SHA256 [sha256.Size]byte
}

// InputFiles lists the files that Compile would read now: rules and profiles, in the directories that the configuration
// names. What cannot be listed is left out; Compile says why.
func (c *Config) InputFiles() (names []string) {
	for _, path := range c.Rules.Paths {
		fs.WalkDir(Host{}, path, func(name string, d fs.DirEntry, err error) error {
			if err == nil && isRuleFile(path, name, d) {
				names = append(names, name)
			}
			return nil
		})
	}
	for _, name := range c.Profiles {
		for _, dir := range c.profileDirs() {
			file := filepath.Join(dir, name+".yaml")
			if _, err := os.Stat(file); err == nil {
				names = append(names, file)
				break
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
