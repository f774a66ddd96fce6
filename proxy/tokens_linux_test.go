package proxy

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// Tokens are counted for the user who made the socket, and whose they are is known
// when they are used.
func TestTokenOwners(t *testing.T) {
	const (
		put  = "PUT /latest/api/token HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
		with = "GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "X-aws-ec2-metadata-token: "
	)
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, setting{policy: policy.Config{Mode: mode}, lab: netlab.Options{IMDS: emulator()}})
			as := func(uid uint32, request string) string {
				t.Helper()
				cmd := exec.Command("bash", "-c", `exec 3<>/dev/tcp/169.254.169.254/80; printf %s "$1" >&3; cat <&3`, "bash", request)
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
				out, err := cmd.Output()
				_, body, _ := strings.Cut(string(out), "\r\n\r\n")
				if err != nil || body == "" {
					t.Fatalf("%q, %v", out, err)
				}
				return body
			}
			as(4321, put)
			as(33, put)
			token := as(4321, put)
			r.recorded(3)
			for uid, want := range map[uint32]int{4321: 2, 33: 1} {
				if q := r.proxy.tokens.known.owners[0][owner{known: true, uid: uid}]; q == nil || q.Len() != want {
					t.Errorf("uid %d: %v, want %d", uid, q, want)
				}
			}
			found := r.proxy.tokens.find([]byte(token))
			if len(found.Issuers) == 0 || found.Issuers[0].UserID != "4321" || found.Expires.Sub(found.Issued) != time.Minute {
				t.Errorf("%+v", found)
			}
			for i, uid := range []uint32{4321, 33} {
				as(uid, with+token+"\r\n\r\n")
				ev := r.recorded(4 + i)[3+i]
				if len(ev.Subjects) == 0 || len(ev.Token.Issuers) == 0 || ev.Token.Foreign(ev.Subjects[0]) != (uid == 33) {
					t.Errorf("used by uid %d: %+v", uid, ev.Token)
				}
			}
		})
	}
}
