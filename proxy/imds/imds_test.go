package imds_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

var ec2 = netip.MustParseAddr("169.254.169.254")

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		target string
		want   imds.Class
		path   string // "" is the target itself
	}{
		{"/", imds.Listing, ""},
		{"/latest", imds.Listing, ""},
		{"/latest/", imds.Listing, ""},
		{"/2021-03-23/meta-data/", imds.Listing, ""},
		{"/latest/api/token", imds.Token, ""},
		{"/latest/api/token/", imds.Token, ""},
		{"/2021-03-23/api/token", imds.Token, ""},
		{"/latest/meta-data/iam/", imds.Listing, ""},
		{"/latest/meta-data/iam/info", imds.Inventory, ""},
		{"/latest/meta-data/iam/security-credentials", imds.Credentials, ""},
		{"/latest/meta-data/iam/security-credentials/", imds.Credentials, ""},
		{"/latest/meta-data/iam/security-credentials/role", imds.Credentials, ""},
		{"/1.0/meta-data/iam/security-credentials/role", imds.Credentials, ""},
		{"/latest/meta-data/iam/security-credentials-extended/role", imds.Credentials, ""},
		{"/latest/meta-data/identity-credentials/", imds.Listing, ""},
		{"/latest/meta-data/identity-credentials/ec2/info", imds.Inventory, ""},
		{"/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", imds.Credentials, ""},
		{"/latest/meta-data/identity-credentials/other", imds.Credentials, ""},
		{"/latest/user-data", imds.UserData, ""},
		{"/latest/user-data/", imds.UserData, ""},
		{"/latest/dynamic/instance-identity/document", imds.Inventory, ""},
		{"/latest/dynamic/instance-identity/pkcs7", imds.IdentityProof, ""},
		{"/latest/dynamic/instance-identity/signature", imds.IdentityProof, ""},
		{"/latest/dynamic/instance-identity/", imds.Listing, ""},
		{"/latest/dynamic/fws/instance-monitoring", imds.Inventory, ""},
		{"/latest/meta-data/spot/instance-action", imds.Operational, ""},
		{"/latest/meta-data/events/maintenance/scheduled", imds.Operational, ""},
		{"/latest/meta-data/managed-ssh-keys/active-keys/ec2-user", imds.Operational, ""},
		{"/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/", imds.Listing, ""},
		{"/latest/meta-data/placement/region", imds.Inventory, ""},
		{"/latest/meta-data/tags/instance/Name", imds.Inventory, ""},
		{"/latest/meta-data/elsewhere", imds.Unknown, ""},
		{"/computeMetadata/v1/instance/service-accounts/default/token", imds.Unknown, ""},
		// Not evasive: AWS's own clients write these.
		{"//latest/meta-data/instance-id", imds.Inventory, "/latest/meta-data/instance-id"},
		{"/latest/meta-data//iam/security-credentials/", imds.Credentials, "/latest/meta-data/iam/security-credentials/"},
		{"//latest/meta-data/tags/instance/secret", imds.Inventory, "/latest/meta-data/tags/instance/secret"},
		{"//latest/meta-data/iam/info", imds.Inventory, "/latest/meta-data/iam/info"},
		// Behind what may be an authority, and something for a version.
		{"//a/b/user-data", imds.UserData, "/a/b/user-data"},
		{"//a/b/dynamic/instance-identity/pkcs7", imds.IdentityProof, "/a/b/dynamic/instance-identity/pkcs7"},
		{"//latest/x/user-data", imds.UserData, "/latest/x/user-data"},
		{"//169.254.169.254/latest/user-data", imds.UserData, "/169.254.169.254/latest/user-data"},
	} {
		got, err := imds.Classify(ec2, c.target)
		if c.path == "" {
			c.path = c.target
		}
		if err != nil || got.Class != c.want || got.Path != c.path || got.Evasive {
			t.Errorf("%s: %+v, %v; want %v", c.target, got, err, c.want)
		}
	}
	for _, c := range []struct {
		endpoint, target string
		want             imds.Class
	}{
		{"169.254.170.2", "/v2/credentials/0f0e", imds.Credentials},
		{"169.254.170.2", "/v4/uuid/task", imds.Inventory},
		{"169.254.170.23", "/v1/credentials", imds.Credentials},
		{"fd00:ec2::23", "/v1/credentials", imds.Credentials},
		{"fd00:ec2::254", "/latest/meta-data/iam/security-credentials/", imds.Credentials},
	} {
		container := !strings.HasSuffix(c.endpoint, "254")
		for _, spelled := range []string{c.target, "/." + c.target} {
			if got, err := imds.Classify(netip.MustParseAddr(c.endpoint), spelled); err != nil || got.Container != container || spelled == c.target && got.Class != c.want {
				t.Errorf("%s at %s: %+v, %v", spelled, c.endpoint, got, err)
			}
		}
	}
}

