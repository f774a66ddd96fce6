package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	"github.com/spf13/cobra"
)

func newCheck(o *options) *cobra.Command {
	var strict bool
	var root string
	cmd := &cobra.Command{
		Use:   "check [FILE...]",
		Short: "Find what is wrong with the configuration, its rules and grants",
		Long: `Find what is wrong with the configuration, its rules and grants, before the daemon
does. Without a FILE it is what the daemon would read: the vendor's and the
operator's config.yaml and drop-ins. Of files that are named, each goes over those
before it. No daemon is needed.

Errors are what the daemon refuses, and grants that others than root can turn to
their use: an executable, or a directory above it, that they can change. Warnings
are what is hardly meant: grants that have expired, that another makes idle, that
are everybody's, whose executable does not exist here or has another name; and what
the authors of rules should know.

Exit status: 0 nothing is wrong, 1 errors (with --strict also warnings), 2 a file
could not be read.`,
		Example: "  imdsgate check\n  imdsgate check --strict --root /mnt/image\n  imdsgate check config.yaml grants.yaml --json | jq '.findings[]'",
		RunE: func(cmd *cobra.Command, files []string) error {
			report := o.check(root, files)
			var err error
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(report)
			} else {
				err = report.print(cmd.OutOrStdout())
			}
			if err == nil && !o.json && report.Errors == 0 && len(files) == 0 && o.config == "" && root == "/" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), "imdsgate reload puts it in force, where it is not yet")
			}
			switch {
			case err != nil:
				return err
			case report.unread:
				return exit(exitTrouble)
			case report.Errors > 0 || strict && report.Warnings > 0:
				return exit(exitNo)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&strict, "strict", false, "let warnings count as errors")
	cmd.Flags().StringVar(&root, "root", "/", "look at the files of a host or image whose root is mounted here")
	return cmd
}

// checkResult is all that was found.
type checkResult struct {
	Errors   int       `json:"errors"`
	Warnings int       `json:"warnings"`
	Findings []finding `json:"findings"`
	Files    []string  `json:"files"` // that the configuration was read from
	Mode     string    `json:"mode,omitempty"`
	Rules    int       `json:"rules"`
	Grants   int       `json:"grants"`
	Denies   int       `json:"denies"`

	unread bool
}

type finding struct {
	Severity string `json:"severity"` // error, warning
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	Column   int    `json:"column,omitempty"`
	Message  string `json:"message"`

	excerpt string
}

func (o *options) check(root string, files []string) *checkResult {
	r := &checkResult{Findings: []finding{}, Files: []string{}}
	var c config.Config
	_, err := os.Stat(root)
	switch {
	case err != nil:
	case len(files) > 0:
		c, err = config.LoadFiles(files...)
	case o.config != "":
		c, err = config.LoadFiles(o.config)
	default:
		if c, err = config.LoadFrom(root); err == nil {
			if len(c.ProfilePaths) == 0 {
				for _, dir := range policy.ProfilePaths {
					c.ProfilePaths = append(c.ProfilePaths, filepath.Join(root, dir))
				}
			}
			files := c.Files()
			for _, name := range c.Profiles {
				if p, err := policy.LoadProfile(name, c.ProfilePaths); err == nil { // or else Policy says so
					files = append(files, p.File)
				}
			}
			for _, file := range files {
				below := strings.TrimPrefix(file, filepath.Clean(root))
				r.add("error", ownedByRoot(root, filepath.Join("/", below), "and makes the policy by that")...)
			}
		}
	}
	if r.add("error", config.Errors(err)...); err != nil {
		return r
	}
	r.Files = append(r.Files, c.Files()...)
	p, err := c.Policy()
	r.add("error", config.Errors(err)...)
	var wrong, odd []error
	for i := range c.Grants {
		w, o := hostFiles(root, fmt.Sprintf("grants[%d]", i), &c.Grants[i])
		wrong, odd = append(wrong, w...), append(odd, o...)
	}
	for _, a := range c.Advice(time.Now()) {
		odd = append(odd, a)
	}
	r.add("error", c.Locate(wrong...)...)
	r.add("warning", c.Locate(odd...)...)
	if err != nil {
		return r
	}
	r.Mode, r.Rules, r.Grants, r.Denies = p.Mode.String(), len(p.Rules()), len(p.Grants()), len(p.Denies())
	for _, rule := range p.Rules() {
		for _, w := range rule.Warnings {
			r.add("warning", w)
		}
	}
	for _, err := range p.Skipped {
		r.add("warning", fmt.Errorf("left out, as rules.skip_refused says: %w", err))
	}
	return r
}

func (r *checkResult) add(severity string, errs ...error) {
	for _, err := range errs {
		f := finding{Severity: severity, Message: err.Error()}
		if fault := (*yamlfile.Fault)(nil); errors.As(err, &fault) {
			f.File, f.Line, f.Column, f.Message, f.excerpt = fault.File, fault.Line, fault.Column, fault.Message, fault.Excerpt
		} else if fault := (*syntax.Error)(nil); errors.As(err, &fault) {
			f.File, f.Line, f.Column = fault.File, fault.Line, fault.Col
		}
		if read := (*fs.PathError)(nil); errors.As(err, &read) {
			r.unread = true
		}
		if severity == "error" {
			r.Errors++
		} else {
			r.Warnings++
		}
		r.Findings = append(r.Findings, f)
	}
}

func (r *checkResult) print(w io.Writer) error {
	p := &printer{w: w}
	for _, f := range r.Findings {
		at := ""
		if f.excerpt != "" || f.File != "" && !strings.Contains(f.Message, f.File) {
			at = f.File + ": "
			if f.Line > 0 {
				at = fmt.Sprintf("%s:%d:%d: ", f.File, f.Line, f.Column)
			}
		}
		p.line("%s%s: %s", at, f.Severity, shown(f.Message))
		if f.excerpt != "" {
			p.line("%s", shown(f.excerpt))
		}
	}
	switch {
	case r.Mode == "":
		p.line("%s", r.counted())
	default:
		from := "no file: everything is as it is by default"
		if len(r.Files) > 0 {
			from = strings.Join(r.Files, ", ")
		}
		p.line("%s: mode %s, %d rules, %d grants, %d denies, from %s", r.counted(), r.Mode, r.Rules, r.Grants, r.Denies, from)
	}
	return p.err
}

func (r *checkResult) counted() string {
	plural := func(n int, what string) string {
		if n == 1 {
			return "1 " + what
		}
		return fmt.Sprintf("%d %ss", n, what)
	}
	if r.Errors+r.Warnings == 0 {
		return "ok"
	}
	return plural(r.Errors, "error") + ", " + plural(r.Warnings, "warning")
}

// about is a complaint about a key of a grant.
func about(key, format string, args ...any) error {
	return &policy.KeyError{Key: key, Err: fmt.Errorf(format, args...)}
}
