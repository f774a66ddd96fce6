package main

import (
	"strings"
	"testing"
)

// What is missing is a place for the archive, and not the permission to ask.
func TestSupportElsewhere(t *testing.T) {
	out, code := imdsgate("support", "--output", "/sys/support.tar.gz") // where not even root can make a file
	if code != exitTrouble || !strings.Contains(out, "--output names another place") || strings.Contains(out, "hint") {
		t.Errorf("%d, %s", code, out)
	}
}

// What people have typed is in the log of the daemon: why they have changed the mode, and what they had in a
// configuration that is refused.
func TestWithoutTypedText(t *testing.T) {
	const journal = `2026-11-27T02:00:00+0000 host systemd[1]: Starting imdsgated.service - Instance metadata gate...
2026-11-27T02:00:01+0000 host imdsgated[7]: {"level":"warn","mode":"off","by":"root","reason":"the \"cat\\ ate it","time":"2026"}
2026-11-27T02:00:02+0000 host imdsgated[7]: {"level":"error","error":"/etc/imdsgate/config.yaml:3: owner: Eve","message":"the new configuration is refused, the old one stays in force"}
2026-11-27T02:00:03+0000 host imdsgated[7]: {"level":"error","error":"no such device","message":"the redirect is not watched any more"}
2026-11-27T02:00:04+0000 host imdsgated[9]: imdsgated: the configuration is refused:
2026-11-27T02:00:04+0000 host imdsgated[9]: /etc/imdsgate/config.yaml:3:8: owner: Eve
2026-11-27T02:00:04+0000 host imdsgated[9]:    3 | owner: Eve
2026-11-27T02:00:05+0000 host imdsgated[10]: panic: runtime error
`
	const want = `2026-11-27T02:00:00+0000 host systemd[1]: Starting imdsgated.service - Instance metadata gate...
2026-11-27T02:00:01+0000 host imdsgated[7]: {"level":"warn","mode":"off","by":"root","reason":"[left out]","time":"2026"}
2026-11-27T02:00:02+0000 host imdsgated[7]: {"level":"error","error":"[left out]","message":"the new configuration is refused, the old one stays in force"}
2026-11-27T02:00:03+0000 host imdsgated[7]: {"level":"error","error":"no such device","message":"the redirect is not watched any more"}
2026-11-27T02:00:04+0000 host imdsgated[9]: imdsgated: the configuration is refused:
2026-11-27T02:00:04+0000 host imdsgated[9]: [left out]
2026-11-27T02:00:04+0000 host imdsgated[9]: [left out]
2026-11-27T02:00:05+0000 host imdsgated[10]: panic: runtime error
`
	if got := string(withoutTypedText([]byte(journal))); got != want {
		t.Errorf("%s", got)
	}
}
