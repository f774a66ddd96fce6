package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/spf13/cobra"
)

func newProfiles(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profiles",
		Short: "Show the grants that are shipped for programs of a platform",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newProfilesList(o), newProfilesShow(o))
	return cmd
}

// profileRow is a profile as it is listed.
type profileRow struct {
	Name    string   `json:"name"`
	Program string   `json:"program"`
	Without string   `json:"without"`
	Checked string   `json:"checked"`
	Grants  []string `json:"grants"`
	Used    bool     `json:"used"` // by the configuration
	File    string   `json:"file"`
}

func profile(p *policy.Profile, used bool) profileRow {
	r := profileRow{Name: p.Name, Program: p.Program, Without: p.Without, Checked: p.Checked.Format(time.DateOnly), Used: used, File: p.File}
	for _, g := range p.Grants {
		r.Grants = append(r.Grants, g.Name)
	}
	return r
}

func newProfilesList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the profiles that there are, and which the configuration uses",
		Long: `List the profiles that there are, and which the configuration uses. They are files
named *.yaml in the first of these directories that has one of the name:
/etc/imdsgate/profiles, /usr/local/lib/imdsgate/profiles, /usr/lib/imdsgate/profiles,
or those under profile_paths. No daemon is needed.

Exit status: 0 all could be read, 2 one could not, 78 the configuration is wrong.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dirs, used, err := o.profiles()
			if err != nil {
				return err
			}
			names, err := policy.ProfileNames(dirs)
			if err != nil {
				return err
			}
			rows := []profileRow{}
			for _, name := range names {
				p, err := policy.LoadProfile(name, dirs)
				if err != nil {
					return err
				}
				rows = append(rows, profile(p, used[name]))
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
			}
			return printProfiles(cmd.OutOrStdout(), rows)
		},
	}
}

func printProfiles(w io.Writer, rows []profileRow) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "there are none")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "PROFILE\tUSED\tGRANTS\tCHECKED\tFOR")
	for _, r := range rows {
		used := "-"
		if r.Used {
			used = "yes"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", r.Name, used, len(r.Grants), r.Checked, shown(r.Program))
	}
	return t.Flush()
}

func newProfilesShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Print a profile, with the sources of each line",
		Long: `Print a profile as it is written, with the sources of each line. It is a file for a
configuration to name (profiles: [NAME]), or to copy to /etc/imdsgate/profiles and
change there.

Exit status: 0 it is there, 2 it is not, 78 the configuration is wrong.`,
		Example: "  imdsgate profiles show cloud-init",
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			dirs, _, err := o.profiles()
			if err != nil || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			names, _ := policy.ProfileNames(dirs)
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			dirs, used, err := o.profiles()
			if err != nil {
				return err
			}
			p, err := policy.LoadProfile(args[0], dirs)
			if err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(profile(p, used[p.Name]))
			}
			src, err := os.ReadFile(p.File)
			if err != nil {
				return fmt.Errorf("read a profile: %w", err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "# %s\n%s", p.File, src)
			return err
		},
	}
}

// profiles are the directories in which the configuration looks for them, and the names
// that it uses.
func (o *options) profiles() (dirs []string, used map[string]bool, err error) {
	c, err := o.load()
	if err != nil {
		return nil, nil, err
	}
	used = map[string]bool{}
	for _, name := range c.Profiles {
		used[name] = true
	}
	if dirs = c.ProfilePaths; len(dirs) == 0 {
		dirs = policy.ProfilePaths
	}
	return dirs, used, nil
}
