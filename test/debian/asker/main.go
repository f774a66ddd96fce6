// Asker is a workload of the booted machine: it asks the metadata service as SDKs do, with
// a new connection for each request, and says how that went.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Outcome is what it prints, as JSON.
type Outcome struct {
	Requests int           `json:"requests"`
	Failed   int           `json:"failed"`
	Error    string        `json:"error,omitempty"` // the first
	Slowest  time.Duration `json:"slowest_ns"`
	Last     time.Time     `json:"last_failure"`
	Taken    int           `json:"taken"` // how often it could bind a port of ours
}

func main() {
	endpoint := flag.String("endpoint", "169.254.169.254", "whom to ask")
	path := flag.String("path", "/latest/meta-data/instance-id", "what to ask for; with the name of the role behind it if that ends in a slash")
	lasts := flag.Duration("for", 0, "how long; 0 is once")
	rate := flag.Int("rate", 50, "requests a second")
	late := flag.Duration("late", 0, "how long after it has connected every tenth connection asks, as one does that is not run meanwhile")
	bind := flag.Bool("bind", false, "try to take the ports of the daemon meanwhile")
	flag.Parse()
	var o Outcome
	var mu sync.Mutex
	var all sync.WaitGroup
	ask := func() {
		begin := time.Now()
		err := fetch(*endpoint, *path, *late)
		took := time.Since(begin)
		mu.Lock()
		defer mu.Unlock()
		o.Requests++
		o.Slowest = max(o.Slowest, took)
		if err != nil {
			if o.Failed++; o.Failed == 1 {
				o.Error = err.Error()
			}
			o.Last = time.Now()
		}
	}
	if *bind {
		all.Go(func() {
			for end := time.Now().Add(*lasts); time.Now().Before(end); time.Sleep(time.Millisecond) {
				for _, addr := range []string{"127.0.0.1:254", "169.254.213.80:253", "[::1]:254", "[fd69:6d64:7367::80]:253"} {
					ln, err := net.Listen("tcp", addr)
					if err == nil {
						ln.Close()
						o.Taken++
					} else if !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
						fmt.Fprintln(os.Stderr, err)
						os.Exit(2)
					}
				}
			}
		})
	}
	all.Go(ask)
	tick := time.NewTicker(time.Second / time.Duration(*rate))
	for end := time.Now().Add(*lasts); time.Now().Before(end); <-tick.C {
		all.Go(ask)
	}
	all.Wait()
	json.NewEncoder(os.Stdout).Encode(o)
	if o.Failed > 0 {
		os.Exit(1)
	}
}

var connections atomic.Int64

// fetch asks with a session token. Each request has a connection of its own.
func fetch(endpoint, path string, late time.Duration) error {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, address)
			if connections.Add(1)%10 == 0 {
				time.Sleep(late)
			}
			return c, err
		}}}
	token, err := ask(client, http.MethodPut, "http://"+endpoint+"/latest/api/token", "")
	if err != nil {
		return err
	}
	body, err := ask(client, http.MethodGet, "http://"+endpoint+path, token)
	if err == nil && path[len(path)-1] == '/' {
		_, err = ask(client, http.MethodGet, "http://"+endpoint+path+body, token)
	}
	return err
}

func ask(client *http.Client, method, url, token string) (string, error) {
	r, err := http.NewRequestWithContext(context.Background(), method, url, nil)
	if err != nil {
		return "", err
	}
	if r.Header.Set("X-aws-ec2-metadata-token-ttl-seconds", "60"); token != "" {
		r.Header = http.Header{"X-Aws-Ec2-Metadata-Token": {token}}
	}
	answer, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s", method, url, answer.Status)
	}
	return string(body), err
}
