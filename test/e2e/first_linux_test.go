package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// In audit mode a request goes to the service before it is known who asks. Who becomes
// another program meanwhile, or passes the connection on, is recorded all the same: the
// kernel has kept who called connect. Who closes it gets no answer, and is recorded as
// nobody who is known.
func TestRecordedThoughGone(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: audit\n")
	const tries = 8
	ways := map[string]string{
		"leaves":  `exec 3<>/dev/tcp/169.254.169.254/80; printf '%s' >&3`,
		"becomes": `exec 3<>/dev/tcp/169.254.169.254/80; printf '%s' >&3; exec sleep 0.1`,
		"passes":  `exec 3<>/dev/tcp/169.254.169.254/80; printf '%s' >&3; sleep 0.1 & exec 3>&-`,
		"child":   `exec 3<>/dev/tcp/169.254.169.254/80; (printf '%s' >&3); exec sleep 0.1`,
	}
	for way, script := range ways {
		request := fmt.Sprintf(`GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: %s\r\n\r\n`, role, way)
		for range tries {
			h.run(client{uid: ordinaryUser, args: []string{"bash", "-c", fmt.Sprintf(script, request)}})
		}
	}
	var denied, named map[any]int
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		docs, err := h.Documents()
		if err != nil {
			t.Fatal(err)
		}
		denied, named = map[any]int{}, map[any]int{}
		all := 0
		for _, d := range docs {
			if d.At("data_stream.dataset") != "imdsgate.decision" || d.At("imdsgate.audit_verdict") != "deny" {
				continue
			}
			all++
			way := d.At("user_agent.original")
			denied[way]++
			if subjects, _ := d.At("imdsgate.subjects.executable").([]any); slices.ContainsFunc(subjects, func(s any) bool { return strings.HasSuffix(fmt.Sprint(s), "/bash") }) ||
				way == "leaves" && d.At("imdsgate.attribution.reason") == "client_gone" {
				named[way]++
			}
		}
		if all == tries*len(ways) {
			break
		}
	}
	for way := range ways {
		if denied[way] != tries || named[way] != tries {
			t.Errorf("%s: %d of %d would have been denied, %d of them bash", way, denied[way], tries, named[way])
		}
	}
}