// Spellings of the credentials path that some reader might accept. Each is
// classified as what it may lead to, or refused.
var spellings = []string{
	"/latest/meta-data/iam/%73ecurity-credentials/role",
	"/latest/meta-data/iam/security%2Dcredentials/role",
	"/latest%2fmeta-data%2Fiam/security-credentials/role",
	"/latest/meta-data/iam%252fsecurity-credentials/role",
	"/latest/./meta-data/iam/security-credentials/role",
	"/latest/meta-data/x/../iam/security-credentials/role",
	"/latest/meta-data/x/%2e%2e/iam/security-credentials/role",
	"/../latest/meta-data/iam/security-credentials/role",
	"/latest/meta-data/iam/security-credentials;x=y/role",
	"/latest;a/meta-data/iam/security-credentials/role",
	"/latest/meta-data/iam/security-credentials/role?x",
	"/latest/meta-data/instance-id/../iam/security-credentials/?/instance-id",
	"/latest/meta-data/iam/Security-Credentials/role",
	"/LATEST/META-DATA/IAM/SECURITY-CREDENTIALS/role",
	"/latest/meta-data/iam/security-credentials./role",
	"/latest/meta-data/iam/security-credentials/role%3f",
	"/latest/latest/meta-data/iam/security-credentials/role",
	"/2031-01-01/meta-data/iam/security-credentials/role",
}

func TestSpellings(t *testing.T) {
	for _, s := range spellings {
		got, err := imds.Classify(ec2, s)
		if err == nil && got.Class != imds.Credentials {
			t.Errorf("%s: %+v", s, got)
		}
		if plain := strings.Contains(s, "latest/latest") || strings.Contains(s, "2031"); err == nil && !got.Evasive && !plain {
			t.Errorf("%s is not called evasive", s)
		}
	}
	for _, s := range []string{"", "latest", "http://169.254.169.254/latest/", "*", "/a b", "/a\tb", "/\x00", "/%00", "/%", "/%2", "/%zz",
		"/\\", "/%5c", "/#", "/a#b", "/\xff", "/%ff", "/%25252525"} {
		if got, err := imds.Classify(ec2, s); !errors.Is(err, imds.ErrTarget) {
			t.Errorf("%q: %+v, %v; want that it is refused", s, got, err)
		}
	}
}

// lenient is a service that accepts every spelling it can make sense of.
func lenient(t testing.TB) func(target string) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := imdstest.Serve(imdstest.Config{Reading: imdstest.Lenient, Role: "role", NoTranscript: true}, ln)
	t.Cleanup(func() { s.Close() })
	return func(target string) string {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(c, "GET "+target+" HTTP/1.1\r\nConnection: close\r\n\r\n"); err != nil {
			return ""
		}
		b, _ := io.ReadAll(c)
		return string(b)
	}
}

// Whatever a lenient service gives credentials for is classified so, or refused.
func TestNoLenientServiceIsMisread(t *testing.T) {
	ask := lenient(t)
	given := 0
	for _, s := range spellings {
		if strings.Contains(ask(s), "SecretAccessKey") {
			given++
		}
		check(t, ask, s)
	}
	if given < 10 {
		t.Errorf("the service gave credentials for %d spellings only: nothing is proven", given)
	}
}

func check(t *testing.T, ask func(string) string, target string) {
	t.Helper()
	got, err := imds.Classify(ec2, target)
	if err != nil {
		return
	}
	answer := ask(target)
	if strings.Contains(answer, "SecretAccessKey") && got.Class != imds.Credentials {
		t.Errorf("%q is classified as %v, and a lenient service gives credentials for it", target, got.Class)
	}
	if strings.Contains(answer, "#cloud-config") && got.Class != imds.UserData && got.Class != imds.Credentials {
		t.Errorf("%q is classified as %v, and a lenient service gives user data for it", target, got.Class)
	}
}

func FuzzClassify(f *testing.F) {
	for _, s := range slices.Concat(spellings, ambiguous) {
		f.Add(s)
	}
	f.Add("/latest/user-data")
	ask := lenient(f)
	f.Fuzz(func(t *testing.T, target string) {
		got, err := imds.Classify(ec2, target)
		if err != nil {
			return
		}
		if !strings.HasPrefix(got.Path, "/") || strings.Contains(got.Path, "//") || strings.ContainsAny(got.Path, "%\\ ") && !strings.Contains(target, "%25") {
			t.Errorf("%q resolves to %q", target, got.Path)
		}
		check(t, ask, target)
		for _, endpoint := range endpoints {
			compare(t, endpoint, target)
		}
	})
}

