package event

import (
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"time"
)

// Record is a document that was read back.
type Record struct {
	// Event is as it was when it was judged: who asked for what. It has no decision and
	// no answer; what the document does not tell as it was is in its Gaps, and in those of
	// its processes. Of a document that is not the decision on a request it has the host,
	// the time, and the State.
	Event    Event
	Document Document
	ID       string
	Sequence uint64
	// What became of a request.
	Decision Decision // of a match no more than the rule's ID
	Response Response
	Duration time.Duration
}

// ErrForeign is a line of JSON that is no document of ours.
var ErrForeign = errors.New("no document of imdsgate: data_stream.dataset does not name one")

// Reader reads documents back. It must be used by one goroutine. What it has read
// stays good, and shares hosts, processes and rules, of which it remembers those that it
// has read last: a process is the same *Process in all events, as long as it is
// remembered.
type Reader struct {
	texts     cache[string]
	reasons   cache[string] // by what stands in the document
	hosts     cache[*Host]
	processes cache[*Process]
	rules     cache[*Rule]
	issuers   cache[issuerPart]
	lists     cache[[]string]
	matches   cache[[]Match]
	seen      seen
	byNumbers map[numbers]*Process
	hostOf    map[hostNumbers]*Host
	urls      memo[ofURL]
	exchanges memo[exchange]
	requests  memo[askedFor]
	endpoints memo[netip.AddrPort]
	known     knowledge
	key       []byte
	reading   reading
	first     subjectParts
	others    []subjectParts
}

// hostNumbers are those of the objects about a host.
type hostNumbers struct {
	host, agent uint64
	namespace   string
}

// numbers are those of a process's objects, and of its host.
type numbers [7]uint64

// NewReader makes one. With fewer bytes of processes than the busiest hosts have in an
// hour, each document takes several times as long; each byte takes another five.
func NewReader() *Reader {
	return &Reader{
		seen: seen{seed: maphash.MakeSeed()}, byNumbers: map[numbers]*Process{}, hostOf: map[hostNumbers]*Host{}, urls: memo[ofURL]{}, exchanges: memo[exchange]{}, requests: memo[askedFor]{},
		endpoints: memo[netip.AddrPort]{}, texts: cache[string]{max: 2 << 20}, reasons: cache[string]{max: 1 << 20}, hosts: cache[*Host]{max: 1 << 20}, processes: cache[*Process]{max: 6 << 20},
		rules: cache[*Rule]{max: 256 << 10}, issuers: cache[issuerPart]{max: 1 << 20},
		lists: cache[[]string]{max: 256 << 10}, matches: cache[[]Match]{max: 256 << 10},
	}
}

// subjectParts are the objects of a document that are about one subject, as they stand
// there.
type subjectParts struct {
	container, ancestors, executable, place, pod, process part

	issuer []byte // of the token
	scope  []byte
}

type issuerPart struct {
	*Issuer
	whole bool
}

// reading is one line that is being read.
type reading struct {
	*Reader
	*Record
	scanner
	dataset, module, namespace []byte
	agent, host                part
	rule                       []byte
	roles, matched             []byte
	action                     []byte
	policy                     []byte
	mode                       []byte
	severity, risk             int64
	subjects                   int
	truncated                  bool
	has                        has

	news      news
	novelties []novelty
}

// has are the fields that were there, of those without which nothing can be judged.
type has uint8

const (
	hasTime has = 1 << iota
	hasGuarded
	hasVerdict
	hasWouldBe
	hasComplete
)

var needed = [...]string{"@timestamp", "imdsgate.request.guarded", "imdsgate.verdict", "imdsgate.audit_verdict", "imdsgate.attribution.complete"}

// Read reads a line into a record, which is written over, except that its slices of
// subjects and roles are used again. The error says what is wrong with the line: it is
// ErrForeign where that is somebody else's. The line may be written over afterwards.
func (r *Reader) Read(line []byte, to *Record) error {
	if r.recognise(line, to) {
		return nil
	}
	r.first, r.others = subjectParts{}, r.others[:0]
	*to = Record{Event: Event{Subjects: to.Event.Subjects[:0], Roles: to.Event.Roles[:0]}}
	d := &r.reading
	*d = reading{Reader: r, Record: to, scanner: scannerOf(line), novelties: d.novelties[:0]}
	d.line()
	d.End()
	if d.Err != nil {
		return d.Err
	}
	if err := d.finish(); err != nil {
		return err
	}
	r.remember(line)
	d.news.tell(to)
	return nil
}

