package main

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"
)

// A configuration that is wrong does not say where the daemon listens, and that is told.
func TestReloadWithoutConfiguration(t *testing.T) {
	dir := files(t, map[string]string{"wrong.yaml": "mode: [\n"})
	for _, c := range []struct {
		args []string
		says bool
	}{
		{[]string{"reload", "--config", filepath.Join(dir, "wrong.yaml")}, true},
		{[]string{"reload", "--config", filepath.Join(dir, "wrong.yaml"), "--socket", filepath.Join(dir, "none.sock")}, false},
	} {
		var out, errs bytes.Buffer
		if code := run(context.Background(), c.args, &out, &errs); code == 0 {
			t.Errorf("%v: a daemon has answered: %s", c.args, &out)
		}
		if says := strings.Contains(errs.String(), "the configuration is wrong, which leaves open where the daemon listens"); says != c.says {
			t.Errorf("%v: %s", c.args, &errs)
		}
	}
}
