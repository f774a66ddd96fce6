package main

import (
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// checkCapabilities names the capabilities that we lack (capabilities(7)), so
// that nobody has to guess from what fails later.
func checkCapabilities(activated bool) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read our capabilities: %w", err)
	}
	needed := []struct {
		number  uint
		purpose string
	}{
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN (the redirect)"},
		{unix.CAP_NET_RAW, "CAP_NET_RAW (the redirect with iptables-legacy)"},
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE (which program a client is)"},
		{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH (which process holds a socket)"},
	}
	if !activated {
		needed = append(needed, struct {
			number  uint
			purpose string
		}{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE (the ports, unless imdsgated.socket holds them)"})
	}
	var missing []string
	for _, c := range needed {
		if data[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			missing = append(missing, c.purpose)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: missing %s; packaging/systemd/imdsgated.service shows how to give them", fs.ErrPermission, strings.Join(missing, ", "))
	}
	return nil
}

// shed gives up capabilities for good, on every thread, and for the programs that we run: what
// is not in the permitted set is in none of the others (capabilities(7)). The bounding set
// takes CAP_SETPCAP, and gives nothing back where NoNewPrivileges= is set.
//
// It waits for each thread, so it must not be called while one may be asking about a process
// that is locked.
func shed(numbers ...uint) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read our capabilities: %w", err)
	}
	for _, n := range numbers {
		set := &data[n/32]
		rest := ^uint32(1 << (n % 32))
		set.Effective &= rest
		set.Permitted &= rest
		set.Inheritable &= rest
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0); errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	return nil
}