func (d *reading) line() {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "@timestamp":
			d.novel(novelTime)
			d.has |= hasTime
		case "agent":
			d.agent = d.part(0, beginning)
		case "host":
			d.host = d.part(0, beginning)
		case "rule":
			d.rule = d.part(0, beginning).raw
		case "data_stream":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "dataset":
					d.dataset = d.Text()
				case "namespace":
					d.namespace = d.Text()
				default:
					d.Skip()
				}
			}
		case "destination":
			d.Event.Connection.Destination = recall(d, d.endpoints, beginning, (*reading).endpoint)
		case "source":
			d.source()
		case "event":
			d.ofEvent()
		case "http":
			x := recall(d, d.exchanges, beginning, (*reading).exchange)
			d.Event.Request.Method, d.Event.Request.HTTP, d.Event.Request.Bytes = x.method, x.version, x.asked
			d.Response.Status, d.Response.Bytes = x.status, x.answered
		case "imdsgate":
			d.own()
		case "url":
			u := recall(d, d.urls, beginningOfURL, (*reading).url)
			q := &d.Event.Request
			q.Host, q.Target, q.Path = u.host, u.target, u.path
		case "user_agent":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				if string(d.name()) == "original" {
					d.Event.Request.UserAgent = d.text(GapUserAgent)
				} else {
					d.Skip()
				}
			}
		case "container":
			d.first.container = d.part(d.salt(), beginning)
		case "orchestrator":
			d.first.pod = d.part(d.salt(), beginning)
		case "process":
			d.first.process = d.part(d.salt(), beginningOfProcess)
		case "message", "related": // which are others in each document
			d.Skip()
		default:
			d.part(0, beginning)
		}
	}
}

func (d *reading) ofEvent() {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "action":
			d.action = d.Text()
		case "dataset":
			if set := d.Text(); d.dataset == nil {
				d.dataset = set
			}
		case "created":
			d.novel(novelCreated)
		case "duration":
			d.novel(novelDuration)
		case "id":
			d.novel(novelID)
		case "module":
			d.module = d.Text()
		case "reason":
			d.Decision.Reason = d.quoting()
		case "risk_score":
			d.risk = d.Int()
		case "sequence":
			d.novel(novelSequence)
		case "severity":
			d.severity = d.Int()
		case "start":
			d.novel(novelStart)
		default:
			d.Skip()
		}
	}
}

// ofURL is what the object url says.
type ofURL struct{ host, target, path string }

func (d *reading) url() (u ofURL) {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "domain":
			u.host = d.text(GapHost)
		case "original":
			u.target = d.text(GapTarget)
		case "path":
			u.path = d.text(GapPath)
		default:
			d.Skip()
		}
	}
	return u
}

// exchange is what the object http says.
type exchange struct {
	method, version         string
	asked, answered, status int64
}

func (d *reading) exchange() (x exchange) {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "request":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "bytes":
					x.asked = d.Int()
				case "method":
					x.method = d.text(GapMethod)
				default:
					d.Skip()
				}
			}
		case "response":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "bytes":
					x.answered = d.Int()
				case "status_code":
					x.status = d.Int()
				default:
					d.Skip()
				}
			}
		case "version":
			x.version = d.text(GapRequest)
		default:
			d.Skip()
		}
	}
	return x
}

// own reads the fields that ECS has no names for.
func (d *reading) own() {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "ancestors":
			d.first.ancestors = d.part(d.salt(), beginning)
		case "attribution":
			d.attribution()
		case "audit_verdict":
			d.Decision.WouldBe = d.verdict()
			d.has |= hasWouldBe
		case "credential":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "access_key_id":
					d.Response.AccessKeyID = d.text(0)
				case "expiration":
					d.novel(novelExpiration)
				default:
					d.Skip()
				}
			}
		case "executable":
			d.first.executable = d.part(d.salt(), beginning)
		case "forwarded":
			d.Event.Connection.Forwarded = d.Bool()
		case "decision":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				if string(d.name()) == "id" {
					d.Decision.Operator = d.text(0)
				} else {
					d.Skip()
				}
			}
		case "deny":
			d.Decision.Deny = d.text(0)
		case "grant":
			d.Decision.Grant = d.text(0)
		case "latched":
			d.Decision.Latched = d.Bool()
		case "matched":
			d.matched = d.Raw()
		case "mode":
			d.mode = d.Text()
		case "others":
			for more := d.Begin('[', ']'); more; more = d.More(']') {
				d.other()
			}
		case "policy":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				if string(d.name()) == "digest" {
					d.policy = d.Text()
				} else {
					d.Skip()
				}
			}
		case "process":
			d.first.place = d.part(d.salt(), beginning)
		case "repeats":
			d.repeats()
		case "request":
			d.asked(recall(d, d.requests, beginning, (*reading).request))
		case "response":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				if string(d.name()) == "failure" {
					d.Response.Failed = d.text(0)
				} else {
					d.Skip()
				}
			}
		case "subjects":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "pid":
					for more := d.Begin('[', ']'); more; more = d.More(']') {
						d.Int()
						d.subjects++
					}
				case "role":
					d.roles = d.Raw()
				default:
					d.Skip()
				}
			}
		case "token":
			d.token(&d.first)
		case "truncated":
			d.truncated = d.Bool()
		case "verdict":
			d.Decision.Verdict = d.verdict()
			d.has |= hasVerdict
		default:
			d.Skip()
		}
	}
}

