//go:build !linux

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func (o *options) diagnose(context.Context, *diagnosis, bool) error {
	return fmt.Errorf("imdsgated runs on Linux: %w", errors.ErrUnsupported)
}

func newAttempt() *cobra.Command { return &cobra.Command{Use: "attempt", Hidden: true} }

func hostVersions() string { return "" }

func hostParts(context.Context) []part { return nil }
