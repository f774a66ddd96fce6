package boot

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/imdsgate/imdsgate/test/debian"
)

// component is a document of EC2 Image Builder's, of which there is no schema to load: these
// are the keys of https://docs.aws.amazon.com/imagebuilder/latest/userguide/toe-use-documents.html,
// and an unknown one is an error.
type component struct {
	Name          string
	Description   string
	SchemaVersion float64 `yaml:"schemaVersion"`
	Parameters    []map[string]struct{ Type, Default, Description string }
	Phases        []struct {
		Name  string
		Steps []struct {
			Name, Action   string
			OnFailure      string `yaml:"onFailure"`
			TimeoutSeconds int    `yaml:"timeoutSeconds"`
			MaxAttempts    int    `yaml:"maxAttempts"`
			Inputs         struct{ Commands []string }
		}
	}
}

// steps are the scripts of each phase, with the parameters in place.
func steps(t *testing.T, parameters map[string]string) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("../../packaging/images/imagebuilder.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var c component
	if err := yaml.UnmarshalWithOptions(b, &c, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if c.SchemaVersion != 1.0 {
		t.Errorf("schema version %v", c.SchemaVersion)
	}
	declared := map[string]bool{}
	for _, p := range c.Parameters {
		for name, what := range p {
			declared[name] = what.Type == "string"
		}
	}
	phases := map[string][]string{}
	var order []string
	for _, phase := range c.Phases {
		order = append(order, phase.Name)
		names := map[string]bool{}
		for _, step := range phase.Steps {
			if step.Action != "ExecuteBash" || step.OnFailure != "Abort" || names[step.Name] || len(step.Inputs.Commands) == 0 {
				t.Errorf("phase %s, step %s: %+v", phase.Name, step.Name, step)
			}
			names[step.Name] = true
			script := regexp.MustCompile(`{{ *(\w+) *}}`).ReplaceAllStringFunc(strings.Join(step.Inputs.Commands, "\n"), func(s string) string {
				name := strings.Trim(s, "{} ")
				if !declared[name] {
					t.Errorf("%s is not a parameter", s)
				}
				return parameters[name]
			})
			phases[phase.Name] = append(phases[phase.Name], script)
			if _, err := exec.LookPath("shellcheck"); err == nil {
				cmd := exec.Command("shellcheck", "--shell=bash", "-")
				cmd.Stdin = strings.NewReader(script)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("phase %s, step %s: %v\n%s", phase.Name, step.Name, err, out)
				}
			}
		}
	}
	if got := strings.Join(order, " "); got != "build validate test" {
		t.Errorf("phases %s", got)
	}
	return phases
}

// Each step of the component does what it is for: build and validate on the host of which
// an image is made, and test on one that begins as the image.
func TestImageBuilder(t *testing.T) {
	s := settings{config: config("enforce"), files: map[string]string{"/etc/systemd/journald.conf.d/boot.conf": "[Journal]\nStorage=persistent\n"}}
	m := boot(t, s)
	// A host without the package, which was made of an image that had it, and reaches no archive.
	m.Do("sh", "-euc", "dpkg --purge imdsgate; rm -rf /etc/apt/sources.list*; mkdir -p /srv/source /var/log/imdsgate /var/lib/imdsgate; echo '{}' >/var/log/imdsgate/events.ndjson")
	packed, err := filepath.Glob("../../bin/packages/imdsgate_*_" + runtime.GOARCH + ".deb")
	if err != nil || len(packed) != 1 {
		t.Fatalf("%v, %v", packed, err)
	}
	deb := filepath.Base(packed[0])
	sums, err := os.ReadFile(filepath.Join(filepath.Dir(packed[0]), "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(m.file(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("/srv/source/SHA256SUMS", string(sums))
	put("/srv/source/config.yaml", s.config)
	version := strings.Split(deb, "_")[1]
	phases := steps(t, map[string]string{"Source": "file:///srv/source", "Digest": fmt.Sprintf("%x", sha256.Sum256(sums)),
		"ConfigDigest": fmt.Sprintf("%x", sha256.Sum256([]byte(s.config))), "Version": version})
	step := func(script string) (string, int) {
		t.Helper()
		put("/root/step.sh", script)
		return m.Try("bash", "/root/step.sh")
	}
	phase := func(name string) {
		t.Helper()
		for i, script := range phases[name] {
			if out, code := step(script); code != 0 {
				t.Fatalf("%s, step %d: exit %d\n%s", name, i+1, code, out)
			}
		}
	}

	// What is not the package that was pinned is not installed.
	put("/srv/source/"+deb, "changed")
	if out, code := step(phases["build"][0]); code == 0 || !strings.Contains(out, "FAILED") {
		t.Errorf("a changed package: exit %d\n%s", code, out)
	}
	m.Do("test", "!", "-e", "/usr/sbin/imdsgated")

	m.Do("sh", "-euc", "journalctl --sync; test -s /var/log/journal/$(cat /etc/machine-id)/system.journal")
	m.Do("cp", debian.Package, "/srv/source/"+deb)
	put("/srv/source/config.yaml", "mode: audit\n")
	if out, code := step(phases["build"][0]); code == 0 || !strings.Contains(out, "config.yaml: FAILED") {
		t.Errorf("another configuration: exit %d\n%s", code, out)
	}
	if got := m.Property("imdsgated.service", "UnitFileState"); got == "enabled" {
		t.Error("with another configuration the daemon is enabled")
	}
	put("/srv/source/config.yaml", s.config)
	phase("build")
	m.Do("sh", "-euc", "logger this is the host of which the image was made; journalctl --rotate; logger again; journalctl --sync")
	phase("validate")
	m.Do("sh", "-euc", debian.Sealed)
	m.Do("sh", "-euc", "grep -q amazon-ssm-agent /etc/imdsgate/config.yaml; test \"$(stat -c '%a %G' /etc/imdsgate/config.yaml)\" = '640 imdsgate'")
	if out, code := step(phases["test"][0]); code == 0 {
		t.Errorf("a host without the daemon passes the test:\n%s", out)
	}
	m.off()
	m.on(s)
	phase("test")
	if out := m.Do("sh", "-euc", "journalctl --sync; test \"$(ls /var/log/journal)\" = $(cat /etc/machine-id); journalctl --no-pager --output=cat"); strings.Contains(out, "of which the image was made") || !strings.Contains(out, "imdsgated") {
		t.Errorf("the journal of the instance:\n%s", out)
	}
}
