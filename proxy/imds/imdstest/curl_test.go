package imdstest_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// TestCurl runs the program that most scripts on instances use.
func TestCurl(t *testing.T) {
	path, err := exec.LookPath("curl")
	switch {
	case err != nil && os.Getenv("CI") != "":
		t.Fatal("needs curl")
	case err != nil:
		t.Skip("needs curl")
	}
	_, addr := serve(t, imdstest.Config{TokensRequired: true})
	curl := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(path, append([]string{"-q", "-sS", "--noproxy", "*", "--max-time", "5"}, args...)...)
		cmd.Stdin = strings.NewReader("")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("curl %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	base := "http://" + addr + "/latest/"
	ttl := []string{"-H", "X-aws-ec2-metadata-token-ttl-seconds: 21600", base + "api/token"}
	token := curl(append([]string{"-X", "PUT"}, ttl...)...)
	if !anyToken.MatchString(token) {
		t.Fatalf("token %q", token)
	}
	// An upload of unknown length: chunked, with Expect: 100-continue.
	if got := curl(append([]string{"-T", "-", "-H", "Expect: 100-continue"}, ttl...)...); !anyToken.MatchString(got) {
		t.Errorf("chunked: %q", got)
	}
	header := "X-aws-ec2-metadata-token: " + token
	if got := curl("-H", header, base+"meta-data/instance-id"); got != "i-0123456789abcdef0" {
		t.Errorf("instance-id: %q", got)
	}
	if got := curl("-H", header, "-I", base+"meta-data/instance-id/"); !strings.Contains(got, "Server: EC2ws\r\n") {
		t.Errorf("HEAD: %q", got)
	}
	if got := curl("-o", "/dev/null", "-w", "%{http_code}", base+"meta-data/"); got != "401" {
		t.Errorf("without a token: %q", got)
	}
	keep := curl("-H", header, "-H", "Connection: keep-alive", "-w", "|%{num_connects}",
		base+"meta-data/mac", base+"meta-data/system")
	if keep != "02:fa:4e:00:00:0a|1nitro|0" {
		t.Errorf("kept connection: %q", keep)
	}
}
