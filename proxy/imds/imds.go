// Package imds knows the instance metadata service: what its paths are worth,
// which of its answers carry credentials, and what it answers when it refuses.
//
// Everything here is a function of bytes. Nothing reads a socket, and nothing
// decides.
package imds

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Endpoints are the addresses of the service on every EC2 instance
// (EC2 User Guide, "Instance metadata and user data").
var Endpoints = []netip.AddrPort{
	netip.MustParseAddrPort("169.254.169.254:80"),
	netip.MustParseAddrPort("[fd00:ec2::254]:80"),
}

// Class is what a request is after. Policies are written per class.
type Class uint8

const (
	Unknown       Class = iota // a path that is in no catalogue
	Listing                    // a directory
	Inventory                  // identity of the instance, of use to an intruder looking around
	Operational                // signals that are polled and must never break: spot, events, SSH login
	Token                      // the IMDSv2 session token
	UserData                   // often holds bootstrap secrets
	IdentityProof              // signed documents: who replays one is this instance
	Credentials                // role credentials, and the name of the role
)

var classNames = [...]string{
	Unknown: "unknown", Listing: "listing", Inventory: "inventory", Operational: "operational",
	Token: "token", UserData: "user-data", IdentityProof: "identity-proof", Credentials: "credentials",
}

// Classes lists all classes, the least guarded first.
func Classes() []Class {
	return []Class{Listing, Inventory, Operational, Token, Unknown, UserData, IdentityProof, Credentials}
}

func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// UnmarshalText reads a class name as a policy has it.
func (c *Class) UnmarshalText(text []byte) error {
	i := slices.Index(classNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("unknown class %q; there are %s", text, strings.Join(classNames[:], ", "))
	}
	*c = Class(i)
	return nil
}

// MarshalText writes the class name.
func (c Class) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Target is what a request target means.
type Target struct {
	Class Class
	// Path is the target resolved: percent-decoded, without empty and dot
	// segments, without query.
	Path string
	// Version is the leading segment: "latest", "1.0", "2021-03-23"; "" if
	// there is none.
	Version string
	// Evasive says that the target is spelled as no client spells it: encoded,
	// with dot segments, parameters, a query, or capital letters where they
	// matter. A duplicate or trailing slash is not evasive.
	Evasive bool
	// Suspect says of an Unknown path that a segment of it speaks of
	// credentials, tokens, secrets or keys.
	Suspect bool
	// Container says that the endpoint is one of those that give tasks of ECS and
	// pods of EKS their credentials. They know no session tokens; at that of ECS the
	// path is the secret by which the agent knows the task.
	Container bool
}

// Guarded reports whether a request for this target asks for something that a
// thief wants: what policy keeps from matched and unattributed callers.
func (t Target) Guarded() bool {
	switch t.Class {
	case Credentials, IdentityProof, UserData:
		return true
	case Unknown:
		return t.Suspect
	}
	return false
}

// ErrTarget says that a request target has more than one reading, or none.
var ErrTarget = errors.New("request target cannot be read one way only")

// maxDecodings bounds the rounds of percent-decoding. A target that still
// changes after so many is refused.
const maxDecodings = 3

// Classify reads the target of a request to an endpoint. Only the origin form
// of RFC 9112 section 3.2.1 has one reading; every other target is an
// ErrTarget, as is one with a control character, a space, a backslash, a
// fragment or a byte beyond ASCII in any reading.
//
// IMDS is not documented to refuse any spelling, nor to understand one, so no
// reading of the target by any service may be worth more than the class it
// gets here. A plain target differs between services in two ways: whether they
// fold case, and whether they look at the version; and to some, two slashes at the
// beginning are followed by an authority (RFC 3986 section 4.2). All these readings
// are taken, and what is worth more counts. An evasive one has as many readings as there are
// orders of decoding, cutting and resolving; none of them can bring in a word
// that no round of decoding shows, so it is worth what it mentions.
func Classify(endpoint netip.Addr, target string) (Target, error) {
	if target == "" || target[0] != '/' {
		return Target{}, fmt.Errorf("%w: not a path", ErrTarget)
	}
	if err := plain(target); err != nil {
		return Target{}, err
	}
	if strings.IndexByte(target, '#') >= 0 {
		return Target{}, fmt.Errorf("%w: it has a fragment", ErrTarget)
	}
	rounds, decoded, err := decode(target)
	if err != nil {
		return Target{}, err
	}
	cut := decoded
	if i := strings.IndexAny(decoded, "?#"); i >= 0 {
		cut = decoded[:i]
	}
	segments, odd := resolve(cut)
	t := Target{Path: join(segments, cut), Evasive: odd || cut != target}
	classify := classifyEC2
	switch endpoint {
	case ecsEndpoint, eksEndpoint, eksEndpoint6:
		classify, t.Container = classifyContainer, true
	}
	if len(segments) > 0 && version(segments[0]) {
		t.Version = segments[0]
	}
	if t.Evasive {
		var best worth
		for _, text := range rounds {
			best = worse(best, mentioned(text))
		}
		t.Class, t.Suspect = best.class, best.suspect
		return t, nil
	}

	best := classify(segments, target)
	if folded := strings.ToLower(target); folded != target {
		s, _ := resolve(folded)
		w := classify(s, folded)
		t.Evasive = w != best || len(s) > 0 && t.Version == "" && version(s[0])
		best = worse(best, w)
	}
	t.Class, t.Suspect = best.class, best.suspect
	return t, nil
}

