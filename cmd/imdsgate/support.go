package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/spf13/cobra"
)

func newSupport(o *options) *cobra.Command {
	var to string
	var last int
	cmd := &cobra.Command{
		Use:   "support",
		Short: "Put what somebody needs who helps you into one redacted archive",
		Long: `Put what somebody needs who helps you into one redacted archive: status, doctor
(without its tries), the configuration, names and digests of rules, versions, our
rules of iptables and those of the hooks they are in, the last events without command
lines, and what the journal has of our units. It prints what is in it, for you to read
before you send it.

Not in it: tokens, keys, user data, bodies, command lines, reasons and owners of
grants, files of the configuration as they are written. In it: names of programs,
users, units and containers, paths that were asked for, addresses of clients.

What cannot be had (as root all can) is in the archive as the reason for it.

Exit status: 0 the archive is written, 2 it is not.`,
		Example: "  sudo imdsgate support --output imdsgate-support.tar.gz",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				to = "imdsgate-support-" + time.Now().UTC().Format("20060102T150405Z") + ".tar.gz"
			}
			f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				// Not %w: being root or of the group, as exit 77 advises, is not what is missing.
				return fmt.Errorf("write the archive: %v; --output names another place", err)
			}
			all := o.support(cmd.Context(), last)
			if err := errors.Join(writeArchive(f, all), f.Close()); err != nil {
				return errors.Join(fmt.Errorf("write the archive %s: %w", to, err), os.Remove(to))
			}
			p := &printer{w: cmd.OutOrStdout()}
			for _, part := range all {
				p.line("%8d bytes  %-16s  %s", len(part.text), part.name, part.about)
			}
			p.line("%s: read it before you send it", to)
			return p.err
		},
	}
	cmd.Flags().StringVarP(&to, "output", "o", "", "the `file` to write, which must not exist (default imdsgate-support-TIME.tar.gz)")
	cmd.Flags().IntVar(&last, "events", 200, "how many of the last events")
	return cmd
}

// part is one file of the archive.
type part struct {
	name, about string
	text        []byte
}

// leftOut stands where somebody has written something in his own words.
const leftOut = "[left out]"

// maxPart bounds one file, of which the beginning is kept.
const maxPart = 4 << 20

// writeArchive writes the parts beneath one directory.
func writeArchive(w io.Writer, all []part) error {
	zip := gzip.NewWriter(w)
	archive := tar.NewWriter(zip)
	for _, p := range all {
		if err := archive.WriteHeader(&tar.Header{Name: "imdsgate-support/" + p.name, Mode: 0o600, Size: int64(len(p.text)), ModTime: time.Now()}); err != nil {
			return err
		}
		if _, err := archive.Write(p.text); err != nil {
			return err
		}
	}
	return errors.Join(archive.Close(), zip.Close())
}

// support collects the parts, each redacted.
func (o *options) support(ctx context.Context, last int) (all []part) {
	add := func(name, about string, text []byte, err error) {
		if len(text) > maxPart {
			text = append(text[:maxPart:maxPart], "\n(cut off)\n"...)
		}
		if err != nil {
			text = append(text, fmt.Sprintf("(not had: %v)\n", err)...)
		}
		all = append(all, part{name, about, redactLines(text)})
	}
	add("version.txt", "versions", fmt.Appendf(nil, "imdsgate %s\n%s %s/%s\n%s", version, runtime.Version(), runtime.GOOS, runtime.GOARCH, hostVersions()), nil)
	client, err := o.client()
	if err != nil {
		add("status.json", "status", nil, err)
		return all
	}
	var s report.Status
	err = client.Get(ctx, "status", nil, &s)
	if set := s.Modes.Set; set != nil {
		set.Reason = leftOut
	}
	for i := range s.Decisions.All {
		s.Decisions.All[i].Reason = leftOut
	}
	text, encodeErr := json.MarshalIndent(s, "", "  ")
	add("status.json", "status, with names and digests of rules", text, errors.Join(err, encodeErr))

	d := &diagnosis{Findings: []symptom{}, Probes: []probed{}, Left: []string{}}
	err = o.diagnose(ctx, d, true)
	if err == nil {
		d.ofStatus(ctx, client)
	}
	for i := range d.Findings {
		if f := &d.Findings[i]; f.ID == "config-refused" { // the message shows the lines that are wrong
			f.Message = leftOut
		}
	}
	text, encodeErr = json.MarshalIndent(d, "", "  ")
	add("doctor.json", "doctor, without its tries", text, errors.Join(err, encodeErr))

	add("config.yaml", "the configuration, without reasons and owners", o.redactedConfig(), nil)
	for _, p := range hostParts(ctx) {
		add(p.name, p.about, p.text, nil)
	}
	add(o.lastEvents(ctx, client, last))
	return all
}

