package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// lies asks after writing whatever a process may write about itself: it has the
// name, the command line and the directory of the program with a grant.
func lies(args []string) error {
	if len(args) == 0 { // room for the command line
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return ask.Exec(self, "lies", strings.Repeat("x", 200))
	}
	if err := os.WriteFile("/proc/self/comm", []byte(filepath.Base(granted())), 0); err != nil {
		return err
	}
	if err := os.Chdir(filepath.Dir(granted())); err != nil {
		return err
	}
	line := granted() + "\x00ask\x00"
	first, last := unsafe.StringData(os.Args[0]), unsafe.StringData(args[0])
	size := uintptr(unsafe.Pointer(last)) - uintptr(unsafe.Pointer(first)) + uintptr(len(args[0]))
	memory := unsafe.Slice(first, size) // the runtime does not copy the arguments
	clear(memory)
	if copy(memory, line) != len(line) {
		return errors.New("no room for the command line")
	}
	shown, err := os.ReadFile("/proc/self/cmdline")
	if err != nil || !bytes.HasPrefix(shown, []byte(line)) {
		return fmt.Errorf("the command line is %q: %w", shown, err)
	}
	return plain(nil)
}

// copySelf copies this program into an open file.
func copySelf(to *os.File) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	_, err = io.Copy(to, self)
	return err
}

// memfd runs a copy of itself that has never had a path.
func memfd([]string) error {
	fd, err := unix.MemfdCreate(strings.TrimPrefix(granted(), "/"), 0)
	if err != nil {
		return err
	}
	if err := copySelf(os.NewFile(uintptr(fd), "memfd")); err != nil {
		return err
	}
	return ask.Exec("/proc/self/fd/"+strconv.Itoa(fd), "plain")
}

// deleted runs a copy of itself whose path is gone.
func deleted(args []string) error {
	if len(args) > 0 {
		if err := os.RemoveAll(args[0]); err != nil {
			return err
		}
		return plain(nil)
	}
	f, err := os.CreateTemp(os.Getenv(ask.Dir), "deleted")
	if err != nil {
		return err
	}
	if err := errors.Join(copySelf(f), f.Chmod(0o755), f.Close()); err != nil {
		return err
	}
	return ask.Exec(f.Name(), "deleted", f.Name())
}

// inside runs this program again, in namespaces of its own.
func inside(namespaces uintptr, args ...string) error {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	own := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces | unix.CLONE_NEWUSER, UidMappings: own, GidMappings: own}
	return cmd.Run()
}

// mount shows itself under the path of the program with a grant.
func mount([]string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return inside(unix.CLONE_NEWNS, "mounted", self)
}

func mounted(args []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount(args[0], granted(), "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return ask.Exec(granted(), "plain")
}

// curl runs a curl that has a grant, with arguments of the attacker's.
func curl(args []string) error { return curled(args[0]) }

func curled(program string, before ...string) error {
	args := append(before, "-s", "-m", "4", "-A", os.Getenv(ask.Name), "-H", "X-aws-ec2-metadata-token: "+os.Getenv(ask.Token), "-w", "\n%{http_code}", "-K", "-")
	cmd := exec.Command(program, args...)
	cmd.Stdin = strings.NewReader("url = " + ask.URL) // no rule is to see it
	ready()
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	i := bytes.LastIndexByte(out, '\n')
	status, err := strconv.Atoi(string(out[i+1:]))
	ask.Answer{Status: status, Secret: status == 200 && bytes.Contains(out, []byte("SecretAccessKey")), Err: err}.Tell()
	return nil
}

// applet runs a program that is many, by a name of one's own choice.
func applet([]string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	dir, err := os.MkdirTemp("", "applet")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, filepath.Base(granted()))
	if err := os.Symlink(busybox, name); err != nil {
		return err
	}
	cmd := exec.Command(name, "-q", "-O", "-", "-U", os.Getenv(ask.Name), "--header", "X-aws-ec2-metadata-token: "+os.Getenv(ask.Token), ask.URL)
	cmd.Args[0] = "wget"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	ready()
	out, err := cmd.Output()
	a := ask.Answer{Status: 200, Secret: bytes.Contains(out, []byte("SecretAccessKey"))}
	if err != nil {
		a = ask.Answer{Err: fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))}
		if bytes.Contains(stderr.Bytes(), []byte(" 403 ")) {
			a = ask.Answer{Status: 403}
		}
	}
	a.Tell()
	return nil
}

// loader has the dynamic loader run that curl.
func loader(args []string) error {
	f, err := elf.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name := make([]byte, p.Filesz-1)
			if _, err := p.ReadAt(name, 0); err != nil {
				return err
			}
			return curled(string(name), args[0])
		}
	}
	return fmt.Errorf("%s has no dynamic loader", args[0])
}

// argv has newlines in its arguments, and one of the largest there can be.
func argv(args []string) error {
	if len(args) > 0 {
		return plain(nil)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	const most = 128<<10 - 1 // MAX_ARG_STRLEN, with the NUL (execve(2))
	return ask.Exec(self, "argv", "\n{\"event\":{\"reason\":\"granted by app\"}}\n", strings.Repeat("\n", most))
}
