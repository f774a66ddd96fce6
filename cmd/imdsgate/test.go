package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/policytest"
	"github.com/spf13/cobra"
)

func newTest(o *options) *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "test [FILE|DIR]...",
		Short: "Test the policy by cases that are written beside it",
		Long: `Judge cases by the policy: who asks what, and what is expected to become of it. Of a
DIR all files named *_test.yaml are read; without arguments those beside the
configuration. No daemon is needed, and nothing is asked of the metadata service.

  subjects:
    app: {executable: /opt/app/bin/app, user: app, unit: app.service}
  cases:
    - name: the app gets its credentials
      subject: app
      request: GET /latest/meta-data/iam/security-credentials/role
      expect: {verdict: allow, grant: app}
    - name: what it starts does not
      subject: {like: app, executable: /usr/bin/curl, parent: app}
      request: GET /latest/meta-data/iam/security-credentials/role
      expect: deny

A file may bring the policy by which its cases are judged, under the key policy. The
request is read and classified by what the daemon uses. Verdicts are those of enforce
mode. docs/testing-policy.md has all keys.

Exit status: 0 all pass, 1 some fail, 2 a file is wrong or could not be read, 78 the
configuration is wrong.`,
		Example: "  imdsgate test\n  imdsgate test --config config.yaml tests/\n  imdsgate test --format junit tests/ >report.xml",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.json {
				format = "json"
			}
			write, ok := map[string]func(*policytest.Report, io.Writer) error{
				"human": func(r *policytest.Report, w io.Writer) error { return r.WriteText(w, verbose) },
				"tap":   (*policytest.Report).WriteTAP, "junit": (*policytest.Report).WriteJUnit, "json": (*policytest.Report).WriteJSON,
			}[format]
			if !ok {
				return fmt.Errorf("unknown format %q; there are human, tap, junit, json", format)
			}
			if len(args) == 0 {
				args = []string{filepath.Dir(cmp.Or(o.config, config.DefaultPath))}
			}
			files, err := caseFiles(args)
			if err != nil {
				return err
			}
			report, err := o.test(files)
			if err != nil {
				return err
			}
			if err := write(report, cmd.OutOrStdout()); err != nil {
				return err
			}
			if report.Failed > 0 {
				return exit(exitNo)
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&format, "format", "human", "how to print: human, tap, junit, json")
	flags.BoolVarP(&verbose, "verbose", "v", false, "print the cases that pass as well")
	completes(cmd, "format", "human", "tap", "junit", "json")
	return cmd
}

// test judges the cases of files. The configuration is read only if one of them does
// not have a policy of its own.
func (o *options) test(files []string) (*policytest.Report, error) {
	var report policytest.Report
	var errs []error
	var configured *policy.Policy
	now := time.Now()
	for _, name := range files {
		file, err := policytest.Read(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		var p *policy.Policy
		switch {
		case file.Policy != nil:
			if p, err = file.Compile(); err != nil {
				errs = append(errs, err)
				continue
			}
		case configured == nil:
			c, err := o.load()
			if err != nil {
				return nil, err
			}
			if configured, err = c.Policy(); err != nil {
				return nil, fmt.Errorf("%w: %w", errConfig, err)
			}
			p = configured
		default:
			p = configured
		}
		results, err := file.Run(p, now)
		errs = append(errs, err)
		report.Add(results)
	}
	return &report, errors.Join(errs...)
}

// caseFiles are the files that are named, and those of directories.
func caseFiles(paths []string) ([]string, error) {
	var files []string
	for _, p := range paths {
		info, err := os.Stat(p)
		if err != nil {
			return nil, fmt.Errorf("look for cases: %w", err)
		}
		if !info.IsDir() {
			files = append(files, p)
			continue
		}
		err = filepath.WalkDir(p, func(file string, entry fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, policytest.Suffix) {
				return err
			}
			if info, err := os.Stat(file); err != nil || info.Mode().IsRegular() { // a link that leads nowhere is told of when it is read
				files = append(files, file)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("look for cases in %s: %w", p, err)
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no files named *%s in %s: imdsgate test --help has an example of one", policytest.Suffix, strings.Join(paths, ", "))
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}
