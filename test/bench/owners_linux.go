package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/procfs"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
)

// times are of one way to ask, on one host.
type times []time.Duration

func (t times) at(q float64) time.Duration {
	return time.Duration(quantile(slices.Sorted(slices.Values(t)), q) * float64(time.Microsecond))
}

func (t times) String() string {
	if len(t) == 0 {
		return ""
	}
	return fmt.Sprintf("%s (%s)", short(t.at(.5)), strings.TrimSuffix(short(t.at(.99)), " µs"))
}

// askFor is how long one slow way is asked again and again; three times at least.
const askFor = 1500 * time.Millisecond

// sample asks n times, or as often as there is time. Wrong answers are not among the times.
func (r *attributionReport) sample(ctx context.Context, n int, ask func() error) (times, error) {
	runtime.GC()
	if err := r.quiet.wait(ctx); err != nil {
		return nil, err
	}
	var all times
	for begin := time.Now(); len(all) < n && (len(all) < 3 || time.Since(begin) < askFor) && ctx.Err() == nil; {
		from := time.Now()
		err := ask()
		took := time.Since(from)
		if err != nil {
			if err := r.judge(err); err != nil {
				return all, err
			}
			if r.wrong > 100 {
				return all, err
			}
			continue
		}
		all = append(all, took)
	}
	return all, nil
}

// position of a client among the processes of the host.
type position int

const (
	oldest position = iota
	middling
	newest
)

func (p position) String() string { return [...]string{"oldest", "middle", "newest"}[p] }

// way is one way to ask for the owner of a connection that has been there for long.
type way struct {
	name  string
	level attribution.Level
	needs string // a program
	n     int    // of how many times as many answers are wanted
	ask   func(s *stage, a *asker, c attribution.Conn) error
}

var ways = []way{
	{name: "`ss -Htnp` with a filter, exec", needs: "ss", n: 1, ask: (*stage).bySS},
	{name: "`lsof -a -iTCP@…`, exec", needs: "lsof", n: 1, ask: (*stage).byLsof},
	{name: "prometheus/procfs", n: 1, ask: (*stage).byProcfs},
	{name: "L0, search of the host", level: attribution.Level0, n: 1, ask: (*stage).byComplete},
	{name: "L1, audit's quick answer", level: attribution.Level1, n: 1, ask: (*stage).byOwner},
	{name: "L1, search of the host", level: attribution.Level1, n: 1, ask: (*stage).byComplete},
	{name: "L2, audit's quick answer", level: attribution.Level2, n: 1, ask: (*stage).byOwner},
	{name: "L2, search of the host", level: attribution.Level2, n: 1, ask: (*stage).byComplete},
	{name: "L3, the witness alone", level: attribution.Level3, n: 20, ask: (*stage).byWitness},
	{name: "L3, audit's quick answer", level: attribution.Level3, n: 3, ask: (*stage).byOwner},
	{name: "L3, complete, by references", level: attribution.Level3, n: 3, ask: (*stage).byReferences},
	{name: "L3, search of the host", level: attribution.Level3, n: 1, ask: (*stage).byComplete},
}

func (s *stage) bySS(a *asker, c attribution.Conn) error {
	var out bytes.Buffer
	cmd := exec.Command("ss", "-Htnp", "state", "established", "src", c.Client.String())
	cmd.Stdout = &out
	if err := s.lab.Instance.Run(cmd); err != nil {
		return fmt.Errorf("ss: %w", err)
	}
	if !strings.Contains(out.String(), fmt.Sprintf("pid=%d,", a.pid())) {
		return fmt.Errorf("ss says %q of process %d: %w", out.String(), a.pid(), errWrong)
	}
	return nil
}

func (s *stage) byLsof(a *asker, c attribution.Conn) error {
	var out bytes.Buffer
	cmd := exec.Command("lsof", "-nP", "-a", fmt.Sprintf("-iTCP@%s:%d", c.Client.Addr(), c.Client.Port()), "-Fp")
	cmd.Stdout = &out
	if err := s.lab.Instance.Run(cmd); err != nil {
		return fmt.Errorf("lsof: %w", err)
	}
	if !strings.Contains("\n"+out.String(), fmt.Sprintf("\np%d\n", a.pid())) {
		return fmt.Errorf("lsof says %q of process %d: %w", out.String(), a.pid(), errWrong)
	}
	return nil
}

