package chroot

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
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

// load returns the commands of each phase with the parameters in place.
func load(t *testing.T, parameters map[string]string) map[string][]string {
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
			for _, command := range step.Inputs.Commands {
				phases[phase.Name] = append(phases[phase.Name], regexp.MustCompile(`{{ *(\w+) *}}`).ReplaceAllStringFunc(command, func(s string) string {
					name := strings.Trim(s, "{} ")
					if !declared[name] {
						t.Errorf("%s is not a parameter", s)
					}
					return parameters[name]
				}))
			}
		}
	}
	if got := strings.Join(order, " "); got != "build validate test" {
		t.Errorf("phases %s", got)
	}
	return phases
}

// sealed complains of what would be the same on all instances of an image.
func sealed(t *testing.T, s *system) {
	t.Helper()
	s.run(`test -e /etc/machine-id -a ! -s /etc/machine-id
		test ! -e /var/lib/imdsgate -a ! -e /var/log/imdsgate -a ! -e /run/imdsgate
		! test -f /var/lib/dbus/machine-id || test -L /var/lib/dbus/machine-id
		test "$(systemctl is-enabled imdsgated.socket imdsgated.service | uniq)" = enabled`)
	// Also where the distribution's systemd applies presets at the first boot.
	s.run("systemctl preset-all >/dev/null 2>&1; systemctl --quiet is-enabled imdsgated.socket; systemctl --quiet is-enabled imdsgated.service")
}

const config = "mode: audit\nprofiles: [cloud-init, amazon-ssm-agent]\n"

