package event

import (
	"slices"
	"strings"
	"testing"
)

const token = "AQAEAExampleExampleExampleExampleExampleExampleExamples=="

// key is no secret key, but as long as one.
const key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"

const tail = " http://169.254.169.254/latest/api/token"

func TestRedaction(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"curl -H X-aws-ec2-metadata-token: " + token + " http://169.254.169.254/", "curl -H X-aws-ec2-metadata-token: [redacted] http://169.254.169.254/"},
		{"X-AWS-EC2-Metadata-Token=secret123", "X-AWS-EC2-Metadata-Token=[redacted]"},
		{"TOKEN " + token + " end", "TOKEN [redacted] end"},
		{"AWS_SECRET_ACCESS_KEY=abcdefgh aws s3 ls", "AWS_SECRET_ACCESS_KEY=[redacted] aws s3 ls"},
		{"export AWS_SECRET_ACCESS_KEY=abcdefgh; aws s3 ls", "export AWS_SECRET_ACCESS_KEY=[redacted]; aws s3 ls"},
		{"setenv AWS_SECRET_ACCESS_KEY abcdefgh", "setenv AWS_SECRET_ACCESS_KEY [redacted]"},
		{"AWS_SESSION_TOKEN=abcdefgh", "AWS_SESSION_TOKEN=[redacted]"},
		{"PGPASSWORD=x psql -h db", "PGPASSWORD=[redacted] psql -h db"},
		{"PGPASSWORD='a b' psql -h db", "PGPASSWORD='[redacted]' psql -h db"},
		{`password='a b' x`, `password='[redacted]' x`},
		{`password = "a \"b c" x`, `password = "[redacted]" x`},
		{`PASSWORD=a\ b x`, `PASSWORD=[redacted] x`},
		{"[default]\naws_session_token   = abcdefgh\nregion = x", "[default]\naws_session_token   = [redacted]\nregion = x"},
		{`{"SecretAccessKey": "abcdefgh"}`, `{"SecretAccessKey": "[redacted]"}`},
		{`{"AccessKeyId":"AKIAEXAMPLEFAKE00001","SecretAccessKey":"X Y","Token":"Z"}`, `{"AccessKeyId":"AKIAEXAMPLEFAKE00001","SecretAccessKey":"[redacted]","Token":"[redacted]"}`},
		{`echo "{\"SecretAccessKey\":\"X Y\",\"Token\": \"Z\"}" > f`, `echo "{\"SecretAccessKey\":\"[redacted]\",\"Token\": \"[redacted]\"}" > f`},
		{`echo "{\"SecretAccessKey\":\"X \\\"Y\"}" > f`, `echo "{\"SecretAccessKey\":\"[redacted]\"}" > f`},
		{`sh -c "echo \"{\\\"SecretAccessKey\\\":\\\"X Y\\\"}\" > f"`, `sh -c "echo \"{\\\"SecretAccessKey\\\":\\\"[redacted]\\\"}\" > f"`},
		{`bash -c "aws configure set aws_secret_access_key X" && ls`, `bash -c "aws configure set aws_secret_access_key [redacted]" && ls`},
		{`aws configure set --profile p default.aws_session_token 'X' && ls`, `aws configure set --profile p default.aws_session_token '[redacted]' && ls`},
		{"mysql --password=hunter22 -h x", "mysql --password=[redacted] -h x"},
		{"mysql --password hunter22 -h x", "mysql --password [redacted] -h x"},
		{`mysql --password "hunter 22" -h x`, `mysql --password "[redacted]" -h x`},
		{`sh -c 'mysql --password='\''a b'\'' -h x'`, `sh -c 'mysql --password='\''[redacted]'\'' -h x'`},
		{"mysql -u root -phunter22 -h x", "mysql -u root -p[redacted] -h x"},
		{"mysqldump '-h' x -p'hunter 22' db", "mysqldump '-h' x -p'[redacted]' db"},
		{"sshpass -p hunter22 ssh h", "sshpass -p [redacted] ssh h"},
		{"sshpass -phunter22 ssh h; mysql -phunter22", "sshpass -p[redacted] ssh h; mysql -p[redacted]"},
		{"SSHPASS=hunter22 sshpass -e ssh h", "SSHPASS=[redacted] sshpass -e ssh h"},
		{"tool --db-token hunter22", "tool --db-token [redacted]"},
		{"tool --secret -hunter22hunter22", "tool --secret [redacted]"},
		{"openssl rsa -passin pass:hunter22", "openssl rsa -passin pass:[redacted]"},
		{"curl -H 'Authorization: Bearer abc.def'", "curl -H 'Authorization: Bearer [redacted]'"},
		{"curl -H 'Authorization: Basic abc' x", "curl -H 'Authorization: Basic [redacted]' x"},
		{"curl -H Authorization: Basic abc x", "curl -H Authorization: Basic [redacted] x"},
		{`curl -H "Authorization: Custom a b c" x`, `curl -H "Authorization: [redacted]" x`},
		{"Authorization: AWS4-HMAC-SHA256 Credential=AKIAEXAMPLEFAKE00001/20261125/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=abcdef01 x",
			"Authorization: AWS4-HMAC-SHA256 Credential=AKIAEXAMPLEFAKE00001/20261125/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=[redacted] x"},
		{"curl -u user:pw" + tail, "curl -u user:[redacted]" + tail},
		{"curl -uuser:pw" + tail, "curl -uuser:[redacted]" + tail},
		{"curl -sSuuser:pw" + tail, "curl -sSuuser:[redacted]" + tail},
		{"curl -fsSLku user:pw" + tail, "curl -fsSLku user:[redacted]" + tail},
		{"curl -sSu 'user:p w'" + tail, "curl -sSu 'user:[redacted]'" + tail},
		{"curl --user user:pw" + tail, "curl --user user:[redacted]" + tail},
		{`curl --user="user:p w"` + tail, `curl --user="user:[redacted]"` + tail},
		{`bash -c "curl -u \"user:p w\"` + tail + `"`, `bash -c "curl -u \"user:[redacted]\"` + tail + `"`},
		{"git clone https://user:pass@example.com/x", "git clone https://[redacted]@example.com/x"},
		{"git clone https://user:p@ss@example.com/x", "git clone https://[redacted]@example.com/x"},
		{"jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefgh", "jwt [redacted]"},
		{"curl 169.254.170.2/v2/credentials/2d8c2a5e-6c0e-4d5e-8d3c-0123456789ab -o x", "curl 169.254.170.2/v2/credentials/[redacted] -o x"},
		{"/V2//Credentials//2d8c2a5e/x", "/V2//Credentials//[redacted]/x"},
		{"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- x", "-----BEGIN RSA PRIVATE KEY-----[redacted] x"},
		{"AKIAEXAMPLEFAKE00001:" + key, "AKIAEXAMPLEFAKE00001:[redacted]"},
		{"tool --id ASIAEXAMPLEFAKE00001 --sk " + key + " x", "tool --id ASIAEXAMPLEFAKE00001 --sk [redacted] x"},
		{"tool " + key + " ASIAEXAMPLEFAKE00001 x", "tool [redacted] ASIAEXAMPLEFAKE00001 x"},
	} {
		if got := Redact(test.in); got != test.want {
			t.Errorf("%q:\n got %q\nwant %q", test.in, got, test.want)
		}
		if got := Redact(Redact(test.in)); got != Redact(test.in) {
			t.Errorf("%q: redacting again changes it to %q", test.in, got)
		}
	}
}

