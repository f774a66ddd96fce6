package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// evictTimeout bounds the wait for killed processes to leave. A process in an uninterruptible sleep takes as long as
// its sleep; longer than this, Close reports it instead of hanging a test run.
const evictTimeout = 5 * time.Second

// evict kills every process that has a thread in one of the namespaces, this one excepted, until none is left. A
// zombie is no longer in any namespace; reaping it is its parent's.
func evict(from []*Namespace) error {
	inodes := make(map[uint64]*Namespace, len(from))
	for _, n := range from {
		inodes[n.inode] = n
	}
	deadline := time.Now().Add(evictTimeout)
	for {
		left, err := inhabitants(inodes)
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v are still in the lab %v after SIGKILL", left, evictTimeout)
		}
		for _, pid := range left {
			if err := kill(pid, inodes); err != nil {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func inhabitants(inodes map[uint64]*Namespace) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && inhabits(pid, inodes) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// inhabits reports whether a thread of the process is in one of the namespaces. What ended meanwhile is not.
func inhabits(pid int, inodes map[uint64]*Namespace) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/ns/net", pid))
	for _, task := range tasks {
		link, err := os.Readlink(task)
		if err != nil {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(link, "net:["), "]"), 10, 64)
		if err == nil && inodes[inode] != nil {
			return true
		}
	}
	return false
}

// kill checks the process again after taking a descriptor of it, so that a reused number hits nobody else.
func kill(pid int, inodes map[uint64]*Namespace) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !inhabits(pid, inodes) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}
