package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// crawl asks for everything that listings lead to, as cloud-init and facter do at every boot.
const crawl = `walk() {
	curl -s -g -H "X-aws-ec2-metadata-token: $0" "http://169.254.169.254$1" | while read -r name || test -n "$name"; do
		case $1$name in
		*/) walk "$1$name" ;;
		*public-keys/0=*) walk "${1}0/" ;;
		*/ | *security-credentials*) ;;
		*) curl -s -g -o /dev/null -w '%{http_code}\n' -H "X-aws-ec2-metadata-token: $0" "http://169.254.169.254$1$name" ;;
		esac
	done
}
walk /latest/meta-data/ && walk /latest/dynamic/instance-identity/`

// Who goes through a list of words is told from who goes through the listings of the service, as a process and as many;
// and who gets himself dozens of tokens from who gets one.
func TestSearching(t *testing.T) {
	t.Parallel()
	const searched, hoarded = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a10", "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a11"
	h := start(t, netlab.Options{}, "mode: enforce\n")
	matched := func(rule string) (decisions, alerts int) {
		t.Helper()
		docs, err := h.Documents()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range docs {
			all, _ := d.At("imdsgate.matched").([]any)
			if slices.Contains(all, any(rule)) {
				decisions++
			}
			if d.At("event.kind") == "alert" && d.At("rule.id") == rule {
				alerts++
			}
		}
		return decisions, alerts
	}
	ask := func(script string, args ...string) string {
		t.Helper()
		out, _ := h.run(client{uid: ordinaryUser, args: append([]string{"sh", "-c", script}, args...)})
		return out
	}

	for range 2 {
		if out := ask(crawl, h.token()); strings.Count(out, "200") < 60 {
			t.Fatalf("the crawler got\n%s", out)
		}
	}
	h.curl(client{uid: ordinaryUser}, "/latest/last")
	h.decided("/latest/last", "curl")
	if decisions, alerts := matched(searched); decisions+alerts != 0 {
		t.Errorf("a crawler: %d decisions, %d alerts", decisions, alerts)
	}

	// One process, and one for each word. Their shells are two parents.
	ask(`curl -s "http://169.254.169.254/latest/meta-data/word-[1-20]"; exit`)
	ask(`for i in $(seq 21 40); do curl -s "http://169.254.169.254/latest/meta-data/word-$i"; done; exit`)
	d := h.decided("/latest/meta-data/word-40", "curl")
	if all := fmt.Sprint(d.At("imdsgate.matched")); !strings.Contains(all, searched) || d.At("imdsgate.verdict") != "allow" {
		t.Errorf("%v", d)
	}
	if _, err := h.Await("the search", func(d gate.Document) bool {
		return d.At("rule.id") == searched && d.At("url.path") == "/latest/meta-data/word-40" && d.At("event.kind") == "alert"
	}); err != nil {
		t.Error(err)
	}
	if decisions, alerts := matched(searched); decisions != 12 || alerts != 12 {
		t.Errorf("word lists: %d decisions, %d alerts", decisions, alerts)
	}

	token := " http://169.254.169.254/latest/api/token"
	ask(`curl -s -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60"` + strings.Repeat(token, 32) + "; exit")
	h.curl(client{uid: ordinaryUser}, "/latest/end")
	h.decided("/latest/end", "curl")
	if decisions, alerts := matched(hoarded); decisions != 3 || alerts != 0 {
		t.Errorf("tokens: %d decisions, %d alerts", decisions, alerts)
	}
}
