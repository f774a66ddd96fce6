// Package http1 reads the heads of requests as the relay does: strictly, so that nobody
// else can read them in another way, and as one function of bytes, so that who tests a
// policy reads them in the same one. It reads no socket, and decides nothing.
package http1

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Limits of what a client may send. Real clients stay far below: the largest
// head seen of 27 of them is under 1 KiB, and none sends a body.
const (
	MaxHead   = 16 << 10
	MaxTarget = 4 << 10
	MaxFields = 100
)

// ErrMalformed says that a request has no reading, or more than one. It is
// never repaired: IMDS might repair it in another way.
var ErrMalformed = errors.New("malformed request")

// Malformed is an ErrMalformed that says why.
func Malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// Request is the head of one request. Its strings are copies; what is
// forwarded are the bytes that were read.
type Request struct {
	Method, Target string
	Minor          byte // of HTTP/1.x: 0 or 1
	Size           int  // bytes of the head, with the empty line
	Host           string
	UserAgent      string

	Chunked bool // an EmptyBody follows the head
	Expect  bool // which the client sends after 100 Continue
	Close   bool // the client will not reuse the connection
	Token   bool // X-aws-ec2-metadata-token, with something in it
	Relayed bool // X-Forwarded-For and its kin
	Odd     bool // spelled as no client spells it

	Bearer Span // in the head: the value of X-aws-ec2-metadata-token

	keep bool // the client says that it would reuse the connection
}

// Span is a part of what was read, which may be moved before it is used.
type Span struct{ from, to int }

// Of gives the part of b.
func (s Span) Of(b []byte) []byte { return b[s.from:s.to] }

// EmptyBody is the only body that a request may have. s3fs sends it, in a token
// PUT; every other way of writing a body, an empty one too, is one that readers
// differ on and no client has use for.
const EmptyBody = "0\r\n\r\n"

// ParseBody reports whether an empty body is at the front of b: false if it is
// not all there yet.
func ParseBody(b []byte) (whole bool, err error) {
	n := min(len(b), len(EmptyBody))
	if string(b[:n]) != EmptyBody[:n] {
		return false, Malformed("a body")
	}
	return n == len(EmptyBody), nil
}

// Parse reads a request head from the front of b. It returns a nil
// request if the head is not all there yet. There is one way to write each
// thing (RFC 9112, without what it lets a recipient be lenient about): lines
// end in CRLF, one space between the parts of the request line, no space
// around a field name, no continued lines, one length.
func Parse(b []byte) (*Request, error) { return new(Head).Read(b) }

// Head is a request head that is read line by line, as it comes: nobody waits for
// the end of what is no request, and a line is looked at once. The zero value is
// ready.
type Head struct {
	Request
	at    int // the lines before it were read
	lines int
	seen  struct{ host, length, encoding, token, ttl, expect bool }
}

// Read goes on with a head that is at the front of b, as Parse.
func (h *Head) Read(b []byte) (*Request, error) {
	for {
		n := bytes.IndexByte(b[h.at:], '\n')
		if n < 0 {
			return nil, h.partial(b)
		}
		line, ok := bytes.CutSuffix(b[h.at:h.at+n], []byte("\r"))
		if !ok {
			return nil, Malformed("line without CR")
		}
		if h.at += n + 1; h.at > MaxHead {
			return nil, Malformed("head of more than %d bytes", MaxHead)
		}
		var err error
		switch h.lines++; {
		case h.lines == 1:
			err = h.requestLine(line)
		case len(line) > 0 && h.lines > MaxFields+1:
			err = Malformed("more than %d fields", MaxFields)
		case len(line) > 0:
			err = h.field(line)
		default:
			h.Size = h.at
			if err = h.whole(); err == nil {
				return &h.Request, nil
			}
		}
		if err != nil {
			return nil, err
		}
	}
}

// Beginning reads of what is no request as much as can be read: the request line,
// and the fields before the first line that is none.
func Beginning(b []byte) *Request {
	h := new(Head)
	h.Read(b)
	return &h.Request
}

