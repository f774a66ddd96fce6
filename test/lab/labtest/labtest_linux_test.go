package labtest_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// TestRequireRoot runs TestAsUser of this binary as nobody.
func TestRequireRoot(t *testing.T) {
	labtest.RequireRoot(t)
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	binary := filepath.Join(dir, "test")
	if err := copyFile(binary, os.Args[0]); err != nil {
		t.Fatal(err)
	}
	for ci, want := range map[string]string{"": "--- SKIP: TestAsUser", "true": "--- FAIL: TestAsUser"} {
		cmd := exec.Command(binary, "-test.v", "-test.run=^TestAsUser$")
		cmd.Dir = "/"
		cmd.Env = []string{"CI=" + ci, "AS_USER=1"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), want) || !strings.Contains(string(out), "needs root") {
			t.Errorf("CI=%q: %v\n%s", ci, err, out)
		}
	}
}

func TestAsUser(t *testing.T) {
	if os.Getenv("AS_USER") == "" {
		return // TestRequireRoot runs it
	}
	labtest.Start(t, netlab.Options{})
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if closeErr := out.Close(); err == nil {
		err = closeErr
	}
	return err
}
