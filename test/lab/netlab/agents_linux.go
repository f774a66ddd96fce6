package netlab

import (
	"errors"
	"fmt"
	"os/exec"

	"github.com/vishvananda/netlink"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// Agents are what gives containers credentials of their own, on the instance itself. Closing the lab stops them.
type Agents struct {
	ECS, EKS *imdstest.Server
}

// ServeAgents starts both as their owners set them up. The agent of ECS listens on loopback, and two rules of iptables
// lead 169.254.170.2 there (ECS Developer Guide, "Installing the Amazon ECS container agent"). That of EKS Pod Identity
// has a link of its own with 169.254.170.23 and fd00:ec2::23 (aws/eks-pod-identity-agent, README).
func (l *Lab) ServeAgents(ecs, eks imdstest.Config) (*Agents, error) {
	err := l.Instance.Do(func() error {
		if err := setSysctls([][2]string{{"ipv4/conf/all/route_localnet", "1"}}); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "pod-id-link0"
		link := &netlink.Bridge{LinkAttrs: attrs} // a dummy there; not every kernel has those
		if err := errors.Join(netlink.LinkAdd(link), netlink.LinkSetUp(link)); err != nil {
			return fmt.Errorf("add link %s: %w", attrs.Name, err)
		}
		for _, prefix := range []string{"169.254.170.23/32", "fd00:ec2::23/128"} {
			if err := addAddress(attrs.Name, prefix); err != nil {
				return fmt.Errorf("add address %s to %s: %w", prefix, attrs.Name, err)
			}
		}
		for _, rule := range [][]string{
			{"PREROUTING", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:51679"},
			{"OUTPUT", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "REDIRECT", "--to-ports", "51679"},
		} {
			if out, err := exec.Command("iptables", append([]string{"-w", "-t", "nat", "-A"}, rule...)...).CombinedOutput(); err != nil {
				return fmt.Errorf("add a rule for the agent of ECS: %w: %s", err, out)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	a := new(Agents)
	for _, one := range []struct {
		agent **imdstest.Server
		cfg   imdstest.Config
		addrs []string
	}{{&a.ECS, ecs, []string{"127.0.0.1:51679"}}, {&a.EKS, eks, []string{"169.254.170.23:80", "[fd00:ec2::23]:80"}}} {
		if *one.agent, err = serve(l.Instance, one.cfg, one.addrs...); err != nil {
			return nil, err
		}
		l.agents = append(l.agents, *one.agent)
	}
	return a, nil
}
