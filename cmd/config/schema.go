package config

import (
	"encoding/json"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Schema writes the JSON Schema (draft 2020-12) of the configuration, for editors and
// pipelines. It says which keys and values there are; what a grant must have is told by
// `imdsgate check` alone.
func Schema(w io.Writer) error {
	s := schemaOf(reflect.TypeFor[Config](), "")
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["$id"] = "https://github.com/imdsgate/imdsgate/raw/main/packaging/config.schema.json"
	s["title"] = "imdsgate's configuration: /etc/imdsgate/config.yaml and its drop-ins"
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(s)
}

type schema = map[string]any

// words are the types that have a name for each value.
var words = map[reflect.Type][]string{
	reflect.TypeFor[policy.Mode]():        {"audit", "enforce", "off"},
	reflect.TypeFor[policy.Posture]():     {"default", "strict"},
	reflect.TypeFor[policy.Action]():      {"log", "alert", "block"},
	reflect.TypeFor[policy.AlertOn]():     {"literal", "either"},
	reflect.TypeFor[policy.TokenAction](): {"off", "alert", "block"},
	reflect.TypeFor[policy.API]():         {"any", "v1", "v2"},
	reflect.TypeFor[event.TokenScope]():   {"unit", "parent", "process"},
	reflect.TypeFor[event.Layout]():       {"own", "defend"},
	reflect.TypeFor[sink.Fsync]():         {"never", "rotate", "interval", "always"},
	reflect.TypeFor[iptables.Backend]():   {"auto", "nft", "legacy"},
	reflect.TypeFor[attribution.Level]():  {"L0", "L1", "L2", "L3"},
	reflect.TypeFor[Uncovered]():          {"deny", "report"},
}

// texts are other types that are written as a text.
var texts = map[reflect.Type]schema{
	reflect.TypeFor[policy.Date]():    {"type": "string", "pattern": `^[0-9]{4}-[0-9]{2}-[0-9]{2}$`},
	reflect.TypeFor[netip.AddrPort](): {"type": "string", "pattern": `^(\[.*\]|[0-9.]+):[0-9]+$`},
	reflect.TypeFor[netip.Addr]():     {"type": "string"},
	reflect.TypeFor[time.Duration]():  {"type": "string", "pattern": `^([0-9.]+(ns|us|µs|ms|s|m|h))+$`},
	reflect.TypeFor[sink.Window]():    {"type": "string", "pattern": `^([0-9.]+(ns|us|µs|ms|s|m|h))+$`},
	reflect.TypeFor[LogLevel]():       {"enum": logLevels},
	reflect.TypeFor[MetricsAddress](): {"type": "string", "pattern": `^(unix:/.+|127\.[0-9.]+:[0-9]+|\[::1\]:[0-9]+)$`},
}

func classNames() (names []string) {
	for _, c := range imds.Classes() {
		names = append(names, c.String())
	}
	return names
}

// required are the keys that an element of a list cannot be without.
var required = map[string][]string{
	"grants[]": {"name", "executable", "owner", "reason"},
	"denies[]": {"name", "reason"},
}

// schemaOf describes a type; at is the key that has it, with "[]" for an element.
func schemaOf(t reflect.Type, at string) schema {
	t = yamlfile.Indirect(t)
	if strings.HasSuffix(at, ".classes[]") {
		return schema{"enum": classNames()}
	}
	if strings.HasSuffix(at, "[].user") || strings.HasSuffix(at, "[].group") {
		return schema{"type": []string{"string", "integer"}}
	}
	if names, ok := words[t]; ok {
		return schema{"enum": names}
	}
	if s, ok := texts[t]; ok {
		return s
	}
	switch t.Kind() {
	case reflect.Bool:
		return schema{"type": "boolean"}
	case reflect.String:
		return schema{"type": "string"}
	case reflect.Uint8:
		return schema{"type": "integer", "minimum": 0, "maximum": 1<<8 - 1}
	case reflect.Uint16:
		return schema{"type": "integer", "minimum": 0, "maximum": 1<<16 - 1}
	case reflect.Int, reflect.Int64:
		return schema{"type": "integer", "minimum": 0}
	case reflect.Slice:
		list := schema{"type": "array", "items": schemaOf(t.Elem(), at+"[]")}
		if t == reflect.TypeFor[policy.OneOrMore]() {
			return schema{"oneOf": []schema{list["items"].(schema), list}}
		}
		return list
	case reflect.Map:
		s := schema{"type": "object", "additionalProperties": schemaOf(t.Elem(), at+".*")}
		if at == "classes" || strings.HasSuffix(at, ".classes") {
			s["propertyNames"] = schema{"enum": classNames()}
		}
		return s
	}
	properties := schema{}
	for _, k := range yamlfile.KeysOf(t) {
		properties[k.Name] = schemaOf(k.Type, strings.TrimPrefix(at+"."+k.Name, "."))
	}
	s := schema{"type": "object", "additionalProperties": false, "properties": properties}
	if keys, ok := required[at]; ok {
		s["required"] = keys
	}
	return s
}
