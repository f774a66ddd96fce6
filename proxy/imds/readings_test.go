package imds_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/proxy/imds"
)

// The model of what a service may make of a target. Each step is something that
// some server, router or library does to a path; nobody knows which of them a
// service takes, nor in what order, so a reading is whatever any sequence of
// them leads to.

// A reading is a target on its way.
type reading struct {
	text    string
	decoded int  // rounds so far
	ignored bool // nothing is left to take for a version
	behind  bool // it was behind an authority
}

var steps = []func(r reading) reading{
	func(r reading) reading { return r.decode(func(byte) bool { return true }) },
	// Servers that keep encoded slashes, for the application to decode.
	func(r reading) reading { return r.decode(func(c byte) bool { return c != '/' }) },
	// Normalisation of RFC 3986 section 6.2.2.2.
	func(r reading) reading {
		return r.decode(func(c byte) bool {
			return strings.IndexByte("-._~", c) >= 0 || '0' <= c && c <= '9' || 'A' <= c|0x20 && c|0x20 <= 'z'
		})
	},
	func(r reading) reading { return r.to(before(r.text, "?")) },
	func(r reading) reading { return r.to(before(r.text, "#")) },
	func(r reading) reading { return r.to(before(r.text, ";")) },
	func(r reading) reading { return r.each(func(s string) string { return before(s, ";") }) },
	func(r reading) reading { return r.each(func(s string) string { return strings.Trim(s, "+") }) },
	func(r reading) reading {
		return r.each(func(s string) string {
			if s == "." || s == ".." {
				return s
			}
			return strings.TrimRight(s, ".")
		})
	},
	func(r reading) reading { return r.to(strings.ToLower(r.text)) },
	func(r reading) reading { return r.to(slashes.ReplaceAllString(r.text, "/")) },
	// Dot segments where an empty segment is one to go back over, as RFC 3986
	// section 5.2.4 has it; and where it is not, because slashes were merged.
	func(r reading) reading {
		var out []string
		all := strings.Split(strings.TrimPrefix(r.text, "/"), "/")
		for i, s := range all {
			last := i == len(all)-1
			switch {
			case s == "..":
				out = out[:max(len(out)-1, 0)]
			case s != ".":
				out = append(out, s)
				continue
			}
			if last {
				out = append(out, "")
			}
		}
		return r.to("/" + strings.Join(out, "/"))
	},
	func(r reading) reading {
		if i := strings.IndexFunc(r.text, func(c rune) bool { return c != '/' }); i > 0 && !r.ignored {
			r.ignored = true
			if _, rest, more := strings.Cut(r.text[i:], "/"); more {
				return r.to("/latest/" + rest)
			}
			return r.to("/latest")
		}
		return r
	},
	// An authority, as RFC 3986 section 4.2 has it, or behind more slashes than two.
	func(r reading) reading {
		if strings.HasPrefix(r.text, "//") && !r.behind && !r.ignored {
			r.behind = true
			_, rest, _ := strings.Cut(strings.TrimLeft(r.text, "/"), "/")
			return r.to("/" + rest)
		}
		return r
	},
}

var slashes = regexp.MustCompile(`/+`)

func (r reading) to(text string) reading { r.text = text; return r }

func (r reading) each(f func(string) string) reading {
	all := strings.Split(r.text, "/")
	for i, s := range all {
		all[i] = f(s)
	}
	return r.to(strings.Join(all, "/"))
}

var escape = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

func (r reading) decode(is func(byte) bool) reading {
	if r.decoded == 3 {
		return r
	}
	text := escape.ReplaceAllStringFunc(r.text, func(s string) string {
		var c byte
		fmt.Sscanf(s, "%%%02x", &c)
		if !is(c) {
			return s
		}
		return string([]byte{c})
	})
	r.decoded++
	return r.to(text)
}

func before(s, sep string) string { s, _, _ = strings.Cut(s, sep); return s }

// name is the path that a service with this reading looks up. What it has not
// made sense of is part of a name like any letter.
func (r reading) name() string {
	var b strings.Builder
	for s := range strings.SplitSeq(r.text, "/") {
		if s != "" {
			s = strange.ReplaceAllString(s, "_")
			if strings.HasSuffix(s, ".") {
				s += "_"
			}
			b.WriteString("/" + s)
		}
	}
	if b.Len() == 0 || strings.HasSuffix(r.text, "/") {
		b.WriteByte('/')
	}
	return b.String()
}

