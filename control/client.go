package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
)

// ErrNotRunning says that no daemon answers at the socket.
var ErrNotRunning = errors.New("the daemon is not running")

// Client asks the daemon at one socket. Its methods may be called from any
// goroutine.
type Client struct {
	socket string
	http   http.Client
}

// NewClient makes a Client; nothing is asked yet.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true, // nobody closes a Client
	}}}
}

// Get asks a question and reads the answer into v.
func (c *Client) Get(ctx context.Context, route string, args url.Values, v any) error {
	return c.ask(ctx, http.MethodGet, route, args, v)
}

// Post asks for a change.
func (c *Client) Post(ctx context.Context, route string, args url.Values, v any) error {
	return c.ask(ctx, http.MethodPost, route, args, v)
}

func (c *Client) ask(ctx context.Context, method, route string, args url.Values, v any) error {
	resp, err := c.send(ctx, method, route, args)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("read the daemon's answer to %s: %w", route, err)
	}
	return nil
}

// Stream calls fn with each line that the daemon sends, until either ends.
func (c *Client) Stream(ctx context.Context, route string, args url.Values, fn func([]byte) error) error {
	resp, err := c.send(ctx, http.MethodGet, route, args)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if err := fn(lines.Bytes()); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return lines.Err()
}

func (c *Client) send(ctx context.Context, method, route string, args url.Values) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "imdsgate", Path: "/v1/" + route, RawQuery: args.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w: nothing listens on %s", ErrNotRunning, c.socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("connect to %s: %w; members of its group may ask", c.socket, fs.ErrPermission)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil, fmt.Errorf("the daemon at %s gave no answer: it ends, or too many ask at a time", c.socket)
	case err != nil:
		return nil, fmt.Errorf("ask the daemon at %s: %w", c.socket, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var f failure
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil || f.Error == "" {
		return nil, fmt.Errorf("the daemon answered %s to %s", resp.Status, route)
	}
	if resp.StatusCode == http.StatusForbidden {
		return nil, fmt.Errorf("%w: %s", fs.ErrPermission, f.Error)
	}
	return nil, errors.New(f.Error)
}
