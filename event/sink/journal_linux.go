package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// What Journal says to failed, besides that journald takes nothing.
var (
	ErrNotCommitted = errors.New("it is not written down what has been passed on, which would come again after a restart")
	ErrMissed       = errors.New("events were removed before they were passed on")
)

// Journal passes on to journald what somebody should see: alerts, requests that were
// denied or would have been, and what the daemon says of itself. It reads the spool at
// path with a cursor in the file state, until ctx is done; what journald does not take
// it tries again, and says so to failed, once, and nil once it works again. So it does
// with a cursor that cannot be written, and each time with nothing to follow it says ErrMissed. It
// returns an error when the spool or the cursor cannot be read.
func Journal(ctx context.Context, path, state string, failed func(error)) error {
	c, err := OpenCursor(path, state)
	if err != nil {
		return err
	}
	defer c.Close()
	wait := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	broken, uncommitted, missed := false, false, 0
	var taken, tried time.Time // when a line was, and when that was to be written down
	for ctx.Err() == nil {
		if (taken.After(tried) || uncommitted) && time.Since(tried) > notMoreOften {
			err := c.Commit()
			tried = time.Now()
			if (err != nil) != uncommitted {
				if uncommitted = err != nil; uncommitted {
					err = fmt.Errorf("%w: %w", ErrNotCommitted, err)
				}
				failed(err)
			}
		}
		line, err := c.Next()
		if n := c.Missed(); n > missed {
			missed = n
			failed(ErrMissed)
		}
		if errors.Is(err, io.EOF) {
			wait(lookAgain)
			continue
		}
		if err != nil {
			return err
		}
		taken = time.Now()
		if ordinary(line) {
			continue
		}
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			continue // somebody else's line
		}
		for {
			err := journal.Send(e.message(), e.priority(), e.fields())
			if (err != nil) != broken {
				broken = err != nil
				if broken || !uncommitted {
					failed(err)
				}
			}
			if err == nil {
				break
			}
			if !wait(time.Second) {
				return nil // this line comes again, and those since the last Commit
			}
		}
	}
	return c.Commit()
}

// ordinary reports whether a line needs no attention: most do not, and are not parsed. In
// text that a client chose the quotes are escaped.
func ordinary(line []byte) bool {
	return bytes.Contains(line, []byte(`"code":"IG1001"`)) || !bytes.Contains(line, []byte(`"code":"IG`))
}

// entry is what the journal has of a document.
type entry struct {
	Message string
	Log     struct{ Level string }
	Event   struct {
		ID, Dataset, Action, Reason, Outcome string
		Severity                             int
	}
	Process struct {
		PID        int64
		Executable string
		Entity     string `json:"entity_id"`
		Parent     struct{ Executable string }
	}
	User     struct{ ID string }
	Rule     struct{ Name string }
	URL      struct{ Path string }
	Imdsgate struct {
		Mode, Verdict string
		WouldBe       string `json:"audit_verdict"`
		Request       struct{ Class string }
	}
}

func (e *entry) message() string {
	m := e.Message
	if e.Process.Executable != "" && e.Event.Dataset == "imdsgate.alert" {
		m = fmt.Sprintf("%s: %s (pid %d)", m, e.Process.Executable, e.Process.PID)
	}
	return m
}

func (e *entry) priority() journal.Priority {
	switch {
	case e.Event.Severity >= 99:
		return journal.PriCrit
	case e.Event.Severity >= 73, e.Event.Outcome == "failure" && e.Imdsgate.Verdict == "":
		return journal.PriErr
	case e.Log.Level == "warn", e.Event.Severity >= 47:
		return journal.PriWarning
	case e.Event.Severity > 0:
		return journal.PriNotice
	}
	return journal.PriInfo
}

func (e *entry) fields() map[string]string {
	pid := ""
	if e.Process.PID > 0 {
		pid = strconv.FormatInt(e.Process.PID, 10)
	}
	all := map[string]string{
		"SYSLOG_IDENTIFIER":      "imdsgated",
		"IMDSGATE_EVENT_ID":      e.Event.ID,
		"IMDSGATE_DATASET":       e.Event.Dataset,
		"IMDSGATE_ACTION":        e.Event.Action,
		"IMDSGATE_REASON":        e.Event.Reason,
		"IMDSGATE_MODE":          e.Imdsgate.Mode,
		"IMDSGATE_VERDICT":       e.Imdsgate.Verdict,
		"IMDSGATE_AUDIT_VERDICT": e.Imdsgate.WouldBe,
		"IMDSGATE_CLASS":         e.Imdsgate.Request.Class,
		"IMDSGATE_PATH":          e.URL.Path,
		"IMDSGATE_RULE":          e.Rule.Name,
		"IMDSGATE_EXECUTABLE":    e.Process.Executable,
		"IMDSGATE_PARENT":        e.Process.Parent.Executable,
		"IMDSGATE_ENTITY_ID":     e.Process.Entity,
		"IMDSGATE_PID":           pid,
		"IMDSGATE_UID":           e.User.ID,
	}
	for name, value := range all {
		if value == "" {
			delete(all, name)
		}
	}
	return all
}
