package main

import "testing"

// While the mode changes nobody looks for connections that do not come here: they are
// meant to, and there is no finder to look with.
func TestSettleMadeWaits(t *testing.T) {
	d, _ := recorder(t)
	defer d.spool.Close()
	d.bypass.making = map[uint64]bool{1: true}
	d.modes.changing.Lock()
	if err := d.settleMade(); err != nil || !d.bypass.making[1] {
		t.Errorf("%v, and then it waits for %v", err, d.bypass.making)
	}
}
