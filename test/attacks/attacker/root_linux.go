package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// Attacks that root sets up; the request is an ordinary user's.

// become changes the user of this thread alone.
func become(uid int) error {
	for _, c := range ask.Become(uid) {
		if err := c.Do(); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	return nil
}

// mixed asks in a thread of another user than the rest of the process.
func mixed(args []string) error {
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := become(uid)
		if err == nil {
			err = plain(nil)
		}
		done <- err
	}()
	return <-done
}

// pid asks in a process that has the number of one with a grant that has just
// asked, if need be within the same tick of its start.
func pid(args []string) error {
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	first := exec.Command(granted(), "ask")
	first.Env = append(os.Environ(), ask.Name+"="+os.Getenv(ask.Name)+"-before")
	first.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	out, err := first.Output()
	if err == nil && strings.Contains(string(out), "result 403") {
		fmt.Println("refused")
		return nil
	}
	if err != nil || !strings.Contains(string(out), "result secret") {
		return fmt.Errorf("the program with a grant got %q: %w", out, err)
	}
	again, err := ask.Execute(self, "plain")
	if err != nil {
		return err
	}
	if err := ask.ForkAs(first.Process.Pid, append(ask.Become(uid), again)...); err != nil {
		return err
	}
	return ask.Wait(first.Process.Pid)
}

// heir asks on the connection of a program with a grant, which has ended, in a process
// that has got its number, and has executed as often.
func heir(args []string) error {
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	owner := exec.Command(granted(), "keep", os.Getenv(ask.Name)+"-before")
	owner.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	out, err := owner.StdoutPipe()
	if err != nil {
		return err
	}
	if _, err := owner.StdinPipe(); err != nil { // it ends with its input
		return err
	}
	if err := owner.Start(); err != nil {
		return err
	}
	defer owner.Process.Kill()
	var theirs string
	for lines := bufio.NewScanner(out); theirs == ""; {
		if !lines.Scan() {
			return errors.New("the program with a grant keeps no connection")
		}
		if said, ok := strings.CutPrefix(lines.Text(), "keeps "); ok {
			theirs, _, _ = strings.Cut(said, " ")
		}
	}
	taken, err := steal([]string{strconv.Itoa(owner.Process.Pid), theirs})
	if err != nil {
		return err
	}
	fd, err := unix.Dup(taken) // without close-on-exec
	if err != nil {
		return err
	}
	unix.Close(taken)
	owner.Process.Kill()
	owner.Wait()
	again, err := ask.Execute(self, "on", strconv.Itoa(fd))
	if err != nil {
		return err
	}
	if err := ask.ForkAs(owner.Process.Pid, append(ask.Become(uid), again)...); err != nil {
		return err
	}
	unix.Close(fd)
	return ask.Wait(owner.Process.Pid)
}

// on asks on a connection that it was born with.
func on(args []string) error {
	fd, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	try(fd)
	return nil
}

// unit runs a program that has a grant by unit in a cgroup with the name of the
// unit: one that root made ("system"), or one that the ordinary user made in a
// directory that is his ("delegated"), or in that of his manager ("manager").
func unit(args []string) (err error) {
	kind, program := args[0], args[1]
	uid, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	root, err := cgroupfs()
	if err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	own := ""
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/"); ok {
			own = p
		}
	}
	dirs, his := map[string][]string{
		"system":    {"system.slice", "granted.service"},
		"delegated": {"delegated", "granted.service"},
		"manager":   {"user.slice", "user-4321.slice", "user@4321.service", "granted.service"},
	}[kind], kind != "system"
	at := own
	for i, dir := range dirs {
		at = path.Join(at, dir)
		if his && i == len(dirs)-1 {
			break
		}
		if err := unix.Mkdirat(root, at, 0o755); err != nil {
			return fmt.Errorf("make cgroup %s: %w", at, err)
		}
		defer func(at string) { err = errors.Join(err, unix.Unlinkat(root, at, unix.AT_REMOVEDIR)) }(at)
	}
	if his {
		for _, file := range []string{"", "cgroup.procs"} {
			if err := unix.Fchownat(root, path.Join(path.Dir(at), file), uid, uid, 0); err != nil {
				return err
			}
		}
	}
	entry := at
	if his {
		entry = path.Dir(at)
		defer func() { err = errors.Join(err, unix.Unlinkat(root, at, unix.AT_REMOVEDIR)) }()
	}
	if err := enter(root, entry); err != nil {
		return err
	}
	defer func() { err = errors.Join(enter(root, own), err) }()
	cmd := exec.Command("/proc/self/exe", "entered", program, args[2], at)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, []*os.File{os.NewFile(uintptr(root), "cgroup2")}
	return cmd.Run()
}

// entered is the rest of unit: it becomes the user, moves itself into a directory
// that it makes if there is none, and runs the program.
func entered(args []string) error {
	program, at := args[0], args[2]
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	const root = 3
	if err := become(uid); err != nil {
		return err
	}
	switch err := unix.Mkdirat(root, at, 0o755); {
	case err == nil:
		if err := enter(root, at); err != nil {
			return err
		}
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make cgroup %s: %w", at, err)
	}
	unix.CloseOnExec(root)
	return ask.Exec(program, "ask")
}

// cgroupfs is the root of cgroup2, attached to no path.
func cgroupfs() (int, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
}

// enter moves this process into a cgroup.
func enter(root int, dir string) error {
	fd, err := unix.Openat(root, path.Join(dir, "cgroup.procs"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("0"))
	return err
}
