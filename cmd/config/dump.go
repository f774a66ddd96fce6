package config

import (
	"encoding"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// Dump writes the configuration as one file that means the same: what is set, and what
// that is which nobody has set, as far as it is known before the daemon starts. With
// origin each value has its file and line behind it.
func (c Config) Dump(w io.Writer, origin bool) error {
	d := dumper{config: c, comments: yaml.CommentMap{}}
	if origin {
		d.comment = func(key string) {
			text := " " + c.Origin(key)
			if text == " " {
				text = " default"
			}
			d.comments["$."+key] = []*yaml.Comment{yaml.LineComment(text)}
		}
	}
	b, err := yaml.MarshalWithOptions(d.tree(), yaml.WithComment(d.comments), yaml.IndentSequence(true))
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

// DumpJSON writes the configuration as an object, and with origin beside it in another
// where each key is set.
func (c Config) DumpJSON(w io.Writer, origin bool) error {
	origins := map[string]string{}
	d := dumper{config: c, comment: func(key string) {
		if at := c.Origin(key); at != "" {
			origins[key] = at
		}
	}}
	var value any = d.tree()
	if origin {
		list := yaml.MapSlice{}
		for _, key := range slices.Sorted(maps.Keys(origins)) {
			list = append(list, yaml.MapItem{Key: key, Value: origins[key]})
		}
		value = yaml.MapSlice{{Key: "config", Value: value}, {Key: "origin", Value: list}}
	}
	b, err := yaml.MarshalWithOptions(value, yaml.JSON())
	if err == nil {
		_, err = w.Write(append(b[:len(b):len(b)], '\n'))
	}
	return err
}

// dumper makes the tree that is written.
type dumper struct {
	config   Config
	comments yaml.CommentMap
	comment  func(key string) // on each value; or nil
}

func (d *dumper) tree() yaml.MapSlice {
	c := d.config
	c.Redirect = c.Redirect.WithDefaults()
	return d.mapping("", reflect.ValueOf(c))
}

func (d *dumper) mapping(at string, v reflect.Value) yaml.MapSlice {
	m := yaml.MapSlice{}
	for _, k := range yamlfile.KeysOf(v.Type()) {
		key := k.Name
		if at != "" {
			key = at + "." + k.Name
		}
		if value, ok := d.value(key, v.FieldByIndex(k.Index)); ok {
			m = append(m, yaml.MapItem{Key: k.Name, Value: value})
		}
	}
	return m
}

// value is what is written for a key. It is not there if nobody has set it and its zero
// value only says so.
func (d *dumper) value(key string, v reflect.Value) (value any, ok bool) {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return nil, false
		}
		v = v.Elem()
	}
	set := d.config.Origin(key) != ""
	switch t := v.Type(); {
	case yamlfile.IsText(t):
		text, err := v.Interface().(encoding.TextMarshaler).MarshalText()
		// What has a name for its zero is worth saying, and in each grant it is not.
		if err != nil || len(text) == 0 || v.IsZero() && !set && (t.Kind() == reflect.Struct || strings.Contains(key, "[")) {
			return nil, false
		}
		value = string(text)
	case t.Kind() == reflect.Struct:
		m := d.mapping(key, v)
		return m, len(m) > 0
	case t.Kind() == reflect.Map:
		m := yaml.MapSlice{}
		for _, name := range slices.Sorted(maps.Keys(mapKeys(v))) {
			if e, ok := d.value(key+"."+name, v.MapIndex(reflect.ValueOf(name))); ok {
				m = append(m, yaml.MapItem{Key: name, Value: e})
			}
		}
		return m, len(m) > 0
	case t.Kind() == reflect.Slice:
		return d.list(key, v)
	case v.IsZero() && !set:
		return nil, false
	default:
		value = v.Interface()
	}
	if d.comment != nil {
		d.comment(key)
	}
	return value, true
}

func mapKeys(v reflect.Value) map[string]bool {
	names := map[string]bool{}
	for _, k := range v.MapKeys() {
		names[k.String()] = true
	}
	return names
}

func (d *dumper) list(key string, v reflect.Value) (any, bool) {
	if v.Len() == 0 {
		return nil, false
	}
	list := make([]any, 0, v.Len())
	for i := range v.Len() {
		at := fmt.Sprintf("%s[%d]", key, i)
		if e, ok := d.value(at, v.Index(i)); ok {
			list = append(list, e)
		}
	}
	return list, true
}
