package iptables

import (
	"context"
	"fmt"
	"slices"
)

// Enforcing reports whether an installation that is in place in this network namespace refuses what comes past it. So
// the rules themselves say in which mode a daemon died, however it died.
func Enforcing(ctx context.Context) (bool, error) {
	all, err := findStores(ctx)
	if err != nil {
		return false, err
	}
	has, err := ipv6Presence()
	if err != nil {
		return false, err
	}
	for _, t := range all {
		for _, f := range Families {
			have, err := t.save(ctx, f)
			if err != nil && f == IPv6 && has != awake {
				continue // there are none where ip6tables does not work, and no IPv6 that they could refuse
			}
			if err != nil {
				return false, fmt.Errorf("read the rules: %w", err)
			}
			for _, c := range have.installed(f).Chains {
				if (c.Name == outputs || c.Name == forward) && c.Table == "filter" && slices.Contains(c.Rules, refuse) {
					return true, nil
				}
			}
		}
	}
	return false, nil
}
