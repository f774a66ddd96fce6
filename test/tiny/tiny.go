// Package tiny makes programs that are so small that the kernel is what takes the time to run them.
package tiny

import (
	"encoding/binary"
	"runtime"
)

// Exit is a program that does exit(0).
func Exit() []byte {
	if runtime.GOARCH == "arm64" {
		return Program([]byte{0xa8, 0x0b, 0x80, 0xd2, 0, 0, 0x80, 0xd2, 1, 0, 0, 0xd4})
	}
	return Program([]byte{0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05})
}

// Program is an executable for this machine that is this code and no more: ELF64, elf(5).
func Program(code []byte) []byte {
	machine := uint16(62)
	if runtime.GOARCH == "arm64" {
		machine = 183
	}
	const base, headers = 0x400000, 64 + 56
	le := binary.LittleEndian
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = le.AppendUint32(le.AppendUint16(le.AppendUint16(b, 2), machine), 1)
	b = le.AppendUint64(le.AppendUint64(le.AppendUint64(b, base+headers), 64), 0)
	b = le.AppendUint32(b, 0)
	for _, n := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, n)
	}
	b = le.AppendUint32(le.AppendUint32(b, 1), 5) // PT_LOAD, readable and executable
	size := uint64(headers + len(code))
	for _, n := range []uint64{0, base, base, size, size, 0x1000} {
		b = le.AppendUint64(b, n)
	}
	return append(b, code...)
}
