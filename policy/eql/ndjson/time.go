package ndjson

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Form is how a time is written. The zero Form is Auto.
type Form uint8

// The forms of times. Text is taken in every form; the forms of numbers say what they
// count.
const (
	// Auto tells numbers apart by their size, as far as that goes:
	//
	//	below 1e9        milliseconds, which is what Elasticsearch takes a number for
	//	1e9 up to 1e11   seconds       (2001 to 5138)
	//	1e11 up to 1e14  milliseconds  (1973 to 5138)
	//	1e14 up to 1e17  microseconds  (1973 to 5138)
	//	1e17 up to 1e18  Windows file time, in units of 100 ns since 1601 (1917 to 4769)
	//	1e18 and above   nanoseconds   (2001 on)
	Auto Form = iota
	Seconds
	Milliseconds
	Microseconds
	Nanoseconds
	FileTime // Windows: units of 100 ns since 1601
)

var forms = [...]string{"auto", "s", "ms", "us", "ns", "filetime"}

func (f Form) String() string { return forms[f] }

// UnmarshalText takes what String gives.
func (f *Form) UnmarshalText(text []byte) error {
	i := slices.Index(forms[:], string(text))
	if i < 0 {
		return fmt.Errorf("unknown form of time %q; there are %s", text, strings.Join(forms[:], ", "))
	}
	*f = Form(i)
	return nil
}

// nanoseconds is a time of a form as what Unix counts.
func (f Form) nanoseconds(text string) (int64, bool) {
	if !numeric(text) {
		return 0, false
	}
	if strings.ContainsAny(text, "eE") {
		x, err := strconv.ParseFloat(text, 64)
		if err != nil || math.Abs(x) >= math.MaxInt64 {
			return 0, false
		}
		text = strconv.FormatFloat(x, 'f', -1, 64)
	}
	whole, fraction, _ := strings.Cut(text, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return 0, false
	}
	if f == Auto {
		f = guess(n)
	}
	unit := [...]int64{Seconds: 1e9, Milliseconds: 1e6, Microseconds: 1e3, Nanoseconds: 1, FileTime: 100}[f]
	if f == FileTime {
		const since1601 = 116_444_736_000_000_000 // to 1970
		if n < math.MinInt64+since1601 {
			return 0, false
		}
		n -= since1601
	}
	if n > math.MaxInt64/unit-1 || n < math.MinInt64/unit+1 {
		return 0, false
	}
	n *= unit
	if fraction != "" {
		part, err := strconv.ParseFloat("0."+fraction, 64)
		if err != nil {
			return 0, false
		}
		if rest := int64(math.Round(part * float64(unit))); strings.HasPrefix(text, "-") {
			n -= rest
		} else {
			n += rest
		}
	}
	return n, true
}

func guess(n int64) Form {
	if n < 0 {
		n = -max(n, -math.MaxInt64)
	}
	switch {
	case n < 1e9:
		return Milliseconds
	case n < 1e11:
		return Seconds
	case n < 1e14:
		return Milliseconds
	case n < 1e17:
		return Microseconds
	case n < 1e18:
		return FileTime
	}
	return Nanoseconds
}

// layouts are those of RFC 3339, with the liberties that writers of logs take:
// a blank for the T, an offset without colon, or none, which is UTC. A fraction of
// any length, after a full stop or a comma, goes without saying.
var layouts = []string{
	time.RFC3339, "2006-01-02T15:04:05", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05",
	"2006-01-02T15:04:05Z0700", "2006-01-02 15:04:05Z0700", "2006-01-02 15:04:05 Z0700", "2006-01-02 15:04:05 UTC", time.DateOnly,
}

// parseDate reads a time that is written as a date.
func parseDate(text string) (time.Time, bool) {
	if len(text) < len(time.DateOnly) || text[4] != '-' {
		return time.Time{}, false
	}
	for _, layout := range layouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// unixTime reads a time in any form. What does not fit into an int64 of
// nanoseconds, before 1678 and after 2261, is not taken.
func (f Form) unixTime(text string) (int64, bool) {
	t, ok := parseDate(text)
	if !ok {
		return f.nanoseconds(text)
	}
	if y := t.Year(); y < 1678 || y > 2261 {
		return 0, false
	}
	return t.UnixNano(), true
}