// What an analyst has to read.
func TestNotRedacted(t *testing.T) {
	for _, s := range []string{
		"curl http://169.254.169.254/latest/api/token",
		"curl -X PUT http://169.254.169.254/latest/api/token -H X-aws-ec2-metadata-token-ttl-seconds: 21600",
		`bash -c TOKEN=$(curl -X PUT "http://169.254.169.254/latest/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 21600")`,
		"curl -s http://169.254.169.254/latest/meta-data/iam/security-credentials/role",
		"curl http://169.254.170.2/v4/0f0e/task",
		"curl 169.254.170.2/v2/credentials/",
		"cat /srv/credentials/x",
		"curl -s --url=http://169.254.169.254/ --user-agent curl:x",
		"tool --token-ttl 21600",
		"/usr/bin/python3 -m token",
		"grep -r password .",
		"grep -ri password= /etc",
		`sh -c 'grep -ri "password=" /etc'`,
		`sh -c 'read -p "Password: " x; curl http://169.254.169.254/'`,
		"grep aws_secret_access_key /root/.aws/credentials",
		"aws configure get aws_secret_access_key",
		"aws configure set aws_access_key_id AKIAEXAMPLEFAKE00001",
		"AWS_ACCESS_KEY_ID=ASIAEXAMPLEFAKE00001 aws sts get-caller-identity",
		"aws secretsmanager get-secret-value --secret-id arn:aws:secretsmanager:us-east-1:123456789012:secret:prod/db-AbCdEf",
		"aws ec2 modify-instance-metadata-options --http-tokens required --instance-id i-0123456789abcdef0",
		"psql --no-password --host db",
		"mysql -u root -p -h x -P3306",
		"socat -u FILE:/x TCP:h:80",
		"find / -name id_rsa -o -iname *password*",
		"ssh -o PasswordAuthentication=no h",
		"docker run -p 8080:80 -u root nginx",
		"mkdir -p /var/lib/x && ssh -p2222 h",
		"sudo -u postgres psql",
		"passwd root",
		"cat /etc/passwd /etc/shadow",
		"git push -u origin main",
		"git show 0123456789abcdef0123456789abcdef01234567",
		"java -Djava.security.auth.login.config=/etc/x -jar app.jar",
		"kubectl create secret generic x",
		"/usr/bin/authorization-agent --config /etc/a.conf",
		"https://example.com/a?b=c",
	} {
		if got := Redact(s); got != s {
			t.Errorf("%q is now %q", s, got)
		}
		if args := strings.Fields(s); !slices.Equal(RedactArgs(args), args) {
			t.Errorf("%q are now %q", args, RedactArgs(args))
		}
	}
}

