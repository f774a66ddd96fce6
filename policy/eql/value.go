package eql

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"
)

// Value is what one field of one event holds: nothing, which is the zero Value,
// or one value, or several. A value whose type is not that of its field counts
// as nothing (but a Double field may hold an Int).
type Value struct {
	// Four words, so that a Value is handed over in registers: events are asked for
	// one with every condition.
	kind   kind
	hi, lo uint64         // an address; lo alone: a number, a boolean, a time, how many there are at
	at     unsafe.Pointer // the bytes of a string, or the first of several strings or values
}

type kind uint8

const (
	none kind = iota
	isString
	isInt
	isFloat
	isBool
	isAddr
	isTime
	isStrings
	isList
)

// String is a Value for a Keyword field.
func String(s string) Value {
	return Value{kind: isString, lo: uint64(len(s)), at: unsafe.Pointer(unsafe.StringData(s))}
}

// Strings is several values for a Keyword field. The slice is shared.
func Strings(s []string) Value {
	return Value{kind: isStrings, lo: uint64(len(s)), at: unsafe.Pointer(unsafe.SliceData(s))}
}

// Int is a Value for a Long or a Double field.
func Int(i int64) Value { return Value{kind: isInt, lo: uint64(i)} }

// Float is a Value for a Double field.
func Float(f float64) Value { return Value{kind: isFloat, lo: math.Float64bits(f)} }

// Bool is a Value for a Boolean field.
func Bool(b bool) Value {
	if b {
		return Value{kind: isBool, lo: 1}
	}
	return Value{kind: isBool}
}

// Addr is a Value for an IP field. Its zone is dropped, and ::ffff:a.b.c.d is
// a.b.c.d. The zero Addr is no value.
func Addr(a netip.Addr) Value {
	if !a.IsValid() {
		return Value{}
	}
	b := a.As16()
	return Value{kind: isAddr, hi: binary.BigEndian.Uint64(b[:8]), lo: binary.BigEndian.Uint64(b[8:])}
}

// Time is a Value for a Date field. The zero Time is no value.
func Time(t time.Time) Value {
	if t.IsZero() {
		return Value{}
	}
	return instant(t)
}

// instant is Time, of the zero Time, too. What is before 1678 or after 2261, and no int64 of
// nanoseconds, is before or after all other times.
func instant(t time.Time) Value {
	n := t.UnixNano()
	switch year := t.UTC().Year(); {
	case year < 1678:
		n = math.MinInt64
	case year > 2261:
		n = math.MaxInt64
	}
	return Value{kind: isTime, lo: uint64(n)}
}

// List is several values of one field.
func List(vs ...Value) Value {
	return Value{kind: isList, lo: uint64(len(vs)), at: unsafe.Pointer(unsafe.SliceData(vs))}
}

// str, strs and list are for values of these kinds alone.
func (v *Value) str() string    { return unsafe.String((*byte)(v.at), int(v.lo)) }
func (v *Value) strs() []string { return unsafe.Slice((*string)(v.at), int(v.lo)) }
func (v *Value) list() []Value  { return unsafe.Slice((*Value)(v.at), int(v.lo)) }

func (v *Value) int() int64     { return int64(v.lo) }
func (v *Value) bool() bool     { return v.lo != 0 }
func (v *Value) isNumber() bool { return v.kind == isInt || v.kind == isFloat }

func (v *Value) float() float64 {
	if v.kind == isInt {
		return float64(v.int())
	}
	return math.Float64frombits(v.lo)
}

// len and single see v as a list of single values.
func (v *Value) len() int {
	switch v.kind {
	case none:
		return 0
	case isStrings, isList:
		return int(v.lo)
	}
	return 1
}

func (v *Value) single(i int) Value {
	switch v.kind {
	case isStrings:
		return String(v.strs()[i])
	case isList:
		return v.list()[i]
	}
	return *v
}

// fits reports whether a single value belongs into a field of type t.
func (v *Value) fits(t Type) bool {
	switch t {
	case Keyword:
		return v.kind == isString
	case IP:
		return v.kind == isAddr
	case Long:
		return v.kind == isInt
	case Double:
		return v.isNumber()
	case Boolean:
		return v.kind == isBool
	case Date:
		return v.kind == isTime
	}
	return false
}

// present reports whether v holds anything, as the value of a field of type t.
func (v *Value) present(t Type) bool {
	switch v.kind {
	case isStrings:
		return t == Keyword && v.lo > 0
	case isList:
		return slices.ContainsFunc(v.list(), func(v Value) bool { return v.fits(t) })
	}
	return v.fits(t)
}