func (d *reading) repeats() {
	r := &d.Event.Repeats
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "connections":
			r.Connections = d.count()
		case "of":
			r.Of = string(d.Text())
		case "requests":
			r.Requests = d.count()
		default:
			d.Skip()
		}
	}
}

// maxCount bounds how many requests one document may stand for, so that sums of a file that
// somebody made do not overflow.
const maxCount = 1 << 40

func (d *reading) count() int64 {
	n := d.Int()
	if d.Err == nil && (n < 0 || n > maxCount) {
		d.Fail("%d is no number of requests", n)
	}
	return n
}

func (d *reading) attribution() {
	a := &d.Event.Attribution
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "complete":
			a.Complete = d.Bool()
			d.has |= hasComplete
		case "confidence":
			a.Confidence = d.text(0)
		case "cookie":
			d.novel(novelCookie)
		case "latency_us":
			d.novel(novelLatency)
		case "level":
			a.Level = d.text(0)
		case "reason":
			a.Reason = d.text(0)
		case "unawaited":
			a.Unawaited = d.Bool()
		case "unreadable":
			a.Unreadable = d.ints()
		case "via":
			a.Via = d.text(0)
		default:
			d.Skip()
		}
	}
}

// askedFor is what imdsgate.request says.
type askedFor struct {
	Request
	guarded bool // it says whether it is
}

func (d *reading) request() (q askedFor) {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "api":
			q.Container = string(d.Text()) == "container"
		case "class":
			q.Class = d.text(GapRequest)
		case "evasive":
			q.Evasive = d.Bool()
		case "forwarded_for":
			q.Forwarded = d.Bool()
		case "guarded":
			q.Guarded, q.guarded = d.Bool(), true
		case "malformed":
			q.Malformed = d.text(GapRequest)
		case "public_host":
			q.HostIsOdd = d.Bool()
		case "token":
			q.Token = string(d.Text()) == "present"
		case "version":
			q.Version = d.text(GapRequest)
		default:
			d.Skip()
		}
	}
	return q
}

// asked adds what imdsgate.request says to what other objects do.
func (d *reading) asked(of askedFor) {
	if of.guarded {
		d.has |= hasGuarded
	}
	q := &d.Event.Request
	q.Container, q.Class, q.Evasive, q.Forwarded, q.Guarded = of.Container, of.Class, of.Evasive, of.Forwarded, of.Guarded
	q.Malformed, q.HostIsOdd, q.Token, q.Version = of.Malformed, of.HostIsOdd, of.Token, of.Version
}

func (d *reading) token(of *subjectParts) {
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "expires":
			d.novel(novelExpires)
		case "issued":
			d.novel(novelIssued)
		case "issuer":
			of.issuer = d.Raw()
		case "scope":
			of.scope = d.Text()
		default:
			d.Skip()
		}
	}
}

func (d *reading) other() {
	var p subjectParts
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "container":
			p.container = d.part(d.salt(), beginning)
		case "orchestrator":
			p.pod = d.part(d.salt(), beginning)
		case "process":
			p.process = d.part(d.salt(), beginningOfProcess)
		case "imdsgate":
			for more := d.Begin('{', '}'); more; more = d.More('}') {
				switch string(d.name()) {
				case "ancestors":
					p.ancestors = d.part(d.salt(), beginning)
				case "executable":
					p.executable = d.part(d.salt(), beginning)
				case "process":
					p.place = d.part(d.salt(), beginning)
				case "token":
					d.token(&p)
				default:
					d.Skip()
				}
			}
		default:
			d.Skip()
		}
	}
	if d.Err == nil && len(d.others) < maxTexts { // else there are more than a document has
		d.others = append(d.others, p)
	}
}

