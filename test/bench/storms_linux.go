package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"github.com/imdsgate/imdsgate/test/tiny"
)

const (
	// askers connect at the same time.
	askers = 4
	// connectRate is of all of them, and spawnRate of all spawners: more than hosts have.
	connectRate = 1000
	spawnRate   = 4000
	spawners    = 2
	// floodRate is of clients without a witness. Each costs a part of a search.
	floodRate = 500
)

// spawns measures the table of processes, and what it loses while processes come and go.
func (s *stage) spawns(ctx context.Context, o attributionOptions, rep *attributionReport) (err error) {
	size := o.sizes[len(o.sizes)-1]
	if err := s.sleepers.grow(size); err != nil {
		return err
	}
	before := heap()
	w, err := procwatch.Open(procwatch.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	grown := heap() - before
	from := w.Stats()

	dir, err := os.MkdirTemp("", "imdsgate-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "exit")
	if err := os.WriteFile(program, tiny.Exit(), 0o755); err != nil {
		return err
	}
	began, cpu := time.Now(), cpuOfThis()
	spawned, err := runSpawners(ctx, program, o.spawn)
	if err != nil {
		return err
	}
	took := time.Since(began)
	cpu = cpuOfThis() - cpu
	drained := w.Drain()
	to := w.Stats()
	if seen := to.Forks - from.Forks; drained != nil || seen < uint64(spawned) && to.Lost == from.Lost {
		rep.judge(fmt.Errorf("%d forks seen of %d (%w): %w", seen, spawned, drained, errWrong))
	}
	rep.add(fmt.Sprintf("The table of processes, and %d s of new ones: fork, execve and exit of the smallest program.", o.spawn), table{
		{"processes", "bytes each", "wanted/s", "got/s", "forks seen", "execs seen", "lost", "images read", "over budget", "CPU of ours"},
		{fmt.Sprint(from.Processes), fmt.Sprint(grown / int64(from.Processes)), fmt.Sprint(spawnRate), fmt.Sprintf("%.0f", float64(spawned)/took.Seconds()),
			fmt.Sprint(to.Forks - from.Forks), fmt.Sprint(to.Execs - from.Execs), fmt.Sprint(to.Lost - from.Lost),
			fmt.Sprint(to.ImagesRead - from.ImagesRead), fmt.Sprint(to.ImagesOverBudget - from.ImagesOverBudget),
			fmt.Sprintf("%.0f %%", 100*cpu.Seconds()/took.Seconds())},
	})
	rep.goal("events of processes lost", 0, float64(to.Lost-from.Lost), "%.0f")
	return nil
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what cleanups and pools let go
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func runSpawners(ctx context.Context, program string, seconds int) (spawned int, err error) {
	var all []*exec.Cmd
	var outs []*bufio.Reader
	for range spawners {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "spawner", program, strconv.Itoa(spawnRate/spawners), strconv.Itoa(seconds))
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return 0, err
		}
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		all, outs = append(all, cmd), append(outs, bufio.NewReader(out))
	}
	var errs []error
	for i, cmd := range all {
		line, _ := outs[i].ReadString('\n')
		n, err := strconv.Atoi(strings.TrimSpace(line))
		errs = append(errs, err, cmd.Wait())
		spawned += n
	}
	return spawned, errors.Join(errs...)
}

// beSpawner is a child that starts a program again and again, and says how often.
func beSpawner(args []string) error {
	if len(args) != 3 {
		return errors.New("want a program, a rate and seconds")
	}
	rate, err1 := strconv.Atoi(args[1])
	seconds, err2 := strconv.Atoi(args[2])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	done := 0
	begin := time.Now()
	for i := range rate * seconds {
		time.Sleep(time.Duration(i)*time.Second/time.Duration(rate) - time.Since(begin))
		if time.Since(begin) > time.Duration(seconds)*time.Second {
			break
		}
		pid, err := syscall.ForkExec(args[0], args[:1], &syscall.ProcAttr{})
		if err != nil {
			return err
		}
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
			return err
		}
		done++
	}
	fmt.Println(done)
	return nil
}

// tally is what became of the connections of one storm.
type tally struct {
	mu       sync.Mutex // guards the following
	took     times
	reasons  map[attribution.Reason]int
	searched int
	wrong    []error
}

// storm has clients connect for a while. answer attributes a connection, and reports whether that needed a search.
func (s *stage) storm(ctx context.Context, rate, seconds int, answer func(attribution.Conn) (o attribution.Owner, searched bool)) (_ *tally, connected int, err error) {
	var clients []*asker
	defer func() {
		for _, a := range clients {
			err = errors.Join(err, a.close())
		}
	}()
	for range askers {
		a, err := startAsker(s.lab.Instance)
		if err != nil {
			return nil, 0, err
		}
		clients = append(clients, a)
	}
	got := &tally{reasons: map[attribution.Reason]int{}}
	served := make(chan struct{})
	s.proxy.(*net.TCPListener).SetDeadline(time.Time{})
	go func() {
		defer close(served)
		var wg sync.WaitGroup
		defer wg.Wait()
		for {
			c, err := s.proxy.Accept()
			if err != nil {
				return
			}
			a := accept(c)
			wg.Go(func() { got.serve(a, answer) })
		}
	}()
	for _, a := range clients {
		if err := a.tell(orderLoad, rate/askers, seconds); err != nil {
			return nil, 0, err
		}
	}
	failed := 0
	for _, a := range clients {
		n, err := a.done()
		if err != nil {
			return nil, 0, err
		}
		connected, failed = connected+n[0], failed+n[1]
	}
	s.proxy.(*net.TCPListener).SetDeadline(time.Unix(1, 0))
	<-served
	if failed > 0 {
		err = fmt.Errorf("%d of %d connections failed", failed, connected)
	}
	return got, connected, err
}

