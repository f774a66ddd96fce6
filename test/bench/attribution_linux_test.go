package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// TestAttribution runs everything with sizes that prove nothing but that it works.
func TestAttribution(t *testing.T) {
	labtest.RequireRoot(t)
	binary := filepath.Join(t.TempDir(), "bench")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var out, progress bytes.Buffer
	cmd := exec.Command(binary, "attribution", "--sizes", "2,4", "--n", "3", "--rounds", "1", "--load", "1", "--spawn", "1")
	cmd.Stdout, cmd.Stderr = &out, &progress
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s%s", err, progress.Bytes(), out.Bytes())
	}
	tables := tablesIn(t, out.String())
	if len(tables) != 6 {
		t.Fatalf("%d tables in\n%s", len(tables), out.Bytes())
	}
	asked := tables[1]
	for _, w := range ways {
		if _, err := exec.LookPath(w.needs); w.needs != "" && err != nil {
			continue
		}
		n := 0
		for _, row := range asked {
			if row[0] == w.name && !slices.Contains(row, "") {
				n++
			}
		}
		if n != 3 {
			t.Errorf("%s: %d rows, want one of each client\n%s", w.name, n, out.Bytes())
		}
	}
	for _, level := range []string{"L1", "L2", "L3"} {
		for _, what := range []string{first, sibling, second, third} {
			if !strings.Contains(out.String(), level+", "+what) {
				t.Errorf("nothing of a %s at %s", what, level)
			}
		}
	}
	for _, row := range tables[5] { // what does not depend on how fast the machine is
		if (strings.Contains(row[0], "lost") || strings.Contains(row[0], "attributed wrong")) && row[3] != "yes" {
			t.Errorf("%q", row)
		}
	}
}

func TestAttributionUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                    "",
		"--sizes 2,3 --n 7":   "",
		"--sizes 3,3":         "--sizes: want ascending numbers from 2 to 10000",
		"--sizes 1":           "--sizes: want ascending numbers from 2 to 10000",
		"--sizes 100,x":       "--sizes: want ascending numbers from 2 to 10000",
		"--sizes 100,10001":   "--sizes: want ascending numbers from 2 to 10000",
		"--n 0":               "--n: want 1 to 10000",
		"--rounds 0":          "--rounds: want 1 to 1000",
		"--load 601":          "--load: want 1 to 600",
		"--spawn 0":           "--spawn: want 1 to 600",
		"quick":               `unexpected argument "quick": see --help`,
		"--sizes 2 --procs 5": "flag provided but not defined: -procs",
	} {
		_, err := parseAttribution(strings.Fields(args))
		if got := fmt.Sprint(err); got != want && (err != nil || want != "") {
			t.Errorf("%q: %s, want %q", args, got, want)
		}
	}
	o, err := parseAttribution(nil)
	if err != nil || !slices.Equal(o.sizes, []int{100, 1000, 5000, 10000}) {
		t.Errorf("%+v, %v", o, err)
	}
}
