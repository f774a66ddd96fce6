// Package shared finds the material that tests run against and that is not ours
// to ship: rule files and conformance cases of other projects, in a folder
// beside the checkout.
package shared

import (
	"os"
	"path/filepath"
	"testing"
)

// Dir returns the folder that IMDSGATE_SHARED names, or else shared beside the
// module. Without it the test is skipped: this is the one skip that is also
// allowed in CI, where the material may be absent for its licence.
func Dir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("IMDSGATE_SHARED")
	if dir == "" {
		dir = filepath.Join(filepath.Dir(moduleRoot(t)), "shared")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no shared folder: set IMDSGATE_SHARED (%v)", err)
	}
	return dir
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the working directory")
		}
		dir = parent
	}
}