// serve attributes one connection, and then reads who the client says it is.
func (t *tally) serve(c accepted, answer func(attribution.Conn) (attribution.Owner, bool)) {
	defer c.Close()
	o, searched := answer(c.who)
	took := time.Since(c.at)
	c.SetReadDeadline(time.Now().Add(patience * time.Second))
	line, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err == nil {
		var pid int
		if pid, err = strconv.Atoi(strings.TrimSpace(line)); err == nil && o.Attributed() {
			err = owned(o, pid, false)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took = append(t.took, took)
	t.reasons[o.Reason]++
	if searched {
		t.searched++
	}
	if err != nil {
		t.wrong = append(t.wrong, fmt.Errorf("%w: %w", errWrong, err))
	}
}

// missed are the connections without a complete answer, by reason.
func (t *tally) missed() (n int, why string) {
	var all []string
	for r, count := range t.reasons {
		if r != attribution.Attributed {
			n += count
			all = append(all, fmt.Sprintf("%s %d", r, count))
		}
	}
	slices.Sort(all)
	return n, strings.Join(all, ", ")
}

// bears measures whether every one of many connections is attributed, with the witness.
func (s *stage) bears(ctx context.Context, o attributionOptions, rep *attributionReport) error {
	if err := errors.Join(s.watch(), s.find(attribution.Level3)); err != nil {
		return err
	}
	begin, cpu := time.Now(), cpuOfThis()
	got, connected, err := s.storm(ctx, connectRate, o.load, func(c attribution.Conn) (attribution.Owner, bool) {
		l := s.finder.Find(c)
		defer l.Close()
		if o, ok := l.Accounted(ctx); ok {
			return o, false
		}
		return l.Complete(ctx, true), true
	})
	if err != nil {
		return err
	}
	took := time.Since(begin)
	cpu = cpuOfThis() - cpu
	for _, err := range got.wrong {
		rep.judge(err)
	}
	missed, why := got.missed()
	rep.add(fmt.Sprintf("%d s of %d connections a second by %d clients, each with a complete answer at L3, beside %d processes.", o.load, connectRate, askers, s.sleepers.n), table{
		{"connections", "/s", "answers", "wrong", "incomplete", "why", "needed a search", "p50 (p99) since accept", "CPU of ours"},
		{fmt.Sprint(connected), fmt.Sprintf("%.0f", float64(connected)/float64(o.load)), fmt.Sprint(len(got.took)), fmt.Sprint(len(got.wrong)),
			fmt.Sprint(missed), why, fmt.Sprint(got.searched), got.took.String(), fmt.Sprintf("%.0f %%", 100*cpu.Seconds()/took.Seconds())},
	})
	rep.goal("connections of many that were attributed wrong, or not", 0, float64(len(got.wrong)+missed), "%.0f")
	return nil
}

// flooded measures how often the host is searched when there is no witness.
func (s *stage) flooded(ctx context.Context, o attributionOptions, rep *attributionReport) error {
	if err := errors.Join(s.forget(), s.unwatch(), s.find(attribution.Level1)); err != nil {
		return err
	}
	rows := table{{"the client", "connections", "quick answers", "incomplete in the end", "why", "searches/s", "answered by each", "the last took", "p50 (p99) since accept", "CPU of ours"}}
	for _, urgent := range []bool{false, true} {
		var later sync.WaitGroup
		var mu sync.Mutex
		quick, final := 0, &tally{reasons: map[attribution.Reason]int{}}
		complete := func(l *attribution.Lookup) attribution.Owner {
			o := l.Complete(ctx, urgent)
			mu.Lock()
			defer mu.Unlock()
			final.reasons[o.Reason]++
			return o
		}
		from, begin, cpu := s.finder.Stats(), time.Now(), cpuOfThis()
		got, connected, err := s.storm(ctx, floodRate, o.spawn, func(c attribution.Conn) (attribution.Owner, bool) {
			l := s.finder.Find(c)
			if urgent {
				defer l.Close()
				return complete(l), true
			}
			o := l.Owner(ctx)
			if o.Attributed() {
				mu.Lock()
				quick++
				mu.Unlock()
			}
			later.Go(func() {
				defer l.Close()
				complete(l)
			})
			return o, false
		})
		took := time.Since(begin)
		cpu = cpuOfThis() - cpu
		to := s.finder.Stats()
		later.Wait()
		if err != nil {
			return err
		}
		for _, err := range got.wrong {
			rep.judge(err)
		}
		searches, answered := to.Scans-from.Scans, to.Answered-from.Answered
		_, why := final.missed()
		missed, _ := final.missed()
		who, answers := "does not wait (audit)", fmt.Sprint(quick)
		if urgent {
			who, answers = "waits (enforce)", ""
		}
		rows = append(rows, []string{who, fmt.Sprint(connected), answers, fmt.Sprint(missed), why, fmt.Sprintf("%.1f", float64(searches)/took.Seconds()),
			fmt.Sprintf("%.1f", float64(answered)/max(1, float64(searches))), short(to.Last), got.took.String(), fmt.Sprintf("%.0f %%", 100*cpu.Seconds()/took.Seconds())})
		if !urgent {
			rep.goal("searches of the host a second when nobody waits", 4, float64(searches)/took.Seconds(), "%.1f")
		}
	}
	rep.add(fmt.Sprintf("A flood of %d connections a second by %d clients at L1, for %d s, beside %d processes.", floodRate, askers, o.spawn, s.sleepers.n), rows)
	return nil
}