// finish makes the event of what was read.
func (d *reading) finish() error {
	if err := d.kind(); err != nil {
		return err
	}
	if d.has&hasTime == 0 {
		return missing(hasTime)
	}
	var err error
	if d.Event.Host, err = d.ofHost(); err != nil {
		return err
	}
	d.Event.Gaps |= GapTime | GapAnswer
	if d.Response.Failed != "" {
		d.Event.Gaps |= GapOutcome
	}
	switch d.Document {
	case LifecycleChange, IntegrityFinding:
		d.Event.State = State{Action: d.kept(d.action), Mode: d.kept(d.mode), Policy: d.kept(d.policy), Reason: d.Decision.Reason}
		return nil
	case RequestDecision:
	default:
		return nil
	}
	for i := range needed {
		if d.has>>i&1 == 0 {
			return missing(1 << i)
		}
	}
	if r := &d.Event.Repeats; r.Requests > 0 {
		if r.First, err = time.Parse(time.RFC3339, string(d.news.start)); err != nil {
			return fmt.Errorf("event.start: %.40q is no time as RFC 3339 has it", d.news.start)
		}
	}
	d.Decision.Mode = d.kept(d.mode)
	d.Response.Refused = d.Decision.Verdict == Deny
	if d.Decision.Rule, err = d.ofRule(); err != nil {
		return err
	}
	if d.Decision.Matches, err = d.ofMatches(); err != nil {
		return err
	}
	if d.roles != nil {
		roles, err := d.list(d.roles)
		if err != nil {
			return err
		}
		d.Event.Roles = append(d.Event.Roles, roles...)
	}
	return d.ofSubjects()
}

func missing(h has) error {
	for i, name := range needed {
		if h == 1<<i {
			return fmt.Errorf("the document lacks %s", name)
		}
	}
	panic("no such field")
}

// kind finds out what the document is.
func (d *reading) kind() error {
	for i, set := range datasets {
		if string(d.dataset) == set {
			d.Document = Document(i)
			switch d.Document {
			case LifecycleChange:
				d.Event.Kind = Lifecycle
			case IntegrityFinding:
				d.Event.Kind = Integrity
			}
			return nil
		}
	}
	if string(d.module) == "imdsgate" { // laid out as Elastic's agent does
		switch string(d.dataset) {
		case "endpoint.events.process":
			d.Document = ProcessStart
			return nil
		case "endpoint.events.network":
			d.Document = ConnectionAttempt
			return nil
		}
	}
	return ErrForeign
}

func (d *reading) ofSubjects() error {
	if d.first.process.raw == nil {
		if d.subjects > 0 {
			return errors.New("the document has imdsgate.subjects, and no process")
		}
		return nil
	}
	if 1+len(d.others) != max(d.subjects, 1) || d.subjects >= maxTexts || d.truncated && len(d.others) >= maxOthers {
		d.Event.Gaps |= GapSubjects
	}
	if err := d.subject(&d.first); err != nil {
		return err
	}
	for i := range d.others {
		if err := d.subject(&d.others[i]); err != nil {
			return err
		}
	}
	return nil
}

// subject adds one, and how it is tied to the token.
func (d *reading) subject(of *subjectParts) error {
	p, err := d.ofProcess(of)
	if err != nil {
		return err
	}
	d.Event.Subjects = append(d.Event.Subjects, p)
	if of.scope == nil {
		return nil
	}
	issuer, err := d.ofIssuer(of.issuer)
	if err != nil {
		return err
	}
	if !issuer.whole {
		d.Event.Gaps |= GapToken
	}
	t := tie{process: p, issuer: issuer.Issuer}
	if string(of.scope) != "none" {
		t.tied = true
		if err := t.scope.UnmarshalText(of.scope); err != nil {
			return fmt.Errorf("imdsgate.token.scope: %w", err)
		}
	}
	d.Event.Token.told = append(d.Event.Token.told, t)
	return nil
}

// name reads the name of a member.
func (d *reading) name() []byte { return d.Key() }

// text reads a string that is in many documents, and notes if it is not what it was.
func (d *reading) text(gap Gaps) string {
	if d.Null() {
		return ""
	}
	b := d.Text()
	if d.Err == nil && gap != 0 && !whole(b) {
		d.Event.Gaps |= gap
	}
	return d.kept(b)
}