// byProcfs does what a program does that uses the package as it is: the inode from /proc/net/tcp, then the descriptors
// of all processes in their order.
func (s *stage) byProcfs(a *asker, c attribution.Conn) error {
	return s.lab.Instance.Do(func() error {
		here, err := procfs.NewFS("/proc/thread-self")
		if err != nil {
			return err
		}
		//lint:ignore SA1019 what is newer is measured as ours
		sockets, err := here.NetTCP()
		if err != nil {
			return err
		}
		link := ""
		for _, l := range sockets {
			if l.LocalPort == uint64(c.Client.Port()) && l.RemPort == uint64(c.Endpoint.Port()) && l.LocalAddr.String() == c.Client.Addr().String() {
				link = fmt.Sprintf("socket:[%d]", l.Inode)
			}
		}
		fs, err := procfs.NewFS("/proc")
		if err != nil {
			return err
		}
		all, err := fs.AllProcs()
		if err != nil {
			return err
		}
		for _, p := range all {
			targets, err := p.FileDescriptorTargets()
			if err == nil && slices.Contains(targets, link) {
				if p.PID != a.pid() {
					return fmt.Errorf("procfs says %d of process %d: %w", p.PID, a.pid(), errWrong)
				}
				return nil
			}
		}
		return fmt.Errorf("procfs does not find process %d: %w", a.pid(), errWrong)
	})
}

func (s *stage) byOwner(a *asker, c attribution.Conn) error {
	l := s.finder.Find(c)
	defer l.Close()
	return owned(l.Owner(context.Background()), a.pid(), false)
}

func (s *stage) byComplete(a *asker, c attribution.Conn) error {
	l := s.finder.Find(c)
	defer l.Close()
	return owned(l.Complete(context.Background(), true), a.pid(), true)
}

func (s *stage) byReferences(a *asker, c attribution.Conn) error {
	_, err := s.references(a, c)
	return err
}

// references is what enforcement does: it asks for a complete answer without a search, and falls back to one.
func (s *stage) references(a *asker, c attribution.Conn) (searched bool, err error) {
	l := s.finder.Find(c)
	defer l.Close()
	o, ok := l.Accounted(context.Background())
	if !ok {
		o = l.Complete(context.Background(), true)
	}
	return !ok, owned(o, a.pid(), true)
}

func (s *stage) byWitness(a *asker, c attribution.Conn) error {
	found, err := s.witness.Connectors(diag.Tuple{Local: c.Client, Remote: c.Endpoint}, false)
	if err != nil {
		return err
	}
	if len(found) != 1 || found[0].PID != a.pid() {
		return fmt.Errorf("the witness says %+v of process %d: %w", found, a.pid(), errWrong)
	}
	return nil
}

// cell is one row's figures on one host.
type cell struct {
	way string
	who string
}

