package witness

import (
	"errors"

	"golang.org/x/sys/unix"
)

// privilege says which capabilities to give where the kernel has refused something for
// want of the one with this number (capabilities(7)). The ebpf package guesses at
// RLIMIT_MEMLOCK instead, which is a reason before Linux 5.11 only.
func privilege(err error, number uint, names string) error {
	if !errors.Is(err, unix.EPERM) || capable(number) || capable(unix.CAP_SYS_ADMIN) {
		return err
	}
	return lack(names)
}

// lack names capabilities that something needs and that we do not all have.
type lack string

func (l lack) Error() string { return "needs " + string(l) + " (Linux before 5.8: CAP_SYS_ADMIN)" }
func (l lack) Unwrap() error { return unix.EPERM }

func capable(number uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[number/32].Effective&(1<<(number%32)) != 0
}
