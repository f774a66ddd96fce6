package event

import (
	"regexp"
	"strings"
)

const redacted = "[redacted]"

// secrets are the forms in which command lines and requests carry what must
// not be logged. The groups are kept and the rest replaced. They are RE2,
// so that no input makes them slow.
var secrets = []struct {
	words []string // one of them is in every match, in lower case
	also  string   // and this is, too
	form  *regexp.Regexp
}{
	{words: []string{"x-aws-ec2-metadata-token", "x_aws_ec2_metadata_token"},
		form: regexp.MustCompile(`(?i)(x[-_]aws[-_]ec2[-_]metadata[-_]token["']?\s*[:=]\s*["']?)[^\s"',;&]+`)},
	// A session token of IMDSv2 by itself: 56 characters of base64url.
	{words: []string{"aqa"}, form: regexp.MustCompile(`()\bAQA[A-Za-z0-9_-]{45,}={0,2}`)},
	{words: []string{"authorization"}, form: regexp.MustCompile(`(?i)(authorization["']?\s*[:=]\s*["']?(?:bearer|basic|aws4-hmac-sha256)?\s*)[^\s"']+`)},
	{words: []string{"bearer"}, form: regexp.MustCompile(`(?i)(\bbearer\s+)[^\s"']+`)},
	{words: []string{"secret", "session_token", "session-token", "sessiontoken", "security_token", "security-token", "securitytoken",
		"access_token", "access-token", "accesstoken", "auth_token", "auth-token", "authtoken", "password", "passwd", "api_key", "api-key", "apikey"},
		form: regexp.MustCompile(`(?i)((?:secret[-_ ]?(?:access)?[-_ ]?key|secretaccesskey|client[-_]?secret|session[-_]?token|security[-_]?token|access[-_]?token|auth[-_]?token|password|passwd|api[-_]?key)["']?\s*[:=]\s*["']?)[^\s"',;&]+`)},
	{words: []string{"--pass", "-password", "-passwd", "-passphrase", "-secret", "-token", "-api-key"}, form: regexp.MustCompile(`(?i)(--(?:[a-z0-9-]*-)?(?:password|passwd|passphrase|secret|token|api-key|secret-key|secret-access-key)(?:=|\s+))[^\s-][^\s]*`)},
	{words: []string{"://"}, also: "@", form: regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@]+(@)`)},
	{words: []string{"eyj"}, form: regexp.MustCompile(`()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`)},
	{words: []string{"-----begin"}, form: regexp.MustCompile(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*-----|$)`)},
}

// beginnings has the first three letters of every word of secrets, hashed. Most
// text has none of them, and is not searched any further.
var beginnings = func() (set [1 << 12]bool) {
	for _, secret := range secrets {
		for _, w := range secret.words {
			set[trigram(w[0], w[1], w[min(2, len(w)-1)])] = true
		}
	}
	return set
}()

func trigram(a, b, c byte) uint { return (uint(a)*31*31 + uint(b)*31 + uint(c)) & (1<<12 - 1) }

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// suspicious reports whether a word of secrets may begin in s.
func suspicious(s string) bool {
	if len(s) < 8 {
		return false // no form is shorter
	}
	a, b := lower(s[0]), lower(s[1])
	for i := 2; i < len(s); i++ {
		c := lower(s[i])
		if beginnings[trigram(a, b, c)] {
			return true
		}
		a, b = b, c
	}
	return false
}

// Redact replaces what looks like a secret in text that a process or client
// chose.
func Redact(s string) string {
	if !suspicious(s) {
		return s
	}
	folded := strings.ToLower(s)
	for _, secret := range secrets {
		if !strings.Contains(folded, secret.also) {
			continue
		}
		for _, w := range secret.words {
			if strings.Contains(folded, w) {
				s = secret.form.ReplaceAllString(s, "${1}"+redacted+"${2}")
				break
			}
		}
	}
	return s
}

// secretFlag is an option whose secret is the next argument.
var secretFlag = regexp.MustCompile(`(?i)^--?(?:[a-z0-9-]*-)?(?:password|passwd|passphrase|secret|token|api-key|secret-key|secret-access-key)$`)

// redactArgs redacts what only the order of arguments gives away; each one is
// redacted by itself after that.
func redactArgs(args []string) []string {
	var out []string
	for i := 1; i < len(args); i++ {
		if secretFlag.MatchString(args[i-1]) {
			if out == nil {
				out = append(out, args...)
			}
			out[i] = redacted
		}
	}
	if out == nil {
		return args
	}
	return out
}
