package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrNoTool says that this host has no iptables command, or none of the back end asked for.
var ErrNoTool = errors.New("no iptables")

const howToInstall = "install the package iptables (Debian, Ubuntu, SUSE, Amazon Linux 2) or iptables-nft (Amazon Linux 2023, RHEL, Fedora)"

// tools are the iptables commands of one back end, by family.
type tools struct {
	backend    Backend
	version    string
	byFamily   [len(Families)]struct{ iptables, save, restore string }
	isStandard bool // the commands without a suffix are these

	started func(pid int) // is told of each process that is to change rules; may be nil
}

func (t *tools) store() string { return "iptables-" + t.backend.String() }

// findTools returns what is installed in dirs.
//
// Debian has iptables-nft and iptables-legacy beside an iptables that is one of them; RHEL 8 and later and Amazon
// Linux 2023 have the nft ones, Amazon Linux 2 the legacy ones, under the name iptables only. The version says which
// one a command is.
func findTools(ctx context.Context, dirs []string) ([]*tools, error) {
	var found []*tools
	var unusable error
	for _, suffix := range []string{"", "-nft", "-legacy"} {
		t := find(dirs, suffix)
		if t == nil {
			continue
		}
		out, err := run(ctx, "", t.byFamily[IPv4].iptables, "--version")
		if err != nil && ctx.Err() == nil && !hasNFT() { // without nfnetlink iptables-nft does not even say that
			unusable = err
			continue
		}
		if err != nil {
			return nil, err
		}
		if t.version, t.backend, err = parseVersion(string(out)); err != nil {
			return nil, fmt.Errorf("%s: %w", t.byFamily[IPv4].iptables, err)
		}
		if byBackend(found, t.backend) == nil {
			found = append(found, t)
		}
	}
	if len(found) == 0 && unusable != nil {
		return nil, unusable
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w commands in %s: %s", ErrNoTool, strings.Join(dirs, ":"), howToInstall)
	}
	return found, nil
}

// findStores is findTools without the commands of a store that the kernel does not have, which can hold nothing of
// ours: iptables-nft may be installed where legacy is in use, because the kernel has no nf_tables. Legacy says itself
// that it has no tables.
func findStores(ctx context.Context) ([]*tools, error) {
	all, err := findTools(ctx, searchPath())
	if err == nil && byBackend(all, BackendNFT) != nil && !hasNFT() {
		all = slices.DeleteFunc(all, func(t *tools) bool { return t.backend == BackendNFT })
	}
	return all, err
}

// hasNFT asks the kernel for the number of the rules' generation, which loads the module if there is one.
func hasNFT() bool { return netfilterHas(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN) }

// netfilterHas is true unless the kernel says that it has no such part, or no nfnetlink (nfnetlink_rcv_msg,
// net/netfilter/nfnetlink.c).
func netfilterHas(subsystem, message int) bool {
	req := nl.NewNetlinkRequest(subsystem<<8|message, 0)
	req.AddData(&nl.Nfgenmsg{Version: nl.NFNETLINK_V0})
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	return !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL)
}

// find returns the first directory's commands that are all there, so that builds are not mixed.
func find(dirs []string, suffix string) *tools {
	for _, dir := range dirs {
		t := &tools{isStandard: suffix == ""}
		complete := true
		for f, name := range [...]string{IPv4: "iptables", IPv6: "ip6tables"} {
			c := &t.byFamily[f]
			c.iptables, c.save, c.restore = command(dir, name+suffix), command(dir, name+suffix+"-save"), command(dir, name+suffix+"-restore")
			complete = complete && c.iptables != "" && c.save != "" && c.restore != ""
		}
		if complete {
			return t
		}
	}
	return nil
}

// command returns the path of a program in a directory, "" if there is none.
func command(dir, name string) string {
	path := filepath.Join(dir, name)
	if _, err := exec.LookPath(path); err != nil || !filepath.IsAbs(path) {
		return ""
	}
	return path
}

func byBackend(all []*tools, b Backend) *tools {
	for _, t := range all {
		if t.backend == b {
			return t
		}
	}
	return nil
}

// searchPath is PATH with the directories of administration commands, which an operator's PATH may lack.
func searchPath() []string {
	return append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin")
}

