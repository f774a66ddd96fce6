package ndjson

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy/eql"
)

// fuzzed are fields of every type, some inside of each other.
var fuzzed = []Field{
	{Field: eql.Field{Name: "a", Type: eql.Keyword}}, {Field: eql.Field{Name: "a.b", Type: eql.Keyword}},
	{Field: eql.Field{Name: "a.b.c", Type: eql.Long}}, {Field: eql.Field{Name: "n", Type: eql.Double}},
	{Field: eql.Field{Name: "o.t", Type: eql.Boolean}}, {Field: eql.Field{Name: "o.ip", Type: eql.IP}},
	{Field: eql.Field{Name: "d", Type: eql.Date}}, {Field: eql.Field{Name: "id", Type: eql.Keyword}},
}

// exactly is a value with its kind, wherever its bytes are.
func exactly(v eql.Value) string {
	return regexp.MustCompile(`at:.*`).ReplaceAllString(fmt.Sprintf("%#v", v), "") + v.String()
}

// FuzzDecode compares what is taken from a line with what encoding/json sees in it.
func FuzzDecode(f *testing.F) {
	for _, line := range []string{
		`{"a":"x","n":1.5e3,"o":{"t":true,"ip":"::1"},"d":"2026-11-25T16:54:31.404Z"}`,
		`{"a":{"b":["x",["y",null,7]],"b.c":3},"a.b":"z","a.b.c":[1,"2",3.9]}`,
		`{"a":[{"b":"1"},{"b":"2"},"s"],"a":"t"}`,
		`{"a":"\ud800\udc00 \ud800 \ud800\ud800\udc00 \udc00\u0041 \/\b\f","\u0061":"q"}`,
		"{\"a\":\"\xff\xfe\xe2\x82\"}",
		`{"n":[1e400,-0,0.1,123456789012345678901234567890,"0x10","NaN"," 7 "],"a.b.c":[9223372036854775807,9223372036854775808,"1_0"]}`,
		`{"a":1,}`, `{"a":[1,]}`, `{"a":01}`, `{"a":1}{}`, `[{"a":1}]`, `{"a":"` + "\t" + `"}`, `{"a":tru}`, `{"a" 1}`, `{`, `{"":{"":1}}`,
		`{"d":[0,999999999,1732553671,1732553671404,133770272714040000,1732553671404000000,"1732553671.5","2026-11-25"]}`,
	} {
		f.Add([]byte(line))
	}
	fs := &Fields{byName: map[string]*Field{}}
	for i := range fuzzed {
		f := &fuzzed[i]
		f.Slot = i
		fs.bySlot = append(fs.bySlot, f)
		fs.byName[f.Name] = f
	}
	d := newDecoder(fs, Roles{Timestamp: "d", ID: "id"})
	f.Fuzz(func(t *testing.T, line []byte) {
		if line = bytes.TrimSpace(line); bytes.Count(line, []byte("["))+bytes.Count(line, []byte("{")) > 5000 {
			return // both have a limit on depth
		}
		given := slices.Clone(line)
		err := d.decode(line)
		if valid := json.Valid(line) && line[0] == '{'; valid != (err == nil) {
			t.Fatalf("valid: %v, but %v", valid, err)
		}
		if err != nil {
			return
		}
		want := fieldsByJSON(t, line)
		kept := d.keep()
		if !bytes.Equal(given, line) {
			t.Fatal("the line is not what it was")
		}
		clear(line) // what is kept has memory of its own
		for _, f := range fuzzed {
			if got := exactly(kept.Value(f.Slot)); got != exactly(want[f.Name]) {
				t.Errorf("%s\n%s: got %s\nwant %s", given, f.Name, got, exactly(want[f.Name]))
			}
		}
		if id := kept.ID(); !json.Valid([]byte(id)) {
			t.Errorf("the id is %s", id)
		}
		if !json.Valid([]byte(kept.JSON())) {
			t.Errorf("it is printed as %s", kept.JSON())
		}
	})
}

