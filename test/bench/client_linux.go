package main

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// kind is what a client does again and again.
type kind string

const (
	perRequest kind = "new"      // a connection for each request
	kept       kind = "keep"     // all requests on one connection
	sequence   kind = "sequence" // a token, the role's name, its credentials, each on a connection of its own
)

// requests is how many there are in one turn.
func (k kind) requests() int {
	if k == sequence {
		return 3
	}
	return 1
}

// script is what clients ask and what they must be answered.
type script struct {
	token            []byte
	id, role, keys   []byte // bodies
	getID, put       []byte // requests
	getRole, getKeys []byte // requests up to the token, which each sequence brings anew
}

const (
	// As aws-sdk-go-v2 sends it, so that requests have the size that proxies have to read.
	headers   = "Host: 169.254.169.254\r\nUser-Agent: aws-sdk-go-v2/1.36.3 ua/2.1 os/linux lang/go#1.24.1 md/GOOS#linux md/GOARCH#amd64 api/imds#1.16.30\r\nAccept-Encoding: gzip\r\n"
	withToken = headers + "X-aws-ec2-metadata-token: "
	lastBytes = "\r\n\r\n"
	rolePath  = "/latest/meta-data/iam/security-credentials/"
)

// learn asks the service itself what the right answers are.
func learn(c *client) (*script, error) {
	s := &script{put: []byte("PUT /latest/api/token HTTP/1.1\r\n" + headers + "Content-Length: 0\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n")}
	get := func(request []byte) ([]byte, error) {
		defer c.close()
		if err := c.connect(); err != nil {
			return nil, err
		}
		body, err := c.ask(request)
		return bytes.Clone(body), err
	}
	var err error
	if s.token, err = get(s.put); err != nil {
		return nil, err
	}
	s.getID = fmt.Appendf(nil, "GET /latest/meta-data/instance-id HTTP/1.1\r\n%s%s%s", withToken, s.token, lastBytes)
	if s.id, err = get(s.getID); err != nil {
		return nil, err
	}
	s.getRole = fmt.Appendf(nil, "GET %s HTTP/1.1\r\n%s", rolePath, withToken)
	if s.role, err = get(fmt.Appendf(nil, "%s%s%s", s.getRole, s.token, lastBytes)); err != nil {
		return nil, err
	}
	s.getKeys = fmt.Appendf(nil, "GET %s%s HTTP/1.1\r\n%s", rolePath, s.role, withToken)
	if s.keys, err = get(fmt.Appendf(nil, "%s%s%s", s.getKeys, s.token, lastBytes)); err != nil {
		return nil, err
	}
	return s, nil
}

// client is one client on one thread. It blocks in the kernel, as a program with a thread for each request does, so
// that no event loop of ours is measured along.
type client struct {
	to      unix.SockaddrInet4
	fd      int // -1 without a connection
	buf     [16 << 10]byte
	getRole []byte // of the present sequence
	getKeys []byte
}

func newClient() *client {
	return &client{to: unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 169, 254}}, fd: -1}
}

// patience is how long a client waits for any one thing. The slowest target takes milliseconds.
const patience = 5

func (c *client) connect() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	c.fd = fd
	wait := unix.Timeval{Sec: patience}
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait))
	if err != nil {
		return fmt.Errorf("setsockopt: %w", err)
	}
	if err := unix.Connect(fd, &c.to); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return nil
}

func (c *client) close() {
	if c.fd >= 0 {
		unix.Close(c.fd)
		c.fd = -1
	}
}

// ask sends a request and returns the body of the answer, valid until the next one.
func (c *client) ask(request []byte) ([]byte, error) {
	if _, err := unix.Write(c.fd, request); err != nil {
		return nil, fmt.Errorf("write: %w", err)
	}
	got, head, size := 0, 0, 0
	for {
		n, err := unix.Read(c.fd, c.buf[got:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return nil, fmt.Errorf("the connection ended after %d bytes", got)
		}
		got += n
		if head == 0 {
			if head, size, err = measureHead(c.buf[:got]); err != nil {
				return nil, err
			}
		}
		switch {
		case head > 0 && got == head+size:
			return c.buf[head:got], nil
		case head > 0 && got > head+size || got == len(c.buf):
			return nil, fmt.Errorf("%d bytes where %d are announced", got, head+size)
		}
	}
}

// measureHead returns the sizes of the head of an answer and of its body; 0 while the head is not whole.
func measureHead(b []byte) (head, body int, err error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		return 0, 0, nil
	}
	if end < 12 || string(b[9:12]) != "200" {
		line, _, _ := bytes.Cut(b, []byte("\r\n"))
		return 0, 0, fmt.Errorf("answered %q", line)
	}
	for rest := b[:end]; len(rest) > 0; {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		const name = "content-length: "
		if len(line) < len(name) || !bytes.EqualFold(line[:len(name)], []byte(name)) {
			continue
		}
		for _, digit := range line[len(name):] {
			if digit < '0' || digit > '9' || body > 1<<20 {
				return 0, 0, fmt.Errorf("length %q", line)
			}
			body = body*10 + int(digit-'0')
		}
		return end + 4, body, nil
	}
	return 0, 0, errors.New("an answer without a length")
}

