package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR CONFIG",
		Hidden: true, // it is for packaging/install.sh
		Short:  "Write the manual pages of the commands and of the configuration",
		Long: `Write the manual pages of the commands into a directory, and that of the configuration,
which consists of what the example says that is shipped (packaging/config.yaml).`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return writeManual(cmd.Root(), args[0], args[1])
		},
	}
}

// writeManual writes a page for each command, and imdsgate-config(5).
func writeManual(root *cobra.Command, dir, config string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the manual: %w", err)
	}
	pages := map[string][]byte{}
	if err := commandPages(root, pages); err != nil {
		return err
	}
	text, err := os.ReadFile(config)
	if err != nil {
		return fmt.Errorf("write the manual of the configuration: %w", err)
	}
	pages["imdsgate-config.5"] = configPage(string(text))
	for name, page := range pages {
		if err := os.WriteFile(filepath.Join(dir, name), page, 0o644); err != nil {
			return fmt.Errorf("write the manual: %w", err)
		}
	}
	return nil
}

// commandPages makes the pages of a command and of those below it.
func commandPages(cmd *cobra.Command, pages map[string][]byte) error {
	if cmd.Name() == "completion" || cmd.Name() == "help" || !cmd.IsAvailableCommand() && cmd.HasParent() {
		return nil
	}
	for _, c := range cmd.Commands() {
		if err := commandPages(c, pages); err != nil {
			return err
		}
	}
	was := cmd.Long
	if cmd.Long == "" {
		cmd.Long = cmd.Short + "."
	}
	cmd.Long = markdown(cmd.Long)
	defer func() { cmd.Long = was }()
	cmd.DisableAutoGenTag = true
	var b bytes.Buffer
	if err := doc.GenMan(cmd, &doc.GenManHeader{Section: "1", Source: "imdsgate " + version, Manual: "imdsgate"}, &b); err != nil {
		return fmt.Errorf("write the manual of %s: %w", cmd.CommandPath(), err)
	}
	pages[strings.ReplaceAll(cmd.CommandPath(), " ", "-")+".1"] = b.Bytes()
	return nil
}

// markdown is a text of a command as the maker of manual pages wants it: what is indented
// stays as it is, and nothing else means more than it says.
func markdown(text string) string {
	var b strings.Builder
	code := false
	for line := range strings.Lines(text) {
		switch indented := strings.HasPrefix(line, "  "); {
		case indented:
			if !code {
				b.WriteString("\n")
			}
			code = true
			b.WriteString("    " + line)
			continue
		case strings.TrimSpace(line) != "":
			if code {
				b.WriteString("\n")
			}
			code = false
		}
		b.WriteString(escapeMarkdown(line))
	}
	return b.String()
}

// escapeMarkdown puts a backslash before what has a meaning in Markdown.
func escapeMarkdown(s string) string {
	return regexp.MustCompile("[\\\\`*_{}\\[\\]<>#|~]").ReplaceAllStringFunc(s, func(c string) string { return `\` + c })
}

// example is a line of the shipped configuration that shows keys although it is a comment.
var example = regexp.MustCompile(`^ *#( *- |  | [a-z_]+: [{\[])`)

// value is a line of a comment that begins with what a key may be set to.
var value = regexp.MustCompile(`^[a-zA-Z0-9]+: `)

// configPage makes the page of the configuration of the example that is shipped: its
// comments are the text, and its keys are between them.
func configPage(config string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%% \"IMDSGATE-CONFIG\" \"5\" \"\" \"imdsgate %s\" \"imdsgate\"\n", version)
	b.WriteString("# NAME\nimdsgate-config \\- what imdsgated does with requests to the instance metadata service\n\n# SYNOPSIS\n")
	b.WriteString("**/usr/lib/imdsgate/config.yaml**, **/usr/lib/imdsgate/config.d/\\*.yaml**, **/etc/imdsgate/config.yaml**, **/etc/imdsgate/config.d/\\*.yaml**\n\n# DESCRIPTION\n")
	code := false
	for line := range strings.Lines(config) {
		trimmed := strings.TrimSpace(line)
		text, comment := strings.CutPrefix(trimmed, "#")
		switch shows := !comment || example.MatchString(line); {
		case trimmed == "":
			b.WriteString("\n\n")
			code = false
		case shows:
			if !code {
				b.WriteString("\n\n")
			}
			code = true
			b.WriteString("    " + line)
		default:
			text = strings.TrimSpace(text)
			switch {
			case code:
				b.WriteString("\n")
			case value.MatchString(text):
				b.WriteString("  \n") // the line before it ends there
			default:
				b.WriteString("\n")
			}
			code = false
			b.WriteString(escapeMarkdown(text))
		}
	}
	b.WriteString("\n# SEE ALSO\n**imdsgated(8)**, **imdsgate(1)**, **imdsgate-test(1)**\n")
	return md2man.Render([]byte(b.String()))
}