// owners measures how long it takes to name the owner of one connection.
func (s *stage) owners(ctx context.Context, o attributionOptions, rep *attributionReport) (err error) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // between the blocks only
	if err := s.watch(); err != nil {
		return err
	}
	var clients [3]*asker
	defer func() {
		for _, a := range clients {
			if a != nil {
				err = errors.Join(err, a.close())
			}
		}
		err = errors.Join(err, s.forget())
	}()
	start := func(p position) (err error) {
		if clients[p] != nil {
			if err := clients[p].close(); err != nil {
				return err
			}
		}
		clients[p], err = startAsker(s.lab.Instance)
		return err
	}
	if err := start(oldest); err != nil {
		return err
	}
	found := map[cell][]times{}
	var order []cell
	note := func(i int, c cell, t times) {
		if found[c] == nil {
			found[c] = make([]times, len(o.sizes))
			order = append(order, c)
		}
		found[c][i] = t
	}
	searched := 0
	for i, size := range o.sizes {
		err := errors.Join(s.sleepers.grow(size/2), start(middling), s.sleepers.grow(size), start(newest))
		if err != nil {
			return err
		}
		level := attribution.Level(99)
		var held [3]accepted
		for _, w := range ways {
			if w.needs != "" {
				if _, err := exec.LookPath(w.needs); err != nil {
					continue
				}
			}
			if w.level != level {
				level = w.level
				if err := s.find(level); err != nil {
					return err
				}
				for p, a := range clients {
					if err := a.tell(orderHold); err != nil {
						return err
					}
					if held[p].Conn != nil {
						held[p].Close()
					}
					if held[p], err = s.accept(); err != nil {
						return err
					}
					if _, err := a.done(); err != nil {
						return err
					}
				}
			}
			for p, a := range clients {
				t, err := rep.sample(ctx, w.n*o.n, func() error { return w.ask(s, a, held[p].who) })
				if err != nil {
					return err
				}
				note(i, cell{w.name, position(p).String()}, t)
			}
		}
		for _, c := range held {
			c.Close()
		}
		for _, level := range []attribution.Level{attribution.Level1, attribution.Level2, attribution.Level3} {
			if err := s.find(level); err != nil {
				return err
			}
			n, err := s.fresh(ctx, rep, max(1, o.n/5), func(what string, t times) {
				note(i, cell{fmt.Sprintf("%s, %s", level, what), "new process"}, t)
			})
			if err != nil {
				return err
			}
			if level == attribution.Level3 {
				searched += n
			}
		}
	}
	head := []string{"", "client"}
	for _, n := range o.sizes {
		head = append(head, fmt.Sprintf("%d processes", n))
	}
	rows := table{head}
	for _, c := range order {
		row := []string{c.way, c.who}
		for _, t := range found[c] {
			row = append(row, t.String())
		}
		rows = append(rows, row)
	}
	rep.add(fmt.Sprintf("Time to name the owner of one connection. %d times, a complete answer at L3 needed a search.", searched), rows)

	worst := func(q float64, whos []string, what string) (most float64) {
		for _, who := range whos {
			for _, t := range found[cell{what, who}] {
				most = max(most, float64(t.at(q))/1e3)
			}
		}
		return most
	}
	all := []string{"oldest", "middle", "newest"}
	anew := []string{"new process"}
	alone := "L3, the witness alone"
	rep.goal("the witness alone, p50", 20, worst(.5, all, alone), "%.1f µs")
	rep.goal("the witness alone, p99", 100, worst(.99, all, alone), "%.1f µs")
	var growth float64
	for _, who := range all {
		t := found[cell{alone, who}]
		growth = max(growth, float64(t[len(t)-1].at(.5)-t[0].at(.5))/1e3)
	}
	rep.goal(fmt.Sprintf("the witness alone, growth of p50 from %d to %d processes", o.sizes[0], o.sizes[len(o.sizes)-1]),
		max(1, .2*float64(found[cell{alone, "newest"}][0].at(.5))/1e3), growth, "%.2f µs")
	files := float64(found[cell{"L3, " + bare, anew[0]}][0].at(.5)) / 1e3
	rep.goal("new client at L3, complete, as a multiple of reading its files", 2, worst(.5, anew, "L3, "+first)/files, "%.1fx")
	rep.goal("new client at L3, complete, p50", 150, worst(.5, anew, "L3, "+first), "%.0f µs")
	rep.goal("new client at L3, complete, p99", 500, worst(.99, anew, "L3, "+first), "%.0f µs")
	rep.goal("new client at L3 whose parents are known, p50", 150, worst(.5, anew, "L3, "+sibling), "%.0f µs")
	rep.goal("its second connection, p50", 10, worst(.5, anew, "L3, "+second), "%.0f µs")
	rep.goal("without eBPF, audit's quick answer of a new client, p50", 300, worst(.5, anew, "L1, "+first), "%.0f µs")
	return nil
}

// What is asked of a new client.
const (
	first   = "first connection"
	sibling = "first, parents known" // read for another client's, within 50 ms
	second  = "second, within 50 ms"
	third   = "third, later"
	// The measure of the first: nobody reads a process with less.
	bare = "no more than to read its files"
)

// freshOrder is what three new clients do.
var freshOrder = []struct {
	what   string
	client int
}{{first, 0}, {sibling, 1}, {second, 0}, {third, 0}, {bare, 2}}

// notFresh is more than what was read of a process serves again.
const notFresh = 60 * time.Millisecond

