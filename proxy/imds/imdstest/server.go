// Package imdstest emulates the EC2 instance metadata service on raw sockets, for tests and load.
//
// It reads and writes HTTP itself: status lines, header names, their case and order are those of transcripts of real
// instances, which net/http could not produce, and a mistake in the proxy under test cannot hide behind the same
// mistake here. What no transcript and no AWS page tells is marked as a guess beside the code. It shares no code with
// the rest of the module and serves only made-up values: every secret says that it is fake.
//
// Config's zero value is an instance with AWS's defaults: tokens optional, hop limit 1, a role, no tags. Everything
// can be changed while it runs, with Update and its short forms. Every byte received and sent is kept for Transcript.
//
// Sources: EC2 User Guide ("Use the Instance Metadata Service to access instance metadata", "Instance metadata
// categories", "Configure the Instance Metadata Service options") and public curl -v captures of 2019 to 2026.
package imdstest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Config is an instance and how its metadata service behaves. The slices and maps are not copied and must not be
// changed once given away; Update replaces them.
type Config struct {
	// TokensRequired is HttpTokens=required: a request without a token is answered 401.
	TokensRequired bool

	// HopLimit is HttpPutResponseHopLimit, 1 to 64, the TTL of the packets that carry a token; 0 means 1. At 64,
	// the kernel's own default, the sockets are left alone, which saves a load test two system calls.
	HopLimit int

	// EndpointDisabled is HttpEndpoint=disabled: everything is answered 403.
	EndpointDisabled bool

	// Tags are the instance's tags; nil is InstanceMetadataTags=disabled.
	Tags map[string]string

	// Role is the name of the instance's role; "" means "imdsgate-lab-role".
	Role string

	// NoRole is an instance without a role.
	NoRole bool

	// CredentialLifetime is the time from a document's issue to its Expiration; 0 means 6 h. Five minutes before
	// the end, or at half time if that is later, the next document is served.
	CredentialLifetime time.Duration

	// ExtendedCredentials adds iam/security-credentials-extended, whose documents have an AccountId.
	ExtendedCredentials bool

	// UserData is the instance's user data; nil means a short cloud-config, empty means none.
	UserData []byte

	// Data adds leaves, or replaces the values of existing ones, by their path below the version:
	// "meta-data/spot/instance-action".
	Data map[string]string

	Reading     Reading     // how request targets are read
	Persistence Persistence // which connections are kept after an answer
	Pages       Pages       // the bodies of 400, 401 and 404

	// HTTP10 are paths below the version that are answered the way a second generation of servers does: HTTP/1.0,
	// headers in another order, always closed.
	HTTP10 []string

	// Agent makes it another service than that of metadata; nil means none.
	Agent *Agent

	// Fault is asked after each request's head was read and says what goes wrong with the answer; nil means
	// nothing. It is called from the connections' goroutines, several at once, and must not keep the Request.
	Fault func(*Request) Fault

	// NoTranscript keeps no transcript. Like TranscriptLimit it is read by Serve and Reset only.
	NoTranscript bool

	// TranscriptLimit bounds what the transcript keeps, in bytes, its own bookkeeping included; 0 means 16 MiB.
	// When it is too low, Transcript.Lost is not zero.
	TranscriptLimit int

	// Now is the clock of the documents, tokens and Date headers; nil means time.Now.
	Now func() time.Time
}

// Reading says how a request target is read. What EC2 does with anything but plain paths is not known.
type Reading uint8

const (
	// Strict takes the target's bytes as the name, but for repeated slashes and one at the end.
	Strict Reading = iota
	// Lenient also removes scheme and authority, query, fragment and ;parameters, decodes percent signs, takes
	// backslashes for slashes, resolves dot segments and ignores case; bare line feeds end lines. It shows what
	// the most forgiving service would have given away.
	Lenient
)

// Persistence says which connections are kept open after an answer.
type Persistence uint8

const (
	AsAsked     Persistence = iota // kept if the client asks with "Connection: keep-alive"
	AlwaysClose                    // never kept
	AlwaysKeep                     // kept unless the client asks to close or speaks HTTP/1.0; no Connection header
)

// Pages says what the bodies of 400, 401 and 404 are. Captures show both kinds.
type Pages uint8

const (
	Empty Pages = iota // no body, text/plain
	XHTML              // a page naming the status, text/html
)

// A Server is a running emulator. Its methods may be called from any goroutine.
type Server struct {
	initial   Config
	listeners []net.Listener
	done      chan struct{} // closed by Close
	running   sync.WaitGroup
	current   atomic.Pointer[instance]
	requests  atomic.Int64
	conns     sync.Pool // of *conn
	log       transcript

	mu     sync.Mutex // guards what follows, and the making of a new current
	open   map[*conn]struct{}
	closed bool
}