// quoting reads a string that has quotes in it, as reasons have. It is remembered as it
// stands in the document, since they take long to be taken out.
func (d *reading) quoting() string {
	if d.Null() {
		return ""
	}
	quoted, escaped := d.Quoted()
	if !escaped {
		if len(quoted) < 2 {
			return ""
		}
		return d.kept(quoted[1 : len(quoted)-1])
	}
	s, ok := d.reasons.get(quoted)
	if !ok {
		if s = string(d.Unquote(quoted)); d.Err == nil && len(quoted) <= maxKept {
			d.reasons.put(quoted, s)
		}
	}
	return s
}

// maxKept bounds the strings that are remembered.
const maxKept = 512

// kept is a string with memory of its own.
func (r *Reader) kept(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if len(b) > maxKept {
		return string(b)
	}
	s, ok := r.texts.get(b)
	if !ok {
		s = string(b)
		r.texts.put(b, s)
	}
	return s
}

func (d *reading) verdict() Verdict {
	switch string(d.Text()) {
	case "allow":
	case "deny":
		return Deny
	default:
		d.Fail("a verdict is allow or deny")
	}
	return Allow
}

func (s *scanner) time() time.Time {
	if s.Null() {
		return time.Time{}
	}
	b := s.Text()
	if s.Err != nil {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, string(b))
	if err != nil {
		s.Fail("%.40q is no time as RFC 3339 has it", b)
	}
	return t
}

// source reads the client's end of the connection, of which the port is told apart.
func (d *reading) source() {
	var ip netip.Addr
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "ip":
			ip = d.address()
		case "port":
			d.novel(novelPort)
		default:
			d.Skip()
		}
	}
	d.Event.Connection.Source = netip.AddrPortFrom(ip, 0)
}

func (d *reading) address() netip.Addr {
	text := d.text(0)
	ip, err := netip.ParseAddr(text)
	if err != nil && text != "invalid IP" && d.Err == nil {
		d.Fail("%.60q is no address", text)
	}
	return ip
}

func (d *reading) port() uint16 {
	port := d.Int()
	if port < 0 || port > 1<<16-1 {
		d.Fail("%d is no port", port)
	}
	return uint16(port)
}

func (d *reading) endpoint() netip.AddrPort {
	var ip netip.Addr
	var port uint16
	for more := d.Begin('{', '}'); more; more = d.More('}') {
		switch string(d.name()) {
		case "ip":
			ip = d.address()
		case "port":
			port = d.port()
		default:
			d.Skip()
		}
	}
	return netip.AddrPortFrom(ip, port)
}

func (d *reading) ofHost() (*Host, error) {
	if d.host.raw == nil && d.agent.raw == nil {
		return nil, errors.New("the document lacks host.id")
	}
	r := d.Reader
	n := hostNumbers{d.host.number, d.agent.number, d.kept(d.namespace)}
	if h := r.hostOf[n]; h != nil && n.host != 0 && n.agent != 0 {
		return h, nil
	}
	r.key = append(append(append(append(append(r.key[:0], d.host.raw...), 0), d.agent.raw...), 0), d.namespace...)
	h, ok := r.hosts.get(r.key)
	if !ok {
		var err error
		if h, err = d.makeHost(); err != nil {
			return nil, err
		}
		r.hosts.put(r.key, h)
	}
	if n.host != 0 && n.agent != 0 {
		if len(r.hostOf) >= placesSeen {
			clear(r.hostOf)
		}
		r.hostOf[n] = h
	}
	return h, nil
}

func (d *reading) makeHost() (*Host, error) {
	h := &Host{Namespace: string(d.namespace)}
	s := scannerOf(d.host.raw)
	s.members(func(name string) {
		switch name {
		case "architecture":
			h.Architecture = s.copied()
		case "boot":
			s.members(func(name string) {
				if name == "id" {
					h.BootID = s.copied()
				} else {
					s.Skip()
				}
			})
		case "id":
			h.ID = s.copied()
		case "name":
			h.Name = s.copied()
		case "os":
			s.members(func(name string) {
				switch name {
				case "kernel":
					h.Kernel = s.copied()
				case "name":
					h.OSName = s.copied()
				case "platform":
					h.OSPlatform = s.copied()
				case "version":
					h.OSVersion = s.copied()
				default:
					s.Skip()
				}
			})
		default:
			s.Skip()
		}
	})
	a := scannerOf(d.agent.raw)
	a.members(func(name string) {
		switch name {
		case "id":
			h.AgentID = a.copied()
		case "version":
			h.Version = a.copied()
		default:
			a.Skip()
		}
	})
	if err := errors.Join(s.Err, a.Err); err != nil {
		return nil, fmt.Errorf("host or agent: %w", err)
	}
	return h, nil
}