func TestRedactArgs(t *testing.T) {
	for _, test := range []struct{ in, want []string }{
		{[]string{"mysql", "--password", "a b c", "-h", "x"}, []string{"mysql", "--password", "[redacted]", "-h", "x"}},
		{[]string{"mysql", "--password=a b c", "-h", "x"}, []string{"mysql", "--password=[redacted]", "-h", "x"}},
		{[]string{"mysql", "-pa b", "-h", "x"}, []string{"mysql", "-p[redacted]", "-h", "x"}},
		{[]string{"sshpass", "-p", "a b", "ssh", "h"}, []string{"sshpass", "-p", "[redacted]", "ssh", "h"}},
		{[]string{"env", "PGPASSWORD=a b;c", "psql", "-h", "db"}, []string{"env", "PGPASSWORD=[redacted]", "psql", "-h", "db"}},
		{[]string{"bash", "-c", "PGPASSWORD=a psql -h db"}, []string{"bash", "-c", "PGPASSWORD=[redacted] psql -h db"}},
		{[]string{"bash", "-lc", "export AWS_SECRET_ACCESS_KEY=a; aws s3 ls"}, []string{"bash", "-lc", "export AWS_SECRET_ACCESS_KEY=[redacted]; aws s3 ls"}},
		{[]string{"aws", "configure", "set", "aws_secret_access_key", "a b", "--profile", "p"}, []string{"aws", "configure", "set", "aws_secret_access_key", "[redacted]", "--profile", "p"}},
		{[]string{"aws", "configure", "set", "default.aws_session_token", "a"}, []string{"aws", "configure", "set", "default.aws_session_token", "[redacted]"}},
		{[]string{"bash", "-c", "aws configure set aws_secret_access_key a && ls"}, []string{"bash", "-c", "aws configure set aws_secret_access_key [redacted] && ls"}},
		{[]string{"curl", "-H", "X-aws-ec2-metadata-token: a b", "x"}, []string{"curl", "-H", "X-aws-ec2-metadata-token: [redacted]", "x"}},
		{[]string{"curl", "-H", "X-aws-ec2-metadata-token:", "a", "x"}, []string{"curl", "-H", "X-aws-ec2-metadata-token:", "[redacted]", "x"}},
		{[]string{"curl", "--header=X-aws-ec2-metadata-token: a", "x"}, []string{"curl", "--header=X-aws-ec2-metadata-token: [redacted]", "x"}},
		{[]string{"curl", "-HAuthorization: Custom a b", "x"}, []string{"curl", "-HAuthorization: [redacted]", "x"}},
		{[]string{"curl", "-H", "Authorization: Basic a", "x"}, []string{"curl", "-H", "Authorization: Basic [redacted]", "x"}},
		{[]string{"curl", "-H", "Authorization:", "Basic", "a", "x"}, []string{"curl", "-H", "Authorization:", "Basic", "[redacted]", "x"}},
		{[]string{"curl", "-u", "user:p w", "x"}, []string{"curl", "-u", "user:[redacted]", "x"}},
		{[]string{"curl", "-uuser:p w", "x"}, []string{"curl", "-uuser:[redacted]", "x"}},
		{[]string{"curl", "-sSLu", "user:p w", "x"}, []string{"curl", "-sSLu", "user:[redacted]", "x"}},
		{[]string{"curl", "--user=user:p w", "x"}, []string{"curl", "--user=user:[redacted]", "x"}},
		{[]string{"tool", "--token", "-x", "y"}, []string{"tool", "--token", "-x", "y"}},
		{[]string{"tool", "AKIAEXAMPLEFAKE00001", key, "y"}, []string{"tool", "AKIAEXAMPLEFAKE00001", "[redacted]", "y"}},
		{[]string{"tool", "-----BEGIN PRIVATE KEY-----\nMIIE", "y"}, []string{"tool", "-----BEGIN PRIVATE KEY-----[redacted]", "y"}},
	} {
		given := slices.Clone(test.in)
		if got := RedactArgs(given); !slices.Equal(got, test.want) || !slices.Equal(given, test.in) {
			t.Errorf("%q:\n got %q\nwant %q", test.in, got, test.want)
		}
		if got := RedactArgs(test.want); !slices.Equal(got, test.want) {
			t.Errorf("%q: redacting again changes it to %q", test.want, got)
		}
	}
}

