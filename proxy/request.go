package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Limits of what a client may send. Real clients stay far below: the largest
// head seen of 27 of them is under 1 KiB, and none sends a body.
const (
	maxHead   = 16 << 10
	maxTarget = 4 << 10
	maxFields = 100
)

// errMalformed says that a request has no reading, or more than one. It is
// never repaired: IMDS might repair it in another way.
var errMalformed = errors.New("malformed request")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
}

// request is the head of one request. Its strings are copies; what is
// forwarded are the bytes that were read.
type request struct {
	method, target string
	minor          byte // of HTTP/1.x: 0 or 1
	headSize       int  // bytes, with the empty line
	host           string
	userAgent      string

	chunked bool // an emptyBody follows the head
	expect  bool // which the client sends after 100 Continue
	close   bool // the client will not reuse the connection
	keep    bool // it says that it would
	token   bool // X-aws-ec2-metadata-token, with something in it
	relayed bool // X-Forwarded-For and its kin
	odd     bool // spelled as no client spells it

	bearer span // in the head: the value of X-aws-ec2-metadata-token
}

// span is a part of what was read, which may be moved before it is used.
type span struct{ from, to int }

func (s span) of(b []byte) []byte { return b[s.from:s.to] }

// emptyBody is the only body that a request may have. s3fs sends it, in a token
// PUT; every other way of writing a body, an empty one too, is one that readers
// differ on and no client has use for.
const emptyBody = "0\r\n\r\n"

// parseBody reports whether an empty body is at the front of b: false if it is
// not all there yet.
func parseBody(b []byte) (whole bool, err error) {
	n := min(len(b), len(emptyBody))
	if string(b[:n]) != emptyBody[:n] {
		return false, malformed("a body")
	}
	return n == len(emptyBody), nil
}

// parseRequest reads a request head from the front of b. It returns a nil
// request if the head is not all there yet. There is one way to write each
// thing (RFC 9112, without what it lets a recipient be lenient about): lines
// end in CRLF, one space between the parts of the request line, no space
// around a field name, no continued lines, one length.
func parseRequest(b []byte) (*request, error) { return new(head).read(b) }

// head is a request head that is read line by line, as it comes: nobody waits for
// the end of what is no request, and a line is looked at once. The zero value is
// ready.
type head struct {
	request
	at    int // the lines before it were read
	lines int
	seen  struct{ host, length, encoding, token, ttl, expect bool }
}

// read goes on with a head that is at the front of b, as parseRequest.
func (h *head) read(b []byte) (*request, error) {
	for {
		n := bytes.IndexByte(b[h.at:], '\n')
		if n < 0 {
			return nil, h.partial(b)
		}
		line, ok := bytes.CutSuffix(b[h.at:h.at+n], []byte("\r"))
		if !ok {
			return nil, malformed("line without CR")
		}
		if h.at += n + 1; h.at > maxHead {
			return nil, malformed("head of more than %d bytes", maxHead)
		}
		var err error
		switch h.lines++; {
		case h.lines == 1:
			err = h.requestLine(line)
		case len(line) > 0 && h.lines > maxFields+1:
			err = malformed("more than %d fields", maxFields)
		case len(line) > 0:
			err = h.field(line)
		default:
			h.headSize = h.at
			if err = h.whole(); err == nil {
				return &h.request, nil
			}
		}
		if err != nil {
			return nil, err
		}
	}
}

// beginning reads of what is no request as much as can be read: the request line,
// and the fields before the first line that is none.
func beginning(b []byte) *request {
	h := new(head)
	h.read(b)
	return &h.request
}

// partial refuses a last line, without its end, that can no longer become a good one.
func (h *head) partial(b []byte) error {
	if len(b) >= maxHead {
		return malformed("head of more than %d bytes", maxHead)
	}
	if h.lines > 0 {
		return nil
	}
	for i, c := range b {
		if c == '\r' && i != len(b)-1 || c < ' ' && c != '\r' || c >= 0x7f {
			return malformed("byte %#02x in the request line", c)
		}
	}
	if len(b) > maxTarget+64 {
		return malformed("request line of more than %d bytes", maxTarget)
	}
	return nil
}

func (r *request) requestLine(line []byte) error {
	parts := bytes.Split(line, []byte(" "))
	if len(parts) != 3 {
		return malformed("request line of %d parts", len(parts))
	}
	method, target, version := parts[0], parts[1], parts[2]
	if len(method) == 0 || len(method) > 32 || !isToken(method) {
		return malformed("method")
	}
	r.method = intern(method)
	if len(target) > maxTarget {
		return malformed("target of %d bytes, more than %d", len(target), maxTarget)
	}
	for _, c := range target {
		if c <= ' ' || c >= 0x7f {
			return malformed("byte %#02x in the target", c)
		}
	}
	r.target = string(target)
	switch r.method {
	case "GET", "HEAD", "PUT", "OPTIONS":
	case "CONNECT", "PRI": // a tunnel, and the preface of HTTP/2
		return malformed("method %s", r.method)
	default:
		r.odd = true
	}
	if len(target) == 0 || target[0] != '/' {
		return malformed("target is not a path")
	}
	switch string(version) {
	case "HTTP/1.1":
		r.minor = 1
	case "HTTP/1.0":
	default:
		return malformed("version")
	}
	return nil
}

