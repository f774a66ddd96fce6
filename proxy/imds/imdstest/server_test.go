package imdstest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

func TestCatalogue(t *testing.T) {
	s, addr := serve(t, imdstest.Config{
		Tags: map[string]string{"Name": "lab", "aws:autoscaling:groupName": "asg"}, ExtendedCredentials: true,
		Data: map[string]string{
			"meta-data/spot/instance-action":             `{"action": "stop", "time": "2026-01-02T03:04:05Z"}`,
			"meta-data/spot/termination-time":            "2026-01-02T03:04:05Z",
			"meta-data/events/recommendations/rebalance": `{"noticeTime": "2026-01-02T03:04:05Z"}`,
		},
	})
	const mac = "meta-data/network/interfaces/macs/02:fa:4e:00:00:0a/"
	paths := strings.Fields(`
		user-data
		dynamic/instance-identity/document dynamic/instance-identity/pkcs7 dynamic/instance-identity/rsa2048
		dynamic/instance-identity/dsa2048 dynamic/instance-identity/signature dynamic/fws/instance-monitoring
		meta-data/iam/security-credentials/imdsgate-lab-role meta-data/iam/info
		meta-data/iam/security-credentials-extended/imdsgate-lab-role
		meta-data/identity-credentials/ec2/security-credentials/ec2-instance meta-data/identity-credentials/ec2/info
		meta-data/public-keys/0/openssh-key meta-data/managed-ssh-keys/active-keys/ec2-user
		meta-data/managed-ssh-keys/signer-cert meta-data/managed-ssh-keys/signer-ocsp/fa4e
		meta-data/tags/instance/Name meta-data/tags/instance/aws:autoscaling:groupName
		meta-data/spot/instance-action meta-data/spot/termination-time meta-data/events/maintenance/history
		meta-data/events/maintenance/scheduled meta-data/events/recommendations/rebalance
		meta-data/autoscaling/target-lifecycle-state
		meta-data/placement/availability-zone meta-data/placement/availability-zone-id
		meta-data/placement/group-name meta-data/placement/group-id meta-data/placement/host-id
		meta-data/placement/partition-number meta-data/placement/region
		meta-data/services/domain meta-data/services/partition
		meta-data/block-device-mapping/ami meta-data/block-device-mapping/root
		meta-data/ami-id meta-data/ami-launch-index meta-data/ami-manifest-path meta-data/ancestor-ami-ids
		meta-data/hostname meta-data/instance-action meta-data/instance-id meta-data/instance-life-cycle
		meta-data/instance-type meta-data/ipv6 meta-data/kernel-id meta-data/local-hostname meta-data/local-ipv4
		meta-data/mac meta-data/outpost-arn meta-data/product-codes meta-data/profile meta-data/public-hostname
		meta-data/public-ipv4 meta-data/ramdisk-id meta-data/reservation-id meta-data/security-groups
		meta-data/system meta-data/hibernation/configured meta-data/metrics/vhostmd
		meta-data/elastic-gpus/associations/elg-0fa4e0 meta-data/elastic-inference/associations/eia-0fa4e0`)
	for _, name := range strings.Fields(`device-number interface-id ipv4-associations/203.0.113.10 ipv4-prefix
		ipv6-prefix ipv6s local-hostname local-ipv4s mac network-card network-card-index owner-id public-hostname
		public-ipv4s security-groups security-group-ids subnet-id subnet-ipv4-cidr-block subnet-ipv6-cidr-blocks
		vpc-id vpc-ipv4-cidr-block vpc-ipv4-cidr-blocks vpc-ipv6-cidr-blocks`) {
		paths = append(paths, mac+name)
	}
	for _, path := range paths {
		plain := ask(t, addr, get("/latest/"+path))
		if !strings.HasPrefix(plain, "HTTP/1.1 200 OK\r\n") || body(plain) == "" {
			t.Errorf("%s: %q", path, plain)
		}
		if slashed := ask(t, addr, get("/2018-09-24/"+path+"/")); body(slashed) != body(plain) {
			t.Errorf("%s: with a slash and a dated version %q", path, slashed)
		}
	}
	if log := s.Transcript(); log.Lost != 0 {
		t.Errorf("transcript lost %d", log.Lost)
	}

	// A crawl finds all of them.
	found := map[string]bool{}
	var crawl func(dir string)
	crawl = func(dir string) {
		for _, entry := range strings.Split(body(ask(t, addr, get("/latest/"+dir))), "\n") {
			name, _, _ := strings.Cut(entry, "=")
			if strings.HasSuffix(entry, "/") || dir == "" && entry != "user-data" || name != entry {
				crawl(dir + strings.TrimSuffix(name, "/") + "/")
			} else {
				found[dir+entry] = true
			}
		}
	}
	crawl("")
	for _, path := range paths {
		if !found[path] {
			t.Errorf("a crawl did not find %s", path)
		}
		delete(found, path)
	}
	for path := range found {
		t.Errorf("a crawl found %s, which is not in the catalogue", path)
	}
}

