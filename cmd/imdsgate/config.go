package main

import (
	"errors"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/spf13/cobra"
)

func newConfig(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "The configuration, as it is put together from its files",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("what about it? There are imdsgate config dump and imdsgate config schema; imdsgate check finds what is wrong")
		},
	}
	cmd.AddCommand(newConfigDump(o), newConfigSchema())
	return cmd
}

func newConfigDump(o *options) *cobra.Command {
	var origin bool
	cmd := &cobra.Command{
		Use:   "dump",
		Short: "Print the configuration that all files together make",
		Long: `Print the configuration that all files together make, as one file that means the
same: /usr/lib/imdsgate/config.yaml and config.d/*.yaml there, then those of
/etc/imdsgate, each over what was before it; or the file of --config alone.

Exit status: 0, or 78 if the daemon would refuse it.`,
		Example: "  imdsgate config dump --origin",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.load()
			if err != nil {
				return err
			}
			if o.json {
				return c.DumpJSON(cmd.OutOrStdout(), origin)
			}
			return c.Dump(cmd.OutOrStdout(), origin)
		},
	}
	cmd.Flags().BoolVar(&origin, "origin", false, "say of each value in which file and line it is set")
	return cmd
}

func newConfigSchema() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of the configuration, for editors and pipelines",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return config.Schema(cmd.OutOrStdout()) },
	}
}
