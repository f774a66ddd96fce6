package imdstest

import (
	"net/netip"
	"strings"
)

// A Request is what a fault is chosen by. Its strings are the client's bytes.
type Request struct {
	Method, Target, Proto string

	// Path is the path below the version as the emulator reads the target, without slashes at its ends:
	// "meta-data/instance-id", "api/token". It is "" for the root, for "/latest/" and for an unreadable target.
	Path string

	Remote netip.AddrPort
	Number int64 // among all requests since Serve or Reset, from 1
	OnConn int   // among the requests of its connection, from 1

	headers []header
}

type header struct{ name, value string }

// Header returns the value of the first header with this name, in any case.
func (r *Request) Header(name string) (value string, ok bool) {
	for _, h := range r.headers {
		if len(h.name) == len(name) && strings.EqualFold(h.name, name) {
			return h.value, true
		}
	}
	return "", false
}

// names reports whether a header is a list that has this element, in any case.
func (r *Request) names(header, element string) bool {
	for _, h := range r.headers {
		if !strings.EqualFold(h.name, header) {
			continue
		}
		for e := range strings.SplitSeq(h.value, ",") {
			if strings.EqualFold(strings.Trim(e, " \t"), element) {
				return true
			}
		}
	}
	return false
}

// headEnd returns the length of the head at the start of b with its empty line, or 0 if it is not there yet. A line
// may end in a bare line feed here; parse refuses it in Strict.
func headEnd(b []byte) int {
	for i, c := range b {
		if c != '\n' || i+1 == len(b) {
			continue
		}
		if b[i+1] == '\n' {
			return i + 2
		}
		if b[i+1] == '\r' && i+2 < len(b) && b[i+2] == '\n' {
			return i + 3
		}
	}
	return 0
}

// parse reads a head that headEnd found. It keeps r's space for headers.
func (r *Request) parse(head string, reading Reading) bool {
	*r = Request{headers: r.headers[:0]}
	for first := true; ; first = false {
		line, rest, _ := strings.Cut(head, "\n")
		head = rest
		if trimmed, ok := strings.CutSuffix(line, "\r"); ok {
			line = trimmed
		} else if reading == Strict {
			return false
		}
		if first {
			var ok bool
			if r.Method, line, ok = strings.Cut(line, " "); !ok {
				return false
			}
			if r.Target, r.Proto, ok = strings.Cut(line, " "); !ok || r.Method == "" || r.Target == "" {
				return false
			}
			if r.Proto != "HTTP/1.1" && r.Proto != "HTTP/1.0" {
				return false
			}
			continue
		}
		if line == "" {
			return true
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t\r") {
			return false
		}
		r.headers = append(r.headers, header{name, strings.Trim(value, " \t")})
	}
}

// A framing says where the request's body ends.
type framing struct {
	chunked bool
	length  int64
}

func (f framing) none() bool { return !f.chunked && f.length == 0 }

// framing reads the two headers that decide it (RFC 9112, 6.3). With both, Strict refuses and Lenient prefers
// Transfer-Encoding.
func (r *Request) framing(reading Reading) (framing, bool) {
	var f framing
	counted := false
	for _, h := range r.headers {
		switch {
		case strings.EqualFold(h.name, "Transfer-Encoding"):
			if f.chunked || !strings.EqualFold(h.value, "chunked") {
				return framing{}, false
			}
			f.chunked = true
		case strings.EqualFold(h.name, "Content-Length"):
			n, ok := digits(h.value)
			if !ok || counted && n != f.length {
				return framing{}, false
			}
			f.length, counted = n, true
		}
	}
	if f.chunked && counted {
		if reading == Strict {
			return framing{}, false
		}
		f.length = 0
	}
	return f, true
}

// digits reads a decimal number of at most nine digits and nothing else.
func digits(s string) (int64, bool) {
	if s == "" || len(s) > 9 {
		return 0, false
	}
	var n int64
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int64(c-'0')
	}
	return n, true
}
