package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestProfilesVerb(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	text := "profiles: [cloud-init]\nprofile_paths: [../../packaging/profiles]\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(dir, "none.yaml")
	if err := os.WriteFile(none, []byte("profile_paths: ["+dir+"/profiles]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wrong := filepath.Join(dir, "wrong.yaml")
	if err := os.WriteFile(wrong, []byte("mode: sometimes\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"profiles", "list", "--config", config}, 0, []string{"PROFILE", "\namazon-ssm-agent ", "\ncloud-init                    yes   4 "}},
		{[]string{"profiles", "list", "--config", config, "--json"}, 0, []string{`"name":"cloud-init"`, `"used":true`, `"grants":["cloud-init-local",`}},
		{[]string{"profiles", "list", "--config", none}, 0, []string{"there are none"}},
		{[]string{"profiles", "list", "--config", wrong}, 78, []string{"sometimes"}},
		{[]string{"profiles", "show", "kubelet", "--config", config}, 0, []string{"# ../../packaging/profiles/kubelet.yaml\nprogram: kubelet", "@08fbb51"}},
		{[]string{"profiles", "show", "kubelet", "--config", config, "--json"}, 0, []string{`{"name":"kubelet"`, `"used":false`}},
		{[]string{"profiles", "show", "cubelet", "--config", config}, 2, []string{"no profile \"cubelet\": there are amazon-"}},
		{[]string{"profiles", "show"}, 2, []string{"accepts 1 arg"}},
		{[]string{"__complete", "profiles", "show", "--config", config, "e"}, 0, []string{"ec2-instance-connect\n", "elastic-agent\n"}},
	} {
		got, code := imdsgate(c.args...)
		for _, want := range c.says {
			if code != c.code || !strings.Contains(got, want) {
				t.Errorf("%v: exit %d, want %d\n%s\nis without %q", c.args, code, c.code, got, want)
			}
		}
	}
}
