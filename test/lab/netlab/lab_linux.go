// Package netlab builds a private EC2 instance out of network namespaces: an instance, the metadata service behind
// its network card, and, on request, two containers that reach it through the instance.
//
//	        metadata                       instance                  bridged: eth0 172.17.0.2/16
//	169.254.169.254, fd00:ec2::254    eth0 172.31.0.10/20 ┌─ br-lab ─┤        fd00:ec2:17::2/64
//	ec2 ───────────────────────────── fd00:ec2:1::10/64 ──┤ 172.17.0.1
//	172.31.0.1 (the subnet's router)                      └─ pod0 ─── routed: eth0 172.31.0.77/32
//	                                                         no address       fd00:ec2:1::77/128
//
// Bridged is a container as Docker makes them. Routed is one as the AWS VPC CNI makes them: its gateway 169.254.1.1
// (fe80::1) exists only as a permanent neighbour entry, and the host's end of its link has no address
// (amazon-vpc-cni-k8s, docs/cni-proposal.md).
//
// Nothing here is visible from outside: the namespaces are anonymous, so they are gone with their last process and
// descriptor, even when the program that built them is killed. It needs root, that is CAP_SYS_ADMIN and
// CAP_NET_ADMIN; tests use package labtest, which says so. There is no NAT: the metadata namespace routes back to the
// containers' own addresses. It is the wrong tool for anything that needs a second instance or the Internet.
package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// Options says what to build. The zero value is an instance and an emulator with its defaults.
type Options struct {
	Containers bool             // also build Bridged and Routed, and turn on the instance's IP forwarding
	IMDS       *imdstest.Config // the emulator on port 80 of both metadata addresses; nil means its defaults
	NoIMDS     bool             // leave port 80 of the metadata namespace free for another service

	// Here makes the namespace that this process is in the instance, for tests that run a part of the product in
	// their own process. It must not be the machine's own: see labtest.Main. One lab at a time can be here.
	Here bool
}

// A Lab is a built instance. Its namespaces may be used from any goroutine until Close.
type Lab struct {
	Instance, Metadata *Namespace
	Bridged, Routed    *Namespace       // nil unless Options.Containers
	IMDS               *imdstest.Server // nil with Options.NoIMDS
	Cgroup             *Cgroup          // of every process that is started in one of the namespaces

	agents  []*imdstest.Server
	here    bool // Instance is this process's
	closing sync.Once
	closed  error // of Close
}

// New builds a lab. On error nothing is left of it.
func New(o Options) (*Lab, error) {
	l := new(Lab)
	if err := l.build(o); err != nil {
		return nil, errors.Join(fmt.Errorf("build lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *Lab) build(o Options) (err error) {
	if l.Cgroup, err = newCgroup(); err != nil {
		return err
	}
	if l.here = o.Here; o.Here {
		l.Instance, err = thisNamespace("instance")
	} else {
		l.Instance, err = newNamespace("instance")
	}
	if err != nil {
		return err
	}
	if l.Metadata, err = newNamespace("metadata"); err != nil {
		return err
	}
	if o.Containers {
		if l.Bridged, err = newNamespace("bridged"); err != nil {
			return err
		}
		if l.Routed, err = newNamespace("routed"); err != nil {
			return err
		}
	}
	for _, n := range l.namespaces() {
		n.cgroup = l.Cgroup
	}
	if err := l.wire(); err != nil {
		return err
	}
	if o.NoIMDS {
		return nil
	}
	return l.serve(o.IMDS)
}

func (l *Lab) serve(cfg *imdstest.Config) (err error) {
	if cfg == nil {
		cfg = new(imdstest.Config)
	}
	l.IMDS, err = serve(l.Metadata, *cfg, "169.254.169.254:80", "[fd00:ec2::254]:80")
	return err
}

// serve runs an emulator in a namespace.
func serve(in *Namespace, cfg imdstest.Config, addrs ...string) (*imdstest.Server, error) {
	var listeners []net.Listener
	for _, addr := range addrs {
		ln, err := in.Listen(context.Background(), nil, "tcp", addr)
		if err != nil {
			for _, ln := range listeners {
				ln.Close()
			}
			return nil, err
		}
		listeners = append(listeners, ln)
	}
	return imdstest.Serve(cfg, listeners...), nil
}

func (l *Lab) namespaces() []*Namespace {
	var all []*Namespace
	for _, n := range []*Namespace{l.Routed, l.Bridged, l.Instance, l.Metadata} {
		if n != nil {
			all = append(all, n)
		}
	}
	return all
}

// Close kills every process that is still inside the lab's namespaces, waits until they have left, stops the
// emulator and lets the namespaces go. Safe to call twice; both calls return what the first one found.
//
// Sockets of this process that are still open inside keep their namespace alive and are errors. Namespaces are taken
// apart by the kernel a few milliseconds after Close. A lab that is killed instead may outlast its processes while
// TCP retransmits what was in flight, at most two minutes (tcp(7), tcp_orphan_retries).
func (l *Lab) Close() error {
	l.closing.Do(func() {
		all := l.namespaces()
		errs := []error{evict(all)}
		if l.IMDS != nil {
			errs = append(errs, l.IMDS.Close())
		}
		for _, a := range l.agents {
			errs = append(errs, a.Close())
		}
		if l.here {
			errs = append(errs, l.unplug())
		}
		errs = append(errs, openSockets(all))
		for _, n := range all {
			errs = append(errs, n.Do(destroyOrphans), n.close())
		}
		if l.Cgroup != nil {
			errs = append(errs, l.Cgroup.close())
		}
		l.closed = errors.Join(errs...)
	})
	return l.closed
}
