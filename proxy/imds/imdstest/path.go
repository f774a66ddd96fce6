package imdstest

import (
	"slices"
	"strings"
)

// versions are those that instances listed in 2024, in the service's order.
var versions = []string{
	"1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
	"2009-04-04", "2011-01-01", "2011-05-01", "2012-01-12", "2014-02-25", "2014-11-05", "2015-10-20", "2016-04-19",
	"2016-06-30", "2016-09-02", "2018-03-28", "2018-08-17", "2018-09-24", "2019-10-01", "2020-10-27", "2021-01-03",
	"2021-03-23", "2021-07-15", "2022-07-09", "2022-09-24", "2024-04-11", "latest",
}

// A place is a target as it was read.
type place struct {
	version string // "" for the root
	path    string // below the version, without slashes at its ends
	slashed bool   // the target ended in a slash
}

// place reads a request target; it fails on one that does not name a known version.
func (r Reading) place(target string) (place, bool) {
	if r == Lenient {
		target = forgive(target)
	}
	if !strings.HasPrefix(target, "/") {
		return place{}, false
	}
	for strings.Contains(target, "//") {
		target = strings.ReplaceAll(target, "//", "/")
	}
	target = target[1:]
	var p place
	target, p.slashed = strings.CutSuffix(target, "/")
	p.version, p.path, _ = strings.Cut(target, "/")
	if p.version == "" {
		return p, true
	}
	return p, p.version == "latest" || slices.Contains(versions, p.version)
}

// forgive reduces a target to the plain path that the most forgiving service would see in it.
func forgive(target string) string {
	if _, rest, ok := strings.Cut(target, "://"); ok && !strings.HasPrefix(target, "/") {
		_, path, _ := strings.Cut(rest, "/")
		target = "/" + path
	}
	target, _, _ = strings.Cut(target, "#")
	target, _, _ = strings.Cut(target, "?")
	for range 3 { // %252f, and once more
		target = unescape(target)
	}
	target = strings.ReplaceAll(target, `\`, "/")
	var kept []string
	for segment := range strings.SplitSeq(target, "/") {
		segment, _, _ = strings.Cut(segment, ";")
		switch segment {
		case "", ".":
		case "..":
			kept = kept[:max(0, len(kept)-1)]
		default:
			kept = append(kept, segment)
		}
	}
	path := "/" + strings.Join(kept, "/")
	if strings.HasSuffix(target, "/") && len(kept) > 0 {
		path += "/"
	}
	return strings.ToLower(path)
}

func unescape(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			hi, lo := unhex(s[i+1]), unhex(s[i+2])
			if hi < 16 && lo < 16 {
				out = append(out, hi<<4|lo)
				i += 2
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// unhex returns the value of a hexadecimal digit, 16 for anything else.
func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10
	}
	return 16
}