func (c *client) expect(request, want []byte) error {
	body, err := c.ask(request)
	if err == nil && !bytes.Equal(body, want) {
		err = fmt.Errorf("body %.40q", body)
	}
	return err
}

// turn does once what is measured. The last connection is left to be closed outside the measured time.
func (c *client) turn(k kind, s *script) error {
	if k == kept {
		return c.expect(s.getID, s.id)
	}
	if err := c.connect(); err != nil {
		return err
	}
	if k == perRequest {
		return c.expect(s.getID, s.id)
	}
	token, err := c.ask(s.put)
	if err != nil {
		return fmt.Errorf("token: %w", err)
	}
	if len(token) != len(s.token) {
		return fmt.Errorf("token of %d bytes", len(token))
	}
	c.getRole = append(append(append(c.getRole[:0], s.getRole...), token...), lastBytes...)
	c.getKeys = append(append(append(c.getKeys[:0], s.getKeys...), token...), lastBytes...)
	c.close()
	if err := c.connect(); err != nil {
		return err
	}
	if err := c.expect(c.getRole, s.role); err != nil {
		return fmt.Errorf("role: %w", err)
	}
	c.close()
	if err := c.connect(); err != nil {
		return err
	}
	if err := c.expect(c.getKeys, s.keys); err != nil {
		return fmt.Errorf("credentials: %w", err)
	}
	return nil
}

// giveUp is how many wrong answers end a client's part of a block: with a target that hangs, each takes seconds.
const giveUp = 3

// load is what clients did in one block.
type load struct {
	took  []time.Duration // of each right turn
	wrong int
	first error // of the wrong ones
	time  time.Duration
}

// turns takes n turns once start is closed. It calls arrived when it is ready for them.
func (c *client) turns(k kind, s *script, n int, arrived func(), start <-chan struct{}) load {
	defer c.close()
	l := load{took: make([]time.Duration, 0, n)}
	if k == kept {
		if l.first = c.connect(); l.first == nil {
			l.first = c.expect(s.getID, s.id)
		}
	}
	arrived()
	<-start
	if l.first != nil {
		l.wrong = 1
		return l
	}
	for range n {
		from := time.Now()
		err := c.turn(k, s)
		to := time.Now()
		if k != kept {
			c.close()
		}
		if err == nil {
			l.took = append(l.took, to.Sub(from))
			continue
		}
		if l.wrong++; l.first == nil {
			l.first = err
		}
		if k == kept || l.wrong == giveUp {
			break
		}
	}
	return l
}

// drive has clients take n turns each at a target, all at once. begin is called when they are ready.
func (t *target) drive(k kind, s *script, clients, n int, begin func()) (load, error) {
	var all load
	var errs []error
	var mu sync.Mutex                            // guards all and errs
	if err := t.lab.Cgroup.Enter(); err != nil { // or the daemon in there would not see who connects
		return all, err
	}
	defer t.lab.Cgroup.Leave()
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	ready.Add(clients)
	for range clients {
		done.Go(func() {
			arrived := sync.OnceFunc(ready.Done)
			defer arrived() // also when the namespace cannot be entered
			var l load
			err := t.lab.Instance.Do(func() error {
				l = newClient().turns(k, s, n, arrived, start)
				return nil
			})
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
			all.took = append(all.took, l.took...)
			if all.wrong += l.wrong; all.first == nil {
				all.first = l.first
			}
		})
	}
	ready.Wait()
	begin()
	from := time.Now()
	close(start)
	done.Wait()
	all.time = time.Since(from)
	return all, errors.Join(errs...)
}