// decode undoes percent-encoding until nothing changes, and gives what each
// round shows, and the last. It takes the query along, because a service may
// decode before it looks for one.
func decode(target string) (rounds [maxDecodings + 1]string, last string, err error) {
	last = target
	for i := range rounds {
		rounds[i] = last
		once, err := unescape(last)
		if err != nil {
			return rounds, "", err
		}
		if once == last {
			return rounds, last, plain(last)
		}
		last = once
	}
	return rounds, "", fmt.Errorf("%w: percent-encoded more than %d times", ErrTarget, maxDecodings)
}

// mentioned is what an evasive target is worth: as much as the dearest place
// of the tree that it names, in whatever order, and never less than a path
// that is in no catalogue.
func mentioned(text string) worth {
	s := strings.ToLower(text)
	switch {
	case strings.Contains(s, "credential"):
		return worth{class: Credentials}
	case strings.Contains(s, "instance-identity"):
		return worth{class: IdentityProof}
	case strings.Contains(s, "user-data"):
		return worth{class: UserData}
	}
	return unknown([]string{s})
}

// plain refuses what no reading may contain.
func plain(s string) error {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c <= ' ' || c == 0x7f:
			return fmt.Errorf("%w: byte %#02x", ErrTarget, c)
		case c >= 0x80:
			return fmt.Errorf("%w: byte %#02x beyond ASCII", ErrTarget, c)
		case c == '\\':
			return fmt.Errorf("%w: a backslash", ErrTarget)
		}
	}
	return nil
}

// unescape decodes %XX once. It returns s itself when there is none.
func unescape(s string) (string, error) {
	if strings.IndexByte(s, '%') < 0 {
		return s, nil
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b = append(b, s[i])
			continue
		}
		if i+2 >= len(s) || hex(s[i+1]) < 0 || hex(s[i+2]) < 0 {
			return "", fmt.Errorf("%w: a percent sign without two hexadecimal digits", ErrTarget)
		}
		b = append(b, byte(hex(s[i+1])<<4|hex(s[i+2])))
		i += 2
	}
	return string(b), nil
}

func hex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// resolve splits a path into its segments: without empty ones, dot segments
// resolved, parameters (";x=y") and trailing dots cut. odd says that anything
// but empty segments was there to resolve, or a plus sign at the edge of a
// segment: to some it is a blank, and to some of those a blank there is nothing.
func resolve(path string) (segments []string, odd bool) {
	segments = make([]string, 0, 8)
	for s := range strings.SplitSeq(path, "/") {
		if i := strings.IndexByte(s, ';'); i >= 0 {
			s, odd = s[:i], true
		}
		switch s {
		case "":
			continue
		case ".":
			odd = true
			continue
		case "..":
			odd = true
			if len(segments) > 0 {
				segments = segments[:len(segments)-1]
			}
			continue
		}
		if s[0] == '+' || s[len(s)-1] == '+' {
			odd = true
		}
		if trimmed := strings.TrimRight(s, "."); trimmed != s {
			odd = true
			if trimmed == "" {
				continue
			}
			s = trimmed
		}
		segments = append(segments, s)
	}
	return segments, odd
}

// join renders resolved segments, or returns the path itself if that is the
// same text.
func join(segments []string, path string) string {
	n := 0
	for _, s := range segments {
		n += 1 + len(s)
	}
	trailing := len(path) > 1 && path[len(path)-1] == '/'
	if trailing && n > 0 || n == 0 {
		n++
	}
	if n == len(path) {
		return path // nothing was cut, so it is the same
	}
	var b strings.Builder
	b.Grow(n)
	for _, s := range segments {
		b.WriteByte('/')
		b.WriteString(s)
	}
	if trailing || len(segments) == 0 {
		b.WriteByte('/')
	}
	return b.String()
}

// version reports whether a segment is a version of the EC2 tree: latest, 1.0
// or a date.
func version(s string) bool {
	if s == "latest" || s == "1.0" {
		return true
	}
	if len(s) != len("2006-01-02") || s[4] != '-' || s[7] != '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		if i != 4 && i != 7 && (s[i] < '0' || s[i] > '9') {
			return false
		}
	}
	return true
}

