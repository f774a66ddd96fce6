package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hostVersions are those of the kernel and of the distribution.
func hostVersions() string {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err.Error() + "\n"
	}
	text := "Linux " + unix.ByteSliceToString(uts.Release[:]) + "\n"
	if release, err := os.ReadFile("/etc/os-release"); err == nil {
		text += string(release)
	}
	return text
}

// hooks are the built-in chains in which a rule can come before ours.
var hooks = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

// hostParts are what other programs know of us.
func hostParts(ctx context.Context) (all []part) {
	for _, tool := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		text, err := output(ctx, tool+"-save")
		all = append(all, part{tool + ".txt", "our rules, and those of the hooks they are in", whyNot(ours(text), err)})
	}
	text, err := output(ctx, "nft", "list", "chains")
	all = append(all, part{"nft-chains.txt", "tables and hooks of nft, without rules", whyNot(text, err)})
	text, err = output(ctx, "journalctl", "--unit=imdsgated.service", "--unit=imdsgated.socket", "--lines=500", "--no-pager", "--output=short-iso")
	return append(all, part{"journal.txt", "what the journal has of our units", whyNot(withoutTypedText(text), err)})
}

// ours are the lines of iptables-save that decide about what comes to us.
func ours(save []byte) []byte {
	var b bytes.Buffer
	for line := range bytes.Lines(save) {
		f := strings.Fields(string(line))
		switch {
		case len(f) == 0:
		case bytes.Contains(line, []byte("IMDSGATE")), strings.HasPrefix(f[0], "*"), strings.HasPrefix(f[0], ":") && slices.Contains(hooks, f[0][1:]),
			f[0] == "-A" && len(f) > 1 && slices.Contains(hooks, f[1]):
			b.Write(line)
		}
	}
	return b.Bytes()
}

// typedText is what the daemon's log quotes of people: why they have changed the mode, and lines of
// a configuration that is refused.
var typedText = regexp.MustCompile(`"(reason|error)":"(?:[^"\\]|\\.)*"`)

// withoutTypedText leaves that out of a journal, and what follows when the daemon or imdsgate
// reload says, not in JSON, that a configuration is refused.
func withoutTypedText(journal []byte) []byte {
	var b bytes.Buffer
	var refused []byte // who says so
	for line := range bytes.Lines(journal) {
		head, message, _ := bytes.Cut(line, []byte("]: "))
		_, who, _ := bytes.Cut(head, []byte(" imdsgate"))
		isJSON := bytes.HasPrefix(message, []byte("{"))
		switch {
		case !isJSON && len(who) > 0 && bytes.Equal(who, refused):
			fmt.Fprintf(&b, "%s]: %s\n", head, leftOut)
			continue
		case !isJSON && len(who) > 0 && bytes.Contains(message, []byte("refused")):
			refused = who
		case isJSON && (bytes.Contains(message, []byte(`"reason":`)) || bytes.Contains(message, []byte(" refused"))):
			line = typedText.ReplaceAll(line, []byte(`"$1":"`+leftOut+`"`))
		}
		b.Write(line)
	}
	return b.Bytes()
}

// whyNot adds why something could not be had.
func whyNot(text []byte, err error) []byte {
	if err != nil {
		text = fmt.Appendf(text, "(not had: %v)\n", err)
	}
	return text
}

// output runs a tool that only looks.
func output(ctx context.Context, tool string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, tool, args...).Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w", tool, err)
	}
	return out, nil
}
