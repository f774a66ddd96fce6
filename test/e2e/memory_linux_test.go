package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"github.com/prometheus/procfs"
)

// inMemory reports which of the texts the memory of a process has, as root reads it.
func inMemory(t *testing.T, pid int, texts map[string]string) (found []string) {
	t.Helper()
	p, err := procfs.NewProc(pid)
	if err != nil {
		t.Fatal(err)
	}
	maps, err := p.ProcMaps()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for _, m := range maps {
		b := make([]byte, m.EndAddr-m.StartAddr)
		n, _ := mem.ReadAt(b, int64(m.StartAddr)) // guard pages and the vvar cannot be read
		for name, text := range texts {
			if bytes.Contains(b[:n], []byte(text)) && !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	slices.Sort(found)
	return found
}

// A token, credentials and user data are not in the daemon's memory when they have passed, also while the connection is
// kept. What is recorded on purpose is.
func TestMemory(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}}, "mode: audit\n")
	conn, err := h.dial("169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	ask := func(method, path, header string) string {
		t.Helper()
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\n%s\r\n\r\n", method, path, header)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, resp.Status, err)
		}
		return string(b)
	}
	token := ask("PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 600")
	userData := ask("GET", "/latest/user-data", bearer+token)
	var c struct{ AccessKeyID, SecretAccessKey, Token string }
	if err := json.Unmarshal([]byte(ask("GET", role, bearer+token)), &c); err != nil {
		t.Fatal(err)
	}
	if len(userData) < 8 || len(c.SecretAccessKey) < 8 || len(c.Token) < 8 {
		t.Fatal("the service has no secrets: the test tests nothing")
	}
	texts := map[string]string{"session token": token, "user data": userData, "secret key": c.SecretAccessKey, "security token": c.Token, "key ID": c.AccessKeyID}
	var found []string
	gone := func() bool {
		for range 20 {
			if found = inMemory(t, h.PID(), texts); slices.Equal(found, []string{"key ID"}) {
				return true
			}
			time.Sleep(100 * time.Millisecond)
		}
		return false
	}
	if !gone() {
		t.Errorf("while the connection is kept, the daemon's memory has %v", found)
	}
	conn.Close()
	if !gone() {
		t.Errorf("after the connection, the daemon's memory has %v", found)
	}
}