// worth is a class with the doubt about an unknown path.
type worth struct {
	class   Class
	suspect bool
}

// rank orders classes by what a thief would give for them.
func (w worth) rank() int {
	if w.class == Unknown && w.suspect {
		return 2*slices.Index(rankOrder[:], Unknown) + 3 // between Token and UserData
	}
	return 2 * slices.Index(rankOrder[:], w.class)
}

var rankOrder = [...]Class{Listing, Inventory, Operational, Unknown, Token, UserData, IdentityProof, Credentials}

func worse(a, b worth) worth {
	if b.rank() > a.rank() {
		return b
	}
	return a
}

// classifyEC2 knows the EC2 tree, with any number of versions before it.
// segments are those of path.
func classifyEC2(segments []string, path string) worth {
	listing := strings.HasSuffix(path, "/")
	w := classifyVersioned(segments, listing)
	if strings.HasPrefix(path, "//") && len(segments) > 0 {
		// The service takes the slashes for one, and clients write two. So what
		// is nowhere in the tree is no reason for doubt here.
		if behind := classifyVersioned(segments[1:], listing); behind.class != Unknown {
			w = worse(w, behind)
		}
	}
	return w
}

func classifyVersioned(segments []string, listing bool) worth {
	if len(segments) == 0 || version(segments[0]) {
		return classifyTree(afterVersions(segments), listing)
	}
	// A service that does not look at the version takes anything for one.
	return worse(classifyTree(segments, listing), classifyTree(afterVersions(segments[1:]), listing))
}

func afterVersions(segments []string) []string {
	for len(segments) > 0 && version(segments[0]) {
		segments = segments[1:]
	}
	return segments
}

// classifyTree knows the tree below a version.
func classifyTree(segments []string, listing bool) worth {
	if len(segments) == 0 {
		return worth{class: Listing}
	}
	rest := segments[1:]
	switch segments[0] {
	case "api":
		if len(rest) == 1 && rest[0] == "token" {
			return worth{class: Token}
		}
	case "user-data":
		return worth{class: UserData}
	case "dynamic":
		switch {
		case len(rest) == 0 || len(rest) == 1 && (rest[0] == "instance-identity" || rest[0] == "fws"):
			return worth{class: Listing}
		case rest[0] == "instance-identity" && rest[1] == "document", rest[0] == "fws":
			return worth{class: Inventory}
		case rest[0] == "instance-identity":
			return worth{class: IdentityProof}
		}
	case "meta-data":
		return classifyMetaData(rest, listing)
	}
	return unknown(segments)
}

// classifyMetaData knows the tree below meta-data.
func classifyMetaData(segments []string, listing bool) worth {
	for _, s := range segments {
		// security-credentials, and security-credentials-extended of newer SDKs.
		if strings.HasPrefix(s, "security-credentials") {
			return worth{class: Credentials}
		}
	}
	if len(segments) == 0 {
		return worth{class: Listing}
	}
	rest := segments[1:]
	switch segments[0] {
	case "identity-credentials":
		// Crawlers walk down to "info", and lose the whole tree when a leaf
		// that was listed is refused; everything else in here is secret.
		switch {
		case len(rest) == 0 || len(rest) == 1 && rest[0] == "ec2":
			return worth{class: Listing}
		case len(rest) == 2 && rest[0] == "ec2" && rest[1] == "info":
			return worth{class: Inventory}
		}
		return worth{class: Credentials}
	case "iam":
		switch {
		case len(rest) == 0:
			return worth{class: Listing}
		case len(rest) == 1 && rest[0] == "info":
			return worth{class: Inventory}
		}
		return unknown(segments)
	case "spot", "events", "autoscaling", "managed-ssh-keys":
		return worth{class: Operational}
	}
	if _, ok := inventory[segments[0]]; !ok {
		return unknown(segments)
	}
	if listing {
		return worth{class: Listing}
	}
	return worth{class: Inventory}
}

// inventory has the categories of the EC2 User Guide, "Instance metadata
// categories", that say what the instance is.
var inventory = set(
	"ami-id", "ami-launch-index", "ami-manifest-path", "ancestor-ami-ids", "block-device-mapping",
	"elastic-gpus", "elastic-inference", "hibernation", "hostname", "instance-action", "instance-id",
	"instance-life-cycle", "instance-type", "ipv6", "kernel-id", "local-hostname", "local-ipv4", "mac",
	"metrics", "network", "outpost-arn", "placement", "product-codes", "profile", "public-hostname",
	"public-ipv4", "public-keys", "ramdisk-id", "reservation-id", "security-groups", "services", "system",
	"tags",
)

func set(names ...string) map[string]struct{} {
	m := make(map[string]struct{}, len(names))
	for _, n := range names {
		m[n] = struct{}{}
	}
	return m
}

