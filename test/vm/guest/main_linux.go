// Guest is the test's part inside the machine. "guest commands" runs those that come by a
// virtio port; "guest metadata" makes the machine an EC2 instance.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// Port is that of the machine by which commands come.
const Port = "/dev/virtio-ports/imdsgate"

// Command is one to run, and Result what came of it. They are JSON values in a stream, results
// in the order in which commands end.
type (
	Command struct {
		ID   int
		Args []string
		Env  []string
	}
	Result struct {
		ID     int
		Output []byte // standard output and error
		Code   int
	}
)

func main() {
	err := errors.New("usage: guest commands | metadata")
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "commands":
			err = commands()
		case "metadata":
			err = metadata()
		}
	}
	fmt.Fprintln(os.Stderr, "guest:", err)
	os.Exit(1)
}

func commands() error {
	port, err := os.OpenFile(Port, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	var mu sync.Mutex // one result at a time
	results := json.NewEncoder(port)
	for in := json.NewDecoder(attached{port}); ; {
		var c Command
		if err := in.Decode(&c); err != nil {
			return err
		}
		go func() {
			r := run(c)
			mu.Lock()
			defer mu.Unlock()
			results.Encode(r)
		}()
	}
}

// attached waits where the port says that nobody is at its other end.
type attached struct{ io.Reader }

func (a attached) Read(b []byte) (int, error) {
	for {
		n, err := a.Reader.Read(b)
		if n > 0 || err != io.EOF {
			return n, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func run(c Command) Result {
	var out bytes.Buffer
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return Result{ID: c.ID, Output: []byte(err.Error()), Code: 127}
	}
	return Result{ID: c.ID, Output: out.Bytes(), Code: cmd.ProcessState.ExitCode()}
}

// metadata does not return: the network namespace of the machine is the instance.
func metadata() error {
	if _, err := netlab.New(netlab.Options{Here: true}); err != nil {
		return err
	}
	ready, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		return err
	}
	if _, err := io.WriteString(ready, "READY=1"); err != nil {
		return err
	}
	select {}
}
