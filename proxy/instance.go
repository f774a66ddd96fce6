package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/proxy/loop"
)

// What the service itself answers to this host, past the redirect. Of each answer the status is read, and nothing else.
// These may be called from any goroutine, once Serve is.

// hopIn is how long an answer may take, be it the one that has to come one hop further. Shorter, and a slow service seems to have a hop limit
// of 1; where it is 1, who asks waits for so long.
const hopIn = time.Second

// BeyondHost asks the service for a session token twice, as anybody may, and reports whether
// one gets beyond this host: the second answer is taken only if it could go one hop further,
// as to a container (HttpPutResponseHopLimit). Without one it asks a third time, as it did first.
func (p *Proxy) BeyondHost(ctx context.Context, endpoint netip.AddrPort) (beyond bool, err error) {
	ask := "PUT /latest/api/token HTTP/1.1\r\nHost: " + endpoint.Addr().String() + "\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\nConnection: close\r\n\r\n"
	try := func(t *loop.Task, minTTL int) error {
		status, err := p.direct(t, endpoint, ask, minTTL, hopIn)
		if err == nil && status != "200" {
			return fmt.Errorf("it answers %q", status)
		}
		return err
	}
	answered := make(chan bool, 1) // it may come when nobody waits any more
	err = p.onLoop(ctx, func(t *loop.Task) error {
		if err := try(t, 0); err != nil {
			return err
		}
		err := try(t, 2)
		answered <- err == nil
		if errors.Is(err, ErrUnanswered) { // because of the hop limit, if a plain one is answered again
			return try(t, 0)
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("ask %v for a session token: %w", endpoint, err)
	}
	return <-answered, nil
}

// WithoutToken asks the service for a listing as IMDSv1 does, and reports whether that is
// answered, or takes a session token (HttpTokens).
func (p *Proxy) WithoutToken(ctx context.Context, endpoint netip.AddrPort) (answered bool, err error) {
	ask := "GET /latest/meta-data/ HTTP/1.1\r\nHost: " + endpoint.Addr().String() + "\r\nConnection: close\r\n\r\n"
	status := make(chan string, 1)
	err = p.onLoop(ctx, func(t *loop.Task) error {
		got, err := p.direct(t, endpoint, ask, 0, selfTestIn)
		if err == nil && got != "200" && got != "401" {
			return fmt.Errorf("it answers %q", got)
		}
		status <- got
		return err
	})
	if err != nil {
		return false, fmt.Errorf("ask %v without a session token: %w", endpoint, err)
	}
	return <-status == "200", nil
}

// direct sends a request past the redirect, with packets of minTTL at least for the answer (IP_MINTTL), and returns its status.
func (p *Proxy) direct(t *loop.Task, endpoint netip.AddrPort, ask string, minTTL int, takes time.Duration) (status string, err error) {
	until := time.Now().Add(takes)
	// Where it comes back to us it is answered with nothing: see looped.
	fd, e, err := p.selfTests.dial(endpoint, p.options.Mark, minTTL, selfTest{ask: ask})
	if err != nil {
		return "", err
	}
	defer p.selfTests.take(e)
	c := t.Adopt(fd)
	defer c.Reset() // or else the service would go on sending what does not arrive
	if err := write(t, c, ask, until); errors.Is(err, os.ErrDeadlineExceeded) {
		return "", syscall.ETIMEDOUT // to connect
	} else if err != nil {
		return "", err
	}
	answer, err := read(t, c, len("HTTP/1.1 200"), until)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "", ErrUnanswered
	}
	status, ok := strings.CutPrefix(answer, "HTTP/1.1 ")
	if err == nil && !ok {
		err = fmt.Errorf("it says %q", answer)
	}
	return status, err
}
