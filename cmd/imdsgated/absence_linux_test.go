package main

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"
	"time"
)

// The time without a daemon begins with its first end, however often it ends then, and
// whatever the clock says.
func TestAbsence(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control.sock")
	end := func(enforcing, missed bool, why string, givenUp bool) (a absence) {
		t.Helper()
		if err := amend(socket, absence{Since: bootTime(), Open: !enforcing, Why: why}, missed, givenUp); err != nil {
			t.Fatal(err)
		}
		if err := absenceFile(socket).read(&a); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return a
	}
	if a := end(false, false, bySuccess, false); a != (absence{}) {
		t.Errorf("a daemon that nobody misses: %+v", a)
	}
	before := bootTime()
	first := end(true, true, "signal, killed KILL", false)
	if first.Since < before || first.Open || first.Ends != 1 || first.Refused != 0 {
		t.Errorf("killed: %+v", first)
	}
	if a := end(true, true, "exit-code, exited 1", false); a.Since != first.Since || a.Ends != 2 || a.Why != first.Why {
		t.Errorf("again: %+v", a)
	}
	given := end(true, true, "", true)
	if given.Since != first.Since || given.Refused < first.Since || given.Ends != 2 {
		t.Errorf("given up: %+v", given)
	}
	time.Sleep(time.Millisecond)
	if a := end(true, true, "", true); a.Refused != given.Refused || a.Open {
		t.Errorf("given up again: %+v", a)
	}
	if a := end(false, true, "", true); !a.Open || a.Since != first.Since {
		t.Errorf("and open after all: %+v", a)
	}
	if a := end(true, true, "", true); !a.Open {
		t.Errorf("that it was open is forgotten: %+v", a)
	}
}