// An instance is what one request is answered from: immutable, replaced as a whole.
type instance struct {
	Config
	secret   [32]byte // of the tokens
	issue    int      // number of the credential documents, from 1
	issuedAt time.Time
	rotateAt time.Time
	launched time.Time
	tree     *tree
	http10   map[string]bool
}

// Serve answers on the listeners, which it owns from here on, until Close. It panics if a field of cfg is out of its
// range.
func Serve(cfg Config, listeners ...net.Listener) *Server {
	s := &Server{initial: cfg, listeners: listeners, done: make(chan struct{}), open: make(map[*conn]struct{})}
	s.conns.New = func() any { return newConn(s) }
	s.Reset()
	for _, ln := range listeners {
		s.running.Add(1)
		go s.accept(ln)
	}
	return s
}

// Close stops listening, closes all connections and waits for their goroutines. Safe to call twice.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.done)
	}
	var errs []error
	for _, ln := range s.listeners {
		if err := ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, fmt.Errorf("close listener %s: %w", ln.Addr(), err))
		}
	}
	for c := range s.open {
		c.nc.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
	return errors.Join(errs...)
}

// Update changes the configuration; requests already being answered keep the old one. fn gets a copy and must not
// call the Server. It panics like Serve.
func (s *Server) Update(fn func(*Config)) {
	s.replace(func(i *instance) { fn(&i.Config) })
}

// SetTokens sets Config.TokensRequired.
func (s *Server) SetTokens(required bool) {
	s.Update(func(c *Config) { c.TokensRequired = required })
}

// SetHopLimit sets Config.HopLimit.
func (s *Server) SetHopLimit(n int) {
	s.Update(func(c *Config) { c.HopLimit = n })
}

// Rotate issues new credential documents. Access key IDs end in the number of the issue: the first is
// ASIAEXAMPLEFAKE00001.
func (s *Server) Rotate() {
	s.replace(func(i *instance) { i.issue++ })
}

// Reset returns to the configuration given to Serve and the first credential documents, as if the instance were
// launched now; it forgets all tokens and the transcript.
func (s *Server) Reset() {
	s.replace(func(i *instance) {
		*i = instance{Config: s.initial, issue: 1}
		rand.Read(i.secret[:])
	})
	s.log.reset(s.initial)
	s.requests.Store(0)
}

// replace makes a changed copy of the current instance the current one.
func (s *Server) replace(change func(*instance)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var next instance
	if cur := s.current.Load(); cur != nil {
		next = *cur
	}
	was := next.issue
	change(&next)
	next.complete(next.issue != was)
	s.current.Store(&next)
}

// complete fills what follows from the configuration; issued says that the credential documents are new.
func (i *instance) complete(issued bool) {
	if i.HopLimit == 0 {
		i.HopLimit = 1
	}
	if i.HopLimit < 1 || i.HopLimit > 64 {
		panic(fmt.Sprintf("imdstest: hop limit %d is not between 1 and 64", i.HopLimit))
	}
	if i.CredentialLifetime == 0 {
		i.CredentialLifetime = 6 * time.Hour
	}
	if i.Role == "" {
		i.Role = "imdsgate-lab-role"
	}
	if i.Now == nil {
		i.Now = time.Now
	}
	now := i.Now()
	if i.launched.IsZero() {
		i.launched = now
	}
	if issued || i.tree == nil {
		i.issuedAt = now
	}
	i.rotateAt = i.issuedAt.Add(max(i.CredentialLifetime/2, i.CredentialLifetime-5*time.Minute))
	i.http10 = make(map[string]bool, len(i.HTTP10))
	for _, path := range i.HTTP10 {
		i.http10[path] = true
	}
	i.tree = i.grow()
}

// now returns the instance as it is at this moment, with new credential documents if the old ones are due.
func (s *Server) now() (*instance, time.Time) {
	i := s.current.Load()
	now := i.Now()
	if now.Before(i.rotateAt) {
		return i, now
	}
	s.replace(func(n *instance) {
		if n.issue == i.issue {
			n.issue++
		}
	})
	return s.current.Load(), now
}

func (s *Server) accept(ln net.Listener) {
	defer s.running.Done()
	for {
		nc, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, most likely: try again when some have been closed.
			select {
			case <-time.After(5 * time.Millisecond):
				continue
			case <-s.done:
				return
			}
		}
		c := s.conns.Get().(*conn)
		c.start(nc)
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			nc.Close()
			return
		}
		s.open[c] = struct{}{}
		s.running.Add(1)
		s.mu.Unlock()
		go s.serve(c)
	}
}

func (s *Server) serve(c *conn) {
	defer s.running.Done()
	c.serve()
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
	c.nc.Close()
	c.record.close()
	s.conns.Put(c)
}
