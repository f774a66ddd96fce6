package report

import (
	"testing"

	"github.com/imdsgate/imdsgate/proxy/imds"
)

func TestExamples(t *testing.T) {
	for _, class := range imds.Classes() {
		if q := Ask("", examples[class], true); q.Class != class.String() || q.Malformed != "" || q.Evasive {
			t.Errorf("%s: %+v", class, q)
		}
	}
	if q := Ask("", "/latest/../x", true); !q.Evasive {
		t.Errorf("%+v", q)
	}
	if q := Ask("", "latest", true); q.Malformed == "" {
		t.Errorf("%+v", q)
	}
}
