package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// peer is a proxy that others use for this, with all it can do that makes it fast and nothing that makes it slower.
type peer struct {
	name    string
	pkg     string // Debian's
	args    []string
	version []string
	config  string
}

// The words DIR, CONFIG and PORT are replaced.
var peers = []peer{
	{
		name: "haproxy", pkg: "haproxy", args: []string{"-db", "-f", "CONFIG"}, version: []string{"-v"},
		config: `global
  maxconn 1000
defaults
  mode http
  timeout connect 2s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
frontend clients
  bind 127.0.0.1:PORT backlog 4096
  default_backend service
backend service
  http-reuse always
  server imds 169.254.169.254:80 pool-max-conn 256
`,
	},
	{
		name: "nginx", pkg: "nginx-light", args: []string{"-e", "stderr", "-p", "DIR", "-c", "CONFIG"}, version: []string{"-v"},
		config: `daemon off;
worker_processes auto;
pid DIR/pid;
error_log stderr error;
events { worker_connections 1000; }
http {
  access_log off;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  upstream imds {
    server 169.254.169.254:80;
    keepalive 256;
    keepalive_requests 100000000;
  }
  server {
    listen 127.0.0.1:PORT backlog=4096 reuseport;
    location / {
      proxy_pass http://imds;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
    }
  }
}
`,
	},
}

const (
	// peerUID is the user of the peers, whose connections are not redirected. No account has it.
	peerUID = 61081
	// peerPort is where they listen; see portRange.
	peerPort = 9254
)

var dotted = regexp.MustCompile(`[0-9]+(\.[0-9]+)+`)

// find returns the path of the program and its version; "" if it is not installed.
func (p *peer) find() (path, version string) {
	path, err := exec.LookPath(p.name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + p.name); err != nil { // not on every user's PATH
			return "", ""
		}
	}
	out, _ := exec.Command(path, p.version...).CombinedOutput()
	return path, dotted.FindString(string(out))
}

// start runs the peer in the lab's instance and redirects the instance's requests to it.
func (p *peer) start(lab *netlab.Lab, path, dir string) (*process, error) {
	if err := os.Chown(dir, peerUID, peerUID); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, p.name+".conf")
	words := strings.NewReplacer("DIR", dir, "CONFIG", config, "PORT", strconv.Itoa(peerPort))
	if err := os.WriteFile(config, []byte(words.Replace(p.config)), 0o644); err != nil {
		return nil, err
	}
	var args []string
	for _, a := range p.args {
		args = append(args, words.Replace(a))
	}
	rule := exec.Command("iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-d", "169.254.169.254/32", "-p", "tcp", "--dport", "80",
		"-m", "owner", "!", "--uid-owner", strconv.Itoa(peerUID), "-j", "REDIRECT", "--to-ports", strconv.Itoa(peerPort))
	var out bytes.Buffer
	rule.Stderr = &out
	if err := lab.Instance.Run(rule); err != nil {
		return nil, fmt.Errorf("redirect to %s: %w: %s", p.name, err, out.Bytes())
	}
	return startProcess(lab, path, args...)
}

// process is a running peer.
type process struct {
	cmd    *exec.Cmd
	cancel func() // asks it to end
	ended  chan error
	said   bytes.Buffer // on standard error; complete when it has ended
}

func startProcess(lab *netlab.Lab, path string, args ...string) (*process, error) {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{cmd: exec.CommandContext(ctx, path, args...), cancel: cancel, ended: make(chan error, 1)}
	p.cmd.Dir = "/" // haproxy goes back to where it began, as a user who may not see root's home
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(unix.SIGTERM) }
	p.cmd.WaitDelay = 5 * time.Second
	p.cmd.Stderr = &p.said
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: peerUID, Gid: peerUID},
		Pdeathsig:  unix.SIGTERM, // with SIGKILL nginx leaves its workers
		Setsid:     true,         // as a service manager does, and gate.Start
	}
	if err := lab.Instance.Start(p.cmd); err != nil {
		cancel()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	return p, nil
}

// stop ends it and waits. That it had ended before is an error.
func (p *process) stop() error {
	defer p.cancel()
	select {
	case err := <-p.ended:
		return fmt.Errorf("%s ended by itself: %v: %s", p.cmd.Path, err, p.said.Bytes())
	default:
		p.cancel()
		<-p.ended
		return nil
	}
}
