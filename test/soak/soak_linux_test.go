// Package soak has the real daemon serve for long, while its rules are reloaded and
// somebody flushes the tables of the firewall, and looks for what only time shows: answers
// that are wrong once in a thousand, events that are lost, verdicts on nobody, and memory
// that grows.
package soak

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

var (
	lasts    = flag.Duration("for", 20*time.Second, "how long the clients ask")
	reload   = flag.Duration("reload", time.Minute, "how often the rules are reloaded, at least ten times in all")
	repaired = flag.Duration("repaired", time.Second, "how long a repair may take; the median half as long")
	seed     = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of what is flushed, and when")
)

// Flushes are so far apart. Sooner, and the daemon takes them for a contest, in which it
// looks ever more seldom.
const (
	minBetween = 8 * time.Second
	maxBetween = 25 * time.Second
)

// flushes are what other tools and people do to the tables.
var flushes = []struct {
	command string
	open    bool // nothing is left that refuses whoever goes past the daemon
}{
	{"iptables -t nat -F", false},
	{"nft delete table ip nat", false},
	{"iptables -F", false},
	{"iptables -t raw -F", false},
	{"ip6tables -t nat -F", false},
	{"nft flush ruleset", true},
	{"iptables -t nat -F; iptables -F", true},
}

// hole is a time in which the rules were not as they should be.
type hole struct {
	command    string
	open       bool
	began, end time.Time
}

// last names the hole before a time.
func last(holes []hole, at time.Time) string {
	for _, h := range slices.Backward(holes) {
		if h.began.Before(at) {
			return fmt.Sprintf("%v after %s, of which nothing was left after %v", at.Sub(h.began), h.command, h.end.Sub(h.began))
		}
	}
	return "when nothing had been flushed"
}

// has reports whether a request was under way in the hole: it may have failed then, or
// have lost what it waits for until the end.
func (h hole) has(f failure) bool { return f.End.After(h.began) && f.Begin.Before(h.end) }

// hung is longer than a request takes that fails in a hole and whose client is told: a SYN
// that was lost is sent again after a second.
const hung = 2500 * time.Millisecond

// maxHung bounds those whose clients are not, in a thousand of all. A connection of the
// daemon's that was being made when its rules in table raw went or came may get no answer.
const maxHung = 1

// enough is what a daemon may grow by between the end of its warm-up and the end, and left
// what it may keep of each request on top of that. The garbage of Go's heap comes and goes,
// as much as what lives, which was 11 MB after as many requests as an hour has, and kept
// to that. 30,000 requests of ten minutes that leave 350 bytes each are more.
const enough, left = 8 << 20, 50

// pins are descriptors that the daemon keeps of processes that asked, once there were so
// many.
const pins = 2 * 256

// loops are goroutines that come and go whoever is connected, or that the daemon keeps for
// whoever comes next.
const loops = 64

