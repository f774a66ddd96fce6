package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	textdiff "github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"
)

func newFmt() *cobra.Command {
	var write, diff, check bool
	cmd := &cobra.Command{
		Use:   "fmt FILE...",
		Short: "Write configuration files in their canonical form",
		Long: `Write configuration files in their canonical form: two blanks for each level, the
keys of grants and denies in the order of the reference, an empty line between two of
them. Comments and meaning stay; a file in which one would not is refused, and so is
one that is wrong. "-" is standard input.

Exit status: 0, 1 with -d or --check if a file would change, 2 if one is refused or
could not be read or written.`,
		Example: "  imdsgate fmt -w /etc/imdsgate/config.d/*.yaml\n  imdsgate fmt --check packaging/config.yaml",
		Args: func(_ *cobra.Command, files []string) error {
			if len(files) == 0 {
				return errors.New("which files? Name them, as in imdsgate fmt -w /etc/imdsgate/config.yaml")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, files []string) error {
			changed, out := false, cmd.OutOrStdout()
			var failed []error
			for _, file := range files {
				before, err := readInput(cmd.InOrStdin(), file)
				if err != nil {
					failed = append(failed, err)
					continue
				}
				after, err := config.Format(file, before)
				if err != nil {
					failed = append(failed, err)
					continue
				}
				same := bytes.Equal(before, after)
				changed = changed || !same
				switch {
				case same && (write || diff || check):
				case check:
					fmt.Fprintln(out, file)
				case diff:
					_, err = io.WriteString(out, shown(string(textdiff.Diff(file, before, file+", formatted", after))))
				case write && file != "-":
					err = replace(file, after)
				default:
					_, err = out.Write(after)
				}
				failed = append(failed, err)
			}
			if err := errors.Join(failed...); err != nil {
				return err
			}
			if changed && (diff || check) {
				return exit(exitNo)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&write, "write", "w", false, "replace the files")
	cmd.Flags().BoolVarP(&diff, "diff", "d", false, "print what would change")
	cmd.Flags().BoolVar(&check, "check", false, "print the names of the files that would change")
	cmd.MarkFlagsMutuallyExclusive("write", "diff", "check")
	return cmd
}

func readInput(in io.Reader, file string) ([]byte, error) {
	if file == "-" {
		return yamlfile.ReadFrom(in)
	}
	return yamlfile.Read(file)
}

// replace puts a new file in the place of another, with its mode and owner, so that
// whoever reads it has the one or the other.
func replace(file string, text []byte) error {
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return err
	}
	info, err := os.Stat(real)
	if err != nil {
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(real), ".imdsgate-fmt-")
	if err != nil {
		return err
	}
	defer os.Remove(temporary.Name())
	_, err = temporary.Write(text)
	if err == nil {
		err = errors.Join(keepOwner(temporary, info), temporary.Chmod(info.Mode().Perm()), temporary.Sync())
	}
	if err = errors.Join(err, temporary.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return os.Rename(temporary.Name(), real)
}
