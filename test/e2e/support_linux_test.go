package e2e

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// The archive has what helps, and none of the secrets that are all over the place.
func TestSupport(t *testing.T) {
	t.Parallel()
	const (
		planted   = "planted-s3cret-of-somebody"
		secretKey = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY00"
	)
	h := start(t, netlab.Options{}, "mode: enforce\ndenies:\n- {name: ci, user: '4999', reason: "+planted+"}\n")
	token := h.token()
	ordinary := client{uid: ordinaryUser, env: []string{"TOKEN=" + token}}
	h.curl(ordinary, instanceID, "-H", "X-aws-ec2-metadata-token: "+token, "-A", planted)
	h.curl(ordinary, role, "-H", "X-aws-ec2-metadata-token: "+token)
	h.curl(ordinary, instanceID+"?password="+planted, "--data-urlencode", "x="+planted, "-G")
	h.run(client{uid: ordinaryUser, args: []string{"sh", "-c", "AWS_SECRET_ACCESS_KEY=" + secretKey + " curl -s -m 3 -o /dev/null " + service + "/latest/user-data # " + planted}})
	h.decided("/latest/user-data", "curl")
	h.curl(client{uid: 4999}, role) // whom the policy denies
	h.setMode("audit", "--for", "5m")
	if out, code := h.imdsgate("decisions", "add", "deny", "--user", "4998", "--for", "1h", "--reason", planted); code != 0 {
		t.Fatal(out)
	}
	h.curl(client{uid: 4998}, role) // and an operator
	for action, by := range map[string]string{"imds-request-denied": `denied by "ci": `, "imds-request-would-deny": "denied by decision "} {
		h.told(action, func(d gate.Document) bool {
			reason, _ := d.At("event.reason").(string)
			return strings.HasPrefix(reason, by) && strings.HasSuffix(reason, planted)
		})
	}

	file := filepath.Join(t.TempDir(), "support.tar.gz")
	out, code := h.imdsgate("support", "--output", file)
	if code != 0 {
		t.Fatalf("%d, %s", code, out)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	parts := map[string]string{}
	for archive := tar.NewReader(zip); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(header.Name, "imdsgate-support/")
		parts[name] = string(text)
		if !strings.Contains(out, " "+name+" ") {
			t.Errorf("it does not say that %s is in it:\n%s", name, out)
		}
		for what, secret := range map[string]string{"a token": token, "what people typed": planted, "a key": secretKey, "the secret key of the role": "SecretAccessKey", "a command line": "-o /dev/null"} {
			if i := strings.Index(string(text), secret); i >= 0 {
				t.Errorf("%s has %s: %s", name, what, text[max(i-200, 0):min(i+200, len(text))])
			}
		}
	}
	for name, has := range map[string]string{
		"status.json": `"mode": "audit"`, "doctor.json": `"findings"`, "config.yaml": "name: ci", "version.txt": "imdsgate test",
		"iptables-nft.txt": "IMDSGATE-OUTPUT", "ip6tables-nft.txt": "fd00:ec2::254", "events.ndjson": `denied by \"ci\": [left out]`, "journal.txt": "", "nft-chains.txt": "hook output",
	} {
		if text, ok := parts[name]; !ok || !strings.Contains(text, has) {
			t.Errorf("%s has no %q:\n%.2000s", name, has, text)
		}
	}
	if out, code := h.imdsgate("support", "--output", file); code != 2 {
		t.Errorf("over a file that is there: %d, %s", code, out)
	}
}
