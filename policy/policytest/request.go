package policytest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Request is what is sent. In a file it may be written as one line: "GET /latest/".
type Request struct {
	Method string `yaml:"method"` // GET if it is not set
	Path   string `yaml:"path"`   // the target, as it is sent
	// Headers beside Host, which is the endpoint's unless it is here, and that of the
	// session token.
	Headers map[string]string `yaml:"headers"`
	// API is v2, with a session token, unless it is v1, the method is PUT, or the
	// endpoint is one for tasks and pods.
	API API `yaml:"api"`
	// Token is whose session token it is: own, unknown, or the name of a subject.
	Token    string   `yaml:"token"`
	Endpoint Endpoint `yaml:"endpoint"` // 169.254.169.254:80 if it is not set
	// Kept says that it is not the first on its connection.
	Kept bool `yaml:"kept"`
}

// API is a version of the service's protocol.
type API uint8

const (
	V2 API = iota
	V1
)

// UnmarshalText reads the name of an API.
func (a *API) UnmarshalText(text []byte) error {
	return named(a, "api", []string{V2: "v2", V1: "v1"}, text)
}

// Endpoint is where a request is sent.
type Endpoint struct{ netip.AddrPort }

// UnmarshalText reads an address, with a port unless that is 80.
func (e *Endpoint) UnmarshalText(text []byte) (err error) {
	if a, err := netip.ParseAddr(string(text)); err == nil {
		e.AddrPort = netip.AddrPortFrom(a, 80)
		return nil
	}
	if e.AddrPort, err = netip.ParseAddrPort(string(text)); err != nil {
		return fmt.Errorf("endpoint %q is not an address, as 169.254.169.254 or [fd00:ec2::254]:80", text)
	}
	return nil
}

// Requests is one request or several.
type Requests []Request

// OrOne lets one request stand for a list.
func (*Requests) OrOne() {}

// UnmarshalYAML reads a line or a mapping.
func (r *Request) UnmarshalYAML(decode func(any) error) error {
	if line := ""; decode(&line) == nil {
		var ok bool
		if r.Method, r.Path, ok = strings.Cut(line, " "); !ok {
			r.Method, r.Path = "", line
		}
		return nil
	}
	type plain Request
	return decode((*plain)(r))
}

// Of tokens: whose they are, beside names of subjects.
const (
	own     = "own"
	unknown = "unknown"
)

func (r *Request) method() string {
	if r.Method == "" {
		return "GET"
	}
	return r.Method
}

func (r *Request) endpoint() netip.AddrPort {
	if !r.Endpoint.IsValid() {
		return imds.Endpoints[0]
	}
	return r.Endpoint.AddrPort
}

// String is the request line without the version.
func (r *Request) String() string { return r.method() + " " + r.Path }

// head is what a client would send.
func (r *Request) head() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", r.method(), r.Path)
	given := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(r.Headers)) {
		given[strings.ToLower(name)] = true
		fmt.Fprintf(&b, "%s: %s\r\n", name, r.Headers[name])
	}
	if !given["host"] {
		host := r.endpoint().Addr().String()
		if r.endpoint().Addr().Is6() {
			host = "[" + host + "]"
		}
		fmt.Fprintf(&b, "Host: %s\r\n", host)
	}
	if r.API == V2 && r.method() != "PUT" && !container(r.endpoint().Addr()) && !given["x-aws-ec2-metadata-token"] {
		b.WriteString("X-aws-ec2-metadata-token: of-no-worth\r\n")
	}
	b.WriteString("\r\n")
	return []byte(b.String())
}

// container reports whether an endpoint is one for tasks and pods.
func container(a netip.Addr) bool {
	t, err := imds.Classify(a, "/")
	return err == nil && t.Container
}

// read is the record of a request, as the relay makes it of these bytes.
func (r *Request) read() event.Request {
	head := r.head()
	q, err := http1.Parse(head)
	if err == nil && q == nil {
		err = http1.Malformed("head without its end")
	}
	if err != nil {
		record := http1.Beginning(head).Readable()
		record.Malformed = err.Error()
		return record
	}
	t, err := imds.Classify(r.endpoint().Addr(), q.Target)
	if err != nil {
		record := q.Readable()
		record.Malformed = err.Error()
		return record
	}
	return q.Asked(t, q.Size)
}
