package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where a run took place.
type machine struct {
	CPU       string
	Cores     int
	Kernel    string
	Go        string
	Processes int // that slept beside the run
}

func describe(sleeping int) (machine, error) {
	m := machine{CPU: runtime.GOARCH, Cores: runtime.NumCPU(), Go: runtime.Version(), Processes: sleeping}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(info)) { // arm64 has no such line
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	return m, nil
}

// String is the first line of a report.
func (m machine) String() string {
	beside := ""
	if m.Processes > 0 {
		beside = fmt.Sprintf(", %d sleeping processes", m.Processes)
	}
	return fmt.Sprintf("%s, %d cores%s; Linux %s, %s", m.CPU, m.Cores, beside, m.Kernel, m.Go)
}

// busySeconds is how long all CPUs together have worked since the machine was started, in ticks of 10 ms.
func busySeconds() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	fields := strings.Fields(string(line))
	var ticks float64
	for i, f := range fields[1:] {
		const idle, iowait, guest = 3, 4, 8 // a guest's time is in user's, too: proc_stat(5)
		if i == idle || i == iowait || i >= guest {
			continue
		}
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	return ticks / 100, nil
}

// quiet holds blocks back while somebody else uses the machine.
type quiet struct {
	left   time.Duration // to wait in the whole run
	blocks int
	busy   int // of them, that began on a busy machine
}

const (
	// watchFor is six ticks of the clock that busySeconds reads.
	watchFor = 60 * time.Millisecond
	// busyShare is of all CPUs. Lower, and the targets' own aftermath counts; higher, and a compiler's start does not.
	busyShare = 0.25
	// waitAtMost for one block.
	waitAtMost = 3 * time.Second
)

func (q *quiet) wait(ctx context.Context) error {
	q.blocks++
	for begin := time.Now(); ; {
		from, err := busySeconds()
		if err != nil {
			return err
		}
		at := time.Now()
		select {
		case <-time.After(watchFor):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		to, err := busySeconds()
		if err != nil {
			return err
		}
		took := time.Since(at)
		if to-from <= busyShare*took.Seconds()*float64(runtime.NumCPU()) {
			return nil
		}
		if q.left -= took; q.left <= 0 || time.Since(begin) > waitAtMost {
			q.busy++
			return nil
		}
	}
}

// tree is a process and its descendants, as they were when they were looked for.
type tree []int

func treeOf(root int) (tree, error) {
	all := tree{root}
	for i := 0; i < len(all); i++ {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", all[i]))
		if err != nil {
			return nil, err
		}
		for _, list := range lists {
			pids, _ := os.ReadFile(list) // of a thread that has ended
			for _, f := range strings.Fields(string(pids)) {
				pid, err := strconv.Atoi(f)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", list, err)
				}
				all = append(all, pid)
			}
		}
	}
	return all, nil
}

// cpu is the CPU time of the tree so far, to the nanosecond, threads that have ended included.
func (t tree) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, pid := range t {
		var ts unix.Timespec
		// The clock of a process: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) in include/linux/posix-timers_types.h.
		if err := unix.ClockGettime(int32(^pid)<<3|2, &ts); err != nil {
			return 0, fmt.Errorf("read the clock of process %d: %w", pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum, nil
}

// memory is the resident memory of the tree in bytes. What processes share is counted for each.
func (t tree) memory() (int64, error) {
	var sum int64
	for _, pid := range t {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(string(b))
		if len(fields) < 2 {
			return 0, fmt.Errorf("/proc/%d/statm is %q", pid, b)
		}
		pages, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += pages * int64(os.Getpagesize())
	}
	return sum, nil
}

// sleepers are processes that do nothing, as most of a host's do, but have to be looked through. A child starts them,
// because a parent has a descriptor of each, and a client with thousands would be measured.
type sleepers struct {
	cmd *exec.Cmd
	end io.WriteCloser
	out io.Reader
	n   int
}

// descriptors of each sleeper: a small service's.
const descriptors = 20

func startSleepers(n int) (*sleepers, error) {
	s := &sleepers{cmd: exec.Command("/proc/self/exe", "sleepers")}
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var err error
	if s.out, err = s.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	if s.end, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if err := s.grow(n); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// grow starts more of them, until there are n.
func (s *sleepers) grow(n int) error {
	if n <= s.n {
		return nil
	}
	_, err := fmt.Fprintln(s.end, n-s.n)
	if err == nil {
		_, err = io.ReadFull(s.out, make([]byte, len(asleep)))
	}
	if err != nil {
		return fmt.Errorf("start %d sleeping processes: %w", n-s.n, err)
	}
	s.n = n
	return nil
}

func (s *sleepers) close() error {
	s.end.Close()
	return s.cmd.Wait()
}

// asleep is what the child says when it has started as many as it was told.
const asleep = "asleep\n"

// sleep is the child. It is told numbers, ends with its standard input, and its own children with it.
func sleep(in io.Reader) error {
	signal.Ignore(unix.SIGINT) // of a terminal, which is for the parent
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	var all []*exec.Cmd
	defer func() {
		for _, cmd := range all {
			cmd.Process.Kill()
		}
		for _, cmd := range all {
			cmd.Wait()
		}
	}()
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		n, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		for range n {
			cmd := exec.Command("sleep", strconv.Itoa(int(2*maxRun.Seconds())))
			for range descriptors - 3 {
				cmd.ExtraFiles = append(cmd.ExtraFiles, null)
			}
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
			if err := cmd.Start(); err != nil {
				return err
			}
			all = append(all, cmd)
		}
		fmt.Print(asleep)
	}
	return lines.Err()
}