// members calls f with the name of each member of an object, of which f reads the
// value. It is for what is read seldom. Of no text there are none.
func (s *scanner) members(f func(name string)) {
	if len(s.Line) == 0 {
		return
	}
	for more := s.Begin('{', '}'); more; more = s.More('}') {
		f(string(s.Key()))
	}
}

// copied reads a string and gives it memory of its own.
func (s *scanner) copied() string {
	if s.Null() {
		return ""
	}
	return string(s.Text())
}

// strings reads an array of them, as many as documents have.
func (s *scanner) strings() (all []string) {
	for more := s.Begin('[', ']'); more; more = s.More(']') {
		if text := s.Text(); len(all) < maxTexts {
			all = append(all, string(text))
		}
	}
	return all
}

// ints reads an array of them, as many as documents have.
func (s *scanner) ints() (all []int64) {
	for more := s.Begin('[', ']'); more; more = s.More(']') {
		if n := s.Int(); len(all) < maxTexts {
			all = append(all, n)
		}
	}
	return all
}

func (d *reading) ofRule() (*Rule, error) {
	if d.rule == nil {
		return nil, nil
	}
	d.key = fmt.Appendf(append(d.key[:0], d.rule...), "\x00%d\x00%d", d.severity, d.risk)
	if r, ok := d.rules.get(d.key); ok {
		return r, nil
	}
	r := &Rule{RiskScore: d.risk, Severity: severityName(d.severity)}
	s := scannerOf(d.rule)
	s.members(func(name string) {
		switch name {
		case "id":
			r.ID = s.copied()
		case "name":
			r.Name = s.copied()
		case "reference":
			r.Reference = s.copied()
		case "ruleset":
			r.Ruleset = s.copied()
		case "version":
			r.Version = s.copied()
		default:
			s.Skip()
		}
	})
	if s.Err != nil {
		return nil, fmt.Errorf("rule: %w", s.Err)
	}
	d.rules.put(d.key, r)
	return r, nil
}

// ofMatches are the rules that matched, of which nothing else is written.
func (d *reading) ofMatches() ([]Match, error) {
	if d.matched == nil {
		return nil, nil
	}
	if all, ok := d.matches.get(d.matched); ok {
		return all, nil
	}
	s := scannerOf(d.matched)
	var all []Match
	for _, id := range s.strings() {
		all = append(all, Match{Rule: &Rule{ID: id}})
	}
	if s.Err != nil {
		return nil, fmt.Errorf("imdsgate.matched: %w", s.Err)
	}
	d.matches.put(d.matched, all)
	return all, nil
}

func (d *reading) list(raw []byte) ([]string, error) {
	if all, ok := d.lists.get(raw); ok {
		return all, nil
	}
	s := scannerOf(raw)
	all := s.strings()
	if s.Err != nil {
		return nil, fmt.Errorf("imdsgate.subjects.role: %w", s.Err)
	}
	d.lists.put(raw, all)
	return all, nil
}

func (d *reading) ofIssuer(raw []byte) (issuerPart, error) {
	if i, ok := d.issuers.get(raw); ok {
		return i, nil
	}
	i := issuerPart{&Issuer{}, true}
	s := scannerOf(raw)
	text := func() string {
		text := s.copied()
		i.whole = i.whole && whole([]byte(text))
		return text
	}
	s.members(func(name string) {
		switch name {
		case "entity_id":
			i.EntityID = text()
		case "executable":
			i.Executable = text()
		case "pid":
			i.PID = s.Int()
		case "unit":
			i.Unit = text()
		case "user":
			s.members(func(name string) {
				switch name {
				case "id":
					i.UserID = text()
				case "name":
					i.UserName = text()
				default:
					s.Skip()
				}
			})
		default:
			s.Skip()
		}
	})
	if s.Err != nil {
		return issuerPart{}, fmt.Errorf("imdsgate.token.issuer: %w", s.Err)
	}
	d.issuers.put(raw, i)
	return i, nil
}

// salt tells the objects of different hosts apart.
func (d *reading) salt() uint64 { return uint64(d.host.number) }

