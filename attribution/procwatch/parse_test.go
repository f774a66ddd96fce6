package procwatch

import (
	"encoding/binary"
	"encoding/hex"
	"testing"
	"time"
)

// Messages of Linux 6.18 on amd64.
var recorded = []struct {
	name, hex string
	want      event
}{
	{"fork", "4c000000030000000b0b00000000000001000000010000000b0b000000000000280000000100000000000000dc5043470f160000b2690000b2690000b8690000b86900000000000000000000",
		event{what: evFork, time: 24254875914460, pid: 27064, tgid: 27064, parent: 27058}},
	{"exec", "4c000000030000000e0b00000000000001000000010000000e0b000000000000280000000200000000000000556765470f160000b9690000b969000000000000000000000000000000000000",
		event{what: evExec, time: 24254878148437, pid: 27065, tgid: 27065}},
	{"exit", "4c000000030000000f0b00000000000001000000010000000f0b0000000000002800000000000080000000008a938b470f160000b9690000b96900000000000011000000b2690000b2690000",
		event{what: evExit, time: 24254880650122, pid: 27065, tgid: 27065}},
	{"comm", "4c00000003000000100b0000000000000100000001000000100b000000000000280000000002000000000000f8038e470f160000b2690000b269000070726f6377617463682e746573740000",
		event{what: evComm, time: 24254880809976, pid: 27058, tgid: 27058}},
	{"acknowledgement of 41", "4c00000003000000110b0000000000000100000001000000110b00002a000000280000000000000000000000a7368e470f160000000000000000000000000000000000000000000000000000",
		event{what: evAck, time: 24254880822951, ack: 42}},
}

func TestParse(t *testing.T) {
	for _, r := range recorded {
		b, err := hex.DecodeString(r.hex)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseEvent(b); err != nil || got != r.want {
			t.Errorf("%s: %+v, %v, want %+v", r.name, got, err, r.want)
		}
		for n := range b {
			if _, err := parseEvent(b[:n]); err == nil {
				t.Errorf("%s cut to %d bytes is taken", r.name, n)
			}
		}
		// The field of the kind may grow in later kernels.
		longer := append(append([]byte{}, b...), make([]byte, 8)...)
		binary.LittleEndian.PutUint32(longer, uint32(len(longer)))
		binary.LittleEndian.PutUint16(longer[offLen:], uint16(len(longer)-offWhat))
		if got, err := parseEvent(longer); err != nil || got != r.want {
			t.Errorf("%s with more behind it: %+v, %v", r.name, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, r := range recorded {
		b, _ := hex.DecodeString(r.hex)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ev, err := parseEvent(b)
		if err != nil && ev != (event{}) {
			t.Errorf("%+v beside %v", ev, err)
		}
		if err == nil && len(b) < offData {
			t.Errorf("%d bytes are an event", len(b))
		}
	})
}

// FuzzTable plays events and readings of /proc in any order: each byte or two is one.
func FuzzTable(f *testing.F) {
	f.Add([]byte("\x00\x01\x12\x21\x22\x33\x41\x51\x52\x60\x01\x02\x30\x31"))
	f.Fuzz(func(t *testing.T, play []byte) {
		w := newWorld(8)
		w.boots()
		s := w.snapshot(w.now)
		for _, b := range play {
			pid, parent := int32(b&7)+8, int32(b>>3&3)+8
			switch b >> 5 {
			case 0, 1:
				w.forks(parent, pid)
				w.running[int(pid)] = w.ticksOf(w.now)
			case 2:
				w.execs(pid, string('a'+rune(parent)))
			case 3:
				delete(w.running, int(pid))
				w.exits(pid)
			case 4:
				w.found(s, pid, parent, w.running[int(pid)], string('a'+rune(parent)))
			case 5:
				w.loses()
				s = w.snapshot(w.now)
			case 6:
				s.done(w.now)
				s = w.snapshot(w.now)
			case 7:
				w.now += keepDead * time.Duration(parent) / 4
				w.expire(w.now)
			}
			w.check(t)
			for pid := range int32(20) {
				w.tells(pid)
			}
			if t.Failed() {
				return
			}
		}
	})
}

func FuzzStat(f *testing.F) {
	f.Add([]byte("12 (a) b) R 1 12 12 0 -1 4194304 100 0 0 0 0 0 0 0 20 0 3 0 1234 0 0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, err := parseStat(b); err != nil && st != (stat{}) {
			t.Errorf("%+v beside %v", st, err)
		}
	})
}

func recordedFork() []byte {
	b, _ := hex.DecodeString(recorded[0].hex)
	return b
}