func TestParseIssued(t *testing.T) {
	const doc = `{"Code":"Success","AccessKeyId":"ASIAEXAMPLEFAKE00001","SecretAccessKey":"fake","Token":"fake","Expiration":"2026-11-25T18:00:00Z"}`
	got, ok := imds.ParseIssued([]byte(doc))
	if !ok || got.AccessKeyID != "ASIAEXAMPLEFAKE00001" || !got.Expiration.Equal(time.Date(2026, 11, 25, 18, 0, 0, 0, time.UTC)) {
		t.Errorf("%+v, %v", got, ok)
	}
	for _, bad := range []string{"", "role-name", "{}", `{"Code":"AssumeRoleUnauthorizedAccess"}`, doc[:50], `[1]`,
		`{"AccessKeyId":"not a key\n","Expiration":"2026-11-25T18:00:00Z"}`,
		`{"AccessKeyId":"` + strings.Repeat("A", 200) + `"}`, `{"AccessKeyId":{"SecretAccessKey":"x"}}`} {
		if got, ok := imds.ParseIssued([]byte(bad)); ok {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

// Of a part of the document no more is taken for the id than the id.
func TestFindIssued(t *testing.T) {
	const doc = "{\n  \"Code\" : \"Success\",\n  \"AccessKeyId\" : \"ASIAEXAMPLEFAKE00001\",\n  \"SecretAccessKey\" : \"fakesecretfakesecretfakesecretfakesecret\",\n" +
		"  \"Token\" : \"fake\",\n  \"Expiration\" : \"2026-11-25T18:00:00Z\"\n}"
	for from := range len(doc) {
		for to := from; to <= len(doc); to++ {
			part := doc[from:to]
			whole := strings.Contains(part, `"AccessKeyId" : "ASIAEXAMPLEFAKE00001"`)
			end := whole && strings.Contains(part, `"Expiration" : "2026-11-25T18:00:00Z"`)
			got, ok := imds.FindIssued([]byte(part))
			if ok != whole || ok && got.AccessKeyID != "ASIAEXAMPLEFAKE00001" || !ok && got != (imds.Issued{}) || end == got.Expiration.IsZero() {
				t.Fatalf("%q: %+v, %v", part, got, ok)
			}
		}
	}
	for _, bad := range []string{`"AccessKeyId": 12, "x": "y"`, `"AccessKeyId" "x"`, `"AccessKeyId":"a b"`, `"AccessKeyId":"` + strings.Repeat("A", 200) + `"`, `"AccessKeyId":""`} {
		if got, ok := imds.FindIssued([]byte(bad)); ok {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

func FuzzParseIssued(f *testing.F) {
	f.Add([]byte(`{"AccessKeyId":"ASIAEXAMPLEFAKE00001","SecretAccessKey":"fake","Expiration":"2026-11-25T18:00:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, parse := range []func([]byte) (imds.Issued, bool){imds.ParseIssued, imds.FindIssued} {
			got, ok := parse(b)
			if ok && (got.AccessKeyID == "" || strings.ContainsAny(got.AccessKeyID, " \n\"{}:")) {
				t.Errorf("%q from %q", got.AccessKeyID, b)
			}
		}
	})
}

func TestRefusal(t *testing.T) {
	at := time.Date(2026, 11, 25, 12, 0, 0, 0, time.FixedZone("", 3600))
	const want = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 0\r\nDate: Wed, 25 Nov 2026 11:00:00 GMT\r\n" +
		"Server: EC2ws\r\nConnection: close\r\n\r\n"
	if got := imds.AppendRefusal(nil, at); string(got) != want {
		t.Errorf("%q", got)
	}
	if got := imds.AppendBadRequest(nil, at); !bytes.HasPrefix(got, []byte("HTTP/1.1 400 Bad Request\r\n")) {
		t.Errorf("%q", got)
	}
}

func TestClassNames(t *testing.T) {
	for _, c := range imds.Classes() {
		var got imds.Class
		text, _ := c.MarshalText()
		if err := got.UnmarshalText(text); err != nil || got != c {
			t.Errorf("%v: %v, %v", c, got, err)
		}
	}
	var c imds.Class
	if err := c.UnmarshalText([]byte("creds")); err == nil || !strings.Contains(err.Error(), "credentials") {
		t.Errorf("%v", err)
	}
}

func BenchmarkClassify(b *testing.B) {
	for _, target := range []string{"/latest/meta-data/instance-id", "/latest/meta-data/iam/security-credentials/role", "/latest/meta-data/iam/%73ecurity-credentials/role"} {
		b.Run(target, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				imds.Classify(ec2, target)
			}
		})
	}
}
