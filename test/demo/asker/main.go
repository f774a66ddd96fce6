// Command asker asks the metadata service for one path and prints the status
// and the size of the answer, never the answer. The demo runs it under various
// names, as programs that are neither AWS's nor a shell's.
package main

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	path := flag.String("path", "/latest/meta-data/iam/security-credentials/", "what to ask for")
	header := flag.String("header", "", "a header to send, `Name: value`")
	v1 := flag.Bool("v1", false, "without a session token")
	flag.Parse()
	if err := ask(*path, *header, *v1); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func ask(path, header string, v1 bool) error {
	// The address is put together here, so that it is in nobody's arguments.
	base := "http://" + strings.Join([]string{"169", "254", "169", "254"}, ".")
	client := http.Client{Timeout: 5 * time.Second}
	token := ""
	if !v1 {
		req, err := http.NewRequest(http.MethodPut, base+"/latest/api/token", nil)
		if err != nil {
			return err
		}
		req.Header.Set("X-aws-ec2-metadata-token-ttl-seconds", "60")
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		token = string(b)
	}
	req, err := http.NewRequest(http.MethodGet, base+path, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("X-aws-ec2-metadata-token", token)
	}
	if name, value, ok := strings.Cut(header, ": "); ok {
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil {
		return err
	}
	fmt.Printf("%d, %d bytes\n", resp.StatusCode, n)
	return nil
}
