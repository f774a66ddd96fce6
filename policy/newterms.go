package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/firstseen"
)

// A rule of the type new_terms matches an event for which its query holds, if this
// combination of values of some fields was in no such event within its window before.
//
// Judge only asks; Observe remembers, since an event is judged more than once. A rule
// that may block learns in audit mode alone. In enforce mode it would else let the
// second try pass, or credentials after a harmless request; and what has a grant would
// open the door for others who run the same program. There it only goes on to know what
// it knows. That is nothing for a host that has just been born, to which every client is
// new, and so the action of these rules is alert unless somebody asks for another.

const newTermsType = "new_terms"

// NewTerms is what a rule of that type remembers.
type NewTerms struct {
	Fields []string
	Window time.Duration

	fields []*event.Field
}

// newTerms is its table in a rule file.
type newTerms struct {
	Field              string   `toml:"field"`
	Value              []string `toml:"value"`
	HistoryWindowStart []struct {
		Field string `toml:"field"`
		Value string `toml:"value"`
	} `toml:"history_window_start"`
}

const (
	// maxTermFields and maxCombinations are Elastic's.
	maxTermFields   = 3
	maxCombinations = 100
)

// parse checks the table, which may be nil.
func (n *newTerms) parse(s source) (*NewTerms, error) {
	const table = "rule.new_terms"
	switch {
	case n == nil || n.Field != "new_terms_fields" || len(n.Value) == 0:
		return nil, s.at(table, "field", "", `a rule of the type new_terms needs a table [rule.new_terms] with field = "new_terms_fields" and their names as value`)
	case len(n.Value) > maxTermFields:
		return nil, s.refuse(table, "value", "", "a combination of %d fields; %d are the most", len(n.Value), maxTermFields)
	case len(n.HistoryWindowStart) != 1 || n.HistoryWindowStart[0].Field != "history_window_start":
		return nil, s.at(table, "field", "", `a rule of the type new_terms needs one table [[rule.new_terms.history_window_start]] with field = "history_window_start" and a value as "now-7d"`)
	}
	t := &NewTerms{Fields: n.Value}
	for _, name := range n.Value {
		i, ok := event.Lookup(name)
		if !ok {
			return nil, s.refuse(table, "value", didYouMean(name), "no event here has the field %s", name)
		}
		t.fields = append(t.fields, &event.Fields[i])
	}
	start := n.HistoryWindowStart[0].Value
	var ok bool
	if t.Window, ok = parseWindow(start); !ok {
		return nil, s.at(table+".history_window_start", "value", `write it as "now-7d", with one of the units s, m, h, d, w, M, y`, "%q is no beginning of a window", start)
	}
	return t, nil
}

var window = regexp.MustCompile(`^now-([0-9]{1,5})([smhdwMy])$`)

const day = 24 * time.Hour

var windowUnits = map[string]time.Duration{
	"s": time.Second, "m": time.Minute, "h": time.Hour, "d": day, "w": 7 * day, "M": 30 * day, "y": 365 * day,
}

// parseWindow reads "now-7d". More than ten years is a mistake, or too much for a
// time.Duration.
func parseWindow(s string) (time.Duration, bool) {
	m := window.FindStringSubmatch(s)
	if m == nil {
		return 0, false
	}
	n, _ := strconv.Atoi(m[1])
	unit := windowUnits[m[2]]
	if n == 0 || time.Duration(n) > 3650*day/unit {
		return 0, false
	}
	return time.Duration(n) * unit, true
}

// keys are the combinations of values in a document: none if a field has no value, and
// one for each of the values where fields have several.
func (n *NewTerms) keys(d *document) []firstseen.Key {
	combinations := [][]byte{nil}
	for _, f := range n.fields {
		v := f.Value(&d.View)
		var longer [][]byte
		for _, value := range termsOf(f.Type, &v) {
			for _, c := range combinations {
				if len(longer) == maxCombinations {
					break
				}
				c = append(c[:len(c):len(c)], f.Name...)
				c = binary.AppendUvarint(append(c, 0), uint64(len(value)))
				longer = append(longer, append(c, value...))
			}
		}
		combinations = longer
	}
	keys := make([]firstseen.Key, len(combinations))
	for i, c := range combinations {
		sum := sha256.Sum256(c)
		keys[i] = firstseen.Key(sum[:])
	}
	return keys
}

// termsOf are the values of a field as text.
func termsOf(t event.Type, v *event.Value) []string {
	switch {
	case !v.Set:
		return nil
	case v.Texts != nil:
		return v.Texts
	case t == event.Keyword:
		return []string{v.Text}
	case v.Ints != nil:
		all := make([]string, len(v.Ints))
		for i, n := range v.Ints {
			all[i] = strconv.FormatInt(n, 10)
		}
		return all
	case t == event.Long:
		return []string{strconv.FormatInt(v.Int, 10)}
	case t == event.IP:
		return []string{v.Addr.Unmap().String()}
	case t == event.Boolean:
		return []string{strconv.FormatBool(v.Bool)}
	default:
		return []string{v.Time.UTC().Format(time.RFC3339Nano)}
	}
}

// String is for people: what is remembered, and for how long.
func (n *NewTerms) String() string {
	return "first seen in " + formatWindow(n.Window) + ": " + strings.Join(n.Fields, ", ")
}

func formatWindow(d time.Duration) string {
	if d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	return d.String()
}

// windows are the rules of the type and how long each remembers.
func (p *Policy) windows() map[string]time.Duration {
	windows := map[string]time.Duration{}
	for _, r := range p.rules {
		if r.NewTerms != nil {
			windows[r.ID] = r.NewTerms.Window
		}
	}
	return windows
}

// KeepTerms makes the rules of the type new_terms remember in a store that outlives
// the engine. Without it they begin anew with each engine. It is called before the
// first event.
func (e *Engine) KeepTerms(s *firstseen.Store) {
	e.terms = s
	e.SetPolicy(e.Policy())
}

// novel reports whether a rule that blocks looks at a combination that it has not seen.
// Of any other type of rule every event is.
func (m *memory) novel(r *rule, ev *event.Event, subject *event.Process) bool {
	return r.NewTerms == nil || m.unseen(r, ev, subject, false) || subject != nil && subject.ParentNow != nil && m.unseen(r, ev, subject, true)
}

func (m *memory) unseen(r *rule, ev *event.Event, subject *event.Process, adopted bool) bool {
	for _, s := range r.blocking {
		for _, kind := range s.documents {
			d := &document{event.View{Event: ev, Document: kind, Subject: subject, Adopted: adopted}}
			if kind == event.ProcessStart && subject == nil || !s.Match(d) {
				continue
			}
			for _, k := range r.NewTerms.keys(d) {
				if !m.terms.Seen(r.ID, k, ev.Time) {
					return true
				}
			}
		}
	}
	return false
}

// observeTerms tells a rule of the type what it has matched, and reports whether that is
// new to it.
func (m *memory) observeTerms(r *rule, d *document) bool {
	learns := d.Event.Decision.Mode != Enforce.String() || !r.mayBlock()
	first := false
	for _, k := range r.NewTerms.keys(d) {
		known := m.terms.Seen(r.ID, k, d.Event.Time)
		if learns || known {
			known = m.terms.See(r.ID, k, d.Event.Time)
		}
		first = first || !known
	}
	return first
}

// mayBlock reports whether the rule blocks requests of any class.
func (r *rule) mayBlock() bool {
	return r.on(&event.Request{Guarded: true}) == Block || slices.Contains(slices.Collect(maps.Values(r.action.Classes)), Block)
}
