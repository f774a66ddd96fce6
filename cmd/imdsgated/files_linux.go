package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"golang.org/x/sys/unix"
)

// What is on the disk is not what is in force: files count from the next reload on, and
// the program from the next start. Whoever waits for that is seen before it, by looking
// at the files every few seconds: inotify would tell sooner, and would have to follow
// links, and directories that come and go.

const (
	filesEvery = 5 * time.Second
	// maxFile bounds what a file may make us read: more than a configuration, a rule or
	// this program has.
	maxFile = 256 << 20
	// maxFound bounds the files that are told in one look, and that are listed.
	maxFound = 32
)

// A stamp is by what a file is known not to have changed. The time of its last change
// (st_ctime) is nobody's to set.
type stamp struct {
	device, inode uint64
	size          int64
	changed       unix.Timespec
}

// files compares what was loaded with what is on the disk.
type files struct {
	mu      sync.Mutex // guards the following
	program string     // where this one was started from
	inputs  func() []string
	loaded  map[string]string // SHA-256 of what was read, by path
	seen    map[string]stamp  // at the last look
	differs map[string]event.File
	exposed []string // paths that others than root can change, and how
}

// tookUp says that a configuration is in force, so that its files are those to be
// compared with.
func (d *daemon) tookUp(c config.Config, p *policy.Policy) {
	f := &d.files
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.program == "" {
		f.program, _ = os.Readlink("/proc/self/exe")
	}
	loaded := make(map[string]string)
	for _, file := range slices.Concat(c.Loaded(), p.Files) {
		loaded[file.Path] = hex.EncodeToString(file.SHA256[:])
	}
	exposed := exposures(append(slices.Sorted(maps.Keys(loaded)), f.program))
	for _, e := range exposed {
		d.log.Warn().Msg(e)
	}
	if was, known := f.loaded[f.program]; known {
		loaded[f.program] = was
	}
	f.inputs = func() []string { return c.Inputs(d.path) }
	f.loaded, f.seen, f.differs, f.exposed = loaded, make(map[string]stamp), make(map[string]event.File), exposed
}

// watchFiles tells of files that are not what was loaded, until ctx ends.
func (d *daemon) watchFiles(ctx context.Context) {
	program, err := digestOf("/proc/self/exe")
	if err != nil {
		d.log.Error().Err(err).Msg("it is not known what this program is, and a change of it is not seen")
	} else {
		d.files.mu.Lock()
		d.files.loaded[d.files.program] = program.SHA256
		d.files.mu.Unlock()
	}
	every := time.NewTicker(filesEvery)
	defer every.Stop()
	for {
		for _, now := range d.files.look() {
			d.fileChanged(now)
		}
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
	}
}

// fileChanged records that a file is another than before.
func (d *daemon) fileChanged(now event.File) {
	d.files.mu.Lock()
	isProgram := now.Path == d.files.program
	d.files.mu.Unlock()
	message := now.Path + " has changed on the disk; " + inForce(isProgram)
	switch {
	case now.SHA256 == now.Loaded:
		message = now.Path + " is on the disk again what is in force"
	case now.SHA256 == "":
		message = now.Path + " is gone; what it said is in force until the next reload"
		if isProgram {
			message = now.Path + " is gone, and cannot be started again"
		}
	case now.Loaded == "":
		message = now.Path + " is new, and not in force before the next reload"
	}
	if now.SHA256 != "" {
		message += fmt.Sprintf(" (owner %s, mode %s)", owner(now), now.Mode)
	}
	d.log.Warn().Str("file", now.Path).Str("sha256", now.SHA256).Str("loaded", now.Loaded).Msg("a file is not what was loaded, or is again")
	s := event.State{Message: message, File: now}
	if isProgram {
		d.finding("program-changed", s, nil)
	} else {
		d.finding("configuration-changed", s, nil)
	}
}

