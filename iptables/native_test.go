package iptables

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func readText(t testing.TB, file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The .json files are what nft -j printed for the .nft files; TestNativeRules writes them.
func nativeCases(t testing.TB) []string {
	files, err := filepath.Glob("testdata/native/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return files
}

func TestParseNative(t *testing.T) {
	for _, file := range nativeCases(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			want, tracks := statedLocks(t, strings.TrimSuffix(file, ".json")+".nft")
			n, err := parseNative([]byte(readText(t, file)))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range Families {
				found, err := rules(n.bases).locks(Config{UID: 990}.WithDefaults(), f, "iptables-nft", usualWays)
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range found.locks {
					got = append(got, l.asComment())
				}
			}
			slices.Sort(got)
			got = slices.Compact(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("locks, - expected, + found:\n%s", diff)
			}
			if n.tracks != tracks {
				t.Errorf("needs connection tracking: %v, want %v", n.tracks, tracks)
			}
		})
	}
}

var lockComment = regexp.MustCompile(`# policy of .*|comment "IPv.*?"`)

// statedLocks returns the locks of a file of nft commands, each stated in the comment of its rule, or in a line
// "# policy of CHAIN: …", and whether a line "# tracks" says that connection tracking is needed.
func statedLocks(t *testing.T, file string) (locks []string, tracks bool) {
	text := readText(t, file)
	locks = lockComment.FindAllString(text, -1)
	slices.Sort(locks)
	return locks, strings.Contains(text, "# tracks\n")
}

// asComment writes a lock as it is stated in the file; what the rule says of itself is in its place.
func (l Lock) asComment() string {
	is := fmt.Sprintf("%s %s %s", l.Family, l.Hook, l.Kind)
	if l.Rule == "" {
		return "# policy of " + l.Chain + ": " + is
	}
	_, comment, _ := strings.Cut(l.Rule, " ")
	_, comment, _ = strings.Cut(comment, " ")
	if strings.Contains(comment, is) {
		return comment
	}
	return l.Rule + " " + is
}

func FuzzNative(f *testing.F) {
	for _, file := range nativeCases(f) {
		f.Add([]byte(readText(f, file)))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		n, err := parseNative(text)
		if err != nil {
			return
		}
		for _, family := range Families {
			_, _ = rules(n.bases).locks(Config{UID: 990}.WithDefaults(), family, "x", usualWays)
		}
	})
}
