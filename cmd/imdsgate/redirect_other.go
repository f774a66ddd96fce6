//go:build !linux

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func leftBehind(context.Context) string { return "it runs on Linux" }

func newRedirect(*options) *cobra.Command {
	return &cobra.Command{
		Use:   "redirect",
		Short: "The rules that bring metadata traffic to the daemon, on Linux",
		RunE: func(*cobra.Command, []string) error {
			return fmt.Errorf("the redirect is made by iptables, on Linux: %w", errors.ErrUnsupported)
		},
	}
}
