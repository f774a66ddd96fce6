package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// target is what requests pass through, in a lab of its own, so that no redirect catches another target's requests.
type target struct {
	name  string
	start func(*target) error // sets tree and stop
	lab   *netlab.Lab
	tree  tree         // the proxy's processes; nil for direct
	stop  func() error // ends them; nil for direct
	idle  int64        // bytes of memory before the first turn

	daemon *gate.Daemon // of imdsgate
}

// Names of targets.
const (
	direct  = "direct"
	audit   = "imdsgate"
	enforce = "imdsgate, enforce"
)

// rig is everything that runs while it is measured.
type rig struct {
	targets  []*target
	upstream *upstream
	script   *script
	versions []string // of peers
	notes    []string
	dir      string
	sleepers *sleepers
}

// newRig starts everything. On error nothing is left of it.
func newRig(o options) (_ *rig, err error) {
	r := new(rig)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.dir, err = os.MkdirTemp("", "imdsgate-bench"); err != nil {
		return nil, err
	}
	if err := os.Chmod(r.dir, 0o755); err != nil { // others than root run what is in it
		return nil, err
	}
	binaries, err := gate.Build(r.dir)
	if err != nil {
		return nil, err
	}
	if o.procs > 0 {
		if r.sleepers, err = startSleepers(o.procs); err != nil {
			return nil, err
		}
	}

	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r.targets = append(r.targets, &target{name: direct, start: func(*target) error { return nil }})
	for _, p := range peers {
		path, version := p.find()
		if path == "" {
			r.notes = append(r.notes, fmt.Sprintf("%s is not installed (Debian's package %s) and left out.", p.name, p.pkg))
			continue
		}
		r.versions = append(r.versions, p.name+" "+version)
		r.targets = append(r.targets, &target{name: p.name, start: func(t *target) error {
			return t.startPeer(p, path, filepath.Join(r.dir, p.name))
		}})
	}
	r.targets = append(r.targets,
		&target{name: audit, start: func(t *target) error { return t.startGate(binaries, "mode: audit\n") }},
		&target{name: enforce, start: func(t *target) error { return t.startGate(binaries, fmt.Sprintf(enforcing, self)) }})

	var listeners []net.Listener
	for _, t := range r.targets {
		if t.lab, err = netlab.New(netlab.Options{NoIMDS: true}); err != nil {
			return nil, err
		}
		if err := errors.Join(t.lab.Instance.Do(manyConnections), t.lab.Metadata.Do(manyConnections)); err != nil {
			return nil, err
		}
		ln, err := t.lab.Metadata.Listen(context.Background(), nil, "tcp", "169.254.169.254:80")
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, ln)
	}
	if r.upstream, err = startUpstream(listeners, o.think); err != nil {
		return nil, err
	}
	for _, t := range r.targets {
		if err := t.start(t); err != nil {
			return nil, err
		}
		if err := r.ready(t); err != nil {
			return nil, fmt.Errorf("%s does not answer: %w", t.name, err)
		}
	}
	return r, nil
}

// enforcing is the configuration of the target that enforces. The grant is for the client, which is this program.
const enforcing = `mode: enforce
grants:
  - name: bench
    executable: %s
    executable_only: true
    owner: bench
    reason: the client of the benchmark
`

func (t *target) startPeer(p peer, path, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	running, err := p.start(t.lab, path, dir)
	if err != nil {
		return err
	}
	t.stop = running.stop
	t.tree = tree{running.cmd.Process.Pid}
	return nil
}

func (t *target) startGate(b gate.Binaries, config string) (err error) {
	// What this program needs of the runtime (supervise) is not how a daemon runs.
	t.daemon, err = gate.Start(t.lab, b, gate.Settings{Config: config, Env: []string{"GODEBUG="}})
	if t.daemon != nil {
		t.stop = t.daemon.Close
	}
	if err != nil {
		return err
	}
	t.tree = tree{t.daemon.PID()}
	return nil
}

// readyIn is how long a target may take to its first answer. haproxy and nginx take 50 ms.
const readyIn = 5 * time.Second

// ready waits until the target answers. The first of them is the service itself, of which the others must give the
// same answers.
func (r *rig) ready(t *target) error {
	if err := t.lab.Cgroup.Enter(); err != nil {
		return err
	}
	defer t.lab.Cgroup.Leave()
	for end := time.Now().Add(readyIn); ; time.Sleep(10 * time.Millisecond) {
		err := t.lab.Instance.Do(func() (err error) {
			c := newClient()
			defer c.close()
			if r.script == nil {
				r.script, err = learn(c)
				return err
			}
			return c.turn(perRequest, r.script)
		})
		if err == nil {
			break
		}
		if time.Now().After(end) {
			return err
		}
	}
	if t.tree == nil {
		return nil
	}
	if err := t.lab.Instance.Do(shortMemory); err != nil {
		return err
	}
	var err error
	if t.daemon == nil { // the daemon's children are iptables, and soon gone
		if t.tree, err = treeOf(t.tree[0]); err != nil {
			return err
		}
	}
	t.idle, err = t.tree.memory()
	return err
}

// manyConnections makes a namespace bear more connections in a minute than an instance has in a day.
func manyConnections() error {
	return set(map[string]string{
		"ipv4/ip_local_port_range": "10000 65535", // above peerPort
		"ipv4/tcp_tw_reuse":        "1",
		"ipv4/tcp_max_tw_buckets":  "1024",
	})
}

// shortMemory makes conntrack forget closed connections sooner: by default each stays for up to two minutes, and a table
// of the usual size would be full before the end.
func shortMemory() error {
	settings := map[string]string{}
	for _, state := range []string{"time_wait", "close", "fin_wait", "last_ack", "close_wait"} {
		settings["netfilter/nf_conntrack_tcp_timeout_"+state] = "2"
	}
	return set(settings)
}

// set writes below /proc/sys/net, of the namespace that the thread is in.
func set(sysctls map[string]string) error {
	for name, value := range sysctls {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

// close ends what was started, in the reverse order.
func (r *rig) close() error {
	var errs []error
	for _, t := range r.targets {
		if t.stop != nil {
			errs = append(errs, t.stop())
		}
	}
	if r.upstream != nil {
		errs = append(errs, r.upstream.close())
	}
	for _, t := range r.targets {
		if t.lab != nil {
			errs = append(errs, t.lab.Close())
		}
	}
	if r.sleepers != nil {
		errs = append(errs, r.sleepers.close())
	}
	if r.dir != "" {
		errs = append(errs, os.RemoveAll(r.dir))
	}
	return errors.Join(errs...)
}
