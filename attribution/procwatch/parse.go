package procwatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Kinds of event (enum what in include/uapi/linux/cn_proc.h).
const (
	evAck  = 0x00000000
	evFork = 0x00000001
	evExec = 0x00000002
	evComm = 0x00000200
	evExit = 0x80000000
)

// Where things are in a message. The kernel writes it in its own byte order, which
// on amd64 and arm64 is little endian; conn_linux.go refuses any other.
const (
	sizeofNlmsghdr = 16
	sizeofCnMsg    = 20

	offIdx  = sizeofNlmsghdr
	offVal  = offIdx + 4
	offAck  = offVal + 8 // after seq
	offLen  = offAck + 4
	offWhat = sizeofNlmsghdr + sizeofCnMsg
	offCPU  = offWhat + 4
	offTime = offCPU + 4
	offData = offTime + 8 // the union event_data

	// fork_proc_event
	offParentTgid = offData + 4
	offChildPid   = offData + 8
	offChildTgid  = offData + 12
	// exec_proc_event, exit_proc_event and comm_proc_event begin alike
	offPid  = offData
	offTgid = offData + 4

	cnIdxProc = 1 // CN_IDX_PROC, include/uapi/linux/connector.h
	cnValProc = 1
	nlmsgDone = 3 // NLMSG_DONE, the type of everything on a connector socket
)

// event is one message of the proc connector, as far as we use it.
type event struct {
	what   uint32
	time   time.Duration // CLOCK_MONOTONIC
	pid    int32         // thread; of a fork: the child's
	tgid   int32         // process; of a fork: the child's
	parent int32         // of a fork: tgid of real_parent
	ack    uint32        // of an acknowledgement: one more than was sent
	errno  uint32        // of an acknowledgement
}

// errForeign is a message that is not from the proc connector.
var errForeign = errors.New("not a message of the proc connector")

// parseEvent reads one datagram. Later kernels may append to a message, and add
// kinds, which come back with no more than what and time.
func parseEvent(b []byte) (event, error) {
	le := binary.LittleEndian
	if len(b) < offData {
		return event{}, fmt.Errorf("message of %d bytes: %w", len(b), errForeign)
	}
	n := le.Uint32(b)
	if uint64(n) > uint64(len(b)) || n < offData || int(le.Uint16(b[offLen:])) > int(n)-offWhat {
		return event{}, fmt.Errorf("message of %d bytes says %d and %d: %w", len(b), n, le.Uint16(b[offLen:]), errForeign)
	}
	if le.Uint16(b[4:]) != nlmsgDone || le.Uint32(b[offIdx:]) != cnIdxProc || le.Uint32(b[offVal:]) != cnValProc {
		return event{}, errForeign
	}
	b = b[:offWhat+int(le.Uint16(b[offLen:]))]
	if len(b) < offData {
		return event{}, fmt.Errorf("event of %d bytes: %w", len(b)-offWhat, errForeign)
	}
	e := event{what: le.Uint32(b[offWhat:]), time: time.Duration(le.Uint64(b[offTime:]))}
	need := 0
	switch e.what {
	case evAck:
		need = offData + 4
	case evFork:
		need = offChildTgid + 4
	case evExec, evExit, evComm:
		need = offTgid + 4
	}
	if len(b) < need {
		return event{}, fmt.Errorf("event %#x of %d bytes: %w", e.what, len(b)-offWhat, errForeign)
	}
	switch e.what {
	case evAck:
		e.ack, e.errno = le.Uint32(b[offAck:]), le.Uint32(b[offData:])
	case evFork:
		e.parent = int32(le.Uint32(b[offParentTgid:]))
		e.pid, e.tgid = int32(le.Uint32(b[offChildPid:])), int32(le.Uint32(b[offChildTgid:]))
	case evExec, evExit, evComm:
		e.pid, e.tgid = int32(le.Uint32(b[offPid:])), int32(le.Uint32(b[offTgid:]))
	}
	return e, nil
}

// appendRequest writes what switches the events on or off for one listener. The
// kernel answers with an event of kind evAck, whose ack is one more.
func appendRequest(b []byte, op, ack uint32) []byte {
	const size = sizeofNlmsghdr + sizeofCnMsg + 4
	le := binary.LittleEndian
	b = le.AppendUint32(b, size)
	b = le.AppendUint16(b, nlmsgDone)
	b = append(b, make([]byte, 2+4+4)...) // flags, seq, pid: our port is filled in by connect
	b = le.AppendUint32(b, cnIdxProc)
	b = le.AppendUint32(b, cnValProc)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, ack)
	b = le.AppendUint16(b, 4)
	b = le.AppendUint16(b, 0)
	return le.AppendUint32(b, op)
}
