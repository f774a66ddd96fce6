package soak

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// process is one that asks for as long as its standard input is open.
type process struct {
	t    *testing.T
	name string
	in   io.Closer
	out  io.Reader
}

func start(t *testing.T, lab *netlab.Lab, i int) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", strconv.Itoa(i))
	cmd.Env = []string{asClient + "=1", "PATH=/usr/bin:/bin"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user + uint32(i), Gid: user}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Instance.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return &process{t, askers[i].name, in, out}
}

// sample is what the daemon takes at one moment.
type sample struct {
	resident, descriptors int
	status                report.Status
}

func look(t *testing.T, d *gate.Daemon) (s sample) {
	t.Helper()
	var err error
	if s.status, err = d.Status(); err != nil {
		t.Fatal(err)
	}
	proc := filepath.Join("/proc", strconv.Itoa(d.PID()))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	s.descriptors = len(files)
	b, err := os.ReadFile(filepath.Join(proc, "statm"))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	s.resident = pages * os.Getpagesize()
	return s
}

// reader reads the events while they are written, since files are rotated away.
type reader struct {
	stop context.CancelFunc
	done chan error
	seen seen
}

// seen is what the events tell.
type seen struct {
	decisions, activated, changed int
	nobody, incomplete            map[string]int    // by reason
	example                       map[string]string // of the first
	lengths                       []time.Duration   // of which rules were not as they should be
	slow                          []string          // events of requests that took long
	missed                        uint64
	gap                           string // the first
	last                          uint64
}

func read(path string) *reader {
	ctx, stop := context.WithCancel(context.Background())
	r := &reader{stop: stop, done: make(chan error, 1), seen: seen{nobody: map[string]int{}, incomplete: map[string]int{}, example: map[string]string{}}}
	go func() { r.done <- sink.Tail(ctx, path, 1<<20, true, r.seen.take) }()
	return r
}

// end returns what was seen, when all was read that there is.
func (r *reader) end(t *testing.T) *seen {
	t.Helper()
	time.Sleep(time.Second) // more than it takes it to look again, and the daemon has ended
	r.stop()
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	return &r.seen
}

func (s *seen) take(line []byte) error {
	var d gate.Document
	if err := json.Unmarshal(line, &d); err != nil {
		return fmt.Errorf("%w in %s", err, line)
	}
	n, ok := d.At("event.sequence").(float64)
	if !ok {
		return fmt.Errorf("no event.sequence in %s", line)
	}
	now := uint64(n)
	if s.last > 0 && now != s.last+1 {
		s.missed += max(now, s.last) - min(now, s.last)
		if s.gap == "" {
			s.gap = fmt.Sprintf("%d follows %d: %s", now, s.last, line)
		}
	}
	s.last = now
	switch action, _ := d.At("event.action").(string); {
	case d.At("data_stream.dataset") == "imdsgate.decision":
		s.decisions++
		reason, _ := d.At("imdsgate.attribution.reason").(string)
		switch {
		case d.At("process.pid") == nil:
			if s.nobody[reason]++; s.nobody[reason] == 1 {
				s.example[reason] = string(line)
			}
		case d.At("imdsgate.attribution.complete") != true:
			s.incomplete[reason]++
		}
		if took, _ := d.At("event.duration").(float64); time.Duration(took) > patience/2 && len(s.slow) < 10 {
			s.slow = append(s.slow, string(line))
		}
	case action == "policy-activated":
		s.activated++
	case action == "redirect-rule-changed", action == "redirect-contested":
		s.changed++
		length, _ := d.At("event.duration").(float64)
		if length <= 0 {
			return fmt.Errorf("no event.duration in %s", line)
		}
		if message, _ := d.At("message").(string); !strings.Contains(message, " together ") { // of several
			s.lengths = append(s.lengths, time.Duration(length))
		}
	}
	return nil
}