// redactedConfig is the configuration as it is put together, without what people have
// written in their own words.
func (o *options) redactedConfig() []byte {
	c, err := o.load()
	if err != nil {
		// The message shows the line that is wrong.
		return []byte("(not had: the configuration is refused; imdsgate check shows why)\n")
	}
	for i := range c.Grants {
		c.Grants[i].Reason, c.Grants[i].Owner = leftOut, leftOut
	}
	for i := range c.Denies {
		c.Denies[i].Reason, c.Denies[i].Owner = leftOut, leftOut
	}
	var b bytes.Buffer
	if err := c.Dump(&b, true); err != nil {
		return fmt.Appendf(nil, "(not had: %v)\n", err)
	}
	return b.Bytes()
}

// lastEvents are the lines of the last events, with what a person may have typed left out.
func (o *options) lastEvents(ctx context.Context, client *control.Client, last int) (name, about string, text []byte, err error) {
	name, about = "events.ndjson", fmt.Sprintf("the last %d events, without command lines", last)
	var b bytes.Buffer
	err = client.Stream(ctx, "events", url.Values{"last": {fmt.Sprint(last)}}, func(line []byte) error {
		var doc map[string]any
		if err := json.Unmarshal(line, &doc); err != nil {
			return nil // nothing of a line that cannot be read is kept
		}
		if e, ok := doc["event"].(map[string]any); ok {
			action, _ := e["action"].(string)
			reason, _ := e["reason"].(string)
			switch decided, _, found := strings.Cut(reason, ": "); {
			case strings.HasPrefix(action, "mode-"), strings.HasPrefix(action, "decision-"), action == "policy-rejected":
				delete(e, "reason") // in an operator's own words, or with lines of the configuration
			case found && (strings.HasPrefix(reason, "denied by ") || strings.HasPrefix(reason, "allowed by ")):
				e["reason"] = decided + ": " + leftOut // with those of a decision or of the policy behind it
			}
		}
		withoutTyped(doc)
		clean, err := json.Marshal(doc)
		b.Write(append(clean, '\n'))
		return err
	})
	return name, about, b.Bytes(), err
}

// typed are the keys below which documents have what people have typed.
var typed = map[string]bool{"args": true, "command_line": true, "title": true, "thread": true, "working_directory": true, "query": true, "user_agent": true}

// withoutTyped takes it out of a document, and what looks like a secret.
func withoutTyped(v any) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if typed[key] {
				delete(v, key)
				continue
			}
			if text, ok := value.(string); ok && (key == "original" || key == "full") {
				v[key], _, _ = strings.Cut(text, "?")
			}
			if text, ok := v[key].(string); ok {
				v[key] = event.Redact(text)
			}
			withoutTyped(value)
		}
	case []any:
		for _, e := range v {
			withoutTyped(e)
		}
	}
}

// redactLines takes out of a text what looks like a secret.
func redactLines(text []byte) []byte {
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		b.WriteString(event.Redact(line))
	}
	return []byte(b.String())
}
