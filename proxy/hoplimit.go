package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/proxy/loop"
)

// hopIn is how long the answer may take that has to come one hop further. The one before,
// which needs not, has come by then. Shorter, and a slow service seems to have a hop limit
// of 1; where it is 1, who asks waits for so long.
const hopIn = time.Second

// BeyondHost asks the service for a session token twice, as anybody may, and reports whether
// one gets beyond this host: the second answer is taken only if it could go one hop further,
// as to a container (HttpPutResponseHopLimit). Without one it asks a third time, as it did first. The status is read of each answer, and not the
// token. It may be called from any goroutine, once Serve is.
func (p *Proxy) BeyondHost(ctx context.Context, endpoint netip.AddrPort) (beyond bool, err error) {
	ask := "PUT /latest/api/token HTTP/1.1\r\nHost: " + endpoint.Addr().String() + "\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\nConnection: close\r\n\r\n"
	const want = "HTTP/1.1 200 "
	try := func(t *loop.Task, minTTL int, until time.Time) error {
		// Where it comes back to us it is answered with nothing: see looped.
		fd, e, err := p.selfTests.dial(endpoint, p.options.Mark, minTTL, selfTest{ask: ask})
		if err != nil {
			return err
		}
		defer p.selfTests.take(e)
		c := t.Adopt(fd)
		defer c.Reset() // or else the service would go on sending what does not arrive
		if err := write(t, c, ask, until); errors.Is(err, os.ErrDeadlineExceeded) {
			return syscall.ETIMEDOUT // to connect
		} else if err != nil {
			return err
		}
		answer, err := read(t, c, len(want), until)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return ErrUnanswered
		case err == nil && answer != want:
			return fmt.Errorf("it says %q", answer)
		}
		return err
	}
	answered := make(chan bool, 1) // it may come when nobody waits any more
	err = p.onLoop(ctx, func(t *loop.Task) error {
		if err := try(t, 0, time.Now().Add(selfTestIn)); err != nil {
			return err
		}
		err := try(t, 2, time.Now().Add(hopIn))
		answered <- err == nil
		if errors.Is(err, ErrUnanswered) { // because of the hop limit, if a plain one is answered again
			return try(t, 0, time.Now().Add(hopIn))
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("ask %v for a session token: %w", endpoint, err)
	}
	return <-answered, nil
}
