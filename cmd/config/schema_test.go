package config

import (
	"bytes"
	"encoding"
	"flag"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

var update = flag.Bool("update", false, "write packaging/config.schema.json")

const schemaFile = "../../packaging/config.schema.json"

func compiledSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	var text bytes.Buffer
	if err := Schema(&text); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(schemaFile, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	doc, err := jsonschema.UnmarshalJSON(&text)
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("config.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("config.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The schema that is published is that of the types.
func TestSchemaIsCurrent(t *testing.T) {
	compiledSchema(t)
	var text bytes.Buffer
	if err := Schema(&text); err != nil {
		t.Fatal(err)
	}
	published, err := os.ReadFile(schemaFile)
	if err != nil || !bytes.Equal(published, text.Bytes()) {
		t.Errorf("packaging/config.schema.json is not what the types say: go test ./cmd/config -run Schema -update (%v)", err)
	}
}

// packaging/config.yaml, which is the manual too, has a word about every key.
func TestEveryKeyIsExplained(t *testing.T) {
	text, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	words := map[string]bool{}
	for _, word := range regexp.MustCompile(`[a-z_]+`).FindAllString(string(text), -1) {
		words[word] = true
	}
	var walk func(at string, s *jsonschema.Schema)
	walk = func(at string, s *jsonschema.Schema) {
		for key, value := range s.Properties {
			if !words[key] && key != "executable_only" { // docs/policy.md has the keys of grants
				t.Errorf("%s%s is not in packaging/config.yaml", at, key)
			}
			walk(at+key+".", value)
		}
		for _, below := range []any{s.AdditionalProperties, s.Items, s.Items2020} {
			if below, ok := below.(*jsonschema.Schema); ok && below != nil {
				walk(at, below)
			}
		}
	}
	walk("", compiledSchema(t))
}

// The schema and the daemon agree on what is right, as far as a schema can know.
func TestSchema(t *testing.T) {
	s := compiledSchema(t)
	example, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(readme), "```yaml\n")
	block, _, ok := strings.Cut(block, "```")
	if !ok || !strings.Contains(block, "grants:") {
		t.Fatal("README has no example of a configuration")
	}
	here := strings.ReplaceAll(block, "/etc/imdsgate/elastic", t.TempDir()) + "profile_paths: [../../packaging/profiles]\n"
	if c, err := Parse("README.md", []byte(here)); err != nil {
		t.Error(err)
	} else if _, err := c.Policy(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		src string
		ok  bool
	}{
		"the example":        {string(example), true},
		"README":             {block, true},
		"one executable":     {grantIn("a"), true},
		"several":            {"grants: [{name: a, executable: [/a, /b], owner: o, reason: r}]", true},
		"a list of nothing":  {"grants: [{name: a, executable: [1], owner: o, reason: r}]", false},
		"an unknown key":     {"mdoe: audit", false},
		"an unknown value":   {"mode: block", false},
		"an unknown class":   {"classes: {creds: strict}", false},
		"a class of a grant": {"grants: [{name: a, executable: /a, owner: o, reason: r, classes: [creds]}]", false},
		"a wrong date":       {"grants: [{name: a, executable: /a, owner: o, reason: r, expires: tomorrow}]", false},
		"no reason":          {"denies: [{name: a}]", false},
		"a number too large": {"limits: {burst: 70000}", false},
		"actions of a rule":  {"rules: {actions: {x: {action: log, classes: {token: block}, alert_on: either}}}", true},
		"a number of a user": {"denies: [{name: a, user: 1000, group: 7, reason: r}]", true},
		"a duration":         {"events: {max_age: 48h, fsync: never, layout: defend}", true},
		"a name":             {"name: web\nrevision: \"12e4567\"", true},
		"an unknown action":  {"rules: {actions: {x: {action: deny}}}", false},
	} {
		var v any
		if err := yaml.Unmarshal([]byte(c.src), &v); err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(v); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every type that has a form of its own can be dumped, and is in the schema by name.
func TestTypes(t *testing.T) {
	var look func(typ reflect.Type, at string)
	look = func(typ reflect.Type, at string) {
		typ = yamlfile.Indirect(typ)
		switch {
		case yamlfile.IsText(typ):
			if !typ.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
				t.Errorf("%s: %v has no MarshalText", at, typ)
			}
			if words[typ] == nil && texts[typ] == nil {
				t.Errorf("%s: %v is not in the schema", at, typ)
			}
		case typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map:
			look(typ.Elem(), at+"[]")
		case typ.Kind() == reflect.Struct:
			for _, k := range yamlfile.KeysOf(typ) {
				look(k.Type, at+"."+k.Name)
			}
		}
	}
	look(reflect.TypeFor[Config](), "")
}

// Each word of the schema is one that its type knows, and there are no others.
func TestWords(t *testing.T) {
	for typ, names := range words {
		known := map[string]bool{}
		for i := range 256 {
			v := reflect.New(typ)
			v.Elem().SetUint(uint64(i))
			func() {
				defer func() { recover() }() // of a number that has no name
				text, err := v.Interface().(encoding.TextMarshaler).MarshalText()
				if err == nil && reflect.New(typ).Interface().(encoding.TextUnmarshaler).UnmarshalText(text) == nil {
					known[string(text)] = true
				}
			}()
		}
		for _, name := range names {
			if !known[name] {
				t.Errorf("%v does not know %q", typ, name)
			}
			delete(known, name)
		}
		if len(known) > 0 {
			t.Errorf("%v also knows %v", typ, known)
		}
	}
}
