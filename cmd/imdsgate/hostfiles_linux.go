package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/imdsgate/imdsgate/policy"
)

// hostFiles looks at the files that a grant names, below root. Those of a container are
// not the host's.
func hostFiles(root, key string, g *policy.Grant) (wrong, odd []error) {
	if g.Container != "" || g.Pod != "" {
		return nil, nil
	}
	look := func(key, file string, executable bool) {
		real, err := resolve(root, file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			odd = append(odd, about(key, "%s does not exist on this host", file))
			return
		case err != nil:
			odd = append(odd, about(key, "%s cannot be looked at: %w", file, err))
			return
		case real != file:
			odd = append(odd, about(key, "%s is a link, and the kernel names what it leads to: write %s", file, real))
		}
		if name, ok := policy.Tool(real); ok && executable && g.Unit == "" {
			if _, known := policy.Tool(file); !known {
				wrong = append(wrong, about(key, "%s is %s (%s), which does whatever it is told: name the unit that runs it", file, real, name))
			}
		}
		info, err := os.Lstat(filepath.Join(root, real))
		switch {
		case err != nil:
			return
		case !info.Mode().IsRegular():
			wrong = append(wrong, about(key, "%s is no file that can be executed", real))
		case info.Mode()&0o111 == 0:
			odd = append(odd, about(key, "%s is not executable", real))
		}
		for _, err := range ownedByRoot(root, real, "so that the grant never holds") {
			wrong = append(wrong, about(key, "%w", err))
		}
	}
	lookAt := func(key, named string, executable bool) {
		if !strings.Contains(named, "*") {
			look(key, named, executable)
			return
		}
		found, err := fs.Glob(os.DirFS(root), strings.TrimPrefix(named, "/"))
		if err != nil || len(found) == 0 {
			odd = append(odd, about(key, "nothing on this host is at %s", named))
		}
		for _, file := range found {
			// A link to one of them, as /snap/NAME/current is, is none.
			if real, err := resolve(root, "/"+file); err != nil || real == "/"+file {
				look(key, "/"+file, executable)
			}
		}
	}
	for i, named := range g.Executable {
		lookAt(fmt.Sprintf("%s.executable[%d]", key, i), named, true)
	}
	if g.Parent != "" {
		lookAt(key+".parent", g.Parent, false)
	}
	return wrong, odd
}

// ownedByRoot complains about a file or a directory above it that others than root can
// change, as attribution does at each request. so says what follows.
func ownedByRoot(root, file, so string) []error {
	for at := file; ; at = filepath.Dir(at) {
		info, err := os.Lstat(filepath.Join(root, at))
		if err != nil {
			return nil
		}
		uid := info.Sys().(*syscall.Stat_t).Uid
		switch {
		case uid != 0:
			return []error{fmt.Errorf("%s belongs to uid %d, who can change %s, %s: chown root %s", at, uid, file, so, at)}
		case info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSymlink == 0:
			return []error{fmt.Errorf("%s is writable by others than root (%v), who can change %s, %s: chmod go-w %s", at, info.Mode(), file, so, at)}
		}
		if at == "/" || at == "." {
			return nil
		}
	}
}

// resolve follows the links in a path, each of them below root.
func resolve(root, file string) (string, error) {
	const most = 40 // as the kernel has it (path_resolution(7))
	real, rest, links := "/", strings.TrimPrefix(file, "/"), 0
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		next := filepath.Join(real, name) // "..", of which there is none above "/"
		info, err := os.Lstat(filepath.Join(root, next))
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			real = next
			continue
		}
		if links++; links > most {
			return "", syscall.ELOOP
		}
		to, err := os.Readlink(filepath.Join(root, next))
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(to) {
			real = "/"
		}
		rest = strings.TrimPrefix(to+"/"+rest, "/")
		rest = strings.TrimSuffix(rest, "/")
	}
	return real, nil
}

// keepOwner gives a file the owner of the one that it takes the place of.
func keepOwner(f *os.File, of fs.FileInfo) error {
	st := of.Sys().(*syscall.Stat_t)
	return f.Chown(int(st.Uid), int(st.Gid))
}
