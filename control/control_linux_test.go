package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

func serve(t *testing.T, gid int) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "run", "control.sock")
	ln, err := Listen(socket, gid)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(ln, map[string]Route{
		"echo": {Answer: func(_ context.Context, q Question) (any, error) {
			return map[string]any{"uid": q.Peer.UID, "pid": q.Peer.PID, "word": q.Args.Get("word")}, nil
		}},
		"fail":   {Answer: func(context.Context, Question) (any, error) { return nil, errors.New("it broke") }},
		"wrong":  {Answer: func(context.Context, Question) (any, error) { return nil, fmt.Errorf("%w: so", ErrBadQuestion) }},
		"change": {Change: true, Answer: func(context.Context, Question) (any, error) { return "changed", nil }},
		"count": {Stream: func(ctx context.Context, _ Question, line func([]byte) error) error {
			for i := 0; ; i++ {
				if err := line(fmt.Appendf(nil, "%d", i)); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(time.Millisecond):
				}
			}
		}},
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	})
	return socket
}

// A client that is not used any more keeps nothing of the daemon's.
func TestClientLeavesNothing(t *testing.T) {
	socket := serve(t, -1)
	before := runtime.NumGoroutine()
	for range 50 {
		var answer any
		if err := NewClient(socket).Get(t.Context(), "echo", nil, &answer); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before+5; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, and %d before", runtime.NumGoroutine(), before)
		}
	}
}

func TestAsk(t *testing.T) {
	socket := serve(t, -1)
	c := NewClient(socket)
	ctx := context.Background()
	var echo struct {
		UID  int
		PID  int
		Word string
	}
	if err := c.Get(ctx, "echo", url.Values{"word": {"a b&c"}}, &echo); err != nil || echo.Word != "a b&c" || echo.UID != os.Getuid() || echo.PID != os.Getpid() {
		t.Errorf("%+v, %v", echo, err)
	}
	if err := c.Get(ctx, "fail", nil, &echo); err == nil || err.Error() != "it broke" {
		t.Error(err)
	}
	if err := c.Get(ctx, "wrong", nil, &echo); err == nil || !strings.Contains(err.Error(), "so") {
		t.Error(err)
	}
	if err := c.Get(ctx, "nothing", nil, &echo); err == nil {
		t.Error("a route that does not exist answered")
	}
	var changed string
	if err := c.Post(ctx, "change", nil, &changed); err != nil || changed != "changed" {
		t.Errorf("%q, %v", changed, err)
	}
	if err := c.Get(ctx, "change", nil, &changed); err == nil {
		t.Error("something was changed by GET")
	}

	lines := 0
	enough := errors.New("enough")
	if err := c.Stream(ctx, "count", nil, func(b []byte) error {
		if string(b) != fmt.Sprint(lines) {
			t.Errorf("line %d is %q", lines, b)
		}
		if lines++; lines == 5 {
			return enough
		}
		return nil
	}); !errors.Is(err, enough) {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := c.Stream(ctx, "count", nil, func([]byte) error { return nil }); err != nil {
		t.Errorf("a stream that was given up: %v", err)
	}
}

func TestNotRunning(t *testing.T) {
	err := NewClient(filepath.Join(t.TempDir(), "none")).Get(context.Background(), "status", nil, nil)
	if !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
}

// A socket that a dead daemon has left is replaced; a live one is not.
func TestListen(t *testing.T) {
	socket := serve(t, -1)
	if _, err := Listen(socket, -1); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Error(err)
	}
	stale := filepath.Join(t.TempDir(), "stale.sock")
	ln, err := Listen(stale, -1)
	if err != nil {
		t.Fatal(err)
	}
	ln.(interface{ SetUnlinkOnClose(bool) }).SetUnlinkOnClose(false)
	ln.Close()
	again, err := Listen(stale, -1)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// serveAll is serve where every user can find the socket.
func serveAll(t *testing.T, group int) (socket string) {
	t.Helper()
	socket = serve(t, group)
	for dir := filepath.Dir(socket); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	return socket
}

// The kernel says who asks: members of the group may, and may change nothing;
// nobody else may even connect.
func TestPeers(t *testing.T) {
	labtest.RequireRoot(t)
	const group = 4321
	socket := serveAll(t, group)
	ask := func(uid, gid uint32, method, route string) string {
		cmd := exec.Command("curl", "-s", "-X", method, "--unix-socket", socket, "http://imdsgate/v1/"+route)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if got := ask(4000, group, "GET", "echo?word=x"); !strings.Contains(got, `"uid":4000`) {
		t.Errorf("a member: %q", got)
	}
	if got := ask(4000, group, "POST", "change"); !strings.Contains(got, "ask as root") {
		t.Errorf("a member who wants to change something: %q", got)
	}
	if got := ask(4000, 4000, "GET", "echo"); got != "" {
		t.Errorf("somebody else: %q", got)
	}
	if got := ask(0, 0, "POST", "change"); !strings.Contains(got, "changed") {
		t.Errorf("root: %q", got)
	}
}

// Members of the group who keep connections take no more than their share, keep nobody
// out who may change something, and have it again when they have left.
func TestTooManyLook(t *testing.T) {
	labtest.RequireRoot(t)
	const group = 4321
	socket := serveAll(t, group)
	member := func(fn func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // and it ends with us
			for _, call := range [][2]uintptr{{syscall.SYS_SETRESGID, group}, {syscall.SYS_SETRESUID, 4000}} {
				if _, _, errno := syscall.RawSyscall(call[0], ^uintptr(0), call[1], ^uintptr(0)); errno != 0 {
					t.Error(errno)
				}
			}
			fn()
		}()
		<-done
	}
	var kept []net.Conn
	member(func() {
		for range 3 * maxLooking {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Error(err)
				return
			}
			kept = append(kept, c)
		}
	})
	open := 0
	for _, c := range kept { // long before it is closed for saying nothing
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			open++
		}
	}
	if open != maxLooking {
		t.Errorf("%d connections are kept, want %d", open, maxLooking)
	}
	var answer any
	if err := NewClient(socket).Post(t.Context(), "change", nil, &answer); err != nil {
		t.Errorf("root: %v", err)
	}
	as := func() (err error) {
		member(func() {
			c, dialErr := net.Dial("unix", socket)
			if err = dialErr; err != nil {
				return
			}
			defer c.Close()
			fmt.Fprint(c, "GET /v1/echo HTTP/1.1\r\nHost: imdsgate\r\n\r\n")
			_, err = c.Read(make([]byte, 1))
		})
		return err
	}
	if err := as(); err == nil {
		t.Error("one more is answered")
	}
	for _, c := range kept {
		c.Close()
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := as()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("all have left, and nobody is answered: %v", err)
		}
	}
}