func TestListings(t *testing.T) {
	_, addr := serve(t, imdstest.Config{Tags: map[string]string{"b": "2", "a": "1"}})
	for path, want := range map[string]string{
		"/latest":                                    "dynamic\nmeta-data\nuser-data",
		"/latest/":                                   "dynamic\nmeta-data\nuser-data",
		"/1.0/":                                      "dynamic\nmeta-data\nuser-data",
		"/latest/dynamic":                            "fws/\ninstance-identity/",
		"/latest/meta-data/iam/":                     "info\nsecurity-credentials/",
		"/latest/meta-data/public-keys/":             "0=imdsgate-lab-key",
		"/latest/meta-data/public-keys/0":            "openssh-key",
		"/latest/meta-data/tags/":                    "instance/",
		"/latest/meta-data/tags/instance":            "a\nb",
		"/latest/meta-data/identity-credentials/ec2": "info\nsecurity-credentials/",
	} {
		if got := body(ask(t, addr, get(path))); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	versions := strings.Split(body(ask(t, addr, get("/"))), "\n")
	if len(versions) != 30 || versions[0] != "1.0" || versions[29] != "latest" {
		t.Errorf("versions %q", versions)
	}
	for _, version := range append(versions, "/latest", "2016-09-02/") {
		if got := body(ask(t, addr, get("/"+version+"/meta-data/system"))); got != "nitro" {
			t.Errorf("version %q: %q", version, got)
		}
	}
	for _, path := range []string{"/2016-09-03/meta-data/", "/api/token", "/latest/api", "/2021-03-23/api/token", "/x"} {
		if got := status(ask(t, addr, get(path))); got != 404 {
			t.Errorf("GET %s: %d, want 404", path, got)
		}
	}
}

func status(answer string) int {
	var code int
	fmt.Sscanf(answer[len("HTTP/1.1 "):], "%d", &code)
	return code
}

// TestReadings shows what each reading gives away for the same target.
func TestReadings(t *testing.T) {
	const role = "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"
	_, strict := serve(t, imdstest.Config{})
	_, lenient := serve(t, imdstest.Config{Reading: imdstest.Lenient})
	secret := body(ask(t, strict, get(role)))
	for _, c := range []struct {
		target          string
		strict, lenient bool // the credentials are given away
	}{
		{role, true, true},
		{"/" + role + "//", true, true},
		{"/latest//meta-data/iam///security-credentials/imdsgate-lab-role", true, true},
		{"/latest/meta-data/iam/./security-credentials/imdsgate-lab-role", false, true},
		{"/latest/meta-data/tags/../iam/security-credentials/imdsgate-lab-role", false, true},
		{"/../../latest/meta-data/iam/security-credentials/imdsgate-lab-role", false, true},
		{"/latest/meta-data/iam/%73ecurity-credentials/imdsgate-lab-role", false, true},
		{"/latest/meta-data%2fiam%2Fsecurity-credentials/imdsgate-lab-role", false, true},
		{"/latest/meta-data/iam%252fsecurity-credentials/imdsgate-lab-role", false, true},
		{"/latest/meta-data/tags/%2e%2e/iam/security-credentials/imdsgate-lab-role", false, true},
		{"/LATEST/Meta-Data/iam/Security-Credentials/IMDSGATE-lab-role", false, true},
		{"/latest/meta-data/iam/security-credentials;x=y/imdsgate-lab-role;", false, true},
		{role + "?a=/b", false, true},
		{role + "#fragment", false, true},
		{`\latest\meta-data\iam\security-credentials\imdsgate-lab-role`, false, true},
		{"http://169.254.169.254" + role, false, true},
		{"http://user@evil.example:81" + role, false, true},
		{"/latest/meta-data/iam/%zzsecurity-credentials/imdsgate-lab-role", false, false},
		{"latest/meta-data/iam/security-credentials/imdsgate-lab-role", false, true},
	} {
		if got := body(ask(t, strict, get(c.target))) == secret; got != c.strict {
			t.Errorf("strict %q: credentials %v, want %v", c.target, got, c.strict)
		}
		answer := body(ask(t, lenient, get(c.target)))
		if got := strings.Contains(answer, "ASIAEXAMPLEFAKE00001"); got != c.lenient {
			t.Errorf("lenient %q: credentials %v, want %v", c.target, got, c.lenient)
		}
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// A clock that tests move.
type clock struct{ atomic.Int64 }

func (c *clock) now() time.Time          { return launch.Add(time.Duration(c.Load())) }
func (c *clock) pass(d time.Duration)    { c.Add(int64(d)) }
func (c *clock) config() imdstest.Config { return imdstest.Config{Now: c.now} }
func tokenGet(path, token string) string {
	return "GET " + path + " HTTP/1.1\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n"
}

func TestTokenLife(t *testing.T) {
	var c clock
	s, addr := serve(t, c.config())
	short, long := newToken(t, addr, 60), newToken(t, addr, 21600)
	if short == long {
		t.Fatal("two tokens are equal")
	}
	ttl := func(token string) int {
		answer := ask(t, addr, tokenGet("/latest/meta-data/ami-id", token))
		_, after, ok := strings.Cut(answer, "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: ")
		if !ok {
			return -status(answer)
		}
		value, _, _ := strings.Cut(after, "\r\n")
		n, err := strconv.Atoi(value)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, step := range []struct {
		pass        time.Duration
		short, long int
	}{
		{0, 60, 21600},
		{400 * time.Millisecond, 60, 21600},
		{600 * time.Millisecond, 59, 21599},
		{58 * time.Second, 1, 21541},
		{time.Second, -401, 21540},
	} {
		c.pass(step.pass)
		if got := ttl(short); got != step.short {
			t.Errorf("after %v more the short token's life is %d, want %d", step.pass, got, step.short)
		}
		if got := ttl(long); got != step.long {
			t.Errorf("after %v more the long token's life is %d, want %d", step.pass, got, step.long)
		}
	}
	for _, forged := range []string{long[:55], long + "=", strings.ToLower(long), strings.Repeat("A", 56)} {
		if got := ttl(forged); got != -401 {
			t.Errorf("forged token %q: %d", forged, got)
		}
	}
	s.Reset()
	if got := ttl(long); got != -401 {
		t.Errorf("a token of before Reset: %d", got)
	}
}

type credentials struct {
	Code, LastUpdated, Type, AccessKeyId, SecretAccessKey, Token, Expiration, AccountId string
}

func fetch(t *testing.T, addr, path string) credentials {
	t.Helper()
	text := body(ask(t, addr, get("/latest/meta-data/"+path)))
	var c credentials
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatalf("%s: %v in %q", path, err, text)
	}
	if n := len(text); n < 1250 || n > 1600 {
		t.Errorf("%s: %d bytes", path, n)
	}
	return c
}

func TestCredentials(t *testing.T) {
	var c clock
	s, addr := serve(t, c.config())
	const role = "iam/security-credentials/imdsgate-lab-role"
	const own = "identity-credentials/ec2/security-credentials/ec2-instance"

	first := fetch(t, addr, role)
	want := credentials{
		"Success", "2026-01-02T03:04:05Z", "AWS-HMAC", "ASIAEXAMPLEFAKE00001",
		"fake-secret-access-key-00001-of-no-accou", first.Token, "2026-01-02T09:04:05Z", "",
	}
	if diff := cmp.Diff(want, first); diff != "" || !strings.HasPrefix(first.Token, "fake-session-token-00001-") {
		t.Errorf("first document (-want +got):\n%s", diff)
	}
	if got := fetch(t, addr, own).AccessKeyId; got != "ASIAEXAMPLEFAKE90001" {
		t.Errorf("the instance's own key is %s", got)
	}

	c.pass(5*time.Hour + 54*time.Minute)
	if got := fetch(t, addr, role); got != first {
		t.Errorf("six minutes before it expires the document is another: %v", got.AccessKeyId)
	}
	c.pass(2 * time.Minute)
	second := fetch(t, addr, role)
	if second.AccessKeyId != "ASIAEXAMPLEFAKE00002" || second.Expiration != "2026-01-02T15:00:05Z" {
		t.Errorf("four minutes before it expires the document is %s to %s", second.AccessKeyId, second.Expiration)
	}
	s.Rotate()
	if got := fetch(t, addr, role).AccessKeyId; got != "ASIAEXAMPLEFAKE00003" {
		t.Errorf("after Rotate the key is %s", got)
	}

	s.Update(func(c *imdstest.Config) { c.Role, c.ExtendedCredentials = "other", true })
	if got := fetch(t, addr, "iam/security-credentials/other").AccessKeyId; got != "ASIAEXAMPLEFAKE00003" {
		t.Errorf("after an update of the role the key is %s", got)
	}
	if got := fetch(t, addr, "iam/security-credentials-extended/other").AccountId; got != "123456789012" {
		t.Errorf("extended: account %q", got)
	}
	s.Update(func(c *imdstest.Config) { c.NoRole = true })
	for path, want := range map[string]int{"iam": 404, "iam/info": 404, "iam/security-credentials/": 404, own: 200} {
		if got := status(ask(t, addr, get("/latest/meta-data/"+path))); got != want {
			t.Errorf("without a role %s is %d", path, got)
		}
	}
	s.Reset()
	if got := fetch(t, addr, role).AccessKeyId; got != "ASIAEXAMPLEFAKE00001" {
		t.Errorf("after Reset the key is %s", got)
	}
}

func TestSwitches(t *testing.T) {
	s, addr := serve(t, imdstest.Config{TokensRequired: true})
	is := func(path string, want int) {
		t.Helper()
		if got := status(ask(t, addr, get("/latest/meta-data/"+path))); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	is("ami-id", 401)
	s.SetTokens(false)
	is("ami-id", 200)
	is("tags/", 404)
	s.Update(func(c *imdstest.Config) { c.Tags = map[string]string{"Name": "lab"} })
	is("tags/instance/Name", 200)
	is("spot/", 404)
	s.Update(func(c *imdstest.Config) { c.Data = map[string]string{"meta-data/spot/termination-time": "now"} })
	is("spot/termination-time", 200)
	s.Update(func(c *imdstest.Config) { c.EndpointDisabled = true })
	is("ami-id", 403)
	s.Reset()
	is("ami-id", 401)
	if log := s.Transcript(); len(log.Connections) != 1 {
		t.Errorf("after Reset and one request the transcript has %d connections", len(log.Connections))
	}
}

func TestFaults(t *testing.T) {
	s, addr := serve(t, imdstest.Config{})
	set := func(f imdstest.Fault) {
		s.Update(func(c *imdstest.Config) {
			c.Fault = func(r *imdstest.Request) imdstest.Fault {
				if r.Path == "meta-data/ami-id" || r.Path == "api/token" {
					return f
				}
				return imdstest.Fault{}
			}
		})
	}
	within := func(patience time.Duration, request string) (string, error) {
		conn := dial(t, addr)
		if _, err := io.WriteString(conn, request); err != nil {
			return "", err
		}
		conn.SetReadDeadline(time.Now().Add(patience))
		answer, err := io.ReadAll(conn)
		return string(answer), err
	}
	exchange := func(request string) (string, error) { return within(5*time.Second, request) }
	full := ask(t, addr, get("/latest/meta-data/ami-id"))

	set(imdstest.Fault{Status: 503})
	if answer, err := exchange(get("/latest/meta-data/ami-id")); status(answer) != 503 || err != nil {
		t.Errorf("status: %q, %v", answer, err)
	}
	if answer, err := exchange(get("/latest/meta-data/mac")); status(answer) != 200 || err != nil {
		t.Errorf("a path without a fault: %q, %v", answer, err)
	}

	set(imdstest.Fault{Delay: 20 * time.Millisecond})
	start := time.Now()
	if answer, err := exchange(get("/latest/meta-data/ami-id")); status(answer) != 200 || err != nil {
		t.Errorf("delay: %q, %v", answer, err)
	}
	if took := time.Since(start); took < 20*time.Millisecond {
		t.Errorf("delay: took %v", took)
	}

	raw := []imdstest.Segment{{Data: "HTTP/1.1 299 O"}, {After: 20 * time.Millisecond, Data: "K\n\nsurplus"}}
	set(imdstest.Fault{Raw: raw, Outcome: imdstest.FIN})
	start = time.Now()
	if answer, err := exchange(get("/latest/meta-data/ami-id")); answer != "HTTP/1.1 299 OK\n\nsurplus" || err != nil || time.Since(start) < 20*time.Millisecond {
		t.Errorf("raw: %q, %v", answer, err)
	}
	set(imdstest.Fault{Raw: raw, Outcome: imdstest.RST})
	if answer, err := exchange(get("/latest/meta-data/ami-id")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("raw, reset: %q, %v", answer, err)
	}
	set(imdstest.Fault{Raw: raw})
	if answer, err := exchange(get("/latest/meta-data/ami-id") + get("/latest/meta-data/mac")); !strings.HasPrefix(answer, "HTTP/1.1 299 OK\n\nsurplusHTTP/1.1 200 ") || err != nil {
		t.Errorf("raw, kept: %q, %v", answer, err)
	}

	set(imdstest.Fault{Outcome: imdstest.Silence})
	if answer, err := within(50*time.Millisecond, get("/latest/meta-data/ami-id")); answer != "" || !isTimeout(err) {
		t.Errorf("silence: %q, %v", answer, err)
	}
	set(imdstest.Fault{Outcome: imdstest.RST})
	if answer, err := exchange(get("/latest/meta-data/ami-id")); answer != "" || !isReset(err) {
		t.Errorf("RST: %q, %v", answer, err)
	}
	set(imdstest.Fault{Outcome: imdstest.FIN})
	if answer, err := exchange(get("/latest/meta-data/ami-id")); answer != "" || err != nil {
		t.Errorf("FIN: %q, %v", answer, err)
	}
	set(imdstest.Fault{Outcome: imdstest.Truncated})
	if answer, err := exchange(get("/latest/meta-data/ami-id")); body(answer) != "ami-0fa4e0" || err != nil ||
		!strings.Contains(answer, "Content-Length: 21\r\n") || len(answer) != len(full)-11 {
		t.Errorf("truncated: %q, %v", answer, err)
	}

	const put = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 9\r\n" +
		"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n"
	set(imdstest.Fault{})
	if answer, err := within(300*time.Millisecond, put); answer != "HTTP/1.1 100 Continue\r\n\r\n" || !isTimeout(err) {
		t.Errorf("expectation: %q, %v", answer, err)
	}
	set(imdstest.Fault{Status: 417})
	if answer, err := exchange(put); !strings.HasPrefix(answer, "HTTP/1.1 417 Expectation Failed\r\n") || err != nil {
		t.Errorf("417: %q, %v", answer, err)
	}
	set(imdstest.Fault{NoContinue: true})
	if answer, err := within(50*time.Millisecond, put); answer != "" || !isTimeout(err) {
		t.Errorf("no continue: %q, %v", answer, err)
	}
	if answer, err := exchange(put + "x"); status(answer) != 200 || err != nil {
		t.Errorf("no continue, sent all the same: %q, %v", answer, err)
	}
}

func TestHugeHead(t *testing.T) {
	_, addr := serve(t, imdstest.Config{})
	for _, request := range []string{
		"GET /" + strings.Repeat("a", 40<<10) + " HTTP/1.1\r\n\r\n",
		"GET / HTTP/1.1\r\n" + strings.Repeat("X-A: b\r\n", 5<<10) + "\r\n",
	} {
		if got := status(ask(t, addr, request)); got != 400 {
			t.Errorf("%.30q…: %d, want 400", request, got)
		}
	}
}

func TestFaultSeesRequest(t *testing.T) {
	seen := make(chan string, 3)
	s, addr := serve(t, imdstest.Config{Persistence: imdstest.AlwaysKeep})
	s.Update(func(c *imdstest.Config) {
		c.Fault = func(r *imdstest.Request) imdstest.Fault {
			agent, _ := r.Header("USER-AGENT")
			seen <- fmt.Sprint(r.Method, " ", r.Target, " ", r.Path, " ", r.Proto, " ", agent, " ", r.Number, r.OnConn)
			return imdstest.Fault{}
		}
	})
	conn := dial(t, addr)
	io.WriteString(conn, "GET //latest/user-data/ HTTP/1.1\r\nuser-agent: a\r\n\r\nHEAD /%2e HTTP/1.0\r\nUser-Agent: b\r\n\r\n")
	if _, err := io.ReadAll(conn); err != nil {
		t.Fatal(err)
	}
	if got, want := <-seen, "GET //latest/user-data/ user-data HTTP/1.1 a 1 1"; got != want {
		t.Errorf("first request %q, want %q", got, want)
	}
	if got, want := <-seen, "HEAD /%2e  HTTP/1.0 b 2 2"; got != want {
		t.Errorf("second request %q, want %q", got, want)
	}
}

func TestTranscriptLimit(t *testing.T) {
	s, addr := serve(t, imdstest.Config{TranscriptLimit: 1000})
	for range 5 {
		ask(t, addr, get("/latest/meta-data/ami-id"))
	}
	log := s.Transcript()
	var kept int
	for _, c := range log.Connections {
		kept += len(c.Received()) + len(c.Sent())
	}
	if kept > 1000 || log.Lost == 0 || len(log.Connections) == 0 {
		t.Errorf("%d connections, %d bytes, lost %d", len(log.Connections), kept, log.Lost)
	}
	if len(log.Connections[0].Sent()) == 0 {
		t.Error("the first connection is not there")
	}
	s, addr = serve(t, imdstest.Config{NoTranscript: true})
	ask(t, addr, get("/latest/meta-data/ami-id"))
	if log := s.Transcript(); len(log.Connections) != 0 || log.Lost != 0 {
		t.Errorf("switched off: %+v", log)
	}
}

func TestTranscriptIsACopy(t *testing.T) {
	s, addr := serve(t, imdstest.Config{})
	ask(t, addr, get("/latest/meta-data/ami-id"))
	first := s.Transcript()
	first.Connections[0].Chunks[0].Data[0] = 'X'
	if again := s.Transcript().Connections[0].Received(); again[0] != 'G' {
		t.Error("changing a copy changed the transcript")
	}
}

// TestClose closes under load: nothing may hang or leak.
func TestClose(t *testing.T) {
	s, addr := serve(t, imdstest.Config{Fault: func(r *imdstest.Request) imdstest.Fault {
		switch r.Number % 4 {
		case 0:
			return imdstest.Fault{Outcome: imdstest.Silence}
		case 1:
			return imdstest.Fault{Delay: time.Hour}
		}
		return imdstest.Fault{}
	}})
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					return
				}
				io.WriteString(conn, get("/latest/meta-data/"))
				io.ReadAll(conn)
				conn.Close()
			}
		})
	}
	dial(t, addr) // one that never says anything
	time.Sleep(20 * time.Millisecond)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	clients.Wait()
}

