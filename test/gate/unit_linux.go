package gate

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// UnitSyscalls are the system calls that a unit allows by SystemCallFilter=
// (systemd.exec(5)), of which the first must be a list of what is allowed. The groups are
// those of this host's systemd-analyze.
func UnitSyscalls(unit string) ([]string, error) {
	text, err := os.ReadFile(unit)
	if err != nil {
		return nil, err
	}
	listed, err := exec.Command("systemd-analyze", "--no-pager", "syscall-filter").Output()
	if err != nil {
		return nil, fmt.Errorf("list the groups of system calls: systemd-analyze: %w", err)
	}
	groups, group := map[string][]string{}, ""
	for line := range strings.Lines(string(listed)) {
		switch name := strings.TrimSpace(line); {
		case line == name+"\n" && name != "":
			group = name
		case name != "" && name[0] != '#':
			groups[group] = append(groups[group], name)
		}
	}
	allowed := map[string]bool{}
	var set func(name string, to bool) error
	set = func(name string, to bool) error {
		if name[0] != '@' {
			allowed[name] = to
			return nil
		}
		if groups[name] == nil {
			return fmt.Errorf("%s: systemd-analyze has no group %s", unit, name)
		}
		for _, member := range groups[name] {
			if err := set(member, to); err != nil {
				return err
			}
		}
		return nil
	}
	for line := range strings.Lines(string(text)) {
		value, ok := strings.CutPrefix(line, "SystemCallFilter=")
		if !ok {
			continue
		}
		value, denied := strings.CutPrefix(value, "~")
		for _, name := range strings.Fields(value) {
			if err := set(name, !denied); err != nil {
				return nil, err
			}
		}
	}
	maps.DeleteFunc(allowed, func(_ string, is bool) bool { return !is })
	if len(allowed) == 0 {
		return nil, fmt.Errorf("%s allows no system call", unit)
	}
	return slices.Sorted(maps.Keys(allowed)), nil
}
