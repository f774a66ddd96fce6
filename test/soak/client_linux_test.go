package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"
)

const (
	asClient = "IMDSGATE_SOAK_CLIENT"
	user     = 4321
	path     = "meta-data/soak/"
	service  = "http://169.254.169.254"
	patience = 5 * time.Second
	// perSecond is the sum of the askers' rates.
	perSecond = 50
)

func answer(i int) string { return "answer " + strconv.Itoa(i) }

// askers are the clients, each a process of its own, of a user of its own.
var askers = []struct {
	name string
	rate int // requests a second
	ask  func(*asker) error
}{
	{"new connections", 14, (*asker).once},
	{"new connections, too", 14, (*asker).once},
	{"one connection", 12, (*asker).kept},
	{"programs", 8, (*asker).program},
	{"a thief", 2, (*asker).steal},
}

func TestMain(m *testing.M) {
	if os.Getenv(asClient) != "" {
		if err := client(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// client asks until its standard input is closed, and says how that went.
func client(args []string) error {
	i, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	over := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(over)
	}()
	a := &asker{id: i, one: &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}},
		keeps: &http.Client{Timeout: patience, Transport: &http.Transport{}}}
	tick := time.NewTicker(time.Second / time.Duration(askers[i].rate))
	var all sync.WaitGroup
	var mu sync.Mutex
	o := outcome{Failures: []failure{}}
	for {
		select {
		case <-over:
			all.Wait()
			return json.NewEncoder(os.Stdout).Encode(o)
		case <-tick.C:
		}
		all.Go(func() {
			begin := time.Now()
			err := askers[i].ask(a)
			end := time.Now()
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				o.Right++
				return
			}
			o.Failures = append(o.Failures, failure{begin, end, err.Error(), errors.As(err, new(wrong))})
		})
	}
}

// wrong is an answer that should not have come.
type wrong string

func (w wrong) Error() string { return "a wrong answer: " + string(w) }

// asker is one client.
type asker struct {
	id         int
	one, keeps *http.Client

	mu      sync.Mutex // guards the following
	token   string
	expires time.Time
}

// fetch asks with a session token, as SDKs do.
func (a *asker) fetch(client *http.Client) error {
	a.mu.Lock()
	if time.Now().After(a.expires) {
		token, code, err := ask(client, http.MethodPut, "api/token", "")
		if err == nil && code != http.StatusOK {
			err = wrong(fmt.Sprintf("%d for a token", code))
		}
		if err != nil {
			a.mu.Unlock()
			return err
		}
		a.token, a.expires = token, time.Now().Add(30*time.Second)
	}
	token := a.token
	a.mu.Unlock()
	body, code, err := ask(client, http.MethodGet, path+strconv.Itoa(a.id), token)
	if err == nil && (code != http.StatusOK || body != answer(a.id)) {
		err = wrong(fmt.Sprintf("%d %q", code, body))
	}
	return err
}

func (a *asker) once() error { return a.fetch(a.one) }
func (a *asker) kept() error { return a.fetch(a.keeps) }

// program asks from a process that begins and ends with it.
func (a *asker) program() error {
	out, err := curl(service + "/latest/" + path + strconv.Itoa(a.id))
	if err == nil && out != answer(a.id)+" 200" {
		err = wrong(out)
	}
	return err
}

// steal asks for what it must not have.
func (a *asker) steal() error {
	out, err := curl(service + "/latest/meta-data/iam/security-credentials/imdsgate-lab-role")
	if err == nil && out != " 403" {
		err = wrong("the credentials") // of which nothing is said
	}
	return err
}

func curl(url string) (string, error) {
	out, err := exec.Command("curl", "-s", "-S", "-m", strconv.Itoa(int(patience.Seconds())), "-w", " %{http_code}", url).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return string(out), err
}

func ask(client *http.Client, method, path, token string) (body string, code int, err error) {
	r, err := http.NewRequestWithContext(context.Background(), method, service+"/latest/"+path, nil)
	if err != nil {
		return "", 0, err
	}
	if token == "" {
		r.Header.Set("X-aws-ec2-metadata-token-ttl-seconds", "60")
	} else {
		r.Header.Set("X-aws-ec2-metadata-token", token)
	}
	resp, err := client.Do(r)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.StatusCode, err
}