var (
	ecsEndpoint  = netip.MustParseAddr("169.254.170.2")
	eksEndpoint  = netip.MustParseAddr("169.254.170.23")
	eksEndpoint6 = netip.MustParseAddr("fd00:ec2::23")
)

// classifyContainer knows the endpoints of the ECS agent and of EKS Pod
// Identity: /v2/credentials/UUID, /v1/credentials, and task metadata.
func classifyContainer(segments []string, _ string) worth {
	for _, s := range segments {
		if strings.Contains(s, "credential") {
			return worth{class: Credentials}
		}
	}
	if len(segments) > 0 && (segments[0] == "v3" || segments[0] == "v4") {
		return worth{class: Inventory}
	}
	return unknown(segments)
}

func unknown(segments []string) worth {
	for _, s := range segments {
		for _, word := range []string{"credential", "token", "secret", "key.pem"} {
			if strings.Contains(s, word) {
				return worth{Unknown, true}
			}
		}
	}
	return worth{class: Unknown}
}

// Issued is what may be known of role credentials that were handed out: it
// joins the process that got them to what CloudTrail says was done with them.
type Issued struct {
	AccessKeyID string
	Expiration  time.Time
}

// ParseIssued reads the document of the role credentials paths. It keeps
// neither the secret key nor the session token. ok is false for any other
// body, and for a document that says it has no credentials.
func ParseIssued(body []byte) (issued Issued, ok bool) {
	var doc struct {
		AccessKeyID string    `json:"AccessKeyId"`
		Expiration  time.Time `json:"Expiration"`
	}
	if err := json.Unmarshal(body, &doc); err != nil || doc.AccessKeyID == "" {
		return Issued{}, false
	}
	if !keyID(doc.AccessKeyID) {
		return Issued{}, false
	}
	return Issued{doc.AccessKeyID, doc.Expiration}, true
}

// FindIssued reads what there is of the same document in a part of it: what came
// before a connection broke, or what was asked for with a Range.
func FindIssued(part []byte) (issued Issued, ok bool) {
	id := member(part, `"AccessKeyId"`)
	if !keyID(id) {
		return Issued{}, false
	}
	end, _ := time.Parse(time.RFC3339, member(part, `"Expiration"`)) // or it is in another part
	return Issued{id, end}, true
}

// member is the text that follows a name; "" if its end is not there.
func member(part []byte, name string) string {
	_, rest, _ := bytes.Cut(part, []byte(name))
	rest, isName := bytes.CutPrefix(bytes.TrimLeft(rest, " \t\r\n"), []byte(":"))
	rest, isText := bytes.CutPrefix(bytes.TrimLeft(rest, " \t\r\n"), []byte(`"`))
	text, _, ended := bytes.Cut(rest, []byte(`"`))
	if !isName || !isText || !ended {
		return ""
	}
	return string(text)
}

// keyID reports whether a text may be the id of a key: 16 to 128 word characters
// (IAM API Reference, AccessKey), or fewer in a mock. Nothing else of a document may
// get out by this door.
func keyID(s string) bool {
	return s != "" && len(s) <= 128 && strings.IndexFunc(s, notWord) < 0
}

func notWord(r rune) bool {
	return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && r != '_'
}

// AppendRefusal appends the answer to a request that may not pass. It has the
// header of the service's own 403, and no body: it is the one answer for which
// every SDK that was tried gives up at once (a body is read as the role's name
// by the AWS CRT, a 401 sends it into an endless loop, and a reset, a 503 or
// silence make others retry for seconds). Now is for the Date field.
func AppendRefusal(b []byte, now time.Time) []byte {
	return appendAnswer(b, "403 Forbidden", now)
}

// AppendBadRequest appends the answer to what is no request.
func AppendBadRequest(b []byte, now time.Time) []byte {
	return appendAnswer(b, "400 Bad Request", now)
}

// AppendUnavailable appends the answer to a caller who asks too often, who shall try
// again: the SDKs for Go, .NET, PHP and Rust do, after pauses, while after 403 they would
// do without credentials. What the service itself says to an instance that asks too often
// is not documented (EC2 User Guide, "Query throttling"); the CRT expects 503.
func AppendUnavailable(b []byte, now time.Time) []byte {
	return appendAnswer(b, "503 Service Unavailable", now)
}

func appendAnswer(b []byte, status string, now time.Time) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = append(b, status...)
	b = append(b, "\r\nContent-Type: text/plain\r\nContent-Length: 0\r\nDate: "...)
	b = now.UTC().AppendFormat(b, "Mon, 02 Jan 2006 15:04:05 GMT")
	return append(b, "\r\nServer: EC2ws\r\nConnection: close\r\n\r\n"...)
}