// Where a secret may stand, for §. Those with a bar are arguments, and § may
// be any text there.
var forms = []string{
	"aws configure set aws_secret_access_key § x", `bash -c "aws configure set aws_session_token §"`,
	`{"SecretAccessKey":"§"}`, `{\"SecretAccessKey\":\"§\"}`, `{\\\"SecretAccessKey\\\":\\\"§\\\"}`, `{"Token" : "§"}`,
	"curl -u user:§ x", "curl -uuser:§ x", "curl --user user:§ x", "curl --user=user:§ x", "curl -u 'user:§ §' x",
	"curl -H 'Authorization: Basic §' x", "curl -H Authorization: Basic § x", "curl -H 'X-aws-ec2-metadata-token: §' x",
	`tool --password "§ § §" x`, "password='§ §' x", "export AWS_SECRET_ACCESS_KEY=§; x", "AWS_SESSION_TOKEN=§ x", "mysql -p§ x",
	"sshpass -p § x", "PGPASSWORD=§ x", "https://user:§@example.com/",
	"aws|configure|set|aws_secret_access_key|§|x", "curl|-u|user:§|x", "curl|-uuser:§|x", "curl|--user=user:§|x",
	"curl|-H|Authorization: Basic §|x", "curl|-H|X-aws-ec2-metadata-token: §|x", "curl|--header=X-aws-ec2-metadata-token: §|x",
	"curl|-H|X-aws-ec2-metadata-token:|§|x", "tool|--password|§|x", "tool|--password=§|x", "mysql|-p§|x", "sshpass|-p|§|x", "env|PGPASSWORD=§|x",
}

