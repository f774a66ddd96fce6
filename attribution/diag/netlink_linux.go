package diag

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// answerTimeout bounds one answer of the kernel. It answers inside the write
// call, so a longer wait means that the answer was lost.
const answerTimeout = 100 // milliseconds

// A wire is one kept netlink socket with one question under way at a time. It
// answers for the network namespace in which it was opened.
type wire struct {
	fd  int
	seq uint32
	buf [8192]byte
}

func (w *wire) open(protocol int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	w.fd = fd
	if err != nil {
		return err
	}
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: answerTimeout * 1000})
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		w.close()
	}
	return err
}

// close may be called twice.
func (w *wire) close() error {
	if w.fd < 0 {
		return nil
	}
	err := unix.Close(w.fd)
	w.fd = -1
	return err
}

// header begins a question of size bytes.
func (w *wire) header(b []byte, typ, flags uint16, size int) []byte {
	w.seq++
	b = binary.NativeEndian.AppendUint32(b, uint32(size))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, w.seq)
	return binary.NativeEndian.AppendUint32(b, 0)
}

// ask sends a question that has one answer. What it returns is good until the
// next question. An error that the kernel answered with is a unix.Errno.
func (w *wire) ask(req []byte) (typ uint16, payload []byte, err error) {
	if _, err := unix.Write(w.fd, req); err != nil {
		return 0, nil, err
	}
	for {
		n, err := w.read(w.buf[:])
		if err != nil {
			return 0, nil, fmt.Errorf("no answer: %w", err)
		}
		typ, seq, payload, _, err := next(w.buf[:n])
		switch {
		case err != nil:
			return 0, nil, err
		case seq != w.seq: // the late answer to a question that timed out
		case typ != unix.NLMSG_ERROR:
			return typ, payload, nil
		default:
			if errno := errnoOf(payload); errno != 0 {
				return 0, nil, errno
			}
			return typ, nil, nil // an acknowledgement
		}
	}
}

// dump sends a question that has many answers of one type. buf is where they
// are read to; one answer must fit.
func (w *wire) dump(req, buf []byte, want uint16, each func(payload []byte) error) error {
	if _, err := unix.Write(w.fd, req); err != nil {
		return err
	}
	for {
		n, err := w.read(buf)
		if err != nil {
			return fmt.Errorf("no answer: %w", err)
		}
		for rest := buf[:n]; len(rest) > 0; {
			var typ uint16
			var seq uint32
			var payload []byte
			typ, seq, payload, rest, err = next(rest)
			switch {
			case err != nil:
				return err
			case seq != w.seq:
			case typ == unix.NLMSG_DONE:
				return nil
			case typ == unix.NLMSG_ERROR:
				return errnoOf(payload)
			case typ == want:
				if err := each(payload); err != nil {
					return err
				}
			}
		}
	}
}

func (w *wire) read(buf []byte) (int, error) {
	for {
		n, err := unix.Read(w.fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// next splits the first netlink message off b.
func next(b []byte) (typ uint16, seq uint32, payload, rest []byte, err error) {
	if len(b) < sizeofHeader {
		return 0, 0, nil, nil, fmt.Errorf("netlink message of %d bytes", len(b))
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < sizeofHeader || size > len(b) {
		return 0, 0, nil, nil, fmt.Errorf("netlink message says %d bytes, has %d", size, len(b))
	}
	typ = binary.NativeEndian.Uint16(b[4:])
	seq = binary.NativeEndian.Uint32(b[8:])
	return typ, seq, b[sizeofHeader:size], b[min((size+3)&^3, len(b)):], nil
}

// errnoOf reads the error of an NLMSG_ERROR; 0 is an acknowledgement.
func errnoOf(payload []byte) unix.Errno {
	if len(payload) < 4 {
		return unix.EIO
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
}
