package proxy

import (
	"bytes"
	"errors"

	"github.com/imdsgate/imdsgate/proxy/http1"
)

// maxResponseHead bounds the head of an answer that we wait for. The service's
// own are under 1 KiB.
const maxResponseHead = 64 << 10

// untilEOF is the length of a body that ends with the connection.
const untilEOF = -2

// response is what must be known of an answer to find its end. The answer
// itself is passed on as it came.
type response struct {
	status   int
	headSize int   // bytes, with the empty line
	length   int64 // of the body; -1 for chunked, untilEOF
	close    bool  // the server will close after it
	ttl      int64 // of the token that it hands out or was asked with, in seconds; 0 if it does not say
}

// errOpaque says that an answer cannot be read as HTTP/1. It is passed on all
// the same, until the server closes.
var errOpaque = errors.New("the answer is not HTTP/1")

// errLength says that what stands where a length should be is none.
var errLength = errors.New("not a length")

// parseResponse reads the head of the answer to a request with this method. It
// returns nil if the head is not all there yet. It is lenient, because IMDS is
// believed: a doubt about the length makes the answer last until the server
// closes.
func parseResponse(b []byte, method string) (*response, error) {
	size := headEnd(b)
	if size == 0 {
		if len(b) >= maxResponseHead || len(b) >= 5 && string(b[:5]) != "HTTP/" {
			return nil, errOpaque
		}
		return nil, nil
	}
	r := &response{headSize: size, length: untilEOF}
	line, rest := cutLine(b[:size])
	// HTTP/1.1 200 OK
	if len(line) < 12 || string(line[:7]) != "HTTP/1." || line[8] != ' ' {
		return nil, errOpaque
	}
	version := line[7]
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return nil, errOpaque
		}
		r.status = r.status*10 + int(c-'0')
	}

	lengths := 0
	chunked, keep := false, false
	for len(rest) > 0 {
		line, rest = cutLine(rest)
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		value = bytes.Trim(value, " \t")
		switch {
		case http1.Is(name, "content-length"):
			n, err := parseLength(value)
			if err != nil || lengths > 0 && n != r.length {
				n = untilEOF
			}
			lengths++
			r.length = n
		case http1.Is(name, "transfer-encoding"):
			chunked = http1.Is(value, "chunked") && version == '1' // HTTP/1.0 has no chunks (RFC 9112 section 6.1)
			if !chunked {
				r.length, lengths = untilEOF, 2
			}
		case http1.Is(name, "x-aws-ec2-metadata-token-ttl-seconds"):
			if n, err := parseLength(value); err == nil {
				r.ttl = n
			}
		case http1.Is(name, "connection"):
			for option := range bytes.SplitSeq(value, []byte(",")) {
				switch option = bytes.Trim(option, " \t"); {
				case http1.Is(option, "close"):
					r.close = true
				case http1.Is(option, "keep-alive"):
					keep = true
				}
			}
		}
	}
	r.close = r.close || version != '1' && !keep
	if chunked {
		r.length = -1
	}
	switch {
	case r.interim(), r.status == 204, r.status == 304, method == "HEAD":
		r.length = 0 // RFC 9112 section 6.3
	case r.length == untilEOF:
		r.close = true
	}
	return r, nil
}

// headEnd is the size of a head with its empty line, or 0 if that is not there yet. The
// lines of an answer may end in a bare LF (RFC 9112 section 2.2).
func headEnd(b []byte) int {
	for at := 0; ; {
		n := bytes.IndexByte(b[at:], '\n') + 1
		if n == 0 {
			return 0
		}
		switch at += n; {
		case at < len(b) && b[at] == '\n':
			return at + 1
		case at+1 < len(b) && b[at] == '\r' && b[at+1] == '\n':
			return at + 2
		}
	}
}

func cutLine(b []byte) (line, rest []byte) {
	line, rest, _ = bytes.Cut(b, []byte("\n"))
	return bytes.TrimSuffix(line, []byte("\r")), rest
}

// parseLength reads a Content-Length: digits and nothing else, or the same number
// several times (RFC 9110 section 8.6).
func parseLength(value []byte) (int64, error) {
	length := int64(-1)
	for one := range bytes.SplitSeq(value, []byte(",")) {
		one = bytes.Trim(one, " \t")
		if len(one) == 0 || len(one) > 10 {
			return 0, errLength
		}
		var n int64
		for _, c := range one {
			if c < '0' || c > '9' {
				return 0, errLength
			}
			n = n*10 + int64(c-'0')
		}
		if length >= 0 && n != length {
			return 0, errLength
		}
		length = n
	}
	return length, nil
}

// interim reports whether another answer follows.
func (r *response) interim() bool { return r.status >= 100 && r.status < 200 }

// body finds the end of a body in what passes by.
type body struct {
	left    int64 // of the body or the chunk; -1 before a chunk's size, untilEOF
	chunked bool
	ended   bool
	broken  bool // the framing makes no sense; the body lasts until EOF
	line    []byte
	last    bool // the last chunk: its trailers follow

	kept []byte // the content without its framing, up to the capacity; never moved, so that no copy stays
	cut  bool   // there was more
}

func newBody(length int64) body {
	switch length {
	case -1:
		return body{chunked: true, left: -1}
	case 0:
		return body{ended: true}
	}
	return body{left: length}
}

// take says how many of the bytes belong to the body.
func (d *body) take(b []byte) int {
	n := 0
	for n < len(b) && !d.ended {
		switch {
		case d.broken || d.left == untilEOF:
			d.keep(b[n:])
			return len(b)
		case !d.chunked:
			m := int(min(d.left, int64(len(b)-n)))
			d.keep(b[n : n+m])
			n += m
			d.left -= int64(m)
			d.ended = d.left == 0
		case d.left > 0: // data of a chunk
			m := int(min(d.left, int64(len(b)-n)))
			d.keep(b[n : n+m])
			n += m
			if d.left -= int64(m); d.left == 0 {
				d.left = -3 // its CRLF
			}
		default:
			i := bytes.IndexByte(b[n:], '\n')
			if i < 0 {
				d.line = append(d.line, b[n:]...)
				d.broken = len(d.line) > 4096
				return len(b)
			}
			d.line = append(d.line, b[n:n+i]...)
			n += i + 1
			d.endOfLine()
			d.line = d.line[:0]
		}
	}
	return n
}

func (d *body) keep(content []byte) {
	n := copy(d.kept[len(d.kept):cap(d.kept)], content)
	d.kept = d.kept[:len(d.kept)+n]
	d.cut = d.cut || n < len(content)
}

func (d *body) endOfLine() {
	line := bytes.TrimSuffix(d.line, []byte("\r"))
	switch {
	case d.last: // a trailer, or the empty line at the end
		d.ended = len(line) == 0
	case d.left == -3:
		d.left = -1
		d.broken = len(line) != 0
	default:
		line, _, _ = bytes.Cut(line, []byte(";"))
		size, err := parseChunkSize(bytes.TrimRight(line, " \t"))
		if err != nil {
			d.broken = true
			return
		}
		d.last = size == 0
		d.left = size
		if d.last {
			d.left = -1
		}
	}
}

func parseChunkSize(line []byte) (int64, error) {
	if len(line) == 0 || len(line) > 8 {
		return 0, errLength
	}
	var n int64
	for _, c := range line {
		switch {
		case '0' <= c && c <= '9':
			n = n<<4 | int64(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | int64(c-'a'+10)
		case 'A' <= c && c <= 'F':
			n = n<<4 | int64(c-'A'+10)
		default:
			return 0, errLength
		}
	}
	return n, nil
}
