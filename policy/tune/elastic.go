package tune

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"time"
)

// A list of exceptions as Kibana exports and imports it (POST /api/exception_lists/_import):
// a line for the list, one for each item, and one that counts them. Its schema is in the
// reference of Kibana's API, "Import exception lists" and "Create an exception list item".
const (
	listID   = "imdsgate-tune"
	listName = "imdsgate: clients of the metadata service that are known"
)

// exceptionList is the first line.
type exceptionList struct {
	ListID      string   `json:"list_id"`
	Type        string   `json:"type"`
	Name        string   `json:"name"`
	Description string   `json:"description"`
	Namespace   string   `json:"namespace_type"`
	OS          []string `json:"os_types"`
	Tags        []string `json:"tags"`
}

// exceptionItem excuses what has all of its entries.
type exceptionItem struct {
	ListID      string   `json:"list_id"`
	ItemID      string   `json:"item_id"`
	Type        string   `json:"type"`
	Name        string   `json:"name"`
	Description string   `json:"description"`
	Namespace   string   `json:"namespace_type"`
	OS          []string `json:"os_types"`
	Tags        []string `json:"tags"`
	Entries     []entry  `json:"entries"`
	Expires     string   `json:"expire_time"` // isoTime
}

// isoTime is the one spelling of a time that Kibana takes: that of JavaScript's
// Date.toISOString, with three digits of a second.
const isoTime = "2006-01-02T15:04:05.000Z"

type entry struct {
	Field    string `json:"field"`
	Operator string `json:"operator"`
	Type     string `json:"type"` // match, match_any or wildcard
	Value    any    `json:"value"`
}

// included is an entry that holds for documents with one of some values. In a value * is
// anything: Kibana has no wildcard that ends at a slash, as that of a grant does.
func included(field string, values ...string) entry {
	e := entry{Field: field, Operator: "included", Type: "match_any", Value: values}
	if len(values) == 1 {
		e.Type, e.Value = "match", values[0]
		if strings.Contains(values[0], "*") {
			e.Type = "wildcard"
		}
	}
	return e
}

// exceptionCount is the last line.
type exceptionCount struct {
	Lists        int      `json:"exported_exception_list_count"`
	Items        int      `json:"exported_exception_list_item_count"`
	NoItems      []string `json:"missing_exception_list_items"`
	NoItemsCount int      `json:"missing_exception_list_item_count"`
	NoLists      []string `json:"missing_exception_lists"`
	NoListsCount int      `json:"missing_exception_lists_count"`
}

// Elastic is the proposals that were taken as exceptions from Elastic's alerts. They open
// no door: what excuses an alert rests on names that documents have, also of other
// sensors, and a grant on what a caller cannot choose.
func Elastic(taken []*Proposal) ([]byte, error) {
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	out.SetEscapeHTML(false)
	lines := []any{exceptionList{
		ListID: listID, Type: "detection", Name: listName, Namespace: "single", OS: []string{}, Tags: []string{"imdsgate"},
		Description: "From recorded events of imdsgate. An exception keeps a rule from raising an alert; what imdsgate lets through is said by its grants alone.",
	}}
	for _, p := range taken {
		lines = append(lines, p.exception())
	}
	lines = append(lines, exceptionCount{Lists: 1, Items: len(taken), NoItems: []string{}, NoLists: []string{}})
	for _, line := range lines {
		if err := out.Encode(line); err != nil {
			return nil, fmt.Errorf("write the exceptions: %w", err)
		}
	}
	return b.Bytes(), nil
}

func (p *Proposal) exception() exceptionItem {
	g := &p.Grant
	id := sha256.Sum256(fmt.Append(nil, g.Executable, g.Unit, g.User, g.Container, g.Pod, g.Parent, g.Classes))
	item := exceptionItem{
		ListID: listID, ItemID: listID + "-" + hex.EncodeToString(id[:8]), Type: "simple", Namespace: "single", OS: []string{"linux"},
		Tags: []string{"imdsgate", "risk:" + p.Risk.String()}, Name: g.Name, Description: g.Reason,
		Expires: g.Expires.Add(24*time.Hour - time.Second).UTC().Format(isoTime),
	}
	add := func(field string, values ...string) {
		if len(values) > 0 {
			item.Entries = append(item.Entries, included(field, values...))
		}
	}
	add("process.executable", g.Executable...)
	switch {
	case g.Pod != "":
		add("orchestrator.resource.id", g.Pod)
	case g.Container != "":
		add("container.id", g.Container)
	case isID(g.User):
		add("user.id", g.User)
	case g.User != "":
		add("user.name", g.User)
	}
	switch parents := p.Parents; {
	case g.Parent != "":
		add("process.parent.executable", g.Parent)
	case len(parents) < maxListed: // else there are more
		add("process.parent.executable", parents...)
	}
	if len(item.Entries) == 1 { // which would excuse the program wherever it runs
		add("imdsgate.process.unit", strings.Replace(g.Unit, "@.", "@*.", 1)) // of a template every instance
	}
	return item
}

func isID(user string) bool {
	ok, _ := path.Match("[0-9]*", user)
	return ok
}
