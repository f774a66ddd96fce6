package witness

import (
	"fmt"
	"runtime"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// noPrealloc is BPF_F_NO_PREALLOC: memory for what is there, not for what could be.
// With 65,536 sockets the maps would take 20 MB of the host else. What cannot be had
// at that moment is counted with what does not fit.
const noPrealloc = 1

// mmapable is BPF_F_MMAPABLE.
const mmapable = 1 << 10

// mapSpecs is the plan of all maps.
func mapSpecs(sockets uint32) map[string]*ebpf.MapSpec {
	hash := func(key, value uintptr, entries uint32) *ebpf.MapSpec {
		return &ebpf.MapSpec{Type: ebpf.Hash, KeySize: uint32(key), ValueSize: uint32(value), MaxEntries: entries, Flags: noPrealloc}
	}
	specs := map[string]*ebpf.MapSpec{
		"connectors": hash(8, unsafe.Sizeof(record{}), sockets),
		"tuples":     hash(unsafe.Sizeof(tuple{}), unsafe.Sizeof(record{}), sockets),
		"namespaces": hash(8, unsafe.Sizeof(namespace{}), maxNamespaces),
		"coverage":   hash(8, unsafe.Sizeof(coverage{}), maxNamespaces),
		"writers":    hash(unsafe.Sizeof(writerKey{}), unsafe.Sizeof(writer{}), max(sockets/4, 64)),
		"execs":      hash(4, unsafe.Sizeof(execution{}), maxProcesses),
		"former":     {Type: ebpf.LRUHash, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(execution{})), MaxEntries: maxFormer},
		"creators":   hash(4, unsafe.Sizeof(writer{}), maxProcesses/4),
		"wanted":     hash(8, 1, maxWanted),
		"users":      {Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(user{})), MaxEntries: 1 << usersBits, Flags: mmapable},
		"shared":     {Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(shared{})), MaxEntries: 1, Flags: mmapable},
		"events":     {Type: ebpf.RingBuf, MaxEntries: 1 << 18},
	}
	for name, spec := range specs {
		spec.Name = "imds_" + name // 15 bytes (BPF_OBJ_NAME_LEN)
		spec.Name = spec.Name[:min(len(spec.Name), 15)]
	}
	return specs
}

// lookups are what bpf(2) reads and writes. They are on the heap, since a stack can
// move while the kernel has addresses as numbers.
var lookups = sync.Pool{New: func() any { return new(lookup) }}

// lookup asks for one element of a map without allocating or reflecting, which the
// package ebpf does.
type lookup struct {
	attr struct { // union bpf_attr for BPF_MAP_LOOKUP_ELEM
		fd         uint32
		_          uint32
		key, value uint64
		flags      uint64
	}
	tuple     tuple
	cookie    uint64
	pid       uint32
	writer    writerKey
	record    record
	actor     writer
	execution execution
}

// get reports whether the key is in the map, and copies its value.
func (l *lookup) get(fd int, key, value unsafe.Pointer) (bool, error) {
	l.attr.fd, l.attr.key, l.attr.value = uint32(fd), uint64(uintptr(key)), uint64(uintptr(value))
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_LOOKUP_ELEM, uintptr(unsafe.Pointer(&l.attr)), unsafe.Sizeof(l.attr))
	runtime.KeepAlive(l)
	switch errno {
	case 0:
		return true, nil
	case unix.ENOENT:
		return false, nil
	}
	return false, fmt.Errorf("look up in a BPF map: %w", errno)
}
