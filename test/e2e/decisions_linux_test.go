package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// decide adds a decision and returns its ID.
func (h *host) decide(args ...string) string {
	h.t.Helper()
	out, code := h.imdsgate(append([]string{"decisions", "add", "--json", "--reason", "INC-123"}, args...)...)
	var done report.Decided
	if err := json.Unmarshal([]byte(out), &done); code != 0 || err != nil {
		h.t.Fatalf("%v: %d, %s", args, code, out)
	}
	return done.Decision.ID
}

// told waits for an event of the daemon about itself.
func (h *host) told(action string, ok func(gate.Document) bool) gate.Document {
	h.t.Helper()
	d, err := h.Await(action, func(d gate.Document) bool { return d.At("event.action") == action && (ok == nil || ok(d)) })
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

// asksAs asks for credentials as an ordinary user with a program until the answer is
// the one that is wanted, or a while has passed.
func (h *host) asksAs(program, want string, within time.Duration) {
	h.t.Helper()
	got := ""
	for end := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		got, _ = h.run(client{uid: ordinaryUser, args: []string{program, "-s", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", "-H", "X-aws-ec2-metadata-token: " + h.token(), service + role}})
		if got == want {
			return
		}
		if time.Now().After(end) {
			h.t.Fatalf("%s gets %s, want %s\n%s", program, got, want, h.Log())
		}
	}
}

// What is allowed for a time passes for that time, and what is denied does not, whatever
// has a grant. Both survive a daemon that is killed.
func TestDecisions(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	copied := h.install("/usr/bin/curl")
	granted := filepath.Join(filepath.Dir(copied), "app") // by its name a downloader has no grant for a user alone
	if err := os.Rename(copied, granted); err != nil {
		t.Fatal(err)
	}
	config := "mode: enforce\n" + grant(granted, ordinaryUser)
	h.start(config)
	const thief = "/usr/bin/curl"
	h.asksAs(thief, "403", 0)
	h.asksAs(granted, "200", 5*time.Second)

	allow := h.decide("allow", "--exe", thief, "--user", "4321", "--accept-risk", "--for", "6s")
	h.asksAs(thief, "200", 5*time.Second)
	if d := h.told("imds-request-allowed", func(d gate.Document) bool { return d.At("imdsgate.decision.id") == allow }); !strings.Contains(d.At("event.reason").(string), "INC-123") {
		t.Errorf("%v", d)
	}
	h.asksAs(thief, "403", 15*time.Second)
	h.told("decision-expired", func(d gate.Document) bool { return d.At("imdsgate.decision.id") == allow })
	d := h.told("decision-added", func(d gate.Document) bool { return d.At("imdsgate.decision.id") == allow })
	if d.At("imdsgate.actor.user.id") != "0" || d.At("imdsgate.actor.user.name") != "root" || d.At("event.reason") != "INC-123" || d.At("imdsgate.until") == nil {
		t.Errorf("%v", d)
	}

	deny := h.decide("deny", "--exe", granted, "--for", "1h")
	h.asksAs(granted, "403", 0)
	if got, _ := h.run(client{uid: ordinaryUser, args: []string{granted, "-s", "-o", "/dev/null", "-w", "%{http_code}", service + instanceID}}); got != "403" {
		t.Errorf("inventory: %s", got)
	}
	if out, code := h.imdsgate("status"); !strings.Contains(out, deny+" deny executable "+granted) || code != 0 {
		t.Errorf("%d, %s", code, out)
	}
	second := h.decide("allow", "--exe", thief, "--user", "4321", "--accept-risk", "--for", "1h")
	h.asksAs(thief, "200", 5*time.Second)
	h.Kill()
	h.startWith(gate.Settings{Config: config, Dir: h.Dir})
	h.asksAs(thief, "200", 5*time.Second)
	h.asksAs(granted, "403", 0)
	if out, code := h.imdsgate("decisions", "list"); code != 0 || !strings.Contains(out, deny) || !strings.Contains(out, second) || !strings.Contains(out, "root") {
		t.Errorf("%d, %s", code, out)
	}

	if out, code := h.imdsgate("decisions", "delete", "nonsense"); code != 2 || !strings.Contains(out, deny) || !strings.Contains(out, second) {
		t.Errorf("%d, %s", code, out)
	}
	if out, code := h.imdsgate("decisions", "delete", deny); code != 0 || !strings.Contains(out, deny) {
		t.Errorf("%d, %s", code, out)
	}
	h.asksAs(granted, "200", 5*time.Second)
	if out, code := h.imdsgate("decisions", "delete", "--all"); code != 0 || !strings.Contains(out, second) {
		t.Errorf("%d, %s", code, out)
	}
	h.asksAs(thief, "403", 0)
	h.told("decision-deleted", func(d gate.Document) bool { return d.At("imdsgate.decision.id") == second })
	if out, code := h.imdsgate("decisions", "list"); code != 0 || out != "there are none" {
		t.Errorf("%d, %s", code, out)
	}
}

// small puts a disk of 64 KiB in the place of one of the daemon's directories.
func small(t *testing.T, dir string) (undo func()) {
	t.Helper()
	st, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=64k,mode=0755,uid=%d", st.Sys().(*syscall.Stat_t).Uid)); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Unmount(dir, unix.MNT_DETACH) }
}

// On a full disk a decision and a mode are in force, it is said that a restart would undo them, and they are kept when
// there is room: a daemon that is killed then comes back with both.
func TestStateFull(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: audit\n")
	h.Stop()
	dir := h.State()
	defer small(t, dir)()
	full := filepath.Join(dir, "full")
	config := gate.Settings{Config: "mode: audit\n", Dir: h.Dir}
	h.startWith(config)
	// What cannot be written again is removed, and would make room for the mode.
	if err := os.Remove(filepath.Join(dir, "redirect.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(full, make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	deny, code := h.imdsgate("decisions", "add", "deny", "--exe", "/usr/bin/curl", "--for", "1h", "--reason", "INC-123")
	if code != 0 || !strings.Contains(deny, "restart") || !strings.Contains(deny, "no space left") {
		t.Errorf("%d, %s", code, deny)
	}
	mode, code := h.imdsgate("mode", "set", "enforce", "--for", "1h", "--reason", "INC-123")
	if code != 0 || !strings.Contains(mode, "restart") || !strings.Contains(mode, "no space left") {
		t.Errorf("%d, %s", code, mode)
	}
	h.asksAs("/usr/bin/curl", "403", 5*time.Second)
	if out, _ := h.imdsgate("status"); strings.Count(out, "no space left") < 2 {
		t.Errorf("%s", out)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, _ := h.imdsgate("status")
		if !strings.Contains(out, "no space left") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("there is room: %s", out)
		}
	}
	h.Kill()
	h.startWith(config)
	h.asksAs("/usr/bin/curl", "403", 5*time.Second)
	if s, err := h.Status(); err != nil || s.Mode != "enforce" || len(s.Decisions.All) != 1 {
		t.Errorf("after a restart: %+v, %v", s.Decisions, err)
	}
}

// Who may not change anything changes nothing, and what would let in a thief is not
// taken.
func TestDecisionsRefused(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	own := filepath.Join(t.TempDir(), "curl")
	b, err := os.ReadFile("/usr/bin/curl")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, b, 0o755); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(own); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	os.Chown(own, ordinaryUser, ordinaryUser)
	link := filepath.Join(filepath.Dir(own), "link") // whoever makes it chooses what it leads to
	if err := os.Symlink(own, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"allow", "--exe", own, "--user", "4321", "--for", "1h", "--accept-risk"}, "belongs to uid 4321"},
		{[]string{"allow", "--exe", link, "--user", "4321", "--for", "1h", "--accept-risk"}, "belongs to uid 4321"},
		{[]string{"allow", "--exe", "/usr/bin/curl", "--for", "1h"}, "LD_PRELOAD"},
		{[]string{"allow", "--exe", "/usr/bin/python3", "--user", "4321", "--for", "1h"}, "--accept-risk"},
		{[]string{"allow", "--user", "4321", "--for", "1h"}, "--accept-risk"},
		{[]string{"allow", "--exe", "/nonexistent", "--unit", "x.service", "--for", "1h"}, "no such file"},
		{[]string{"allow", "--exe", "/usr/bin", "--unit", "x.service", "--for", "1h"}, "no program"},
		{[]string{"deny", "--user", "nobody-of-that-name", "--for", "1h"}, "no user"},
		{[]string{"deny", "--user", "4321", "--for", "31d"}, "30 days"},
		{[]string{"deny", "--user", "4321", "--for", "soon"}, "4h"},
		{[]string{"deny", "--user", "", "--for", "1h"}, "empty"},
		{[]string{"deny", "--for", "1h"}, "is about"},
		{[]string{"deny", "--container", "4f3c2b1a0123", "--for", "1h"}, "--no-trunc"},
		{[]string{"permit", "--user", "4321", "--for", "1h"}, "permit"},
	} {
		out, code := h.imdsgate(append([]string{"decisions", "add", "--reason", "INC-123"}, c.args...)...)
		if code != 2 || !strings.Contains(out, c.says) {
			t.Errorf("%v: %d, %s", c.args, code, out)
		}
	}
	if out, code := h.imdsgate("decisions", "add", "deny", "--user", "4321", "--for", "1h"); code != 2 || !strings.Contains(out, "reason") {
		t.Errorf("without a reason: %d, %s", code, out)
	}
	for _, args := range [][]string{
		{"decisions", "add", "allow", "--exe", "/usr/bin/curl", "--user", "4321", "--for", "1h", "--reason", "x", "--accept-risk"},
		{"decisions", "delete", "--all"},
		{"mode", "set", "off", "--for", "1h", "--reason", "x"},
	} {
		if out, code := h.run(client{uid: ordinaryUser, args: append([]string{h.gate.Command, "--config", h.Config}, args...)}); code != 77 {
			t.Errorf("an ordinary user: %v: %d, %s", args, code, out)
		}
	}
	// Allowed by name in spite of the file, the file is still looked at when it asks.
	h.decide("allow", "--user", "4321", "--accept-risk", "--for", "1h")
	h.asksAs("/usr/bin/curl", "200", 5*time.Second)
	h.asksAs(own, "403", 0)
	h.imdsgate("decisions", "delete", "--all")

	// A file that somebody else has written is no decision of ours, and says so.
	h.decide("deny", "--user", "4321", "--for", "1h")
	h.Stop()
	file := filepath.Join(h.State(), "decisions.json")
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", st, err)
	}
	if err := os.WriteFile(file, []byte(`{"decisions": [{"id": "x", "effect": "allow", "user": "4321"`), 0o600); err != nil {
		t.Fatal(err)
	}
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	h.logged("decisions of before are not in force")
	h.told("decisions-lost", func(d gate.Document) bool { return d.At("event.outcome") == "failure" })
	if out, _ := h.imdsgate("status"); !strings.Contains(out, "decisions.json.damaged") {
		t.Errorf("%s", out)
	}
	if _, err := os.Stat(file + ".damaged"); err != nil {
		t.Error(err)
	}
	h.decide("deny", "--user", "4321", "--for", "1h")
}