// The build and validate phases run here. The test phase asks the service, and runs on EC2 alone.
func TestImageBuilder(t *testing.T) {
	s := open(t)
	s.run("cp -R /packages /tmp/source")
	s.write("/tmp/source/config.yaml", config)
	sums, err := os.ReadFile(filepath.Join(*packages, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	parameters := map[string]string{"Source": "file:///tmp/source", "Digest": fmt.Sprintf("%x", sha256.Sum256(sums)), "Version": version(t)}
	phases := load(t, parameters)
	for phase, commands := range phases {
		for i, command := range commands {
			s.write("/tmp/phase.sh", command)
			if out, err := s.try("shellcheck --shell=bash /tmp/phase.sh"); err != nil {
				t.Errorf("phase %s, command %d:\n%s", phase, i+1, out)
			}
		}
	}
	s.run("install -d /var/log/imdsgate /var/lib/imdsgate; echo '{}' >/var/log/imdsgate/events.ndjson") // of an image that is made again
	for _, command := range append(phases["build"], phases["validate"]...) {
		s.run(command)
	}
	sealed(t, s)
	s.run("grep -q amazon-ssm-agent /etc/imdsgate/config.yaml; test \"$(stat -c '%a %G' /etc/imdsgate/config.yaml)\" = '640 imdsgate'")

	// A package that is not what was pinned is not installed.
	s = open(t)
	s.run("cp -R /packages /tmp/source; echo changed >>/tmp/source/$(basename " + only(t, ".deb") + ")")
	if out, err := s.try(phases["build"][0]); err == nil || !strings.Contains(out, "FAILED") {
		t.Errorf("a changed package: %v\n%s", err, out)
	}
	if _, err := s.try("test -e /usr/sbin/imdsgated"); err == nil {
		t.Error("a changed package was installed")
	}
}

// What cloud-init's schema accepts is also what its shell accepts.
func TestCloudInit(t *testing.T) {
	s := open(t)
	s.run("cloud-init schema --config-file /source/images/cloud-init.yaml")
	b, err := os.ReadFile("../../packaging/images/cloud-init.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Runcmd []string }
	if err := yaml.UnmarshalWithOptions(b, &doc, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if len(doc.Runcmd) != 1 {
		t.Fatalf("%d commands", len(doc.Runcmd))
	}
	s.write("/tmp/runcmd.sh", doc.Runcmd[0])
	s.run("shellcheck --shell=sh /tmp/runcmd.sh")
	sums, err := os.ReadFile(filepath.Join(*packages, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	values := fmt.Sprintf("SOURCE=file:///packages DIGEST=%x VERSION=%s\n", sha256.Sum256(sums), version(t))
	command := regexp.MustCompile(`SOURCE=.*\n`).ReplaceAllLiteralString(doc.Runcmd[0], values)
	command = strings.ReplaceAll(command, "enable --now", "enable") // nothing runs here
	command = strings.ReplaceAll(command, "apt-get update", ":")    // nor is there a network
	s.run(command)
	s.run("systemctl --quiet is-enabled imdsgated.service; imdsgated -check; setpriv --reuid imdsgate --regid imdsgate --clear-groups imdsgated -check; imdsgate config dump | grep -q amazon-ssm-agent")
}

// Debian's Packer 1.6.6 does not know three of the settings, of which two came with the
// plugin for Amazon; the rest of the template is validated without them.
func TestPacker(t *testing.T) {
	s := open(t)
	b, err := os.ReadFile("../../packaging/images/packer.pkr.hcl")
	if err != nil {
		t.Fatal(err)
	}
	template := string(b)
	for _, later := range []string{`(?ms)^packer \{\n.*?^\}\n`, `(?m)^  imds_support  = "v2.0"\n`, `(?ms)^  metadata_options \{\n[^}]*http_tokens                 = "required"\n.*?^  \}\n`} {
		found := regexp.MustCompile(later)
		if len(found.FindAllString(template, -1)) != 1 {
			t.Errorf("the template does not have %s once", later)
		}
		template = found.ReplaceAllString(template, "")
	}
	s.write("/tmp/template.pkr.hcl", template)
	s.write("/tmp/config.yaml", config)
	values := " -var version=1 -var package=" + only(t, ".deb") + " -var sha256=0 -var config=/tmp/config.yaml "
	s.run("packer validate" + values + "/tmp/template.pkr.hcl")
	s.write("/tmp/template.pkr.hcl", strings.Replace(template, "inline = [", "inlin = [", 1))
	if out, err := s.try("packer validate" + values + "/tmp/template.pkr.hcl"); err == nil {
		t.Errorf("packer validates anything: %s", out)
	}
}

func TestAnsible(t *testing.T) {
	s := open(t)
	deb, err := os.ReadFile(filepath.Join(*packages, filepath.Base(only(t, ".deb"))))
	if err != nil {
		t.Fatal(err)
	}
	s.run("mkdir -p /tmp/roles; cp -R /source/images/ansible /tmp/roles/imdsgate")
	variables, err := json.Marshal(map[string]any{
		"imdsgate_package": only(t, ".deb"), "imdsgate_sha256": fmt.Sprintf("%x", sha256.Sum256(deb)),
		"imdsgate_config": config, "imdsgate_started": false, "imdsgate_seal": true,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.write("/tmp/play.yaml", "---\n- name: Image\n  hosts: localhost\n  connection: local\n  roles:\n    - role: imdsgate\n")
	s.write("/tmp/vars.json", string(variables))
	s.run("cd /tmp; ansible-lint --offline --profile production roles/imdsgate")
	play := "cd /tmp; ansible-playbook --extra-vars @vars.json "
	s.run(play + "--syntax-check play.yaml")
	s.run(play + "play.yaml")
	sealed(t, s)
	// A second time it changes nothing but what sealing always does.
	if out := s.run(play + "play.yaml"); !strings.Contains(out, "changed=1 ") {
		t.Errorf("a second time:\n%s", out)
	}
	s.write("/tmp/vars.json", strings.Replace(string(variables), `"imdsgate_sha256":"`, `"imdsgate_sha256":"0`, 1))
	if out, err := s.try(play + "play.yaml"); err == nil || !strings.Contains(out, "does not have the digest") {
		t.Errorf("another digest: %v\n%s", err, out)
	}
}
