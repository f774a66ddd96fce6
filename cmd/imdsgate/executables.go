package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy/tune"
)

// lookUpExecutables adds to proposals whose evidence is of this host which packages own the
// executables, and what the files are now. Of other hosts nobody here can know. The daemon
// has no part in it: it would hash on the processor on which requests are served.
func lookUpExecutables(ctx context.Context, t *tune.Tuner, r *tune.Report) {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || !t.Seen(strings.TrimSpace(string(id))) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	known := map[string]executable{}
	for _, p := range r.Proposals {
		if p.Grant.Container+p.Grant.Pod != "" {
			continue // whose files are others
		}
		for _, file := range p.Grant.Executable {
			e, ok := known[file]
			if !ok {
				e = executableOf(ctx, file)
				known[file] = e
			}
			if e.asked {
				if p.Packages == nil {
					p.Packages = map[string]string{}
				}
				p.Packages[file] = e.owner
			}
			if e.hash != "" {
				if p.Hashes == nil {
					p.Hashes = map[string]string{}
				}
				p.Hashes[file] = e.hash
			}
		}
	}
}

// executable is what this host says of a file.
type executable struct {
	owner string // the package
	asked bool   // there was somebody to ask for it
	hash  string // SHA-256; "" if the file cannot be read
}

func executableOf(ctx context.Context, file string) (e executable) {
	if strings.ContainsAny(file, "*?[\\") || !strings.HasPrefix(file, "/") {
		return e // a pattern, also to dpkg
	}
	e.owner, e.asked = packageOf(ctx, file)
	e.hash, _ = hashOf(ctx, file)
	return e
}

// maxHashed is the largest file that is hashed, in a second or two.
const maxHashed = 1 << 30

func hashOf(ctx context.Context, file string) (string, error) {
	info, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || info.Size() > maxHashed {
		return "", fmt.Errorf("%s is no file of at most %d bytes", file, maxHashed)
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	for ctx.Err() == nil {
		if _, err := io.CopyN(sum, f, 16<<20); err == io.EOF {
			return hex.EncodeToString(sum.Sum(nil)), nil
		} else if err != nil {
			return "", err
		}
	}
	return "", ctx.Err()
}

// packageOf asks the package manager of the host, if there is one. The name is "" if no
// package owns the file.
func packageOf(ctx context.Context, file string) (name string, ok bool) {
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