// fieldsByJSON reads the fields in the slow and obvious way.
func fieldsByJSON(t *testing.T, line []byte) map[string]eql.Value {
	all := map[string][]json.Token{}
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	var value func(path string)
	value = func(path string) {
		token, err := d.Token()
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		switch token {
		case json.Delim('{'):
			for d.More() {
				key, _ := d.Token()
				value(path + "." + key.(string))
			}
			d.Token()
		case json.Delim('['):
			for d.More() {
				value(path)
			}
			d.Token()
		case nil:
		default:
			all[path] = append(all[path], token)
		}
	}
	value("")
	values := map[string]eql.Value{}
	for _, f := range fuzzed {
		var texts []string
		var list []eql.Value
		for _, token := range all["."+f.Name] {
			text := fmt.Sprint(token)
			first := byte(' ')
			if _, ok := token.(string); ok {
				first = '"'
			}
			texts = append(texts, text)
			if f.Type != eql.Keyword {
				if v, ok := f.convert(first, text); ok {
					list = append(list, v)
				}
			}
		}
		switch {
		case f.Type == eql.Keyword && len(texts) == 1:
			values[f.Name] = eql.String(texts[0])
		case f.Type == eql.Keyword && len(texts) > 1:
			values[f.Name] = eql.Strings(texts)
		case len(list) == 1:
			values[f.Name] = list[0]
		case len(list) > 1:
			values[f.Name] = eql.List(list...)
		}
	}
	return values
}

func TestConvert(t *testing.T) {
	for _, c := range []struct {
		typ  eql.Type
		json string
		want string // "" for no value
	}{
		{eql.Long, `42`, "42"}, {eql.Long, `"42"`, "42"}, {eql.Long, `" 42 "`, "42"}, {eql.Long, `1.9`, "1"}, {eql.Long, `-1.9`, "-1"},
		{eql.Long, `1e3`, "1000"}, {eql.Long, `9223372036854775808`, ""}, {eql.Long, `true`, ""}, {eql.Long, `"0x10"`, ""}, {eql.Long, `"inf"`, ""}, {eql.Long, `""`, ""},
		{eql.Double, `42`, "42"}, {eql.Double, `1.5`, "1.5"}, {eql.Double, `"1.5"`, "1.5"}, {eql.Double, `1e400`, "Infinity"}, {eql.Double, `"nan"`, ""},
		{eql.Boolean, `true`, "true"}, {eql.Boolean, `"false"`, "false"}, {eql.Boolean, `1`, ""},
		{eql.IP, `"::ffff:169.254.169.254"`, "169.254.169.254"}, {eql.IP, `"fe80::1%eth0"`, "fe80::1"}, {eql.IP, `"host"`, ""}, {eql.IP, `1`, ""},
		{eql.Date, `"2026-11-25T16:54:31.404Z"`, "2026-11-25T16:54:31.404Z"}, {eql.Date, `1732553671404`, "2024-11-25T16:54:31.404Z"}, {eql.Date, `"soon"`, ""},
		{eql.Keyword, `1.0`, "1.0"}, {eql.Keyword, `true`, "true"}, {eql.Keyword, `"é\n"`, "é\n"},
	} {
		text, first := strings.Trim(c.json, `"`), c.json[0]
		if c.typ == eql.Keyword {
			f := Field{Field: eql.Field{Name: "f", Type: c.typ}}
			d := newDecoder(&Fields{bySlot: []*Field{&f}}, Roles{Timestamp: "t"})
			if err := d.decode([]byte(`{"f":` + c.json + `}`)); err != nil || d.event.Value(0).String() != c.want {
				t.Errorf("%v of %s: %v, %v", c.typ, c.json, d.event.Value(0), err)
			}
			continue
		}
		f := Field{Field: eql.Field{Type: c.typ}}
		v, ok := f.convert(first, text)
		if ok != (c.want != "") || ok && v.String() != c.want {
			t.Errorf("%v of %s: %v, %v; want %q", c.typ, c.json, v, ok, c.want)
		}
	}
}

