package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The time without a daemon begins with its first end, however often it ends then, and
// whatever the clock says.
func TestAbsence(t *testing.T) {
	dir := t.TempDir()
	d := &daemon{path: filepath.Join(dir, "config.yaml")}
	file := absenceFile(filepath.Join(dir, "control.sock"))
	if err := os.WriteFile(d.path, []byte("control:\n  socket: "+dir+"/control.sock\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	amend := func(enforcing, missed bool, why string, givenUp bool) (a absence) {
		t.Helper()
		if err := d.amend(absence{Since: bootTime(), Open: !enforcing, Why: why}, missed, givenUp); err != nil {
			t.Fatal(err)
		}
		if err := file.read(&a); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return a
	}
	if a := amend(false, false, bySuccess, false); a != (absence{}) {
		t.Errorf("a daemon that nobody misses: %+v", a)
	}
	before := bootTime()
	first := amend(true, true, "signal, killed KILL", false)
	if first.Since < before || first.Open || first.Ends != 1 || first.Refused != 0 {
		t.Errorf("killed: %+v", first)
	}
	if a := amend(true, true, "exit-code, exited 1", false); a.Since != first.Since || a.Ends != 2 || a.Why != first.Why {
		t.Errorf("again: %+v", a)
	}
	given := amend(true, true, "", true)
	if given.Since != first.Since || given.Refused < first.Since || given.Ends != 2 {
		t.Errorf("given up: %+v", given)
	}
	time.Sleep(time.Millisecond)
	if a := amend(true, true, "", true); a.Refused != given.Refused || a.Open {
		t.Errorf("given up again: %+v", a)
	}
	if a := amend(false, true, "", true); !a.Open || a.Since != first.Since {
		t.Errorf("and open after all: %+v", a)
	}
	if a := amend(true, true, "", true); !a.Open {
		t.Errorf("that it was open is forgotten: %+v", a)
	}
}
