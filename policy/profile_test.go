package policy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func profileDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const appProfile = "program: App\nwithout: nothing works\nchecked: 2026-01-02\nsources: [https://example.com]\n" +
	"grants:\n  - {name: app, executable: /opt/app, unit: app.service, owner: o, reason: r}\n"

// The grants of a profile are grants like others; that of the site goes before that of the
// package.
func TestProfileGrants(t *testing.T) {
	site := profileDir(t, map[string]string{"app.yaml": strings.ReplaceAll(appProfile, "app.service", "own.service")})
	vendor := profileDir(t, map[string]string{"app.yaml": appProfile, "other.yaml": strings.ReplaceAll(appProfile, "name: app", "name: other"), "app_test.yaml": "cases: []"})
	names, err := ProfileNames([]string{site, vendor, filepath.Join(vendor, "none")})
	if err != nil || !slices.Equal(names, []string{"app", "other"}) {
		t.Fatal(names, err)
	}
	p := compile(t, Config{Profiles: []string{"app", "other"}, ProfilePaths: []string{filepath.Join(site, "none"), site, vendor}})
	if g := p.Grants(); len(g) != 2 || g[0].Unit != "own.service" || g[1].Name != "other" {
		t.Errorf("%+v", g)
	}
	without := compile(t, Config{})
	if p.Digest == without.Digest {
		t.Error("two hosts with and without a profile have the same digest")
	}
}

func TestProfileErrors(t *testing.T) {
	dir := profileDir(t, map[string]string{
		"app.yaml": appProfile, "again.yaml": appProfile,
		"unknown.yaml": appProfile + "unit: x\n", "broken.yaml": "grants: [\n", "tag.yaml": "grants: !00 00",
		"unsafe.yaml": strings.ReplaceAll(appProfile, "/opt/app,", "[/opt/app, /tmp/app],"),
	})
	for _, c := range []struct {
		name string
		want []string
	}{
		{"ap", []string{"profiles[0]: no profile \"ap\": there are again, app, broken, ", dir}},
		{"../app", []string{"\"../app\" is not the name of a profile"}},
		{".app", []string{"is not the name of a profile"}},
		{"", []string{"is not the name of a profile"}},
		{"unknown", []string{"unknown.yaml:7:1: unknown key \"unit\"", "^"}},
		{"broken", []string{"broken.yaml:"}},
		{"tag", []string{"tag.yaml"}},
		{"unsafe", []string{"unsafe.yaml:6:40: \"/tmp/app\" is below /tmp", "^"}},
	} {
		_, err := Compile(Config{Profiles: []string{c.name}, ProfilePaths: []string{dir}}, nil)
		if err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v\nis without %q", c.name, err, want)
			}
		}
	}
	if _, err := Compile(Config{Profiles: []string{"app", "again"}, ProfilePaths: []string{dir}}, nil); err == nil || !strings.Contains(err.Error(), "profiles[1].name: grant \"app\" is there twice") {
		t.Errorf("two profiles with one name of a grant: %v", err)
	}
	if p, err := Compile(Config{Profiles: []string{"app", "app"}, ProfilePaths: []string{dir}}, nil); err != nil || len(p.Grants()) != 1 {
		t.Errorf("a profile that two files name: %v", err)
	}
	if _, err := LoadProfile("none", []string{t.TempDir()}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "there are none") {
		t.Error(err)
	}
}