func TestTimes(t *testing.T) {
	for _, c := range []struct {
		form Form
		text string
		want string // "" for no time
	}{
		{Auto, "2026-11-25T16:54:31Z", "2026-11-25T16:54:31Z"},
		{Auto, "2026-11-25T16:54:31.123456789+02:00", "2026-11-25T14:54:31.123456789Z"},
		{Auto, "2026-11-25T16:54:31,5Z", "2026-11-25T16:54:31.5Z"},
		{Auto, "2026-11-25T16:54:31", "2026-11-25T16:54:31Z"},
		{Auto, "2026-11-25 16:54:31.25", "2026-11-25T16:54:31.25Z"},
		{Auto, "2026-11-25T16:54:31.5+0100", "2026-11-25T15:54:31.5Z"},
		{Auto, "2026-11-25 16:54:31 UTC", "2026-11-25T16:54:31Z"},
		{Auto, "2026-11-25", "2026-11-25T00:00:00Z"},
		{Auto, "1500", "1970-01-01T00:00:01.5Z"},
		{Auto, "-1500", "1969-12-31T23:59:58.5Z"},
		{Auto, "1764089671", "2025-11-25T16:54:31Z"},
		{Auto, "1764089671.404", "2025-11-25T16:54:31.404Z"},
		{Auto, "1764089671404", "2025-11-25T16:54:31.404Z"},
		{Auto, "1764089671404.25", "2025-11-25T16:54:31.40425Z"},
		{Auto, "1764089671404123", "2025-11-25T16:54:31.404123Z"},
		{Auto, "134085632714041234", "2025-11-25T16:54:31.4041234Z"},
		{Auto, "116444736000000000", "1970-01-01T00:00:00Z"},
		{Auto, "1764089671404123456", "2025-11-25T16:54:31.404123456Z"},
		{Auto, "1.764089671404e12", "2025-11-25T16:54:31.404Z"},
		{Seconds, "5", "1970-01-01T00:00:05Z"},
		{Milliseconds, "1764089671404", "2025-11-25T16:54:31.404Z"},
		{Nanoseconds, "5", "1970-01-01T00:00:00.000000005Z"},
		{FileTime, "116444736000000001", "1970-01-01T00:00:00.0000001Z"},
		{Seconds, "2026-11-25T16:54:31Z", "2026-11-25T16:54:31Z"},
		{Seconds, "9223372037", ""}, {FileTime, "1", ""}, {Auto, "1e300", ""}, {Auto, "nan", ""}, {Auto, "", ""}, {Auto, "-", ""},
		{Auto, "yesterday", ""}, {Auto, "0001-01-01T00:00:00Z", ""}, {Auto, "2026-11-25 16:54:31 PST", ""}, {Auto, "2026-13-25", ""},
	} {
		at, ok := c.form.unixTime(c.text)
		e := Event{at: at}
		if got := e.Time().UTC().Format("2006-01-02T15:04:05.999999999Z07:00"); ok != (c.want != "") || ok && got != c.want {
			t.Errorf("%v %q: %s, %v; want %q", c.form, c.text, got, ok, c.want)
		}
	}
}

func TestTiebreaker(t *testing.T) {
	none := tiebreaker{}
	order := []tiebreaker{
		newTiebreaker('1', "-3"), newTiebreaker('1', "2"), newTiebreaker('1', "2.5"), newTiebreaker('1', "10"),
		newTiebreaker('1', "9007199254740992"), newTiebreaker('1', "9007199254740993"),
		newTiebreaker('"', "10"), newTiebreaker('"', "9"), none,
	}
	for i, a := range order {
		for j, b := range order {
			if got, want := a.compare(b), i-j; got > 0 != (want > 0) || got < 0 != (want < 0) {
				t.Errorf("%+v compared with %+v: %d", a, b, got)
			}
		}
	}
}
