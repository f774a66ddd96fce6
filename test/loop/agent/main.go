// Agent is a service that lives long, and has a hole.
//
// For each line "fetch" on standard input it asks for credentials with a session token and
// prints the status that it got. What follows "check " is run by a shell, as services do that
// take the name of a host or of a file from somebody and have not looked at it.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"
)

const service = "http://169.254.169.254/latest/"

func main() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		command, rest, _ := strings.Cut(lines.Text(), " ")
		switch command {
		case "fetch":
			fmt.Println(fetch())
		case "check":
			if err := exec.Command("/bin/sh", "-c", "exec "+rest).Start(); err != nil {
				fmt.Println(err)
			}
		}
	}
}

// fetch is the status of the last of three requests.
func fetch() string {
	token, status := ask(http.MethodPut, "api/token", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
	if status != "200" {
		return status
	}
	const roles = "meta-data/iam/security-credentials/"
	role, status := ask(http.MethodGet, roles, "X-Aws-Ec2-Metadata-Token", token)
	if status != "200" {
		return status
	}
	_, status = ask(http.MethodGet, roles+role, "X-Aws-Ec2-Metadata-Token", token)
	return status
}

func ask(method, path, header, value string) (body, status string) {
	req, err := http.NewRequest(method, service+path, nil)
	if err != nil {
		return "", err.Error()
	}
	req.Header.Set(header, value)
	client := http.Client{Timeout: 3 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		return "", err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err.Error()
	}
	return string(b), fmt.Sprint(resp.StatusCode)
}