// fresh asks for the owners of connections of processes that are new each time: quick answers below level 3, and there
// complete ones. Nothing of the first one's parents has been read within 50 ms.
func (s *stage) fresh(ctx context.Context, rep *attributionReport, n int, note func(string, times)) (searched int, err error) {
	runtime.GC()
	if err := rep.quiet.wait(ctx); err != nil {
		return 0, err
	}
	took := map[string]times{}
	one := func() (err error) {
		var clients [3]*asker
		defer func() {
			for _, a := range clients {
				if a != nil {
					err = errors.Join(err, a.close())
				}
			}
		}()
		for i := range clients {
			if clients[i], err = startAsker(s.lab.Instance); err != nil {
				return err
			}
		}
		for _, turn := range freshOrder {
			if turn.what == first || turn.what == third || turn.what == bare {
				time.Sleep(notFresh)
			}
			a := clients[turn.client]
			err := s.asks(a, func(c accepted) error {
				var err error
				from := time.Now()
				switch {
				case turn.what == bare:
					err = readFiles(a.cmd.Process.Pid)
				case s.finder.Level() == attribution.Level3:
					var more bool
					more, err = s.references(a, c.who)
					if more {
						searched++
					}
				default:
					err = s.byOwner(a, c.who)
				}
				took[turn.what] = append(took[turn.what], time.Since(from))
				return rep.judge(err)
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	for range n {
		if err := one(); err != nil {
			return searched, err
		}
		if ctx.Err() != nil {
			return searched, context.Cause(ctx)
		}
	}
	if note != nil {
		for _, turn := range freshOrder {
			note(turn.what, took[turn.what])
		}
	}
	return searched, nil
}

// readFiles makes the system calls by which a process is read so that it cannot be another one meanwhile, and nothing
// else.
func readFiles(pid int) error {
	dir, err := unix.Open("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var buf [4096]byte
	var st unix.Stat_t
	var errs [9]error
	read := func(name string) error {
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Read(fd, buf[:])
		return err
	}
	stat, err := unix.Openat(dir, "stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(stat)
	image := func() (err error) {
		if _, err = unix.Pread(stat, buf[:], 0); err != nil {
			return err
		}
		return unix.Fstatat(dir, "exe", &st, 0)
	}
	errs[0] = image()
	var n int
	n, errs[1] = unix.Readlinkat(dir, "exe", buf[:])
	errs[2] = unix.Stat(string(buf[:max(n, 0)]), &st)
	for i, name := range []string{"ns/user", "cwd"} {
		_, errs[3+i] = unix.Readlinkat(dir, name, buf[:])
	}
	for i, name := range []string{"cmdline", "status", "cgroup"} {
		errs[5+i] = read(name)
	}
	errs[8] = image()
	return errors.Join(errs[:]...)
}

// knownForLong asks about one connection again and again, for a profile.
func (s *stage) knownForLong(ctx context.Context, rep *attributionReport, n int) error {
	a, err := startAsker(s.lab.Instance)
	if err != nil {
		return err
	}
	defer a.close()
	return s.asks(a, func(c accepted) error {
		for range 100 * n {
			if _, err := s.references(a, c.who); err != nil || ctx.Err() != nil {
				return err
			}
		}
		return nil
	})
}

// connects measures what the witness costs those who connect, by turns with it and without.
func (s *stage) connects(ctx context.Context, o attributionOptions, rep *attributionReport) (err error) {
	a, err := startAsker(s.lab.Instance)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.close()) }()
	for _, ln := range []func(){drain(s.proxy), drain(s.other)} {
		defer ln()
	}
	to := []struct {
		what    string
		address string
		most    float64
	}{{"the endpoint", endpoint.String(), 2}, {"another address", beside.String(), .5}}
	type pair struct{ without, with, more []float64 }
	got := make([]pair, len(to))
	for round := range o.rounds {
		if err := rep.quiet.wait(ctx); err != nil {
			return err
		}
		var us [2][2]float64
		for k := range 2 {
			with := (k + round) % 2
			if with == 1 {
				if err := s.watch(); err != nil {
					return err
				}
			}
			for i, t := range to {
				if err := a.tell(orderMeasure, t.address, o.n); err != nil {
					return err
				}
				ns, err := a.done()
				if err != nil {
					return err
				}
				us[i][with] = float64(ns[0]) / 1e3
			}
			if err := s.unwatch(); err != nil {
				return err
			}
		}
		for i := range to {
			g := &got[i]
			g.without, g.with = append(g.without, us[i][0]), append(g.with, us[i][1])
			g.more = append(g.more, us[i][1]-us[i][0])
		}
	}
	rows := table{{"connect(2) to", "without", "with", "difference", "(quartiles)"}}
	for i, t := range to {
		g := got[i]
		rows = append(rows, []string{t.what, fmt.Sprintf("%.1f", middle(g.without, .5)), fmt.Sprintf("%.1f", middle(g.with, .5)),
			fmt.Sprintf("%+.2f", middle(g.more, .5)), fmt.Sprintf("%+.2f to %+.2f", middle(g.more, .25), middle(g.more, .75))})
		rep.goal("the witness adds to a connect to "+t.what, t.most, middle(g.more, .5), "%+.2f µs")
	}
	rep.add(fmt.Sprintf("connect(2) without the witness and with it, in µs: medians of %d rounds of %d; the difference is the median of the rounds'.", o.rounds, o.n), rows)
	return nil
}
