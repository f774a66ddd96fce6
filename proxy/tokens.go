package proxy

import (
	"crypto/rand"
	"crypto/sha256"
	"slices"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// A session token is a bearer's: the service takes it from any process, user and
// namespace. So whose each is, is remembered: a hash of the token that passed to a
// client, with who that was. The key of the hash is made at the start and never
// leaves, so that neither the table nor anything that is written tells a token,
// nor lets one that somebody guesses be confirmed.

const (
	// Tokens of a length between these are remembered. The service's have 56 bytes, of
	// which 54 are letters of base64.
	minToken, maxToken = 16, 256
	// maxTokens bounds the tokens that are remembered. Lower, and one that a program
	// uses for hours is forgotten, and then unknown, when many are issued; higher, and
	// a flood of them takes more memory: half a kilobyte each, or twice that of a
	// process with many parents.
	maxTokens = 16 << 10
	// maxTokenAge is how long the service lets a token live, at most.
	maxTokenAge = 6 * time.Hour
	// maxIssuers bounds the processes to whom one token was issued: those that had a
	// part in the connection.
	maxIssuers = 8
)

// tokens are those that were issued through us. Its methods may be called from any
// goroutine.
type tokens struct {
	key [sha256.Size]byte

	mu    sync.Mutex // guards known
	known *shares[tokenSum, event.Token]
}

type tokenSum [sha256.Size]byte

func newTokens() *tokens {
	t := &tokens{known: newShares[tokenSum, event.Token](maxTokens)}
	rand.Read(t.key[:])
	return t
}

// sum hashes a token; false if it is none that is remembered.
func (t *tokens) sum(token []byte) (sum tokenSum, ok bool) {
	if len(token) < minToken || len(token) > maxToken {
		return sum, false
	}
	var b [sha256.Size + maxToken]byte
	n := copy(b[:], t.key[:])
	letters := spell(b[n:], token)
	sum = sha256.Sum256(b[:n+letters])
	clear(b[:])
	return sum, letters >= minToken
}

// spell writes a token in the one spelling that all have which a lenient decoder of
// base64 takes for the same, or else a stolen token would become an unknown one by a
// change of its last letter: in either alphabet, padded or not, with the bits set
// that no byte has room for, and with bytes between that are of no alphabet. It is
// not known whether the service is so lenient. dst is as long as the token at
// least.
func spell(dst, token []byte) (n int) {
	for _, c := range token {
		switch {
		case c == '=':
			return n - trailing(dst[:n])
		case c == '-':
			c = '+'
		case c == '_':
			c = '/'
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '+', c == '/':
		default:
			continue
		}
		dst[n] = c
		n++
	}
	return n - trailing(dst[:n])
}

// trailing clears the bits of the last of base64's letters that are of no byte, and
// says how many letters are none of any byte's.
func trailing(b []byte) int {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	mask := byte(0)
	switch len(b) % 4 {
	case 0:
		return 0
	case 1:
		return 1
	case 2:
		mask = 0b110000
	case 3:
		mask = 0b111100
	}
	last := &b[len(b)-1]
	for i := range len(letters) {
		if letters[i] == *last {
			*last = letters[byte(i)&mask]
			break
		}
	}
	return 0
}

// find says what is known of the token in a request, also of one that is over, which
// the service refuses: who uses it is of interest all the same.
func (t *tokens) find(token []byte) event.Token {
	sum, ok := t.sum(token)
	if !ok {
		return event.Token{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.known.get(sum); e != nil {
		return e.value
	}
	return event.Token{}
}

// issued remembers to whom a token was issued: the subjects of an event, if there
// are any. One that the service gives to several is all of theirs.
func (t *tokens) issued(o owner, sum tokenSum, ev *event.Event, at time.Time, lives time.Duration) {
	var issuers []*event.Issuer
	for _, p := range ev.Subjects {
		if p.EntityID != "" && len(issuers) < maxIssuers &&
			!slices.ContainsFunc(issuers, func(i *event.Issuer) bool { return i.EntityID == p.EntityID }) {
			issuers = append(issuers, event.NewIssuer(p))
		}
	}
	if len(issuers) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.known.get(sum); e != nil {
		for _, i := range e.value.Issuers {
			if len(issuers) < maxIssuers && !slices.ContainsFunc(issuers, func(j *event.Issuer) bool { return i.EntityID == j.EntityID }) {
				issuers = append(issuers, i)
			}
		}
		e.value.Issuers = issuers
		return
	}
	over := at.Add(lives)
	t.known.add(o, sum, event.Token{Issuers: issuers, Issued: at, Expires: over}, over, at)
}

// count says how many are known, and how many were forgotten before they were over.
func (t *tokens) count() (known int, forgotten uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.known.entries), t.known.forgotten
}
