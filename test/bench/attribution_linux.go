package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const attributionHelp = `usage: bench attribution [options]

Measures how long it takes to name the owner of a connection, beside ss, lsof and a scan of /proc, on hosts with more
and more processes; what the witness costs a client; and what attribution bears. Every answer is compared with what
the client says of itself. Prints tables in Markdown. Everything happens in a network namespace and a cgroup of its
own; the sleeping processes are ordinary ones. Needs root, eBPF and iptables; ss and lsof are left out if they are not
installed. The machine should have nothing else to do. With what is default it takes about eight minutes.

  --sizes LIST   sleeping processes on the host, in ascending order (default 100,1000,5000,10000)
  --n N          answers of each kind; slow ones are fewer (default 300)
  --rounds N     of connects with the witness and without it (default 21)
  --load N       seconds of 1,000 connections a second (default 60)
  --spawn N      seconds of 4,000 new processes a second, and of each flood (default 10)
  --profile FILE write a CPU profile of new clients at level 3, and of known ones to FILE.known, and nothing else
  -h, --help     show this help

The exit status is 1 if an answer was wrong or something could not be measured. That a goal is missed does not change it.
`

type attributionOptions struct {
	sizes                  []int
	n, rounds, load, spawn int
	profile                string
}

func parseAttribution(args []string) (attributionOptions, error) {
	var o attributionOptions
	flags := flag.NewFlagSet("bench attribution", flag.ContinueOnError)
	flags.Usage = func() {}
	flags.SetOutput(io.Discard)
	sizes := flags.String("sizes", "100,1000,5000,10000", "")
	flags.IntVar(&o.n, "n", 300, "")
	flags.IntVar(&o.rounds, "rounds", 21, "")
	flags.IntVar(&o.load, "load", 60, "")
	flags.IntVar(&o.spawn, "spawn", 10, "")
	flags.StringVar(&o.profile, "profile", "", "")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	for s := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 2 || n > 10000 || len(o.sizes) > 0 && n <= o.sizes[len(o.sizes)-1] {
			return o, errors.New("--sizes: want ascending numbers from 2 to 10000")
		}
		o.sizes = append(o.sizes, n)
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q: see --help", flags.Arg(0))
	case o.n < 1 || o.n > 10000:
		return o, errors.New("--n: want 1 to 10000")
	case o.rounds < 1 || o.rounds > 1000:
		return o, errors.New("--rounds: want 1 to 1000")
	case o.load < 1 || o.load > 600:
		return o, errors.New("--load: want 1 to 600")
	case o.spawn < 1 || o.spawn > 600:
		return o, errors.New("--spawn: want 1 to 600")
	}
	return o, nil
}

func attributionMain(args []string) error {
	o, err := parseAttribution(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(attributionHelp)
		return nil
	}
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes network namespaces and loads BPF programs")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, maxRun, fmt.Errorf("not done after %v", maxRun))
	defer cancel()
	rep := &attributionReport{}
	if rep.machine, err = describe(0); err != nil {
		return err
	}
	if err := measureAttribution(ctx, o, rep, os.Stderr); err != nil {
		return err
	}
	if o.profile == "" {
		rep.markdown(os.Stdout)
	}
	if rep.wrong > 0 {
		return fmt.Errorf("wrong answers: %d, the first: %w", rep.wrong, rep.first)
	}
	return nil
}

func measureAttribution(ctx context.Context, o attributionOptions, rep *attributionReport, progress io.Writer) (err error) {
	s, err := newStage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	// A signal ends what waits for a client, too.
	go func() {
		<-ctx.Done()
		s.proxy.Close()
	}()
	if o.profile != "" {
		return s.profile(ctx, o)
	}
	for _, part := range []struct {
		what string
		do   func(context.Context, attributionOptions, *attributionReport) error
	}{
		{"connects with the witness and without", s.connects},
		{"owners of connections", s.owners},
		{"a table of processes, and new ones", s.spawns},
		{"many connections with the witness", s.bears},
		{"a flood without it", s.flooded},
	} {
		fmt.Fprintln(progress, part.what)
		if err := part.do(ctx, o, rep); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("%s: %w", part.what, err)
		}
	}
	return nil
}

// attributionReport is a whole run.
type attributionReport struct {
	machine machine
	quiet   quiet
	parts   []part
	goals   []attributionGoal
	wrong   int
	first   error
}

type part struct {
	title string
	rows  table
}

// attributionGoal is one of those of the project. Times are in microseconds.
type attributionGoal struct {
	what      string
	most, got float64
	format    string
}

func (r *attributionReport) add(title string, rows table) {
	r.parts = append(r.parts, part{title, rows})
}

func (r *attributionReport) goal(what string, most, got float64, format string) {
	r.goals = append(r.goals, attributionGoal{what, most, got, format})
}

// judge counts a wrong answer, and gives back another error.
func (r *attributionReport) judge(err error) error {
	if !errors.Is(err, errWrong) {
		return err
	}
	if r.wrong++; r.first == nil {
		r.first = err
	}
	return nil
}

func (r *attributionReport) markdown(w io.Writer) {
	fmt.Fprintf(w, "%s.\n%d of %d blocks began while the machine was busy. Times are p50 (p99) of what was asked, with %d descriptors for each process.\n",
		r.machine, r.quiet.busy, r.quiet.blocks, descriptors)
	for _, p := range r.parts {
		fmt.Fprintf(w, "\n%s\n\n", p.title)
		p.rows.print(w)
	}
	rows := table{{"goal", "at most", "measured", "holds"}}
	for _, g := range r.goals {
		holds := "yes"
		if g.got > g.most {
			holds = "no"
		}
		rows = append(rows, []string{g.what, fmt.Sprintf(g.format, g.most), fmt.Sprintf(g.format, g.got), holds})
	}
	fmt.Fprintf(w, "\n%d wrong answers.\n\n", r.wrong)
	rows.print(w)
}

// short is a time with two or three digits.
func short(d time.Duration) string {
	us := float64(d) / float64(time.Microsecond)
	switch {
	case d == 0:
		return ""
	case us < 10:
		return fmt.Sprintf("%.1f µs", us)
	case us < 1000:
		return fmt.Sprintf("%.0f µs", us)
	case us < 10_000:
		return fmt.Sprintf("%.1f ms", us/1e3)
	}
	return fmt.Sprintf("%.0f ms", us/1e3)
}

// profile writes where the time goes.
func (s *stage) profile(ctx context.Context, o attributionOptions) error {
	rep := new(attributionReport)
	if err := s.sleepers.grow(o.sizes[0]); err != nil {
		return err
	}
	if err := s.watch(); err != nil {
		return err
	}
	if err := s.find(3); err != nil {
		return err
	}
	for _, p := range []struct {
		file string
		do   func() error
	}{
		{o.profile, func() error { _, err := s.fresh(ctx, rep, o.n, nil); return err }},
		{o.profile + ".known", func() error { return s.knownForLong(ctx, rep, o.n) }},
	} {
		f, err := os.Create(p.file)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		err = p.do()
		pprof.StopCPUProfile()
		if err != nil {
			return err
		}
	}
	return nil
}
