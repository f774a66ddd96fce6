package event

import (
	"regexp"
	"strings"
)

const redacted = "[redacted]"

// What is searched is text, or a command as /proc has it, with a NUL between
// its arguments. A shell takes the quotes away, so that only the end of an
// argument says where a secret ends that has blanks; in a script it is a quote
// or a blank. Nothing that is replaced has a NUL.
const (
	// argument is the beginning of one, up to the name of a secret.
	argument = `\x00[\w.,:=@+-]*?`
	// rest is what remains of one.
	rest = `[^\s\x00][^\x00]*`
	// quoted is a string of a script, or of JSON in a script: its quotes may be
	// escaped, and those inside are escaped further. After its first quote is no
	// blank, or else that quote would be the last of another string.
	quoted = `(\\{2,}")(?:[^\s"\\\x00]|\\+[^"\\\x00]|\\{4,}")(?:[^"\\\x00]|\\+[^"\\\x00]|\\{4,}")*` +
		`|(\\")(?:[^\s"\\\x00]|\\+[^"\\\x00]|\\{2,}")(?:[^"\\\x00]|\\+[^"\\\x00]|\\{2,}")*` +
		`|(")(?:[^\s"\\\x00]|\\[^\x00])(?:[^"\\\x00]|\\[^\x00])*` +
		`|('\\''|')[^\s'\x00][^'\x00]*`
	// bare is a character of a word without quotes.
	bare = `(?:\\+[^"'\\\x00]|[^\s"'&;\\\x00])`
	word = `(?:` + quoted + `|` + bare + `+)`
)

// assigned is a secret behind its name. The argument after -c is a script.
func assigned(name string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)(` + argument + name + `)` + rest + `|((?:\x00-\w*c` + argument + `)?` + name + `)` + word)
}

// following is a secret that is the next word. With a dash begins another
// option, unless more follows than options have.
func following(name string) *regexp.Regexp {
	const next = `(?:[^-\s"'&;\\\x00]|\\+[^"'\\\x00]|-[^-\s"'&;\\\x00]{8})` + bare + `*`
	return regexp.MustCompile(`(?i)(` + name + `\x00)(?:[^-\x00]|-[^-\x00]{8})[^\x00]*|(` + name + `\s+)(?:` + quoted + `|` + next + `)`)
}

const (
	// The key id of a signed request may be read.
	authorization = `authorization\\*["']?\s*[:=][\s\x00]*(?:aws4-hmac-sha256\b[^"'\x00]*?signature=|(?:basic|bearer|digest|negotiate|token|apikey)[\s\x00]+)?`
	mysql         = `(?i:\b(?:mysql|mariadb)[\w-]*)(?:[\s\x00][^;&|]*?)?`
	sshpass       = `(?i:\bsshpass)(?:[\s\x00][^;&|]*?)?`
	// Of curl: -u with the user in the same argument, with other options before
	// it, and by its long name.
	shortUser  = `-(?:[fgGikIlLsSv]|sS)?[uU]`
	shortsUser = `-[fgGikIlLsSv]*[uU]`
	curlUser   = `(?:` + shortUser + `|` + shortsUser + `\s+|--(?:proxy-)?user(?:=|\s+))`
)

