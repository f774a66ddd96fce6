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
	"github.com/imdsgate/imdsgate/test/debian"
)

const config = "mode: audit\nprofiles: [cloud-init, amazon-ssm-agent]\n"

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
	s.run(debian.Sealed)
	// A second time it changes nothing but what sealing always does.
	if out := s.run(play + "play.yaml"); !strings.Contains(out, "changed=1 ") {
		t.Errorf("a second time:\n%s", out)
	}
	s.write("/tmp/vars.json", strings.Replace(string(variables), `"imdsgate_sha256":"`, `"imdsgate_sha256":"0`, 1))
	if out, err := s.try(play + "play.yaml"); err == nil || !strings.Contains(out, "does not have the digest") {
		t.Errorf("another digest: %v\n%s", err, out)
	}
}
