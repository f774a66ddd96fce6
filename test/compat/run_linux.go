package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// A way is how a client reaches the service.
type way uint8

const (
	direct  way = iota // nothing in between
	audit              // through the daemon as it is by default
	granted            // through the daemon in enforce mode, strict, with a grant
	blocked            // the same without the grant
)

func (w way) String() string { return [...]string{"direct", "audit", "granted", "blocked"}[w] }

const (
	ordinaryUser = 4321
	// clientTimeout is for one run of a client: cloud-init's own limit for a token is 240 s, all others give up sooner.
	clientTimeout = 60 * time.Second
)

// An observation is one run of a client.
type observation struct {
	stdout, stderr string
	code           int
	took           time.Duration
	ended          time.Time
	hung           bool
	service        []exchange // what the service has seen
	decisions      []decision // what the daemon has decided
	signed         int        // requests to the bucket that were signed with the service's credentials
}

// An exchange is what went in both directions over a connection to the service until the client's next turn, with
// what is different each time replaced.
type exchange struct{ received, sent string }

// A decision is of one request.
type decision struct {
	at             time.Time
	method, target string
	status         int
	tokenless      bool
}

// enter runs a program in a root, with file systems that are gone when it is, in a cgroup as
// systemd has it for a unit, which a grant for an interpreter must name.
const enter = `root=$1 uid=$2; shift 2
mount -t cgroup2 none /sys/fs/cgroup
own=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup) slice=$own/system.slice
mkdir -p "$slice/client.service"; echo $$ >"$slice/client.service/cgroup.procs"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -t tmpfs -o mode=755 run "$root/run"
[ "$uid" != 0 ] || mount --rbind /dev "$root/dev"
code=0; chroot --userspec="$uid:$uid" --groups= "$root" "$@" || code=$?
echo $$ >"$own/cgroup.procs"; rmdir "$slice/client.service" "$slice"; exit $code`

// once runs a client in a lab of its own, whose service believes that it is now.
func once(ctx context.Context, r root, b gate.Binaries, c client, w way, now time.Time) (o observation, err error) {
	config := &imdstest.Config{Now: func() time.Time { return now }}
	if c.userData != "" {
		config.UserData = []byte(c.userData)
	}
	lab, err := netlab.New(netlab.Options{IMDS: config})
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	s3, err := serveBucket(lab)
	if err != nil {
		return o, err
	}
	defer s3.close()

	uid := ordinaryUser
	if c.root {
		uid = 0
	}
	var daemon *gate.Daemon
	if w != direct {
		settings := ""
		if w != audit {
			settings = "mode: enforce\nposture: strict\n"
		}
		if w == granted {
			asks := c.asks
			if asks == "" {
				asks = c.args[0]
			}
			executable, err := r.executable(asks)
			if err != nil {
				return o, err
			}
			settings += fmt.Sprintf("grants:\n- name: client\n  executable: %s\n  unit: client.service\n  user: %q\n  owner: compat\n  reason: it is the legitimate one\n", executable, fmt.Sprint(uid))
		}
		daemon, err = gate.Start(lab, b, gate.Settings{Config: settings})
		if daemon != nil {
			defer func() { err = errors.Join(err, daemon.Close()) }()
		}
		if err != nil {
			return o, err
		}
	}

	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	args := append([]string{"--mount", "--propagation=private", "--", "sh", "-ec", enter, "sh", string(r), fmt.Sprint(uid)}, c.args...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/tmp", "LC_ALL=C.UTF-8"}, c.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second // for children of the client that keep its output open
	begin := time.Now()
	runErr := lab.Instance.Run(cmd)
	o.ended = time.Now()
	o.took = o.ended.Sub(begin)
	o.hung = errors.Is(ctx.Err(), context.DeadlineExceeded)
	if cmd.ProcessState == nil {
		return o, runErr
	}
	o.stdout, o.stderr, o.code = stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()

	if daemon != nil {
		if code := daemon.Stop(); code != 0 {
			return o, fmt.Errorf("the daemon ended with %d:\n%s", code, daemon.Log())
		}
		docs, err := daemon.Documents()
		if err != nil {
			return o, err
		}
		for _, d := range docs {
			if d.At("data_stream.dataset") != "imdsgate.decision" {
				continue
			}
			one, err := decided(d)
			if err != nil {
				return o, err
			}
			o.decisions = append(o.decisions, one)
		}
	}
	left, err := os.ReadFile(filepath.Join(lab.Cgroup.Path(), "cgroup.procs"))
	if err != nil {
		return o, err
	}
	if len(left) > 0 && !o.hung {
		return o, fmt.Errorf("%s has left the processes %v", w, strings.Fields(string(left)))
	}
	transcript := lab.IMDS.Transcript()
	if transcript.Lost > 0 {
		return o, fmt.Errorf("%s: the transcript has lost %d bytes", w, transcript.Lost)
	}
	o.service = exchanges(transcript)
	s3.close()
	o.signed = int(s3.signed.Load())
	return o, nil
}

func decided(d gate.Document) (decision, error) {
	method, _ := d.At("http.request.method").(string)
	target, _ := d.At("url.original").(string)
	status, _ := d.At("http.response.status_code").(float64)
	start, _ := d.At("event.start").(string)
	at, err := time.Parse(time.RFC3339Nano, start)
	if err != nil {
		return decision{}, fmt.Errorf("an event without a time: %w", err)
	}
	return decision{at: at, method: method, target: target, status: int(status), tokenless: d.At("imdsgate.request.api") == "v1"}, nil
}

// A noBucket answers in the instance as S3 does for a bucket that is not there, which makes clients stop without trying
// again.
type noBucket struct {
	signed atomic.Int32
	server http.Server
	done   chan struct{}
}

func serveBucket(lab *netlab.Lab) (*noBucket, error) {
	ln, err := lab.Instance.Listen(context.Background(), nil, "tcp", bucket)
	if err != nil {
		return nil, err
	}
	s3 := &noBucket{done: make(chan struct{})}
	s3.server.Handler = s3
	go func() {
		defer close(s3.done)
		s3.server.Serve(ln)
	}()
	return s3, nil
}

func (s3 *noBucket) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.Contains(r.Header.Get("Authorization"), "ASIAEXAMPLEFAKE") {
		s3.signed.Add(1)
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>`)
}

// close may be called twice.
func (s3 *noBucket) close() {
	s3.server.Close()
	<-s3.done
}