// partial refuses a last line, without its end, that can no longer become a good one.
func (h *Head) partial(b []byte) error {
	if len(b) >= MaxHead {
		return Malformed("head of more than %d bytes", MaxHead)
	}
	if h.lines > 0 {
		return nil
	}
	for i, c := range b {
		if c == '\r' && i != len(b)-1 || c < ' ' && c != '\r' || c >= 0x7f {
			return Malformed("byte %#02x in the request line", c)
		}
	}
	if len(b) > MaxTarget+64 {
		return Malformed("request line of more than %d bytes", MaxTarget)
	}
	return nil
}

func (r *Request) requestLine(line []byte) error {
	method, rest, _ := bytes.Cut(line, []byte(" "))
	target, version, _ := bytes.Cut(rest, []byte(" "))
	if n := bytes.Count(line, []byte(" ")) + 1; n != 3 {
		return Malformed("request line of %d parts", n)
	}
	if len(method) == 0 || len(method) > 32 || !isToken(method) {
		return Malformed("method")
	}
	r.Method = intern(method)
	if len(target) > MaxTarget {
		return Malformed("target of %d bytes, more than %d", len(target), MaxTarget)
	}
	for _, c := range target {
		if c <= ' ' || c >= 0x7f {
			return Malformed("byte %#02x in the target", c)
		}
	}
	r.Target = string(target)
	switch r.Method {
	case "GET", "HEAD", "PUT", "OPTIONS":
	case "CONNECT", "PRI": // a tunnel, and the preface of HTTP/2
		return Malformed("method %s", r.Method)
	default:
		r.Odd = true
	}
	if len(target) == 0 || target[0] != '/' {
		return Malformed("target is not a path")
	}
	switch string(version) {
	case "HTTP/1.1":
		r.Minor = 1
	case "HTTP/1.0":
	default:
		return Malformed("version")
	}
	return nil
}

// field reads one line of the header.
func (h *Head) field(line []byte) error {
	once := func(flag *bool, name []byte) error {
		if *flag {
			return Malformed("%.64s twice", bytes.ToLower(name))
		}
		*flag = true
		return nil
	}
	name, value, ok := bytes.Cut(line, []byte(":"))
	if !ok || len(name) == 0 || !isToken(name) {
		return Malformed("field name")
	}
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return Malformed("byte %#02x in the field %.64s", c, bytes.ToLower(name))
		}
	}
	value = bytes.Trim(value, " \t")
	switch {
	case Is(name, "host"):
		if err := once(&h.seen.host, name); err != nil {
			return err
		}
		if len(value) > 255 || bytes.ContainsAny(value, " \t,/@\\") {
			return Malformed("host")
		}
		h.Host = string(value)
	case Is(name, "content-length"):
		if err := once(&h.seen.length, name); err != nil {
			return err
		}
		if string(value) != "0" {
			return Malformed("content-length other than 0")
		}
	case Is(name, "transfer-encoding"):
		if err := once(&h.seen.encoding, name); err != nil {
			return err
		}
		if !Is(value, "chunked") || h.Minor == 0 {
			return Malformed("transfer-encoding")
		}
		h.Chunked = true
	case Is(name, "connection"):
		if err := h.connection(value); err != nil {
			return err
		}
	case Is(name, "expect"):
		if err := once(&h.seen.expect, name); err != nil {
			return err
		}
		if !Is(value, "100-continue") || h.Minor == 0 {
			return Malformed("expect")
		}
		h.Expect = true
	case Is(name, "upgrade"), Is(name, "http2-settings"):
		return Malformed("upgrade")
	case Is(name, "x-aws-ec2-metadata-token"):
		if err := once(&h.seen.token, name); err != nil {
			return err
		}
		h.Token = len(value) > 0 // what forges requests may be able to add an empty one
		_, raw, _ := bytes.Cut(line, []byte(":"))
		h.Bearer.to = h.at - len("\r\n") - len(raw) + len(bytes.TrimRight(raw, " \t"))
		h.Bearer.from = h.Bearer.to - len(value)
	case Is(name, "x-aws-ec2-metadata-token-ttl-seconds"):
		if err := once(&h.seen.ttl, name); err != nil {
			return err
		}
	case Is(name, "x-forwarded-for"), Is(name, "forwarded"), Is(name, "x-forwarded-host"), Is(name, "via"):
		h.Relayed = true
	case Is(name, "user-agent"):
		h.UserAgent = string(value)
	case Is(name, "x-http-method-override"), Is(name, "x-original-url"), Is(name, "x-rewrite-url"):
		h.Odd = true // nobody knows of IMDS that it honours these
	case bytes.IndexByte(name, '_') >= 0:
		return h.kin(name)
	}
	return nil
}

