package main

import (
	"bytes"
	"context"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy/tune"
)

// lookUpPackages adds to proposals whose evidence is of this host which packages own the
// executables. Of other hosts nobody here can know.
func lookUpPackages(ctx context.Context, t *tune.Tuner, r *tune.Report) {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || !t.Seen(strings.TrimSpace(string(id))) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	files := map[string]string{}
	for _, p := range r.Proposals {
		for _, file := range p.Grant.Executable {
			files[file] = ""
		}
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		owner, ok := packageOf(ctx, file)
		if !ok {
			delete(files, file)
			continue
		}
		files[file] = owner
	}
	for _, p := range r.Proposals {
		if p.Grant.Container+p.Grant.Pod != "" {
			continue // whose files are others
		}
		for _, file := range p.Grant.Executable {
			if owner, ok := files[file]; ok {
				if p.Packages == nil {
					p.Packages = map[string]string{}
				}
				p.Packages[file] = owner
			}
		}
	}
}

// packageOf asks the package manager of the host, if there is one. The name is "" if no
// package owns the file.
func packageOf(ctx context.Context, file string) (name string, ok bool) {
	if strings.ContainsAny(file, "*?[\\") || !strings.HasPrefix(file, "/") {
		return "", false // a pattern, to dpkg
	}
	paths := []string{file}
	if short, ok := strings.CutPrefix(file, "/usr"); ok { // as packages had it before /usr was merged
		paths = append(paths, short)
	}
	for _, tool := range []struct {
		name string
		args []string
		cut  string
	}{
		{"dpkg-query", []string{"--search"}, ":"},
		{"rpm", []string{"--query", "--queryformat", "%{NAME}\n", "--file"}, "\n"},
	} {
		program, err := exec.LookPath(tool.name)
		if err != nil {
			continue
		}
		ok = true
		for _, path := range paths {
			cmd := exec.CommandContext(ctx, program, append(tool.args, path)...)
			cmd.Env = []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}
			out, err := cmd.Output()
			if err != nil {
				continue
			}
			if first, _, found := bytes.Cut(out, []byte(tool.cut)); found && !bytes.HasPrefix(first, []byte("diversion ")) {
				return string(first), true
			}
		}
	}
	return "", ok
}
