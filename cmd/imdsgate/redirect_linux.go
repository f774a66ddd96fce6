package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newRedirect(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "redirect",
		Short: "The rules that bring metadata traffic to the daemon",
		Long: `The rules that bring metadata traffic to the daemon. The daemon installs and
watches them by itself; these verbs are for looking, for images that are built
before it runs, and for cleaning up after one that is gone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPrint(o), newInstall(o), newVerify(o), newRemove(o))
	return cmd
}

// daemonUser is the account that packages make for the daemon, and daemonUnit
// the cgroup that systemd gives it.
const (
	daemonUser = "imdsgate"
	daemonUnit = "system.slice/imdsgated.service"
)

// plan is what the daemon would install: with its user, with its unit where that is
// running, and in the mode that it is in.
func (o *options) plan(ctx context.Context) (iptables.Config, error) {
	c, err := o.load()
	if err != nil {
		return iptables.Config{}, err
	}
	rules := c.Redirect.WithDefaults()
	rules.Enforce = c.Mode == policy.Enforce
	if client, err := o.client(); err == nil {
		var now report.Modes
		if client.Get(ctx, "mode", nil, &now) == nil {
			rules.Enforce = now.Mode == policy.Enforce
		}
	}
	rules.SocketActivated = true // by imdsgated.socket, or by the daemon that runs
	u, err := user.Lookup(daemonUser)
	if err != nil {
		return rules, fmt.Errorf("the redirect exempts the daemon by its user: %w; packages make it, or: useradd --system %s", err, daemonUser)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return rules, fmt.Errorf("user %s: uid %q: %w", daemonUser, u.Uid, err)
	}
	rules.UID = uint32(uid)
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(mount, daemonUnit)); err == nil {
			rules.Cgroup = daemonUnit
		}
	}
	return rules, nil
}

// leftBehind says what becomes of requests while no daemon runs.
func leftBehind(ctx context.Context) string {
	switch _, enforcing, err := iptables.Installed(ctx); {
	case err != nil || os.Geteuid() != 0 && !enforcing:
		return "what becomes of requests root can see (imdsgate doctor)"
	case enforcing:
		return "the redirect of enforce mode is in place, so that requests fail until it runs again"
	}
	return "requests go to the service unseen"
}

func newPrint(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "print",
		Short: "Print the rules, as iptables-restore reads them, and change nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules, err := o.plan(cmd.Context())
			if err != nil {
				return err
			}
			if err := rules.Validate(); err != nil {
				return fmt.Errorf("%w: redirect: %w", errConfig, err)
			}
			plan := rules.Plan(iptables.FullCoverage)
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(plan)
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), plan)
			return err
		},
	}
}

func (o *options) open(ctx context.Context) (*iptables.Redirect, error) {
	rules, err := o.plan(ctx)
	if err != nil {
		return nil, err
	}
	return iptables.Open(ctx, rules)
}

func newInstall(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "install",
		Short: "Install the rules",
		Long: `Install the rules. Without a daemon behind them, requests to the metadata
service are refused from then on.

Exit status: 0 every way to the service is taken; 1 one is not, because
somebody else's rule decides about it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.open(cmd.Context())
			if err != nil {
				return err
			}
			defer r.Close()
			found, err := r.Install(cmd.Context())
			if err != nil {
				return err
			}
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(found)
			} else {
				p := &printer{w: cmd.OutOrStdout()}
				for _, f := range found.Families {
					if f.Skipped != "" {
						p.line("%s: left out: %s", f.Family, f.Skipped)
						continue
					}
					p.line("%s: host %v, forwarded %v (%s, %s)", f.Family, f.Hooks.Host, f.Hooks.Forwarded, found.Backend, found.Version)
				}
				for _, l := range found.Locks {
					p.line("not taken: %s", l)
				}
				for _, l := range found.Overridden {
					p.line("overridden: %s", l)
				}
				for _, w := range found.Warnings {
					p.line("warning: %s", w)
				}
				for _, pr := range found.Prohibitions {
					p.line("warning: %s", pr)
				}
				if found.Conntrack.First {
					p.line("connection tracking is on from now on, for these rules only: %d sockets are open, it has room for %d", found.Conntrack.Sockets, found.Conntrack.Max)
				}
				err = p.err
			}
			if err == nil && len(found.Locks) > 0 {
				return exit(exitNo)
			}
			return err
		},
	}
}

func newVerify(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Compare the rules with what they should be",
		Long: `Compare the rules with what they should be.

Exit status: 0 they are as they should be, 1 they are not.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.open(cmd.Context())
			if err != nil {
				return err
			}
			defer r.Close()
			found, err := r.Status(cmd.Context())
			if err != nil {
				return err
			}
			differences := found.Differences
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(differences)
			} else {
				p := &printer{w: cmd.OutOrStdout()}
				for _, d := range differences {
					p.line("%s", d)
				}
				if len(differences) == 0 {
					p.line("the rules are as they should be")
				}
				for _, pr := range found.Prohibitions {
					p.line("but %s", pr)
				}
				err = p.err
			}
			if err == nil && len(differences) > 0 {
				return exit(exitNo)
			}
			return err
		},
	}
}

func newRemove(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "remove",
		Short: "Remove everything that any installation has left, and nothing else",
		Long: `Remove everything that any installation has left, and nothing else. It stays
removed until a daemon starts, or the next boot; one that runs puts it back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _ := config.Load(o.config) // also where it is wrong
			runs := o.runs(cmd.Context())
			if !runs {
				if err := noteRemoval(c.Control); err != nil {
					fmt.Fprintf(cmd.ErrOrStderr(), "what the unit runs after a daemon may put it back: %v\n", err)
				}
			}
			removed, err := iptables.Remove(cmd.Context())
			if err == nil && !runs {
				err = attribution.Untime(c.Control.TimedNote())
			}
			if err != nil {
				return err
			}
			message := "removed"
			if !removed {
				message = "there was nothing to remove"
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), message)
			return err
		},
	}
}

// runs reports whether a daemon answers.
func (o *options) runs(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var now report.Modes
	client, err := o.client()
	return err == nil && client.Get(ctx, "mode", nil, &now) == nil
}

// noteRemoval has what the unit runs after a daemon leave the redirect removed.
func noteRemoval(at config.Control) error {
	f, err := os.OpenFile(at.RemovedNote(), os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if errors.Is(err, fs.ErrNotExist) { // no daemon was started since the boot
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}
