package config

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// How several files make one configuration
//
// The vendor's come first, then the operator's, and each goes over what was before it:
//
//	/usr/lib/imdsgate/config.yaml
//	/usr/lib/imdsgate/config.d/*.yaml
//	/etc/imdsgate/config.yaml
//	/etc/imdsgate/config.d/*.yaml
//
// Within a config.d the names decide. As systemd has it for drop-ins (systemd.unit(5)),
// a file in /etc/imdsgate/config.d takes the place of one of the same name in
// /usr/lib/imdsgate/config.d; empty, or a link to /dev/null, it masks it.
//
// Values and lists go over each other, the last one wins. Grants, denies, profiles and
// paths of rules are added, and actions of rules, postures of classes go over each other one by
// one.

const (
	vendorDir   = "/usr/lib/imdsgate"
	operatorDir = "/etc/imdsgate"
	mainFile    = "config.yaml"
	dropIns     = "config.d"
)

// DefaultPath is the operator's file. It need not exist.
const DefaultPath = operatorDir + "/" + mainFile

// Load reads the configuration: of the file at path alone, or of all that there are if
// that is "". What is wrong in any of them is said at once. After an error there is what
// is right, and of a file that is wrong mode, redirect, state and control alone: for who
// cleans up after a daemon.
func Load(path string) (Config, error) {
	if path != "" {
		return LoadFiles(path)
	}
	return LoadFrom("/")
}

// LoadFrom is Load of all files below another root.
func LoadFrom(root string) (Config, error) {
	files, err := filesBelow(root)
	c, loadErr := load(files, true)
	return c, errors.Join(err, loadErr)
}

// LoadFiles is Load of files that are named, each over those before it.
func LoadFiles(paths ...string) (Config, error) { return load(paths, false) }

func filesBelow(root string) (files []string, err error) {
	vendor, operator := filepath.Join(root, vendorDir), filepath.Join(root, operatorDir)
	own, err := dropInsOf(operator)
	theirs, vendorErr := dropInsOf(vendor)
	theirs = slices.DeleteFunc(theirs, func(path string) bool {
		return slices.ContainsFunc(own, func(mine string) bool { return filepath.Base(mine) == filepath.Base(path) })
	})
	files = slices.Concat([]string{filepath.Join(vendor, mainFile)}, theirs, []string{filepath.Join(operator, mainFile)}, own)
	return files, errors.Join(err, vendorErr)
}

// dropInsOf lists the drop-ins of a directory by name. Other files than *.yaml and
// hidden ones, as editors leave them, are none, nor are cases for imdsgate test.
func dropInsOf(dir string) (files []string, err error) {
	entries, err := os.ReadDir(filepath.Join(dir, dropIns))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the drop-ins of the configuration: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".yaml") && !strings.HasSuffix(e.Name(), "_test.yaml") && !strings.HasPrefix(e.Name(), ".") && !e.IsDir() {
			files = append(files, filepath.Join(dir, dropIns, e.Name()))
		}
	}
	return files, nil
}

// load reads files, each over what was before it.
func load(files []string, optional bool) (Config, error) {
	var c Config
	var errs []error
	for _, path := range files {
		text, err := yamlfile.Read(path)
		if optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read the configuration: %w", err))
			continue
		}
		if err := c.add(path, text); err != nil {
			errs = append(errs, err)
			c.salvage(path, text)
		}
	}
	c.complete()
	return c, errors.Join(errs...)
}

// Parse reads a configuration from bytes; name is for errors.
func Parse(name string, text []byte) (Config, error) {
	var c Config
	err := c.add(name, text)
	c.complete()
	return c, err
}

// With is the configuration with one more file over it.
func (c Config) With(name string, text []byte) (Config, error) {
	err := c.add(name, text)
	return c, err
}

// add puts a file over what there is. It leaves c as it is if the file is wrong.
func (c *Config) add(name string, text []byte) error {
	s, err := yamlfile.Parse(name, text)
	if err != nil {
		return err
	}
	var own Config
	if err := s.Decode(&own); err != nil {
		return err
	}
	all := *c
	put(reflect.ValueOf(&all).Elem(), reflect.ValueOf(own), s.Root)
	all.Grants = slices.Concat(c.Grants, own.Grants)
	all.Denies = slices.Concat(c.Denies, own.Denies)
	all.Profiles = slices.Concat(c.Profiles, own.Profiles)
	all.Rules.Paths = slices.Concat(c.Rules.Paths, own.Rules.Paths)
	all.Rules.Actions = over(c.Rules.Actions, own.Rules.Actions)
	all.Classes = over(c.Classes, own.Classes)
	all.layers = append(slices.Clip(c.layers), s)
	*c = all
	return nil
}

// salvage puts what is right of a file that is wrong over what there is: see Load.
func (c *Config) salvage(name string, text []byte) {
	s, err := yamlfile.Parse(name, text)
	if err != nil {
		return
	}
	type saved struct {
		Mode     policy.Mode     `yaml:"mode"`
		Redirect iptables.Config `yaml:"redirect"`
		State    State           `yaml:"state"`
		Control  Control         `yaml:"control"`
	}
	var own saved
	s.Decode(&own) // which refuses all other keys, and leaves out what is wrong
	all := saved{c.Mode, c.Redirect, c.State, c.Control}
	put(reflect.ValueOf(&all).Elem(), reflect.ValueOf(own), s.Root)
	c.Mode, c.Redirect, c.State, c.Control = all.Mode, all.Redirect, all.State, all.Control
}