// ofProcess makes a process of its objects, or remembers what it has made of the same.
func (d *reading) ofProcess(of *subjectParts) (*Process, error) {
	objects := [...]*part{&d.host, &of.process, &of.place, &of.executable, &of.ancestors, &of.container, &of.pod}
	var n numbers
	numbered := true
	for i, o := range objects {
		n[i] = o.number
		numbered = numbered && (o.number != 0 || o.raw == nil)
	}
	if numbered {
		if p := d.byNumbers[n]; p != nil {
			return p, nil
		}
	}
	key := d.key[:0]
	for _, o := range objects {
		key = append(append(key, 0), o.raw...)
	}
	d.key = key
	p, ok := d.processes.get(key)
	if !ok {
		p = &Process{}
		r := processReader{p: p}
		r.process(of.process.raw)
		r.place(of.place.raw)
		r.executable(of.executable.raw)
		r.ancestors(of.ancestors.raw)
		r.container(of.container.raw, of.pod.raw)
		if r.err != nil {
			return nil, r.err
		}
		d.processes.put(key, p)
	}
	if numbered {
		if len(d.byNumbers) >= placesSeen {
			clear(d.byNumbers)
		}
		d.byNumbers[n] = p
	}
	return p, nil
}

// processReader reads the objects of one process. It keeps the first error.
type processReader struct {
	p   *Process
	err error
}

func (r *processReader) note(object string, s *scanner) {
	if s.End(); s.Err != nil && r.err == nil {
		r.err = fmt.Errorf("%s: %w", object, s.Err)
	}
}

func (r *processReader) process(raw []byte) {
	s := scannerOf(raw)
	s.process(r.p)
	r.note("process", &s)
}

// process reads the object of a process, and in it that of its parent.
func (s *scanner) process(p *Process) {
	text := func(gap Gaps) string {
		b := s.Text()
		if !whole(b) {
			p.Gaps |= gap
		}
		return string(b)
	}
	list := func(gap Gaps) []string {
		all := s.strings()
		size := 0
		for _, one := range all {
			if size += len(one); !whole([]byte(one)) {
				p.Gaps |= gap
			}
		}
		if len(all) >= maxTexts || size > maxText-4 {
			p.Gaps |= gap
		}
		return all
	}
	count := int64(-1)
	s.members(func(name string) {
		switch name {
		case "args":
			p.Args = list(GapArgs)
		case "args_count":
			count = s.Int()
		case "command_line":
			p.CommandLine = text(GapCommandLine)
		case "entity_id":
			p.EntityID = text(0)
		case "executable":
			p.Executable = text(GapExecutable)
		case "group":
			p.GroupID, p.GroupName = s.idName(p)
		case "group_leader":
			s.members(func(name string) {
				if name == "pid" {
					p.Group = s.Int()
				} else {
					s.Skip()
				}
			})
		case "interactive":
			p.TTY = s.Bool()
		case "name":
			p.Name = text(GapName)
		case "parent":
			p.Parent = &Process{Gaps: GapFile} // which another object may tell
			s.process(p.Parent)
		case "pid":
			p.PID = s.Int()
		case "real_group":
			p.RealGroupID, _ = s.idName(p)
		case "real_user":
			p.RealUserID, _ = s.idName(p)
		case "saved_group":
			p.SavedGroupID, _ = s.idName(p)
		case "saved_user":
			p.SavedUserID, _ = s.idName(p)
		case "session_leader":
			s.members(func(name string) {
				if name == "pid" {
					p.Session = s.Int()
				} else {
					s.Skip()
				}
			})
		case "start":
			p.Start = s.time()
		case "supplemental_groups":
			s.members(func(name string) {
				if name == "id" {
					p.SupplementalGroups = list(GapUser)
				} else {
					s.Skip()
				}
			})
		case "thread":
			s.members(func(name string) {
				if name == "name" {
					p.Thread = text(GapThread)
				} else {
					s.Skip()
				}
			})
		case "user":
			p.UserID, p.UserName = s.idName(p)
		case "working_directory":
			p.WorkingDir = text(GapWorkingDir)
		default:
			s.Skip()
		}
	})
	switch {
	case count < 0: // no more than its number and name
		p.Gaps |= ofOneProcess
	case int64(len(p.Args)) != count:
		p.Gaps |= GapArgs | GapArgsCount
	}
	// A program that was started by a relative path has that for another path.
	if p.Gaps&GapArgs != 0 && (len(p.Args) == 0 || !whole([]byte(p.Args[0]))) {
		p.Gaps |= GapExecutable
	}
}

