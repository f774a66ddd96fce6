// Command confine executes a program that may make some system calls only, as systemd does
// for SystemCallFilter=; others fail with EPERM. What the architecture does not have is no
// mistake.
//
//	confine read,write,... PROGRAM ARGUMENTS
package main

import (
	"fmt"
	"os"
	"strings"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "confine:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: confine NAME,... PROGRAM [ARGUMENT...]")
	}
	native, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	var names []string
	for name := range strings.SplitSeq(args[0], ",") {
		if _, ok := native.SyscallNames[name]; ok {
			names = append(names, name)
		}
	}
	err = seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionErrno,
		Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: names}},
	}})
	if err != nil {
		return fmt.Errorf("allow %d system calls: %w", len(names), err)
	}
	return fmt.Errorf("execute %s: %w", args[1], unix.Exec(args[1], args[1:], os.Environ()))
}
