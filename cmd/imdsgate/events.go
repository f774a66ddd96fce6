package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/spf13/cobra"
)

func newEvents(o *options) *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "events [FILE]",
		Short: "Show what was asked, by whom, and what became of it",
		Long: `Show what was asked, by whom, and what became of it: the last events of the
daemon, or of a FILE in which it wrote them. --json prints them as they are
written, one ECS document to a line.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			show := func(line []byte) error {
				if o.json {
					_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", line)
					return err
				}
				return printEvent(cmd.OutOrStdout(), line)
			}
			if len(args) == 1 {
				return sink.Tail(cmd.Context(), args[0], lines, follow, show)
			}
			client, err := o.client()
			if err != nil {
				return err
			}
			return client.Stream(cmd.Context(), "events", url.Values{
				"last": {strconv.Itoa(lines)}, "follow": {strconv.FormatBool(follow)},
			}, show)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with those to come")
	cmd.Flags().IntVarP(&lines, "lines", "n", 20, "how many of the past to show")
	return cmd
}

// document is what one line of an event says to a person.
type document struct {
	Timestamp string `json:"@timestamp"`
	Message   string `json:"message"`
	Event     struct {
		Kind   string `json:"kind"`
		Action string `json:"action"`
		Reason string `json:"reason"`
	} `json:"event"`
	Process *struct {
		PID        int    `json:"pid"`
		Executable string `json:"executable"`
		Parent     struct {
			Executable string `json:"executable"`
		} `json:"parent"`
	} `json:"process"`
	HTTP struct {
		Response struct {
			Status int `json:"status_code"`
		} `json:"response"`
	} `json:"http"`
	Imdsgate struct {
		Subjects struct {
			PID        []int    `json:"pid"`
			Executable []string `json:"executable"`
			Role       []string `json:"role"`
		} `json:"subjects"`
		Credential struct {
			AccessKeyID string `json:"access_key_id"`
		} `json:"credential"`
	} `json:"imdsgate"`
}

func printEvent(w io.Writer, line []byte) error {
	var d document
	if err := json.Unmarshal(line, &d); err != nil {
		return fmt.Errorf("a line that is no event: %w", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  ", d.Timestamp)
	if d.Event.Kind == "alert" {
		b.WriteString("ALERT ")
	}
	b.WriteString(d.Message)
	if p := d.Process; p != nil && d.Event.Kind == "alert" {
		fmt.Fprintf(&b, "; %s (pid %d)", p.Executable, p.PID)
	}
	if p := d.Process; p != nil && p.Parent.Executable != "" {
		fmt.Fprintf(&b, "; parent %s", p.Parent.Executable)
	}
	// Who else is judged; what this one was before is in the document.
	if p, all := d.Process, d.Imdsgate.Subjects; p != nil && len(all.Executable) == len(all.PID) && len(all.Role) == len(all.PID) {
		for i, pid := range all.PID {
			if pid != p.PID {
				fmt.Fprintf(&b, "; %s %s (pid %d)", all.Role[i], all.Executable[i], pid)
			}
		}
	}
	if d.HTTP.Response.Status != 0 {
		fmt.Fprintf(&b, "; %d", d.HTTP.Response.Status)
	}
	if id := d.Imdsgate.Credential.AccessKeyID; id != "" {
		fmt.Fprintf(&b, "; got %s", id)
	}
	// That a rule decided is in the message already.
	if d.Event.Reason != "" && d.Event.Kind != "alert" && !strings.HasPrefix(d.Event.Reason, "rule ") {
		fmt.Fprintf(&b, "; %s", d.Event.Reason)
	}
	_, err := fmt.Fprintln(w, b.String())
	return err
}