// whole judges a head that is all there.
func (h *Head) whole() error {
	switch {
	case h.seen.length && h.seen.encoding:
		return Malformed("content-length and transfer-encoding")
	case h.Chunked && (h.Method == "GET" || h.Method == "HEAD"):
		return Malformed("%s with a body", h.Method)
	}
	h.Close = h.Close || h.Minor == 0 && !h.keep
	h.Expect = h.Expect && h.Chunked // or else there is nothing to wait for
	return nil
}

// kin reads a field whose name has an underscore. Who makes variables of fields, as
// CGI does (RFC 3875 section 4.1.18), cannot tell it from a dash.
func (r *Request) kin(name []byte) error {
	switch of := bytes.Trim(bytes.ReplaceAll(name, []byte("_"), []byte("-")), "-"); {
	case Is(of, "host"), Is(of, "content-length"), Is(of, "transfer-encoding"):
		return Malformed("field %.64s", bytes.ToLower(name))
	case Is(of, "x-aws-ec2-metadata-token"), Is(of, "x-aws-ec2-metadata-token-ttl-seconds"),
		Is(of, "x-forwarded-for"), Is(of, "x-forwarded-host"),
		Is(of, "x-http-method-override"), Is(of, "x-original-url"), Is(of, "x-rewrite-url"):
		r.Odd = true
	}
	return nil
}

// connection reads a Connection field. It names no field that is stripped:
// what it says is for the next hop, and we are none.
func (r *Request) connection(value []byte) error {
	for option := range bytes.SplitSeq(value, []byte(",")) {
		switch option = bytes.Trim(option, " \t"); {
		case Is(option, "close"):
			r.Close = true
		case Is(option, "keep-alive"):
			r.keep = true
		case Is(option, "te"), len(option) == 0:
		case Is(option, "upgrade"):
			return Malformed("upgrade")
		default:
			r.Odd = true
		}
	}
	return nil
}

// Is compares a field name, or a value that has no case, with lower-case ASCII.
func Is(b []byte, lower string) bool {
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

// Repeatable reports whether a request may be sent twice without doing more than once
// (RFC 9110 section 9.2.2).
func Repeatable(method string) bool {
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

// PublicHost reports whether a Host is a name that the service is not known
// by. A browser that was led here by DNS rebinding sends the attacker's.
func PublicHost(host string) bool {
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

// Readable is what a head says, whatever it asks for.
func (r *Request) Readable() event.Request {
	return event.Request{
		Method: r.Method, Target: r.Target, Host: r.Host, UserAgent: r.UserAgent,
		Token: r.Token, Forwarded: r.Relayed, HostIsOdd: PublicHost(r.Host),
	}
}

// Asked is the record of what is asked for, with a target of r that was classified and
// size bytes of head and body.
func (r *Request) Asked(t imds.Target, size int) event.Request {
	q := r.Readable()
	q.Path, q.Class, q.Guarded, q.Version = t.Path, t.Class.String(), t.Guarded(), t.Version
	q.HTTP, q.Bytes, q.Evasive, q.Container = "1."+string('0'+r.Minor), int64(size), t.Evasive || r.Odd, t.Container
	return q
}
