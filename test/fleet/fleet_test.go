package fleet

import (
	"bufio"
	"os"
	"path/filepath"
	"testing"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy/tune"
)

func TestX(t *testing.T) {
	c, err := config.Parse("x", []byte(configuration))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Policy()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n, err := Fleet{}.Write(dir, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(n)
	tn := tune.New(tune.Options{Policy: p})
	files, _ := filepath.Glob(dir + "/*")
	for _, f := range files {
		fd, _ := os.Open(f)
		s := bufio.NewScanner(fd)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			if err := tn.Line(s.Bytes()); err != nil {
				t.Fatal(err)
			}
		}
	}
	r := tn.Report()
	for _, p := range r.Proposals {
		t.Logf("%s %s: %+v\n%v\nalso %v", p.Risk, p.Grant.Name, p.Grant, p.Because, p.Also)
	}
	for _, p := range r.Refused {
		t.Logf("refused %s: %s\n%s %d", p.Who, p.Why, p.Instead, p.Count)
	}
	for _, p := range r.Unexplained {
		t.Logf("unexplained %s: %s %d", p.Who, p.Why, p.Count)
	}
	t.Logf("%+v", r.Readiness)
	b, err := tune.DropIn(r.Proposals, r)
	t.Logf("%v\n%s", err, b)
}

const configuration = `
grants:
  - name: backup
    executable: /opt/backup/bin/backup-agent
    unit: backup.service
    user: backup
    classes: [credentials]
    owner: storage team
    reason: copies to S3, over IMDSv1 until it is replaced
`