func TestConcurrentUse(t *testing.T) {
	s, addr := serve(t, imdstest.Config{})
	var all sync.WaitGroup
	for n := range 8 {
		all.Go(func() {
			for range 30 {
				switch n {
				case 0:
					s.Rotate()
				case 1:
					s.SetTokens(false)
					s.SetHopLimit(64)
				case 2:
					s.Transcript()
				default:
					token := newToken(t, addr, 60)
					if got := body(ask(t, addr, tokenGet("/latest/meta-data/system", token))); got != "nitro" {
						t.Errorf("got %q", got)
					}
				}
			}
		})
	}
	all.Wait()
}

func TestHopLimitRange(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("hop limit 65 was taken")
		}
	}()
	imdstest.Serve(imdstest.Config{HopLimit: 65})
}

func FuzzConnection(f *testing.F) {
	for _, request := range []string{
		get("/latest/meta-data/"), "PUT /latest/api/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;a\r\nx\r\n0\r\n\r\n",
		"GET /%2e%2e/%zz;x\\?# HTTP/1.0\n\n", "\r\n\r\nHEAD http://a//b HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "\x00 \n",
	} {
		f.Add([]byte(request), true)
		f.Add([]byte(request), false)
	}
	_, strict := serve(f, imdstest.Config{NoTranscript: true, Persistence: imdstest.AlwaysKeep})
	_, lenient := serve(f, imdstest.Config{NoTranscript: true, Reading: imdstest.Lenient})
	f.Fuzz(func(t *testing.T, request []byte, strictly bool) {
		addr := lenient
		if strictly {
			addr = strict
		}
		conn := dial(t, addr)
		if _, err := conn.Write(request); err != nil && !isReset(err) {
			t.Fatal(err)
		}
		conn.CloseWrite()
		answer, err := io.ReadAll(conn)
		if err != nil && !isReset(err) {
			t.Fatalf("%q: %v", request, err)
		}
		if len(answer) > 0 && !strings.HasPrefix(string(answer), "HTTP/1.1 ") {
			t.Errorf("%q: answer %q", request, answer)
		}
	})
}

func BenchmarkGet(b *testing.B) {
	for _, keep := range []bool{false, true} {
		b.Run(fmt.Sprintf("keep=%v", keep), func(b *testing.B) {
			b.ReportAllocs()
			_, addr := serve(b, imdstest.Config{NoTranscript: true})
			request := get("/latest/meta-data/instance-id")
			if keep {
				request = "GET /latest/meta-data/instance-id HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"
			}
			var conn net.Conn
			buf := make([]byte, 4096)
			for b.Loop() {
				if conn == nil {
					var err error
					if conn, err = net.Dial("tcp", addr); err != nil {
						b.Fatal(err)
					}
				}
				io.WriteString(conn, request)
				if n, err := conn.Read(buf); err != nil || !strings.HasSuffix(string(buf[:n]), "i-0123456789abcdef0") {
					b.Fatalf("%q, %v", buf[:n], err)
				}
				if !keep {
					conn.Close()
					conn = nil
				}
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
}
