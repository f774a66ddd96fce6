package diag

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

func socketInode(fd int) (uint32, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return uint32(st.Ino), err
}

func dialMapped(dst netip.AddrPort) (int, error) { return dialFamily(unix.AF_INET6, "", dst) }

// dialFamily connects with a socket of that family, which for AF_INET6 may be a
// v4-mapped one, bound to a device unless it is "". Reads end after two seconds.
func dialFamily(family int, device string, dst netip.AddrPort) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var to unix.Sockaddr = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	if family == unix.AF_INET {
		to = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()}
	}
	if device != "" {
		err = unix.BindToDevice(fd, device)
	}
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2})
	}
	if err == nil {
		err = unix.Connect(fd, to)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func closeFD(fd int) { unix.Close(fd) }

func ptr(b *[16]byte) unsafe.Pointer { return unsafe.Pointer(b) }