func TestSoak(t *testing.T) {
	labtest.RequireRoot(t)
	t.Logf("-seed %d", *seed)
	values := map[string]string{}
	for i := range len(askers) + 1 {
		values[path+strconv.Itoa(i)] = answer(i)
	}
	lab := labtest.Start(t, netlab.Options{IMDS: &imdstest.Config{Data: values, NoTranscript: true}})
	built, err := gate.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	policies := t.TempDir()
	if err := os.Chmod(policies, 0o755); err != nil {
		t.Fatal(err)
	}
	config := func(n int) string {
		return fmt.Sprintf("mode: enforce\nrules: {paths: [%s]}\ndenies:\n  - {name: number-%d, user: nobody, paths: [/latest/user-data], reason: one of those that change}\n", policies, n)
	}
	d, err := gate.Start(lab, built, gate.Settings{Config: config(0), Spool: "max_size: 33554432\n  keep: 3"})
	if d != nil {
		defer d.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	want := ours(t, lab)
	reading := read(d.Events)

	var running []*process
	for i := range askers {
		running = append(running, start(t, lab, i))
	}
	began := time.Now()
	var holes []hole
	var samples []sample
	reloads := 0
	reloadEvery, sampleEvery := min(*reload, *lasts/10), max(*lasts/200, 250*time.Millisecond)
	random := rand.New(rand.NewPCG(*seed, 0))
	next := func(now time.Time) time.Time {
		return now.Add(minBetween + time.Duration(random.Int64N(int64(maxBetween-minBetween))))
	}
	nextReload, nextFlush, nextSample := began.Add(reloadEvery), began.Add(time.Second), began
	for now := began; now.Sub(began) < *lasts; now = time.Now() {
		switch {
		case !now.Before(nextFlush):
			f := flushes[random.IntN(len(flushes))]
			holes = append(holes, flush(t, lab, f.command, f.open, want))
			nextFlush = next(time.Now())
		case !now.Before(nextReload):
			reloads++
			write(t, filepath.Join(policies, "changing.toml"), fmt.Sprintf(rule, reloads))
			if err := d.Write(config(reloads)); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(built.Command, "--config", d.Config, "reload").CombinedOutput(); err != nil {
				t.Errorf("reload %d: %v\n%s", reloads, err, out)
			}
			nextReload = nextReload.Add(reloadEvery)
		case !now.Before(nextSample):
			samples = append(samples, look(t, d))
			nextSample = nextSample.Add(sampleEvery)
		default:
			time.Sleep(5 * time.Millisecond)
		}
	}
	late := look(t, d)

	right, asked, silent := 0, 0, 0
	for _, p := range running {
		o := p.leave()
		right += o.Right
		asked += o.Right + len(o.Failures)
		byHole := 0
		for _, f := range o.Failures {
			i := slices.IndexFunc(holes, func(h hole) bool { return h.has(f) })
			switch {
			case i < 0:
				t.Errorf("%s: at %v, for %v, %s: %s", p.name, f.Begin.Sub(began), f.End.Sub(f.Begin), last(holes, f.End), f.What)
			case f.Wrong && !holes[i].open:
				t.Errorf("%s: at %v, after %s: %s", p.name, f.Begin.Sub(began), holes[i].command, f.What)
			default:
				byHole++
				if f.End.Sub(f.Begin) > hung {
					silent++
					t.Logf("%s: at %v, for %v, after %s: %s", p.name, f.Begin.Sub(began), f.End.Sub(f.Begin), holes[i].command, f.What)
				}
			}
		}
		t.Logf("%s: %d right, %d failed while the rules were not there", p.name, o.Right, byHole)
		if o.Right == 0 {
			t.Errorf("%s: no right answer", p.name)
		}
	}
	if rate := float64(asked) / time.Since(began).Seconds(); rate < perSecond*4/5 {
		t.Errorf("%.0f requests a second are fewer than meant", rate)
	}
	if silent*1000 > asked*maxHung {
		t.Errorf("%d of %d requests were given up by their clients", silent, asked)
	}
	away := repairs(t, holes)

	final := late.status
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if final, err = d.Status(); err != nil {
			t.Fatal(err)
		}
		if final.Requests.Open == 0 && final.Events.Waiting == 0 || time.Now().After(end) {
			break
		}
	}
	if e := final.Events; e.Dropped+e.Failed+e.Removed > 0 || e.Error != "" {
		t.Errorf("events: %+v", e)
	}
	if code := d.Stop(); code != 0 {
		t.Errorf("the daemon ended with %d\n%s", code, d.Log())
	}
	seen := reading.end(t)
	if seen.missed > 0 {
		t.Errorf("%d events are missing: %s", seen.missed, seen.gap)
	}
	// Who asked while the rules were not there may have reached the service itself.
	if past := right - int(final.Requests.Requests); float64(past) > 2*perSecond*away.Seconds() {
		t.Errorf("%d right answers, and %d requests that came to the daemon", right, final.Requests.Requests)
	}
	if uint64(seen.decisions) != final.Requests.Requests {
		t.Errorf("%d requests, and %d events about them", final.Requests.Requests, seen.decisions)
	}
	if late := seen.nobody["late"]; late*1000 > seen.decisions*maxLate {
		t.Errorf("of %d verdicts %d had to do without evidence, which came too late", seen.decisions, late)
	}
	for reason, n := range seen.nobody {
		if !explained[reason] {
			t.Errorf("%d verdicts on nobody, because of %q: %s", n, reason, seen.example[reason])
		}
	}
	for _, line := range seen.slow {
		t.Logf("took long: %s", line)
	}
	t.Logf("%d verdicts, on nobody %v, on some who may not be all %v; %d reloads", seen.decisions, seen.nobody, seen.incomplete, reloads)
	if seen.activated != reloads {
		t.Errorf("%d events tell of %d reloads", seen.activated, reloads)
	}
	if seen.changed == 0 && len(holes) > 0 {
		t.Errorf("no event tells of %d flushes", len(holes))
	}
	t.Logf("%d events of changed rules say that these were not as they should be for %v mostly, %v at most", seen.changed, median(seen.lengths), worst(seen.lengths))
	// One may be about a change of which the kernel has not told in time, and then counts from the look before.
	if median(seen.lengths) > *repaired/2 {
		t.Errorf("the daemon says that the rules were not there for %v mostly", median(seen.lengths))
	}
	flat(t, samples, asked)
}

