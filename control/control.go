// Package control is how an operator talks to a running daemon: HTTP on a Unix
// socket, with JSON answers.
//
// Who may connect at all is a matter of the socket's mode and group; who may
// change something is decided by the peer's credentials, which the kernel gives
// (unix(7), SO_PEERCRED). The package carries questions and answers and does not
// know what they mean. Anything that speaks HTTP over a Unix socket can ask:
//
//	curl --unix-socket /run/imdsgate/control.sock http://imdsgate/v1/status
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// DefaultSocket is where the daemon listens unless it is told otherwise.
const DefaultSocket = "/run/imdsgate/control.sock"

// Peer is who asks.
type Peer struct {
	PID int32
	UID uint32
	GID uint32
}

// mayChange is for root and for the user of the daemon.
func (p Peer) mayChange() bool { return p.UID == 0 || p.UID == uint32(os.Geteuid()) }

// Question is one call of an operator.
type Question struct {
	Peer Peer
	Args url.Values
}

// Route answers one kind of question. Exactly one of Answer and Stream is set.
type Route struct {
	// Change restricts the route to root and to the user of the daemon.
	Change bool
	// Answer returns what is sent as JSON.
	Answer func(context.Context, Question) (any, error)
	// Stream writes lines for as long as it likes; ctx ends when the peer leaves
	// or the server is closed.
	Stream func(ctx context.Context, q Question, line func([]byte) error) error
}

// ErrBadQuestion makes an error of a Route the fault of the one who asked.
var ErrBadQuestion = errors.New("bad question")

// Server answers on one socket.
type Server struct {
	http *http.Server
	ln   net.Listener
	done chan error
}

// Listen makes the socket at path, for root and the group, and removes one that
// a dead daemon has left. A live one is an error: there is one daemon. gid below
// 0 leaves the group as it is.
func Listen(path string, gid int) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another daemon answers there; stop it first", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of the socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket %s: %w", path, err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("make the socket %s: %w", path, err)
	}
	err = os.Chmod(path, 0o660)
	if err == nil && gid >= 0 {
		err = os.Chown(path, -1, gid)
	}
	if err != nil {
		ln.Close()
		return nil, fmt.Errorf("restrict the socket %s: %w", path, err)
	}
	return ln, nil
}

// Serve answers questions on the listener until Close. routes are by name.
func Serve(ln net.Listener, routes map[string]Route) *Server {
	mux := http.NewServeMux()
	for name, r := range routes {
		mux.HandleFunc("/v1/"+name, r.serve)
	}
	s := &Server{ln: ln, done: make(chan error, 1), http: &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    64 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, c.(*conn).peer)
		},
	}}
	go func() { s.done <- s.http.Serve(&listener{ln, make(chan struct{}, maxLooking)}) }()
	return s
}

// Close ends all answers, streams included, and removes the socket.
func (s *Server) Close() error {
	err := s.http.Close()
	if served := <-s.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

type peerKey struct{}

func (r Route) serve(w http.ResponseWriter, req *http.Request) {
	peer := req.Context().Value(peerKey{}).(Peer)
	if r.Change && !peer.mayChange() {
		fail(w, http.StatusForbidden, fmt.Errorf("uid %d may look but not change; ask as root", peer.UID))
		return
	}
	if r.Change != (req.Method == http.MethodPost) {
		fail(w, http.StatusMethodNotAllowed, errors.New("changes are POST, everything else is GET"))
		return
	}
	q := Question{Peer: peer, Args: req.URL.Query()}
	if r.Stream != nil {
		w.Header().Set("Content-Type", "application/x-ndjson")
		flush := http.NewResponseController(w)
		err := r.Stream(req.Context(), q, func(line []byte) error {
			if _, err := w.Write(append(line, '\n')); err != nil {
				return err
			}
			return flush.Flush()
		})
		if err != nil && req.Context().Err() == nil {
			fail(w, statusOf(err), err)
		}
		return
	}
	answer, err := r.Answer(req.Context(), q)
	if err != nil {
		fail(w, statusOf(err), err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

func statusOf(err error) int {
	if errors.Is(err, ErrBadQuestion) {
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// failure is how an error travels.
type failure struct {
	Error string `json:"error"`
}

func fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// Whose fault it is travels as the status.
	json.NewEncoder(w).Encode(failure{strings.TrimPrefix(err.Error(), ErrBadQuestion.Error()+": ")})
}