func inForce(isProgram bool) string {
	if isProgram {
		return "the program that runs is the old one"
	}
	return "what was loaded is in force until the next reload"
}

func owner(f event.File) string {
	if f.Owner != "" {
		return f.Owner
	}
	return "uid " + f.UID
}

// look returns the files that are others than at the last look.
func (f *files) look() (found []event.File) {
	f.mu.Lock()
	defer f.mu.Unlock()
	names := f.inputs()
	for name := range f.loaded {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if len(found) == maxFound {
			break // the rest is found by the next look
		}
		if now, changed := f.compare(name); changed {
			found = append(found, now)
		}
	}
	return found
}

// compare looks at one file, and reads it if it is another than at the last look. It is
// called with mu held.
func (f *files) compare(name string) (now event.File, changed bool) {
	loaded, was := f.loaded[name], f.differs[name]
	_, differed := f.differs[name]
	st, err := stampOf(name)
	if err == nil && st == f.seen[name] {
		return now, false
	}
	if err == nil {
		now, err = digestOf(name)
	}
	now.Path, now.Loaded = name, loaded
	switch {
	case errors.Is(err, fs.ErrNotExist):
		delete(f.seen, name)
	case err != nil:
		return now, false // and it is tried again
	default:
		f.seen[name] = st
	}
	if now.SHA256 == loaded {
		delete(f.differs, name)
		return now, differed
	}
	f.differs[name] = now
	return now, !differed || was.SHA256 != now.SHA256
}

func stampOf(name string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return stamp{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return stamp{st.Dev, st.Ino, st.Size, st.Ctim}, nil
}

// digestOf reads a file.
func digestOf(name string) (now event.File, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // without waiting for the other end of a pipe
	if err != nil {
		return now, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return now, err
	}
	st := info.Sys().(*syscall.Stat_t)
	now = event.File{Path: name, Modified: info.ModTime(), UID: strconv.FormatUint(uint64(st.Uid), 10), Mode: fmt.Sprintf("%04o", st.Mode&0o7777)}
	if u, err := user.LookupId(now.UID); err == nil {
		now.Owner = u.Username
	}
	sum := sha256.New()
	if info.Mode().IsRegular() { // else it is as if it were empty
		if n, err := io.Copy(sum, io.LimitReader(f, maxFile)); err != nil || n == maxFile {
			return now, fmt.Errorf("read %s: %d bytes: %w", name, n, errors.Join(err, errors.ErrUnsupported))
		}
	}
	now.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return now, nil
}

// exposures says which files others than root can change: by writing to them, or to a
// directory on the way to them.
func exposures(names []string) (all []string) {
	looked := make(map[string]bool)
	for _, name := range names {
		path, err := filepath.EvalSymlinks(name)
		if err != nil {
			continue // what is not there is nobody's
		}
		for first := true; !looked[path]; path, first = filepath.Dir(path), false {
			looked[path] = true
			var st unix.Stat_t
			if unix.Stat(path, &st) != nil {
				break
			}
			// In a directory with the sticky bit everybody can change his own files alone.
			writable := st.Mode&0o022 != 0 && (first || st.Mode&unix.S_ISVTX == 0)
			if (st.Uid != 0 || writable) && st.Mode&unix.S_IFMT != unix.S_IFCHR {
				all = append(all, fmt.Sprintf("%s (uid %d, mode %04o) can be changed by others than root, and with it %s", path, st.Uid, st.Mode&0o7777, name))
			}
		}
	}
	return all
}

// status is what `imdsgate status` shows.
func (f *files) status() (r report.Files) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(f.loaded)) {
		r.Loaded = append(r.Loaded, report.File{Path: name, SHA256: f.loaded[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(f.differs)) {
		now := f.differs[name]
		r.Changed = append(r.Changed, report.File{Path: name, SHA256: now.SHA256, Owner: owner(now), Modified: now.Modified})
	}
	r.Exposed = f.exposed
	return r
}
