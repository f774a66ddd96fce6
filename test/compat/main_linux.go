// Compat runs other people's programs, unmodified, against the metadata service's stand-in: directly, and through the
// real daemon in audit mode, in enforce mode with a grant, and in enforce mode without one. It writes what it saw to
// docs/clients.md, and exits with 0 only if every client behaved as the service and its operator must be able to expect:
// the same requests, answers and output with and without the daemon; and refused at once, without a storm of retries
// or a way back to IMDSv1.
//
// The programs are in a Debian root that test/clients/install.sh makes; see clients_linux.go for the list. They run
// in that root, as an ordinary user where they can, and their files are granted by their path on the host.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/imdsgate/imdsgate/test/gate"
)

const help = `usage: compat [--doc FILE] DIR [CLIENT...]

Runs the clients in DIR, which test/clients/install.sh has made, or only those that are named, and prints what
does not hold. Needs root.

  --doc FILE   write the table of all clients to FILE
  -h, --help   show this help
`

func main() {
	// Whatever ends the run, what it made is taken away again.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(help)
	case err != nil:
		fmt.Fprintln(os.Stderr, "compat:", err)
		os.Exit(2)
	case !ok:
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, w io.Writer) (ok bool, err error) {
	flags := flag.NewFlagSet("compat", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	doc := flags.String("doc", "", "")
	if err := flags.Parse(args); err != nil {
		return false, err
	}
	if flags.NArg() == 0 {
		return false, flag.ErrHelp
	}
	if os.Geteuid() != 0 {
		return false, errors.New("network namespaces, the redirect and the clients' root need root: sudo make test-clients")
	}
	wanted := flags.Args()[1:]
	if *doc != "" && len(wanted) > 0 {
		return false, errors.New("--doc is for all clients")
	}
	for _, name := range wanted {
		if !slices.ContainsFunc(clients, func(c client) bool { return c.name == name }) {
			return false, fmt.Errorf("there is no client %q", name)
		}
	}
	dir, err := filepath.Abs(flags.Arg(0))
	if err != nil {
		return false, err
	}
	r := root(filepath.Join(dir, "root"))
	if err := r.furnish("test/clients"); err != nil {
		return false, err
	}
	build, err := os.MkdirTemp("", "imdsgate-compat")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(build), r.leaks()) }()
	binaries, err := gate.Build(build)
	if err != nil {
		return false, err
	}

	var rows []row
	ok = true
	for _, c := range clients {
		if len(wanted) > 0 && !slices.Contains(wanted, c.name) {
			continue
		}
		row, err := compare(ctx, r, binaries, c)
		if err != nil {
			return false, fmt.Errorf("%s: %w", c.name, err)
		}
		rows = append(rows, row)
		row.print(w)
		ok = ok && len(row.complaints) == 0
	}
	if *doc != "" && ok {
		if err := os.WriteFile(*doc, []byte(document(rows)), 0o644); err != nil {
			return false, err
		}
	}
	return ok, nil
}

// A root is the directory in which the clients are installed.
type root string

// furnish puts our part into the root: the scripts and programs that call AWS's libraries, and what tells the clients
// that they are in EC2, and where a bucket is.
func (r root) furnish(source string) error {
	if _, err := os.Stat(filepath.Join(string(r), "opt/clients/node_modules")); err != nil {
		return fmt.Errorf("%w: make test-clients installs the clients", err)
	}
	scripts, err := filepath.Glob(filepath.Join(source, "scripts/*"))
	if err != nil {
		return err
	}
	for _, from := range scripts {
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := r.write("opt/clients/"+filepath.Base(from), string(b)); err != nil {
			return err
		}
	}
	for path, text := range files {
		if err := r.write(path, text); err != nil {
			return err
		}
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(string(r), "opt/clients")+"/", "./sdkclient", "./sdkv1client")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the clients of AWS's SDKs for Go: %w\n%s", err, out)
	}
	return nil
}

func (r root) write(path, text string) error {
	path = filepath.Join(string(r), path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// executable is the path on the host of a file of the root, its links resolved as they are inside.
func (r root) executable(path string) (string, error) {
	out, err := exec.Command("chroot", string(r), "readlink", "-e", path).Output()
	if err != nil {
		return "", fmt.Errorf("there is no %s in %s: %w", path, r, err)
	}
	return filepath.Join(string(r), strings.TrimSpace(string(out))), nil
}

// version asks the package manager that has installed a client. It is "PACKAGE VERSION".
func (r root) version(from string) (string, error) {
	manager, name, _ := strings.Cut(from, ":")
	var cmd *exec.Cmd
	switch manager {
	case "Debian":
		cmd = exec.Command("chroot", string(r), "dpkg-query", "-W", "-f", "${Version}", name)
	case "npm":
		cmd = exec.Command("chroot", string(r), node, "-p", fmt.Sprintf("JSON.parse(fs.readFileSync('/opt/clients/node_modules/%s/package.json')).version", name))
	case "Go":
		cmd = exec.Command("go", "list", "-m", "-f", "{{.Version}}", name)
		cmd.Dir = "test/clients"
	}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("the version of %s: %w", from, err)
	}
	return name + " " + strings.TrimSpace(string(out)), nil
}

// leaks tells of mounts in the root that outlast the clients.
func (r root) leaks() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], string(r)) {
			return fmt.Errorf("%s is still mounted", fields[4])
		}
	}
	return nil
}
