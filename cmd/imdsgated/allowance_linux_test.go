package main

import (
	"testing"

	"github.com/safchain/ethtool"
)

// The counter of whatever driver this machine has is found, and no other.
func TestAllowanceExceeded(t *testing.T) {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		t.Fatal(err)
	}
	defer tool.Close()
	for _, link := range []string{"eth0", "ens5", "enp0s3"} {
		driver, err := tool.DriverName(link)
		if err != nil {
			continue
		}
		counters, err := tool.Stats(link)
		if err != nil {
			continue
		}
		for name, before := range counters {
			n, err := allowanceExceeded(driver, name)
			if err != nil || n == nil || *n < before {
				t.Errorf("%s of %s: %v, %v, and it was %d", name, driver, n, err, before)
			}
			return
		}
	}
	if n, err := allowanceExceeded("ena", "linklocal_allowance_exceeded"); n != nil || err != nil {
		t.Logf("this is an EC2 instance: %v, %v", n, err)
	}
}
