package policytest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/policytest"
)

const profiles = "../../packaging/profiles"

// Each profile that is shipped says what it is for and where that is known from. Its cases
// pass; each of its grants lets something pass in one of them, and somebody else is refused.
func TestProfiles(t *testing.T) {
	names, err := policy.ProfileNames([]string{profiles})
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	page, err := os.ReadFile("../../docs/profiles.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !strings.Contains(string(page), "\n| `"+name+"` | ") {
			t.Errorf("docs/profiles.md has no row for %s", name)
		}
		profile, err := policy.LoadProfile(name, []string{profiles})
		if err != nil {
			t.Error(err)
			continue
		}
		if profile.Program == "" || profile.Without == "" || profile.Checked.IsZero() || len(profile.Sources) == 0 || len(profile.Grants) == 0 {
			t.Errorf("%s is not as complete as the others", profile.File)
		}
		file := filepath.Join(profiles, name+policytest.Suffix)
		src, err := os.ReadFile(file)
		if err != nil {
			t.Errorf("%s has no cases: %v", name, err)
			continue
		}
		r := run(t, file, string(src))
		if r.Failed > 0 {
			var b strings.Builder
			r.WriteText(&b, false)
			t.Error(b.String())
		}
		passed, refused := map[string]bool{}, false
		for _, result := range r.Results {
			refused = refused || result.Verdict == "deny"
			for _, grant := range result.Grants {
				passed[grant] = true
			}
		}
		for _, g := range profile.Grants {
			if !passed[g.Name] {
				t.Errorf("%s: no case is let pass by the grant %s", file, g.Name)
			}
		}
		if !refused {
			t.Errorf("%s: nobody is refused", file)
		}
	}
	if _, err := policy.Compile(policy.Config{Profiles: names, ProfilePaths: []string{profiles}}, classes()); err != nil {
		t.Errorf("all of them together: %v", err)
	}
}