// idName reads a user or group of a process.
func (s *scanner) idName(of *Process) (id, name string) {
	s.members(func(key string) {
		switch key {
		case "id":
			id = s.copied()
		case "name":
			name = s.copied()
		default:
			s.Skip()
		}
	})
	if !whole([]byte(id)) || !whole([]byte(name)) {
		of.Gaps |= GapUser
	}
	return id, name
}

// place reads imdsgate.process.
func (r *processReader) place(raw []byte) {
	s, p := scannerOf(raw), r.p
	text := func() string {
		b := s.Text()
		if !whole(b) {
			p.Gaps |= GapPlace
		}
		return string(b)
	}
	s.members(func(name string) {
		switch name {
		case "ancestry":
			p.Ancestry = s.copied()
		case "cgroup":
			p.Cgroup = text()
		case "earlier_image":
			p.Earlier = s.Bool()
		case "ended":
			p.Ended = s.Bool()
		case "parent":
			parent := p.Parent
			if parent == nil { // of which there is no more
				parent = &Process{}
			}
			known := false
			s.members(func(name string) {
				switch name {
				case "host_verified":
					parent.HostVerified, known = s.Bool(), true
				case "loader":
					parent.Loader = s.Bool()
				case "root_owned":
					parent.RootOwned = s.Bool()
				case "unproven":
					parent.Unproven = s.Bool()
				default:
					s.Skip()
				}
			})
			if known {
				parent.Gaps &^= GapFile
			}
		case "parent_now":
			p.ParentNow = &Process{}
			s.process(p.ParentNow)
		case "unit":
			p.Unit = text()
		case "user_unit":
			p.UserUnit = text()
		default:
			s.Skip()
		}
	})
	r.note("imdsgate.process", &s)
}

// executable reads imdsgate.executable.
func (r *processReader) executable(raw []byte) {
	s, p := scannerOf(raw), r.p
	proven := false
	s.members(func(name string) {
		switch name {
		case "deleted":
			p.Deleted = s.Bool()
		case "host_verified":
			p.HostVerified, proven = s.Bool(), true
		case "loader":
			p.Loader, p.Known = s.Bool(), true
		case "root_owned":
			p.RootOwned = s.Bool()
		case "swapped":
			p.Swapped = s.Bool()
		default:
			s.Skip()
		}
	})
	p.Unproven = p.Known && !proven
	r.note("imdsgate.executable", &s)
}

// ancestors reads those above the parent.
func (r *processReader) ancestors(raw []byte) {
	s, p := scannerOf(raw), r.p
	var pids []int64
	var executables []string
	s.members(func(name string) {
		switch name {
		case "executable":
			executables = s.strings()
		case "pid":
			pids = s.ints()
		default:
			s.Skip()
		}
	})
	r.note("imdsgate.ancestors", &s)
	size := 0
	for _, e := range executables {
		if size += len(e); !whole([]byte(e)) {
			p.Gaps |= GapAncestors
		}
	}
	if len(pids) != len(executables) || len(pids) >= maxTexts || size > maxText-4 || len(pids) > 0 && p.Parent == nil {
		p.Gaps |= GapAncestors
	}
	last := p.Parent
	for i := 1; i < min(len(pids), len(executables)) && last != nil; i++ {
		last.Parent = &Process{PID: pids[i], Executable: executables[i], Gaps: ofOneProcess}
		last = last.Parent
	}
}

// container reads the objects container and orchestrator.
func (r *processReader) container(raw, pod []byte) {
	s, p := scannerOf(raw), r.p
	s.members(func(name string) {
		switch name {
		case "id":
			p.Container = s.copied()
		case "runtime":
			p.Runtime = s.copied()
		default:
			s.Skip()
		}
	})
	r.note("container", &s)
	o := scannerOf(pod)
	o.members(func(name string) {
		if name != "resource" {
			o.Skip()
			return
		}
		o.members(func(name string) {
			if name == "id" {
				p.Pod = o.copied()
			} else {
				o.Skip()
			}
		})
	})
	r.note("orchestrator", &o)
	for _, text := range [...]string{p.Container, p.Runtime, p.Pod} {
		if !whole([]byte(text)) {
			p.Gaps |= GapPlace
		}
	}
}

func severityName(n int64) string {
	for _, name := range [...]string{"low", "medium", "high", "critical"} {
		if of, _ := SeverityNumber(name); of == n {
			return name
		}
	}
	return ""
}
