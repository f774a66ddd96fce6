package event

import (
	"os"
	"strings"
	"testing"
)

// Who is woken by an alert on one finds it there.
func TestFindingsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, action := range Findings() {
		if !strings.Contains(string(page), "`"+action+"`") {
			t.Errorf("docs/operate.md does not say what %s is", action)
		}
	}
}