// rule is one that matches nobody, and is another each time.
const rule = "[rule]\nrule_id = \"soak\"\nname = \"Soak\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\nnetwork where process.name == \"nobody-%d\"\n'''\n"

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ours are the rules of ours that there are.
func ours(t *testing.T, lab *netlab.Lab) string {
	t.Helper()
	var out bytes.Buffer
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		cmd := exec.Command(tool)
		cmd.Stdout = &out
		if err := lab.Instance.Run(cmd); err != nil {
			t.Fatal(err)
		}
	}
	lines := slices.DeleteFunc(strings.Split(out.String(), "\n"), func(line string) bool { return !strings.Contains(line, "IMDSGATE") })
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// flush does so and waits until all rules are there again.
func flush(t *testing.T, lab *netlab.Lab, command string, open bool, want string) hole {
	t.Helper()
	h := hole{command: command, open: open, began: time.Now()}
	cmd := exec.Command("sh", "-ec", command)
	if err := lab.Instance.Run(cmd); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		got := ours(t, lab)
		h.end = time.Now()
		if got == want {
			return h
		}
		if h.end.Sub(begin) > 30*time.Second {
			t.Fatalf("%s: not repaired:\n%s\ninstead of\n%s", command, got, want)
		}
	}
}

// repairs returns for how long rules were missing in all.
func repairs(t *testing.T, holes []hole) (away time.Duration) {
	t.Helper()
	var all []time.Duration
	for _, h := range holes {
		took := h.end.Sub(h.began)
		all = append(all, took)
		away += took
		if took > *repaired {
			t.Errorf("after %s the rules were there again after %v", h.command, took)
		}
	}
	if median(all) > *repaired/2 {
		t.Errorf("repairs took %v mostly", median(all))
	}
	t.Logf("%d flushes; until the rules were there again, and seen, it took %v mostly, %v at most", len(all), median(all), worst(all))
	return away
}

func median(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2].Round(time.Millisecond)
}

func worst(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	return slices.Max(all).Round(time.Millisecond)
}

// flat compares the end with what was there after the warm-up.
func flat(t *testing.T, samples []sample, asked int) {
	t.Helper()
	n := len(samples)
	if n < 20 {
		t.Errorf("%d samples are too few", n)
		return
	}
	// The rules remember the last 16,384 programs that were executed (policy.maxRemembered), of which some are executed
	// each second here: an hour is long enough to fill that.
	begin := n / 5
	if full := slices.IndexFunc(samples, func(s sample) bool {
		return s.status.Attribution.History != nil && s.status.Attribution.History.Execs > 17<<10
	}); full > begin && full < n/2+n/10 {
		begin = full
	}
	for _, of := range []struct {
		name       string
		get        func(sample) int
		warm, more int
	}{
		{"bytes resident", func(s sample) int { return s.resident }, 0, enough + left*asked},
		{"goroutines", func(s sample) int { return s.status.Process.Goroutines }, 0, loops},
		{"descriptors", func(s sample) int { return s.descriptors }, pins, 64},
	} {
		middle := func(some []sample) int {
			var all []int
			for _, s := range some {
				all = append(all, of.get(s))
			}
			slices.Sort(all)
			return all[len(all)/2]
		}
		early, late := middle(samples[begin:begin+n/5]), middle(samples[n-n/5:])
		t.Logf("%s: %d early, %d late", of.name, early, late)
		if late > max(early, of.warm)+of.more {
			t.Errorf("%d %s at the end, after %d", late, of.name, early)
		}
	}
}

// explained are the reasons for a verdict on nobody that are the client's: it has ended,
// or another program began, while it was looked at. On a machine that others are busy on
// evidence may be late.
var explained = map[string]bool{"client_gone": true, "no_socket": true, "churn": true, "exec_race": true, "late": true}

// maxLate bounds the verdicts for which it was, in a thousand.
const maxLate = 2

// outcome is what an asker prints.
type outcome struct {
	Right    int       `json:"right"`
	Failures []failure `json:"failures"`
}

// failure is a request that was not answered as it should have been.
type failure struct {
	Begin time.Time `json:"begin"`
	End   time.Time `json:"end"`
	What  string    `json:"what"`
	Wrong bool      `json:"wrong"` // there was an answer, to somebody who should have had none, or another one
}

func (p *process) leave() (o outcome) {
	p.t.Helper()
	p.in.Close()
	if err := json.NewDecoder(p.out).Decode(&o); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	return o
}