// compare orders two numbers, booleans or times. It returns false if that makes no
// sense.
func compare(a, b *Value) (int, bool) {
	if a.isNumber() && b.isNumber() && (a.kind == isFloat || b.kind == isFloat) {
		x, y := a.float(), b.float()
		return cmp.Compare(x, y), x == x && y == y // not NaN
	}
	return cmp.Compare(a.int(), b.int()), a.kind == b.kind
}

// String is v as EQL's string() has it; several values are separated by commas.
func (v Value) String() string {
	switch v.kind {
	case isString:
		return v.str()
	case isInt:
		return strconv.FormatInt(v.int(), 10)
	case isFloat:
		return formatFloat(v.float())
	case isBool:
		return strconv.FormatBool(v.bool())
	case isAddr:
		return v.addr().String()
	case isTime:
		return time.Unix(0, v.int()).UTC().Format(time.RFC3339Nano)
	}
	all := make([]string, v.len())
	for i := range all {
		all[i] = v.single(i).String()
	}
	return strings.Join(all, ", ")
}

func (v *Value) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], v.hi)
	binary.BigEndian.PutUint64(b[8:], v.lo)
	return netip.AddrFrom16(b).Unmap()
}

// formatFloat writes as Java does, where Elasticsearch lives: 4.0, 1.5E10.
func formatFloat(f float64) string {
	if a := math.Abs(f); a == 0 || 1e-3 <= a && a < 1e7 {
		s := strconv.FormatFloat(f, 'f', -1, 64)
		if !strings.Contains(s, ".") {
			s += ".0"
		}
		return s
	}
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return strings.Replace(strings.TrimPrefix(fmt.Sprint(f), "+"), "Inf", "Infinity", 1)
	}
	mantissa, exponent, _ := strings.Cut(strconv.FormatFloat(f, 'e', -1, 64), "e")
	if !strings.Contains(mantissa, ".") {
		mantissa += ".0"
	}
	n, _ := strconv.Atoi(exponent)
	return mantissa + "E" + strconv.Itoa(n)
}

// appendKey appends an encoding of a single value, or of none, that no other
// value has, also if more is appended. 1 and 1.0 are the same value.
func (v Value) appendKey(b []byte) []byte {
	if f := v.float(); v.kind == isFloat && f == math.Trunc(f) && math.Abs(f) < 1<<63 {
		v = Int(int64(f))
	}
	b = append(b, byte(v.kind))
	switch v.kind {
	case none:
	case isString:
		b = binary.AppendUvarint(b, v.lo)
		b = append(b, v.str()...)
	case isAddr:
		b = binary.BigEndian.AppendUint64(b, v.hi)
		fallthrough
	default:
		b = binary.BigEndian.AppendUint64(b, v.lo)
	}
	return b
}

// block is a range of addresses, v4 among v6 as ::ffff:a.b.c.d.
type block struct{ hi, lo, maskHi, maskLo uint64 }

// parseBlock reads a CIDR block, or a single address, which is a block of one. A
// block may have bits set below its mask.
func parseBlock(s string) (block, bool) {
	addr, err := netip.ParseAddr(s)
	bits := 128
	if err != nil {
		text, length, ok := strings.Cut(s, "/")
		addr, err = netip.ParseAddr(text)
		n, err2 := strconv.ParseUint(length, 10, 8)
		if !ok || err != nil || err2 != nil || int(n) > addr.BitLen() {
			return block{}, false
		}
		bits = 128 - addr.BitLen() + int(n)
	}
	if addr.Zone() != "" {
		return block{}, false
	}
	v := Addr(addr)
	b := block{maskHi: ^uint64(0), maskLo: ^uint64(0)}
	if bits <= 64 {
		b.maskHi, b.maskLo = b.maskHi<<(64-bits), 0
	} else {
		b.maskLo <<= 128 - bits
	}
	b.hi, b.lo = v.hi&b.maskHi, v.lo&b.maskLo
	return b, true
}

type blocks []block

func (bs blocks) contain(v Value) bool {
	return slices.ContainsFunc(bs, func(b block) bool { return v.hi&b.maskHi == b.hi && v.lo&b.maskLo == b.lo })
}

// parseDate reads the constants that may be compared with a Date field: what
// Elasticsearch calls strict_date_optional_time. What is left out is the least it
// can be, and the time zone UTC.
func parseDate(s string) (time.Time, bool) {
	for _, zone := range []string{"", "Z07:00", "Z0700", "Z07"} {
		for _, layout := range []string{"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02T15", time.DateOnly, "2006-01", "2006"} {
			if t, err := time.Parse(layout+zone, s); err == nil {
				return t, zone == "" || strings.Contains(layout, "T")
			}
		}
	}
	return time.Time{}, false
}