// put sets what a mapping says, below keys of mappings one by one. One that takes in
// another (<<, or an alias) is set as a whole.
func put(all, own reflect.Value, node ast.Node) {
	_, whole := yamlfile.Child(node, "<<")
	for _, k := range yamlfile.KeysOf(own.Type()) {
		value, _ := yamlfile.Child(node, k.Name)
		if value == nil && whole == nil {
			continue
		}
		to, from := all.FieldByIndex(k.Index), own.FieldByIndex(k.Index)
		if to.Kind() == reflect.Struct && !yamlfile.IsText(to.Type()) && whole == nil && value.Type() != ast.AliasType {
			put(to, from, value)
		} else {
			to.Set(from)
		}
	}
}

// over is a map with what another has in it.
func over[V any](below, above map[string]V) map[string]V {
	if len(below)+len(above) == 0 {
		return nil
	}
	all := make(map[string]V, len(below)+len(above))
	for _, m := range []map[string]V{below, above} {
		for k, v := range m {
			all[k] = v
		}
	}
	return all
}

// layers are files, the last of which goes over the others.
type layers []*yamlfile.File

// added are the lists to which each file adds.
var added = [][]string{{"grants"}, {"denies"}, {"profiles"}, {"rules", "paths"}}

// find is the file that has set a key, and where; nil if none has set any part of it.
func (l layers) find(key string) (s *yamlfile.File, path []string, depth int) {
	path = yamlfile.Path(key)
	for _, list := range added {
		n := len(list)
		if len(path) <= n || !slices.Equal(path[:n], list) {
			continue
		}
		i, err := strconv.Atoi(path[n])
		if err != nil {
			break
		}
		for _, s := range l {
			if has := s.Length(list...); i >= has {
				i -= has
				continue
			}
			path = slices.Clone(path)
			path[n] = strconv.Itoa(i)
			_, depth = s.Find(path)
			return s, path, depth
		}
	}
	for _, of := range l {
		if _, d := of.Find(path); d > 0 && d >= depth {
			s, depth = of, d
		}
	}
	return s, path, depth
}

// Origin is where a key is set: "file:line"; "" if nobody has set it.
func (c Config) Origin(key string) string {
	s, path, depth := c.layers.find(key)
	if s == nil || depth < len(path) {
		return ""
	}
	return fmt.Sprintf("%s:%d", s.Name, s.Line(path))
}

// Files are those that the configuration was read from, in order.
func (c Config) Files() (names []string) {
	for _, s := range c.layers {
		names = append(names, s.Name)
	}
	return names
}

// Loaded are the files of the configuration as they were read, without those of rules
// and profiles.
func (c Config) Loaded() (all []policy.File) {
	for _, s := range c.layers {
		all = append(all, policy.File{Path: s.Name, SHA256: sha256.Sum256(s.Text)})
	}
	return all
}

// Inputs lists the files that there are now and that Load and Config.Policy would read.
// path is what Load was given.
func (c Config) Inputs(path string) (names []string) {
	files := []string{path}
	if path == "" {
		files, _ = filesBelow("/")
	}
	for _, name := range files {
		if _, err := os.Stat(name); err == nil {
			names = append(names, name)
		}
	}
	return append(names, c.InputFiles()...)
}

// Locate gives complaints about keys the places where they are set, in the order of
// files and lines.
func (c Config) Locate(errs ...error) []error { return Errors(c.layers.locate(errors.Join(errs...))) }

// locate gives the complaints of a policy the places where they are about something
// that a file says, in the order of files and lines.
func (l layers) locate(err error) error {
	var errs []error
	for _, err := range Errors(err) {
		complaint := (*policy.KeyError)(nil)
		if !errors.As(err, &complaint) {
			errs = append(errs, err)
			continue
		}
		s, path, _ := l.find(complaint.Key)
		if s == nil {
			errs = append(errs, err)
			continue
		}
		about := complaint.Err
		if complaint.Other != "" {
			if other, path, _ := l.find(complaint.Other); other != nil {
				about = fmt.Errorf("%w; see %s:%d", about, other.Name, other.Line(path))
			}
		}
		fault := s.Locate(path, about)
		fault.Err = err
		errs = append(errs, fault)
	}
	slices.SortStableFunc(errs, func(a, b error) int {
		x, y := (*yamlfile.Fault)(nil), (*yamlfile.Fault)(nil)
		if !errors.As(a, &x) || !errors.As(b, &y) || x.File != y.File {
			return 0
		}
		return cmp.Compare(x.Line, y.Line)
	})
	return errors.Join(errs...)
}

// Errors takes apart what errors.Join has put together, as it is in what Load and
// Config.Policy return.
func Errors(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, err := range joined.Unwrap() {
		all = append(all, Errors(err)...)
	}
	return all
}
