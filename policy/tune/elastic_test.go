package tune

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// What Kibana's reference says of the lines of an import: no other keys are sent, and
// whatever is sent is of this form.
type (
	documentedList struct {
		ListID      string   `json:"list_id"`
		Type        string   `json:"type"`
		Name        string   `json:"name"`
		Description string   `json:"description"`
		Namespace   string   `json:"namespace_type"`
		OS          []string `json:"os_types"`
		Tags        []string `json:"tags"`
	}
	documentedItem struct {
		documentedList
		ItemID  string            `json:"item_id"`
		Expires string            `json:"expire_time"`
		Entries []json.RawMessage `json:"entries"`
	}
	documentedEntry[V string | []string] struct {
		Field    string `json:"field"`
		Operator string `json:"operator"`
		Type     string `json:"type"`
		Value    V      `json:"value"`
	}
	documentedCount struct {
		Lists        int      `json:"exported_exception_list_count"`
		Items        int      `json:"exported_exception_list_item_count"`
		NoItems      []string `json:"missing_exception_list_items"`
		NoItemsCount int      `json:"missing_exception_list_item_count"`
		NoLists      []string `json:"missing_exception_lists"`
		NoListsCount int      `json:"missing_exception_lists_count"`
	}
)

func strict(t *testing.T, line []byte, v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		t.Fatalf("%v in %s", err, line)
	}
	if _, err := d.Token(); err != io.EOF {
		t.Fatalf("more than an object in %s", line)
	}
}

func (l *documentedList) check(t *testing.T, kind string) {
	t.Helper()
	if l.ListID == "" || l.Name == "" || l.Description == "" || l.Type != kind || !slices.Contains([]string{"single", "agnostic"}, l.Namespace) || slices.Contains(l.Tags, "") {
		t.Errorf("%+v", l)
	}
	for _, os := range l.OS {
		if !slices.Contains([]string{"linux", "macos", "windows"}, os) {
			t.Errorf("%+v", l)
		}
	}
}

// entries checks each by its type, and shows them.
func (i *documentedItem) entries(t *testing.T) (shown []string) {
	t.Helper()
	for _, raw := range i.Entries {
		var of struct{ Type string }
		if err := json.Unmarshal(raw, &of); err != nil {
			t.Fatal(err)
		}
		field, operator, values := "", "", []string(nil)
		switch of.Type {
		case "match", "wildcard":
			var e documentedEntry[string]
			strict(t, raw, &e)
			field, operator, values = e.Field, e.Operator, []string{e.Value}
		case "match_any":
			var e documentedEntry[[]string]
			strict(t, raw, &e)
			field, operator, values = e.Field, e.Operator, e.Value
		}
		if field == "" || operator != "included" || len(values) == 0 || slices.Contains(values, "") {
			t.Errorf("%s", raw)
		}
		if of.Type != "wildcard" && strings.Contains(strings.Join(values, ""), "*") {
			t.Errorf("* is only itself in %s", raw)
		}
		shown = append(shown, fmt.Sprint(field, " ", of.Type, " ", strings.Join(values, ", ")))
	}
	return shown
}

// TestElastic is the form that Kibana imports, and whom the exceptions are about.
func TestElastic(t *testing.T) {
	const parent = "process.parent.executable match /usr/lib/systemd/systemd"
	several := func(files ...string) func(*history) {
		return func(h *history) {
			for _, file := range files {
				h.days(func(_ *event.Event, p *event.Process) { p.Executable, p.Args = file, []string{"x"} })
			}
		}
	}
	one := func(change func(p *event.Process)) func(*history) {
		return func(h *history) { h.days(func(_ *event.Event, p *event.Process) { change(p) }) }
	}
	for _, test := range []struct {
		name  string
		asked func(*history)
		want  []string
	}{
		{"a program in its unit", one(func(*event.Process) {}), []string{"process.executable match /usr/bin/python3.11", "user.name match reports", parent}},
		{"a user without a name", one(func(p *event.Process) { p.UserName = "" }), []string{"process.executable match /usr/bin/python3.11", "user.id match 989", parent}},
		{"two versions", several("/usr/bin/python3.11", "/usr/bin/python3.12"), []string{"process.executable match_any /usr/bin/python3.11, /usr/bin/python3.12", "user.name match reports", parent}},
		{"a version in the path", several("/opt/app-1.2/bin/app", "/opt/app-1.3/bin/app"), []string{"process.executable wildcard /opt/app-*/bin/app", "user.name match reports", parent}},
		{"a container", one(func(p *event.Process) {
			p.Container, p.Unit, p.HostVerified, p.RootOwned = strings.Repeat("c0ffee42", 8), "", false, false
		}), []string{"process.executable match /usr/bin/python3.11", "container.id match " + strings.Repeat("c0ffee42", 8), parent}},
		{"instances of a unit, for many users and parents", func(h *history) {
			n := 0
			h.days(func(_ *event.Event, p *event.Process) {
				n++
				p.Executable, p.Args, p.Unit = "/opt/app/bin/app", []string{"app"}, fmt.Sprintf("app@%d.service", n)
			})
			for i := range maxListed {
				h.days(func(_ *event.Event, p *event.Process) {
					n++
					p.Executable, p.Args, p.Unit, p.UserName = "/opt/app/bin/app", []string{"app"}, fmt.Sprintf("app@%d.service", n), fmt.Sprint("user", i)
					parents(p, fmt.Sprintf("/opt/app/bin/starter%d", i))
				})
			}
		}, []string{"process.executable match /opt/app/bin/app", "imdsgate.process.unit wildcard app@*.service"}},
	} {
		h := read(t, policy.Config{Posture: policy.Strict}, Options{})
		test.asked(h)
		text, err := Elastic(h.tuner.Report().Proposals)
		if err != nil {
			t.Fatal(err)
		}
		lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
		if len(lines) != 3 {
			t.Errorf("%s: one list, one item and their count:\n%s", test.name, text)
			continue
		}
		var list documentedList
		strict(t, lines[0], &list)
		list.check(t, "detection")
		var item documentedItem
		strict(t, lines[1], &item)
		item.check(t, "simple")
		if item.ListID != list.ListID || item.ItemID == "" {
			t.Errorf("%s: %s", test.name, lines[1])
		}
		// What is no time of JavaScript's is refused, and the whole item with it.
		if at, err := time.Parse("2006-01-02T15:04:05.000Z", item.Expires); err != nil || at.Before(monday) {
			t.Errorf("%s: expire_time %s: %v", test.name, item.Expires, err)
		}
		if got := item.entries(t); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
		var count documentedCount
		strict(t, lines[2], &count)
		if count.Lists != 1 || count.Items != 1 || count.NoItemsCount+count.NoListsCount != 0 || count.NoItems == nil || count.NoLists == nil {
			t.Errorf("%s: %s", test.name, lines[2])
		}
	}
}