var versionText = regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)(?: \((\w+)\))?`)

// parseVersion reads "iptables v1.8.9 (nf_tables)". Before 1.8.0 there was only what is now called legacy, and no
// word for it. iptables-restore knows --wait since 1.6.2.
func parseVersion(text string) (string, Backend, error) {
	m := versionText.FindStringSubmatch(text)
	if m == nil {
		return "", BackendAuto, fmt.Errorf("unknown version %q", text)
	}
	n := 0
	for _, part := range m[1:4] {
		i, _ := strconv.Atoi(part)
		n = n*1000 + i
	}
	if n < 1_006_002 {
		return "", BackendAuto, fmt.Errorf("version %q is too old, want 1.6.2 or later", m[0])
	}
	if m[4] == "nf_tables" {
		return m[0], BackendNFT, nil
	}
	return m[0], BackendLegacy, nil
}

// run runs a command and returns what it prints. An error has the command's own words.
func run(ctx context.Context, input, path string, args ...string) ([]byte, error) {
	return runTold(ctx, nil, input, path, args...)
}

// runTold is run that tells the pid of the process while it runs, if somebody wants it.
func runTold(ctx context.Context, started func(pid int), input, path string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = strings.NewReader(input)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = 5 * time.Second
	// Who stops us with all our process group (Ctrl-C, for example) must not stop what takes the rules away.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Start()
	if err == nil {
		if started != nil {
			started(cmd.Process.Pid)
		}
		err = cmd.Wait()
	}
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("run %s: %w: %s", filepath.Base(path), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// procNet is the calling thread's view; /proc/net is the main thread's.
const procNet = "/proc/thread-self/net/"

// save reads one family's rules. Legacy rules are read only if the kernel has a table of them in this namespace,
// because looking for one makes it (and loads its module).
func (t *tools) save(ctx context.Context, f Family) (*ruleset, error) {
	if t.backend == BackendLegacy {
		names, err := os.ReadFile(procNet + [...]string{IPv4: "ip_tables_names", IPv6: "ip6_tables_names"}[f])
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(names) == 0 {
			return new(ruleset), nil
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("list legacy tables: %w: needs CAP_DAC_READ_SEARCH", err)
		}
		if err != nil {
			return nil, fmt.Errorf("list legacy tables: %w", err)
		}
	}
	// It reads in several steps, and while others change the rules prints a chain twice (measured, iptables-nft 1.8.9).
	for attempt := 1; ; attempt++ {
		text, err := run(ctx, "", t.byFamily[f].save)
		if err != nil {
			return nil, err
		}
		r, err := parseSave(string(text))
		if err == nil {
			return r, nil
		}
		if attempt == maxAttempts || !sleep(ctx, time.Duration(attempt)*(10*time.Millisecond+rand.N(30*time.Millisecond))) {
			return nil, fmt.Errorf("%s: %w", t.byFamily[f].save, err)
		}
	}
}

// readNative reads the rules of the nft command.
func readNative(ctx context.Context, dirs []string) (native, error) {
	for _, dir := range dirs {
		if path := command(dir, "nft"); path != "" {
			text, err := run(ctx, "", path, "-j", "list", "ruleset")
			if err != nil {
				return native{}, err
			}
			return parseNative(text)
		}
	}
	return native{}, errors.New("there is no nft command (package nftables)")
}

// restore gives up when another program holds the legacy lock for ten seconds; iptables-nft needs no lock.
func (t *tools) restore(ctx context.Context, f Family, script string) error {
	_, err := runTold(ctx, t.started, script, t.byFamily[f].restore, "--noflush", "--wait=10")
	return err
}

const (
	// maxAttempts is how often settle begins again because somebody else was at it at the same time. Installers that
	// undo each other's last step part after a few; ten mean that another program insists on a different order.
	maxAttempts = 10

	// When the same commands come out of what is read three more times, it is not chance: they fail, or iptables
	// prints their rules in other words.
	maxSame = 3
)

// settle makes our part of one family's rules be want. Each attempt is one iptables-restore run. have is what was read
// before, or nil.
//
// There is no lock. An ordinary user could hold one that is private to a network namespace (an abstract socket, a
// netlink port), and a file would have to be where both the daemon's user and root can write. Instead each attempt
// either finds what it has read or fails, and reads again after a random while.
func (t *tools) settle(ctx context.Context, want FamilyPlan, have *ruleset) (changed bool, err error) {
	last, same := "", 0
	for attempt := range maxAttempts {
		if attempt > 1 && !sleep(ctx, time.Duration(attempt)*(10*time.Millisecond+rand.N(30*time.Millisecond))) {
			return changed, ctx.Err()
		}
		if have == nil {
			var saveErr error
			if have, saveErr = t.save(ctx, want.Family); saveErr != nil {
				return changed, errors.Join(err, saveErr)
			}
		}
		c := compare(have, want)
		script := c.script()
		if script == "" {
			return changed, nil
		}
		if same++; script != last {
			same = 0
		}
		switch {
		case same == maxSame && err != nil:
			return changed, fmt.Errorf("change %s rules: %w", want.Family, err)
		case same == maxSame:
			return changed, fmt.Errorf("%s %s does not print back what was written: %s", t.store(), t.version, c.differences[0])
		}
		have, last = nil, script
		if err = t.restore(ctx, want.Family, script); err == nil {
			changed = true
		}
	}
	return changed, errors.Join(err, fmt.Errorf("change %s rules: another program changes them back", want.Family))
}

// sleep returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
