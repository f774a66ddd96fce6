package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal opens a pseudo-terminal.
func terminal(t *testing.T) (controller, terminal *os.File) {
	t.Helper()
	controller, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { controller.Close() })
	fd := int(controller.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return controller, terminal
}

// A search that takes long says on a terminal how far it is, and takes that away for a
// match and at the end.
func TestEQLProgress(t *testing.T) {
	controller, tty := terminal(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stdin
	os.Stdin = r
	defer func() { os.Stdin = was }()
	go func() {
		fmt.Fprintln(w, execCurl)
		time.Sleep(2500 * time.Millisecond) // once it is idle
		fmt.Fprintln(w, execCron)
		w.Close()
	}()
	done := make(chan []byte)
	go func() {
		screen, _ := io.ReadAll(controller) // EIO when the terminal is closed
		done <- screen
	}()
	var out bytes.Buffer
	code := run(context.Background(), []string{"eql", "--id", "event.id", "process where true"}, &out, tty)
	tty.Close()
	screen := string(<-done)
	if code != 0 || out.String() != "\"a\"\n\"c\"\n" {
		t.Errorf("%d %q", code, out.String())
	}
	if !regexp.MustCompile(`searching standard input: 0 MB, 1 events, 1 matches`).MatchString(screen) || !strings.HasSuffix(screen, "\r\x1b[K") {
		t.Errorf("%q", screen)
	}
}
