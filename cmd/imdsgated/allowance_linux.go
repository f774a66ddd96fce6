package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/safchain/ethtool"
)

// allowanceExceeded sums a counter of the interfaces that have a driver. The ENA driver
// counts as linklocal_allowance_exceeded the packets to the metadata service, to DNS
// and to NTP that were dropped because an interface had more than 1,024 a second of
// them (EC2 User Guide, "Monitor network performance for ENA"). It is nil where no
// interface has the driver and the counter.
func allowanceExceeded(driver, counter string) (*uint64, error) {
	const all = "/sys/class/net"
	entries, err := os.ReadDir(all)
	if err != nil {
		return nil, fmt.Errorf("list the network interfaces: %w", err)
	}
	var tool *ethtool.Ethtool
	var sum *uint64
	var errs []error
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(all, e.Name(), "device/driver"))
		if err != nil || filepath.Base(link) != driver { // without one it is not a device
			continue
		}
		if tool == nil {
			if tool, err = ethtool.NewEthtool(); err != nil {
				return nil, fmt.Errorf("ask network drivers: %w", err)
			}
			defer tool.Close()
		}
		counters, err := tool.Stats(e.Name())
		if err != nil {
			errs = append(errs, fmt.Errorf("read the counters of %s: %w", e.Name(), err))
			continue
		}
		if n, ok := counters[counter]; ok {
			if sum == nil {
				sum = new(uint64)
			}
			*sum += n
		}
	}
	return sum, errors.Join(errs...)
}