func FuzzRedact(f *testing.F) {
	for _, s := range []string{"hunter22", "a b", `p"'\;&`, "x --password y", token, "-----BEGIN PRIVATE KEY-----x-----END PRIVATE KEY-----", "\x00-c\x00PASSWORD=x"} {
		f.Add(s, s)
	}
	for _, form := range forms {
		f.Add(form, "hunter22")
	}
	f.Fuzz(func(t *testing.T, text, secret string) {
		once := Redact(text)
		if again := Redact(once); again != once {
			t.Errorf("%q is redacted to %q, and that to %q", text, once, again)
		}
		if strings.Count(once, "\x00") != strings.Count(text, "\x00") {
			t.Errorf("%q is redacted to %q, which has other arguments", text, once)
		}
		// Not found by chance in what is left, and a word of any shell.
		word := "Zq0" + strings.Map(func(r rune) rune {
			if 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("+/=_.-!%^*~$(){}[],:?", r) {
				return r
			}
			return -1
		}, secret)
		any := "Zq0" + strings.ReplaceAll(secret, "\x00", "")
		for _, form := range forms {
			s, got := word, ""
			if args := strings.Split(form, "|"); len(args) > 1 {
				s = any
				for i := range args {
					args[i] = strings.ReplaceAll(args[i], "§", s)
				}
				got = strings.Join(RedactArgs(args), "|")
			} else {
				if strings.Contains(form, "://") {
					s = strings.ReplaceAll(s, "/", "") // ends the authority
				}
				got = Redact(strings.ReplaceAll(form, "§", s))
			}
			if strings.Contains(got, "Zq0") {
				t.Errorf("%q in %q leaves %q", s, form, got)
			}
		}
	})
}

func BenchmarkRedact(b *testing.B) {
	for _, bench := range []struct{ name, text string }{
		{"plain", "/usr/bin/python3 /opt/app/bin/worker --queue default --verbose --log-level info --concurrency 8"},
		{"curl", "curl -s -X PUT http://169.254.169.254/latest/api/token"},
		{"token", "curl -H X-aws-ec2-metadata-token: " + token + " http://169.254.169.254/latest/meta-data/iam/security-credentials/"},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Redact(bench.text)
			}
		})
	}
}

// The most that one command line may cost: as long as any, and made of what takes
// long to search.
func TestRedactIsBounded(t *testing.T) {
	for _, unit := range []string{"curl -u mysql -p sshpass -p ", "set aws_secret_access_key x ", "--password hunter2 "} {
		for _, args := range [][]string{{"sh", "-c", strings.Repeat(unit, 32<<10/len(unit))}, strings.Fields(strings.Repeat(unit, 32<<10/len(unit)))} {
			clean := strings.Join(RedactArgs(args), " ")
			if len(clean) > maxRedacted || strings.Count(clean, redacted) > 64 || strings.Contains(clean, "hunter2") {
				t.Errorf("%d bytes, %d secrets: %.200s", len(clean), strings.Count(clean, redacted), clean)
			}
		}
	}
}

func BenchmarkRedactWorst(b *testing.B) {
	const unit = "curl -u mysql -p sshpass -p "
	args := []string{"sh", "-c", strings.Repeat(unit, 32<<10/len(unit))}
	b.ReportAllocs()
	for b.Loop() {
		RedactArgs(args)
	}
}
