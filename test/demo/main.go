// Command demo shows imdsgate at work, on a machine that need not be in EC2: a
// private lab of network namespaces with a stand-in for the metadata service,
// the real daemon in enforce mode behind the real redirect, a legitimate client,
// and thieves. It exits 0 only if every one of them got what he should.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

func main() {
	// Whatever ends the demo, what it made is taken away again.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

func run(ctx context.Context, w io.Writer) (ok bool, err error) {
	if os.Geteuid() != 0 {
		return false, fmt.Errorf("network namespaces and the redirect need root: sudo make demo")
	}
	build, err := os.MkdirTemp("", "imdsgate-demo-build")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(build)
	fmt.Fprintln(w, "building the daemon, and a client with AWS's SDK ...")
	binaries, err := gate.Build(build)
	if err != nil {
		return false, err
	}
	sdk, _, err := netlab.BuildClients(build)
	if err != nil {
		return false, err
	}
	asker := filepath.Join(build, "asker")
	cmd := exec.Command("go", "build", "-trimpath", "-o", asker, "github.com/imdsgate/imdsgate/test/demo/asker")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return false, fmt.Errorf("build a client: %w\n%s", err, out)
	}

	begin := time.Now()
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		return false, err
	}
	defer lab.Close()
	files := &props{app: sdk, asker: asker}
	defer func() { err = errors.Join(err, files.strike()) }()
	parts, err := cast(files)
	if err != nil {
		return false, err
	}
	daemon, err := gate.Start(lab, binaries, gate.Settings{Config: policy})
	if err != nil {
		return false, err
	}
	defer daemon.Close()
	status, err := daemon.Status()
	if err != nil {
		return false, err
	}
	fmt.Fprintf(w, "imdsgated is in %s mode with %d rules and %d grant, behind iptables (%s), attribution level %s\n\n",
		status.Mode, len(status.Policy.Rules), len(status.Policy.Grants), status.Redirect.Backend, status.Attribution.Level)

	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "\tWHO\tPROCESS\tPARENT\tASKED FOR\tRULE OR GRANT\tVERDICT\tTHE CLIENT GOT")
	wrong := 0
	for _, p := range parts {
		if ctx.Err() != nil {
			return false, fmt.Errorf("interrupted")
		}
		line, problem := play(lab, daemon, p)
		mark := "ok"
		if problem != "" {
			mark, wrong = "WRONG", wrong+1
			line += "\t<- " + problem
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", mark, p.who, line)
	}
	t.Flush()
	fmt.Fprintf(w, "\n%d clients, %d as they should be, %v\n", len(parts), len(parts)-wrong, time.Since(begin).Round(100*time.Millisecond))
	return wrong == 0, nil
}

// play runs one client and compares what it got, and what was recorded, with
// what should be.
func play(lab *netlab.Lab, daemon *gate.Daemon, p part) (line, problem string) {
	cmd := exec.Command(p.run[0], p.run[1:]...)
	cmd.Dir = p.dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/nonexistent", "AWS_EC2_METADATA_V1_DISABLED=true"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: p.uid, Gid: p.uid}}
	err := lab.Instance.Run(cmd)
	got, _, _ := strings.Cut(strings.TrimSpace(out.String()), "\n")
	got = strings.TrimSpace(got)

	doc, awaitErr := daemon.Await(p.who, func(d gate.Document) bool {
		name, _ := d.At("process.name").(string)
		return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("url.path") == p.path && strings.HasPrefix(name, p.name)
	})
	if awaitErr != nil {
		return "", fmt.Sprintf("%v; it printed %q (%v)", awaitErr, got, err)
	}
	text := func(name string) string {
		s, _ := doc.At(name).(string)
		return s
	}
	rule := text("rule.name")
	if grant := text("imdsgate.grant"); grant != "" {
		rule = "grant " + grant
	}
	matched, _ := doc.At("imdsgate.matched").([]any)
	if rule == "" && len(matched) > 0 {
		rule = names[fmt.Sprint(matched[len(matched)-1])]
	}
	verdict := text("imdsgate.verdict")
	alerts := 0
	if docs, err := daemon.Documents(); err == nil {
		for _, d := range docs {
			related, _ := d.At("imdsgate.alert.correlated_event_ids").([]any)
			if slices.Contains(related, doc.At("event.id")) {
				alerts++
			}
		}
	}
	shown := verdict
	switch {
	case alerts > 0 && verdict == "allow":
		shown = "allow, alert"
	case len(matched) > 0 && verdict == "allow" && !strings.HasPrefix(rule, "grant"):
		shown = "allow, log"
	}
	line = strings.Join([]string{text("process.name"), text("process.parent.name"), text("imdsgate.request.class"), short(rule), shown, got}, "\t")

	named := strings.HasPrefix(p.rule, "grant ") && rule == p.rule
	for _, m := range matched {
		named = named || m == p.rule
	}
	switch {
	case !strings.HasPrefix(got, p.got):
		problem = fmt.Sprintf("it should have got %q", p.got)
	case verdict != p.verdict:
		problem = "the verdict should be " + p.verdict
	case !named:
		problem = "the rule should be " + p.rule
	case p.verdict == "deny" && text("rule.id") != p.rule:
		problem = "it should be blocked by " + p.rule
	case p.parent != "" && text("process.parent.name") != p.parent:
		problem = "the parent should be " + p.parent
	case (alerts > 0) != p.alert:
		problem = fmt.Sprintf("%d alerts", alerts)
	}
	return line, problem
}

// names are of rules that did not decide.
var names = map[string]string{
	ruleOdd:       "Metadata service asked by a tool, an interpreter or a program from an odd place",
	ruleUntrusted: "Credentials asked for by an executable that is not the host's own",
	ruleV1:        "Credentials asked for over IMDSv1",
	ruleRelayed:   "Metadata service asked through a proxy or under a public name",
}

// short cuts the name of a rule to what fits into a table.
func short(rule string) string {
	const fits = 44
	if len(rule) <= fits {
		return rule
	}
	return strings.TrimSpace(rule[:fits]) + "…"
}