var strange = regexp.MustCompile(`[^A-Za-z0-9._:~-]`)

// readings are the names that a target may stand for. Hostile targets have
// many: a fuzzer is told of the first thousand.
func readings(endpoint netip.Addr, target string) []string {
	queue := []reading{{text: target, ignored: endpoint != ec2}} // others have no version to ignore
	seen := map[reading]bool{queue[0]: true}
	names := map[string]bool{}
	for i := 0; i < len(queue) && len(queue) < 1000; i++ {
		name := queue[i].name()
		// What is nowhere in the tree is nothing behind an authority: clients write
		// two slashes where one is meant.
		if t, err := imds.Classify(endpoint, name); !queue[i].behind || err != nil || t.Class != imds.Unknown {
			names[name] = true
		}
		for _, step := range steps {
			if next := step(queue[i]); !seen[next] {
				seen[next] = true
				queue = append(queue, next)
			}
		}
	}
	var all []string
	for n := range names {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

// worth orders what a reading is good for, the dearest last.
func worth(t imds.Target) int {
	order := []imds.Class{imds.Listing, imds.Inventory, imds.Operational, imds.Unknown, imds.Token, imds.UserData, imds.IdentityProof, imds.Credentials}
	if t.Class == imds.Unknown && t.Suspect {
		return 2*slices.Index(order, imds.Token) + 1
	}
	return 2 * slices.Index(order, t.Class)
}

// compare fails the test for a reading that is worth more than the target was
// said to be.
func compare(t *testing.T, endpoint netip.Addr, target string) {
	t.Helper()
	got, err := imds.Classify(endpoint, target)
	if err != nil {
		return
	}
	for _, name := range readings(endpoint, target) {
		plain, err := imds.Classify(endpoint, name)
		if err != nil || plain.Evasive && !strings.ContainsFunc(name, func(c rune) bool { return 'A' <= c && c <= 'Z' }) {
			t.Fatalf("%q as a reading of %q: %+v, %v", name, target, plain, err)
		}
		if worth(plain) > worth(got) {
			t.Errorf("%q is classified as %v (suspect %v), and may be read as %q: %v (suspect %v)",
				target, got.Class, got.Suspect, name, plain.Class, plain.Suspect)
			return
		}
	}
}

// Targets with more than one reading, of which the cheap one comes last.
var ambiguous = []string{
	"/latest/meta-data/iam/security-credentials/x/..;/..;/..;/ami-id",
	"/latest/meta-data/iam/security-credentials/../../ami-id",
	"/latest/meta-data/iam/security-credentials/%2e%2e/%2e%2e/ami-id",
	"/latest/meta-data/iam/security-credentials/%252e%252e/%252e%252e/ami-id",
	"/latest/meta-data/iam/security-credentials/x;/../../../ami-id",
	"/latest/meta-data/iam/security-credentials;/../../ami-id",
	"/latest/meta-data/ami-id/..%2fiam/security-credentials/",
	"/latest/meta-data/ami-id/%2e%2e%252fiam/security-credentials/",
	"/latest/meta-data/ami-id;/../iam/security-credentials/",
	"/latest/meta-data/ami-id;/../../iam/security-credentials/",
	"/latest/meta-data/ami-id?/../iam/security-credentials/",
	"/latest/meta-data/ami-id%3f/../iam/security-credentials/",
	"/latest/meta-data/ami-id%23/../../user-data",
	"/latest/user-data//../../meta-data/ami-id",
	"/latest/user-data/../meta-data/ami-id",
	"/latest/user-data;/..",
	"/latest/user-data?",
	"/latest/user-data+",
	"/latest/user-data./",
	"/latest/user-data.../..",
	"/latest/user-data/...",
	"/latest/user-data/.;/..",
	"/latest/user-data/..+",
	"/latest/meta-data/../%75ser-data/../meta-data/ami-id",
	"/latest/dynamic/instance-identity/document/../pkcs7/../document",
	"/latest/dynamic/instance-identity/document;x",
	"/latest/DYNAMIC/instance-identity/document+",
	"/latest/dynamic/instance-identity/document.",
	"/latest/meta-data/identity-credentials/ec2/info;x",
	"/latest/meta-data/identity-credentials/ec2/info/x/..",
	"/latest/api/token/../../meta-data/ami-id",
	"/latest/api/token%3fx",
	"/latest/api/token;x",
	"/latest/meta-data/ami-id;x",
	"/latest/meta-data/spot/../secret",
	"/latest/meta-data/secret/../spot/termination-time",
	"/Latest/User-Data",
	"/LATEST/user-data",
	"/Latest/dynamic/instance-identity/pkcs7",
	"/v1/user-data",
	"/v1/latest/user-data",
	"/2021-3-23/meta-data/iam/security-credentials/role",
	"/user-data/meta-data/iam/security-credentials/role",
	"/meta-data/user-data",
	"/latest/latest/user-data",
	"//a/b/user-data",
	"//a/b/dynamic/instance-identity/pkcs7",
	"//169.254.169.254/latest/user-data",
	"///a//b/User-Data",
	"//a/user-data",
	"//latest/x/user-data",
	"//a/b/meta-data/iam/security-credentials/role",
	"//latest/meta-data/tags/instance/secret",
	"/v2/credentials/0f0e/../../../v4/uuid/task",
	"/v4/uuid/task;/../../../v2/credentials/0f0e",
	"/V2/Credentials/0f0e",
	"/v4/uuid/task?/../../v1/credentials",
	"/v4/%2Credentials",
	"/v4/%252%43redentials",
}

var endpoints = []netip.Addr{ec2, netip.MustParseAddr("169.254.170.2")}

func TestNoReadingIsWorthMore(t *testing.T) {
	for _, endpoint := range endpoints {
		for _, target := range slices.Concat(spellings, ambiguous) {
			compare(t, endpoint, target)
		}
	}
	// The model reads what it was made for.
	for _, c := range []struct{ target, reading string }{
		{"/latest/meta-data/iam/security-credentials/x/..;/..;/..;/ami-id", "/latest/meta-data/ami-id"},
		{"/latest/meta-data/ami-id?/../iam/security-credentials/", "/latest/meta-data/iam/security-credentials/"},
		{"/latest/user-data//../../meta-data/ami-id", "/latest/meta-data/ami-id"},
		{"/latest/user-data//..", "/latest/user-data/"},
		{"/latest/%2575ser-data", "/latest/user-data"},
		{"/v1/User-Data+", "/latest/user-data"},
		{"//a/b/user-data", "/latest/user-data"},
	} {
		if all := readings(ec2, c.target); !slices.Contains(all, c.reading) {
			t.Errorf("%q is never read as %q, only as %q", c.target, c.reading, all)
		}
	}
}

var pieces = []string{
	"/", "/", "/", "//", "//a", "latest", "LATEST", "Latest", "1.0", "v1", "2021-03-23", "meta-data", "Meta-Data", "ami-id", "Ami-Id", "iam", "info", "spot",
	"security-credentials", "Security-Credentials", "identity-credentials", "ec2", "user-data", "User-Data", "%75ser-data", "dynamic",
	"instance-identity", "document", "pkcs7", "api", "token", "credentials", "v2", "v4", "secret",
	"/..", "/../", "/.", "/%2e%2e/", "/%252e%252e/", "/.%2e/", "/..;/", "/..;x/", "%2f", "%252f", "%25", "..%2f",
	";", ";x=y", "%3b", "?", "%3f", "%253f", "%23", ".", "...", "+", "%2b", "x",
}

func TestRandomTargets(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	read := 0
	for range 1000 {
		target := "/"
		for n := random.IntN(12); n >= 0; n-- {
			target += pieces[random.IntN(len(pieces))]
			if random.IntN(2) == 0 {
				target += "/"
			}
		}
		for _, endpoint := range endpoints {
			if _, err := imds.Classify(endpoint, target); err == nil {
				read++
			}
			compare(t, endpoint, target)
		}
	}
	if read < 500 {
		t.Errorf("only %d targets were not refused", read)
	}
}
