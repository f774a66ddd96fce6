package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// spark starts a process that ends at once. It shares this one's memory and
// touches nothing of it (spark_amd64.s, spark_arm64.s), so that many of them are
// started in a second, and it returns its pid or -errno.
func spark() int

// storm starts as many processes as it is told.
func storm(args []string) error {
	times, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	signal.Ignore(unix.SIGCHLD) // nobody waits for the children
	ready()
	for n := range times {
		if pid := spark(); pid < 0 && unix.Errno(-pid) != unix.EAGAIN {
			return fmt.Errorf("after %d processes: %w", n, unix.Errno(-pid))
		}
	}
	fmt.Println("done", times)
	return nil
}

// flood makes connections and resets them.
func flood(most int, end time.Time) (n int, err error) {
	for n = 0; n < most && time.Now().Before(end); n++ {
		fd, err := nonblocking()
		if err != nil {
			return n, err
		}
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
	}
	return n, nil
}

func nonblocking() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, ask.Client{}.Address()); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connects floods for as many milliseconds as it is told.
func connects(args []string) error {
	ms, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	ready()
	n, err := flood(1<<30, time.Now().Add(time.Duration(ms)*time.Millisecond))
	fmt.Println("done", n)
	return err
}

// hoard makes as many connections as it is told and keeps them.
func hoard(args []string) error {
	most, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	n := 0
	for end := time.Now().Add(3 * time.Second); n < most && time.Now().Before(end); n++ {
		if _, err := nonblocking(); err != nil {
			if n == 0 {
				return err
			}
			break
		}
	}
	fmt.Println("hoards", n)
	ready()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// descriptors opens as many as it may, and asks all the time.
func descriptors(args []string) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	most, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	// Beyond those, nothing can be opened: the clients come first.
	n := 0
	for ; n < most; n++ {
		if _, err := unix.Dup(0); err != nil {
			break
		}
	}
	for fd := n - 60; fd < n-20; fd++ {
		unix.Close(fd)
	}
	// Each thread may have as many again.
	for range 6_000_000 / max(n, 1) {
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			done <- unix.Unshare(unix.CLONE_FILES)
			select {}
		}()
		if err := <-done; err != nil {
			return err
		}
	}
	fmt.Println("descriptors", n, limit.Max)
	for range 8 {
		go func() {
			for {
				if fd, err := (ask.Client{}).Connect(); err == nil {
					ask.Exchange(fd, ask.Request("flood"))
					unix.Close(fd)
				}
			}
		}()
	}
	time.Sleep(200 * time.Millisecond)
	ready()
	time.Sleep(5 * time.Second)
	return nil
}