// secrets are the forms in which command lines and requests carry what must
// not be logged. They are RE2, so that no input makes one search slow.
var secrets = []struct {
	words []string // one of them is in every match when folded; the rarer its beginning, the less is searched
	also  string   // and this is, too
	form  *regexp.Regexp
	with  string // the replacement, if it is not all groups before "[redacted]"
}{
	{words: []string{"@"}, also: "://", form: regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/"'\x00]+@`), with: "${1}" + redacted + "@"},
	{words: []string{"horiz"}, form: regexp.MustCompile(`(?i)(["']` + authorization + `)[^\s"'\\\x00][^"'\\\x00]*`)},
	{words: []string{"horiz"}, form: assigned(authorization)},
	{words: []string{"bearer"}, form: regexp.MustCompile(`(?i)(\bbearer[\s\x00]+)[^\s"'\\\x00]+`)},
	{words: []string{"en=", "en:", `en"`, "en'", `en\`, "-token ", "_token ", "htoken ", "ntoken ", "sstoken ", "ytoken ", "ecret", "pass", "_pwd", "-pwd", "pi_key", "pi-key", "pikey"},
		form: assigned(`(?:(?:[-_](?:token|secret|pwd)|pass(?:word|wd|phrase)?|a(?:(?:ccess|uth)token|pi[-_]?key)` +
			`|se(?:(?:curity|ssion)token|cret[-_ ]?(?:access)?[-_ ]?key))\\*["']?|["']token\\*["'])(?:=>?|\s+=>?\s+|\s*:\s*)`)},
	{words: []string{"-token ", "_token ", "ntoken ", "-token: ", "_token: ", "ecret ", "t-string ", "pass ", "passwd ", "password ", "passphrase ", "key "},
		form: following(`(?:[-_]token:|(?:^|[\s"'(\x00])--?(?:[\w-]*[-_])?(?:pass(?:word|wd|phrase)?|(?:session)?token` +
			`|api[-_]?key|secret(?:-string|[-_]?(?:access[-_]?)?key)?))`)},
	{words: []string{"s_secret_access_key", "s_session_token"}, also: "set", // every SDK says "aws" in its user agent
		form: following(`\bset(?:env|x)?[\s\x00](?:[^;&|]*?[\s\x00])?[\w.-]*aws_(?:secret_access_key|session_token)`)},
	{words: []string{"mysql", "mariadb", "sshpass"}, also: " -p",
		form: regexp.MustCompile(`(` + mysql + `\x00-p|` + sshpass + `\x00-p\x00?)[^\x00]+|(` + mysql + `\s-p|` + sshpass + `\s-p\s*)` + word)},
	{words: []string{" -u", "-user", "fu ", "gu ", "iu ", "ku ", "lu ", "su ", "vu ", "-fu", "-gu", "-iu", "-ku", "-lu", "-su", "-vu", "ssu"}, also: "curl",
		form: regexp.MustCompile(`(\x00(?:` + shortUser + `|` + shortsUser + `\x00|--(?:proxy-)?user[=\x00])[^\s:/=\x00]*:)[^\x00]+` +
			`|(\s` + curlUser + `\\*"[^\s:"\\\x00]*:)[^"\\\x00]+|(\s` + curlUser + `'[^\s:'\x00]*:)[^'\x00]+|(\s` + curlUser + `[^\s:/="'\\\x00]*:)` + bare + `+`)},
	// Whoever knows the path at the endpoint of ECS gets the credentials of the task.
	{words: []string{"/credentials/"}, form: regexp.MustCompile(`(?i)(/v\d+/+credentials/+)[^\s"'\\\x00/?#&;]+`)},
	// Tokens of IMDSv2 are 56 characters of base64url, those of STS some hundred.
	{words: []string{"aqa", "iqojb3", "fwogzx", "fqogzx", "fqodyx"},
		form: regexp.MustCompile(`\bAQA[A-Za-z0-9_-]{45,}={0,2}|\b(?:IQoJb3JpZ2lu|FwoGZXIvYXdz|FQoGZXIvYXdz|FQoDYXdz)[A-Za-z0-9+/=%_-]{20,}`)},
	// A secret key is 40 characters of base64, and known by the key id beside it.
	{words: []string{"akia", "asia"}, form: regexp.MustCompile(`(\b(?:AKIA|ASIA)[A-Z0-9]{12,124}(?:[^\[]{0,64}?)[^A-Za-z0-9/+\[])[A-Za-z0-9/+]{40,}={0,2}`)},
	{words: []string{"akia", "asia"}, form: regexp.MustCompile(`(^|[^A-Za-z0-9/+])[A-Za-z0-9/+]{40,}={0,2}([^A-Za-z0-9/+=].{0,24}?\b(?:AKIA|ASIA)[A-Z0-9]{12})`), with: "${1}" + redacted + "${2}"},
	{words: []string{"eyj"}, form: regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`)},
	{words: []string{"-----begin"}, form: regexp.MustCompile(`(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?:\[redacted\]|[^\x00]*?-----END [A-Z ]*-----|[^\x00]*)`)},
}

// allGroups is the usual replacement: those that took no part are empty.
const allGroups = "${1}${2}${3}${4}${5}${6}${7}${8}${9}${10}" + redacted

// beginnings has the first three characters of every word of secrets, hashed, and alone
// the words that are one character. Most text has none of
// them, and is not searched any further. A bit for each, the set stays in the
// processor's first cache.
var beginnings, alone = func() (set [1 << 16 / 64]uint64, alone [256]bool) {
	for _, secret := range secrets {
		for _, w := range secret.words {
			if len(w) == 1 {
				alone[w[0]] = true
				continue
			}
			t := trigram(w[0], w[1], w[2])
			set[t/64] |= 1 << (t % 64)
		}
	}
	return set, alone
}()

func trigram(a, b, c byte) uint16 { return uint16(a)<<10 ^ uint16(b)<<5 ^ uint16(c) }

// fold folds case, and takes the end of an argument and all white space for a
// blank.
func fold(c byte) byte { return folds[c] }

var folds = func() (to [256]byte) {
	for c := range to {
		switch {
		case 'A' <= c && c <= 'Z':
			to[c] = byte(c) + 'a' - 'A'
		case c < ' ':
			to[c] = ' '
		default:
			to[c] = byte(c)
		}
	}
	return to
}()

// suspicious reports whether a word of secrets may begin in s.
func suspicious[text string | []byte](s text) bool {
	if len(s) < len("pass=x") {
		return false // no form is shorter
	}
	a, b := fold(s[0]), fold(s[1])
	for i := 2; i < len(s); i++ {
		c := fold(s[i])
		if t := trigram(a, b, c); beginnings[t/64]>>(t%64)&1 == 1 || alone[c] {
			return true
		}
		a, b = b, c
	}
	return false
}

// maxRedacted bounds what is searched of one text, and lastWord what is left out
// because it may be half a secret. Both are more than a document has.
const (
	maxRedacted = maxText + lastWord
	lastWord    = 1 << 10
)

// Redact replaces what looks like a secret in text that a process or client
// chose. What it returns, it would not change. Text that may have one is cut.
func Redact(s string) string {
	if !suspicious(s) {
		return s
	}
	if len(s) > maxRedacted {
		end := strings.LastIndexAny(s[maxText:maxRedacted], " \t\n\x00\"'=:,;&")
		s = s[:maxText+max(end, 0)]
	}
	// A secret that is gone may bring another one nearer to what gives it away.
	for range 4 {
		next := redact(s)
		if next == s {
			break
		}
		s = next
	}
	return s
}

func redact(s string) string {
	b := []byte(s)
	for i, c := range b {
		b[i] = fold(c)
	}
	folded := string(b)
	for _, secret := range secrets {
		if !strings.Contains(folded, secret.also) {
			continue
		}
		for _, w := range secret.words {
			if strings.Contains(folded, w) {
				with := secret.with
				if with == "" {
					with = allGroups
				}
				s = replace(s, secret.form, with)
				break
			}
		}
	}
	return s
}

// maxSecrets bounds what is replaced of one form, because a search from each of
// many beginnings to the end takes the square of the length: one command line of
// 32 KB could take more than a second. What comes behind so many is cut off.
const maxSecrets = 8

func replace(s string, form *regexp.Regexp, with string) string {
	if all := form.FindAllStringIndex(s, maxSecrets+1); len(all) > maxSecrets {
		s = s[:all[maxSecrets][0]] + redacted
	}
	return form.ReplaceAllString(s, with)
}

// RedactArgs redacts the arguments of a command. They say more together than
// each by itself, and more than with blanks between them.
func RedactArgs(args []string) []string {
	line := strings.Join(args, "\x00")
	if clean := Redact(line); clean != line {
		return strings.Split(clean, "\x00")
	}
	return args
}