// field reads one line of the header.
func (h *head) field(line []byte) error {
	once := func(flag *bool, name []byte) error {
		if *flag {
			return malformed("%.64s twice", bytes.ToLower(name))
		}
		*flag = true
		return nil
	}
	name, value, ok := bytes.Cut(line, []byte(":"))
	if !ok || len(name) == 0 || !isToken(name) {
		return malformed("field name")
	}
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return malformed("byte %#02x in the field %.64s", c, bytes.ToLower(name))
		}
	}
	value = bytes.Trim(value, " \t")
	switch {
	case is(name, "host"):
		if err := once(&h.seen.host, name); err != nil {
			return err
		}
		if len(value) > 255 || bytes.ContainsAny(value, " \t,/@\\") {
			return malformed("host")
		}
		h.host = string(value)
	case is(name, "content-length"):
		if err := once(&h.seen.length, name); err != nil {
			return err
		}
		if string(value) != "0" {
			return malformed("content-length other than 0")
		}
	case is(name, "transfer-encoding"):
		if err := once(&h.seen.encoding, name); err != nil {
			return err
		}
		if !is(value, "chunked") || h.minor == 0 {
			return malformed("transfer-encoding")
		}
		h.chunked = true
	case is(name, "connection"):
		if err := h.connection(value); err != nil {
			return err
		}
	case is(name, "expect"):
		if err := once(&h.seen.expect, name); err != nil {
			return err
		}
		if !is(value, "100-continue") || h.minor == 0 {
			return malformed("expect")
		}
		h.expect = true
	case is(name, "upgrade"), is(name, "http2-settings"):
		return malformed("upgrade")
	case is(name, "x-aws-ec2-metadata-token"):
		if err := once(&h.seen.token, name); err != nil {
			return err
		}
		h.token = len(value) > 0 // what forges requests may be able to add an empty one
		_, raw, _ := bytes.Cut(line, []byte(":"))
		h.bearer.to = h.at - len("\r\n") - len(raw) + len(bytes.TrimRight(raw, " \t"))
		h.bearer.from = h.bearer.to - len(value)
	case is(name, "x-aws-ec2-metadata-token-ttl-seconds"):
		if err := once(&h.seen.ttl, name); err != nil {
			return err
		}
	case is(name, "x-forwarded-for"), is(name, "forwarded"), is(name, "x-forwarded-host"), is(name, "via"):
		h.relayed = true
	case is(name, "user-agent"):
		h.userAgent = string(value)
	case is(name, "x-http-method-override"), is(name, "x-original-url"), is(name, "x-rewrite-url"):
		h.odd = true // nobody knows of IMDS that it honours these
	case bytes.IndexByte(name, '_') >= 0:
		return h.kin(name)
	}
	return nil
}

// whole judges a head that is all there.
func (h *head) whole() error {
	switch {
	case h.seen.length && h.seen.encoding:
		return malformed("content-length and transfer-encoding")
	case h.chunked && (h.method == "GET" || h.method == "HEAD"):
		return malformed("%s with a body", h.method)
	}
	h.close = h.close || h.minor == 0 && !h.keep
	h.expect = h.expect && h.chunked // or else there is nothing to wait for
	return nil
}

// kin reads a field whose name has an underscore. Who makes variables of fields, as
// CGI does (RFC 3875 section 4.1.18), cannot tell it from a dash.
func (r *request) kin(name []byte) error {
	switch of := bytes.Trim(bytes.ReplaceAll(name, []byte("_"), []byte("-")), "-"); {
	case is(of, "host"), is(of, "content-length"), is(of, "transfer-encoding"):
		return malformed("field %.64s", bytes.ToLower(name))
	case is(of, "x-aws-ec2-metadata-token"), is(of, "x-aws-ec2-metadata-token-ttl-seconds"),
		is(of, "x-forwarded-for"), is(of, "x-forwarded-host"),
		is(of, "x-http-method-override"), is(of, "x-original-url"), is(of, "x-rewrite-url"):
		r.odd = true
	}
	return nil
}

// connection reads a Connection field. It names no field that is stripped:
// what it says is for the next hop, and we are none.
func (r *request) connection(value []byte) error {
	for option := range bytes.SplitSeq(value, []byte(",")) {
		switch option = bytes.Trim(option, " \t"); {
		case is(option, "close"):
			r.close = true
		case is(option, "keep-alive"):
			r.keep = true
		case is(option, "te"), len(option) == 0:
		case is(option, "upgrade"):
			return malformed("upgrade")
		default:
			r.odd = true
		}
	}
	return nil
}

// is compares a field name, or a value that has no case, with lower-case ASCII.
func is(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// isToken reports whether b is a token of RFC 9110 section 5.6.2.
func isToken(b []byte) bool {
	for _, c := range b {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// repeatable reports whether a request may be sent twice without doing more than once
// (RFC 9110 section 9.2.2).
func repeatable(method string) bool {
	switch method {
	case "GET", "HEAD", "OPTIONS", "PUT":
		return true
	}
	return false
}

// intern avoids a copy of the usual methods.
func intern(method []byte) string {
	switch string(method) {
	case "GET":
		return "GET"
	case "PUT":
		return "PUT"
	case "HEAD":
		return "HEAD"
	}
	return string(method)
}

// publicHost reports whether a Host is a name that the service is not known
// by. A browser that was led here by DNS rebinding sends the attacker's.
func publicHost(host string) bool {
	if host == "" {
		return false
	}
	name := host
	if strings.HasPrefix(name, "[") {
		name, _, _ = strings.Cut(name[1:], "]")
	} else if i := strings.LastIndexByte(name, ':'); i >= 0 && strings.Count(name, ":") == 1 {
		name = name[:i]
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return false
	}
	switch strings.ToLower(strings.TrimSuffix(name, ".")) {
	case "instance-data", "instance-data.ec2.internal":
		return false
	}
	return true
}
