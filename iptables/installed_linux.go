package iptables

import (
	"context"
	"fmt"
	"slices"
)

// Installed reports whether anything of an installation is in place in this network namespace, and whether it refuses
// what comes past it. So the rules themselves say in which mode a daemon died, however it died.
func Installed(ctx context.Context) (installed, enforcing bool, err error) {
	all, err := findStores(ctx)
	if err != nil {
		return false, false, err
	}
	has, err := ipv6Presence()
	if err != nil {
		return false, false, err
	}
	for _, t := range all {
		for _, f := range Families {
			have, err := t.save(ctx, f)
			if err != nil && f == IPv6 && has != awake {
				continue // there are none where ip6tables does not work, and no IPv6 that they could refuse
			}
			if err != nil {
				return false, false, fmt.Errorf("read the rules: %w", err)
			}
			is := have.installed(f)
			installed = installed || !is.empty()
			for _, c := range is.Chains {
				enforcing = enforcing || (c.Name == outputs || c.Name == forward) && c.Table == "filter" && slices.Contains(c.Rules, refuse)
			}
		}
	}
	return installed, enforcing, nil
}
