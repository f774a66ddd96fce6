package yamlfile

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// How values are read
//
// As the YAML library would read them, whose tags and interfaces the types have: but in
// one walk, with all that is wrong, and each at its place. The library looks through the
// whole file for each value that is a text with a form (encoding.TextUnmarshaler), so that
// a thousand grants with an API took seconds; it forgets where such a value was; and of
// mappings that take in each other it is never done.

// Decode reads the file into a struct, to which to points. All that is wrong comes
// together; keys that the struct does not have are wrong, and so are repeated ones.
func (f *File) Decode(to any) error {
	if f.Root == nil {
		return nil
	}
	d := decoder{File: f, anchors: map[string]ast.Node{}}
	err := d.value(f.Root, reflect.ValueOf(to).Elem(), "")
	if d.over() { // whatever else is said of what was not read
		return f.At(d.last, fmt.Errorf("more than %d values, each as often as aliases (*) stand for it", maxValues))
	}
	return err
}

// Explainer is a mapping that knows why it does not have a key, of which somebody may
// think; "" if it does not.
type Explainer interface{ WhyNot(key string) string }

// OrOne is a list for which one value may stand.
type OrOne interface{ OrOne() }

type decoder struct {
	*File
	anchors map[string]ast.Node
	values  int
	last    *token.Token // of a value that was read
}

func (d *decoder) over() bool { return d.values > maxValues }

// value reads a node; parent is the key that has it.
func (d *decoder) value(node ast.Node, v reflect.Value, parent string) error {
	if d.over() || node == nil {
		return nil
	}
	d.values, d.last = d.values+1, node.GetToken()
	switch n := node.(type) {
	case *ast.AnchorNode:
		err := d.value(n.Value, v, parent)
		d.anchors[n.Name.GetToken().Value] = n.Value // not before: it is no part of itself
		return err
	case *ast.AliasNode:
		node, ok := d.anchors[n.Value.GetToken().Value]
		if !ok {
			return d.At(n.Value.GetToken(), fmt.Errorf("no anchor &%s is above", n.Value.GetToken().Value))
		}
		return d.value(node, v, parent)
	case *ast.TagNode:
		if !strings.HasPrefix(n.Start.Value, "!!") || n.Start.Value == "!!binary" || n.Value == nil {
			return d.At(n.Start, fmt.Errorf("%s is a tag, and none belongs here: leave it out", n.Start.Value))
		}
		return d.value(n.Value, v, parent)
	case *ast.NullNode:
		return nil
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	at := func(err error) error {
		if errors.As(err, new(*Fault)) || err == nil {
			return err
		}
		return d.At(firstToken(node), err)
	}
	switch to := v.Addr().Interface().(type) {
	case interface{ UnmarshalYAML(func(any) error) error }:
		return at(to.UnmarshalYAML(func(to any) error {
			return d.value(node, reflect.ValueOf(to).Elem(), parent)
		}))
	case *time.Duration:
		text, err := d.text(node)
		if err == nil {
			*to, err = time.ParseDuration(text)
		}
		if err == nil && *to < 0 {
			err = fmt.Errorf("%v is negative", *to)
		}
		return at(err)
	case encoding.TextUnmarshaler:
		text, err := d.text(node)
		if err == nil {
			err = to.UnmarshalText([]byte(text))
		}
		return at(err)
	}
	switch v.Kind() {
	case reflect.String:
		text, err := d.text(node)
		v.SetString(text)
		return err
	case reflect.Bool:
		n, ok := node.(*ast.BoolNode)
		if !ok {
			return d.wanted("true or false", node)
		}
		v.SetBool(n.Value)
		return nil
	case reflect.Struct, reflect.Map:
		return d.mapping(node, v, parent)
	case reflect.Slice:
		values := []ast.Node{node}
		if list, ok := node.(*ast.SequenceNode); ok {
			values = list.Values
		} else if _, ok := v.Addr().Interface().(OrOne); !ok {
			return d.wanted("a list", node)
		}
		var errs []error
		v.Set(reflect.MakeSlice(v.Type(), len(values), len(values)))
		for i, e := range values {
			errs = append(errs, d.value(e, v.Index(i), parent))
		}
		return errors.Join(errs...)
	}
	return d.number(node, v)
}

func (d *decoder) number(node ast.Node, v reflect.Value) error {
	n, ok := node.(*ast.IntegerNode)
	if !ok {
		return d.wanted("a number", node)
	}
	number := reflect.ValueOf(n.Value)
	if !number.CanInt() && !number.CanUint() || !number.CanConvert(v.Type()) {
		return d.wanted("a number", node)
	}
	v.Set(number.Convert(v.Type()))
	if fmt.Sprint(v.Interface()) != fmt.Sprint(n.Value) || v.CanInt() && v.Int() < 0 { // nothing is counted in less than none
		return d.At(n.Token, fmt.Errorf("%v is too large or too small", n.Value))
	}
	return nil
}

// text is a value as it is written, without quotes: 0123 is no number where a text is wanted.
func (d *decoder) text(node ast.Node) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.LiteralNode:
		return n.Value.Value, nil
	case ast.ScalarNode:
		return n.GetToken().Value, nil
	}
	return "", d.wanted("a text", node)
}

// mapping reads into a struct or a map. What is taken in (<<) goes first, so that what is
// written goes over it.
func (d *decoder) mapping(node ast.Node, v reflect.Value, parent string) error {
	m, ok := node.(ast.MapNode)
	if !ok {
		return d.wanted("a mapping of keys", node)
	}
	if v.Kind() == reflect.Map && v.IsNil() {
		v.Set(reflect.MakeMap(v.Type()))
	}
	var errs []error
	for i := m.MapRange(); i.Next(); {
		if i.Key().IsMergeKey() {
			errs = append(errs, d.merge(i.Value(), v, parent))
		}
	}
	var keys []Key
	if v.Kind() == reflect.Struct {
		keys = KeysOf(v.Type())
	}
	seen := map[string]bool{}
	for i := m.MapRange(); i.Next() && !d.over(); {
		if i.Key().IsMergeKey() {
			continue
		}
		key := i.Key().GetToken()
		if seen[key.Value] {
			errs = append(errs, d.At(key, fmt.Errorf("the key %q is there twice", key.Value)))
		}
		seen[key.Value] = true
		if v.Kind() == reflect.Map {
			value := reflect.New(v.Type().Elem()).Elem()
			errs = append(errs, d.value(i.Value(), value, key.Value))
			v.SetMapIndex(reflect.ValueOf(key.Value), value)
			continue
		}
		k := slices.IndexFunc(keys, func(k Key) bool { return k.Name == key.Value })
		if k < 0 {
			errs = append(errs, d.At(key, unknown(key.Value, parent, keys, v)))
			continue
		}
		errs = append(errs, d.value(i.Value(), v.FieldByIndex(keys[k].Index), key.Value))
	}
	return errors.Join(errs...)
}

// merge takes in a mapping, or several of which the first goes over the others.
func (d *decoder) merge(node ast.Node, v reflect.Value, parent string) error {
	if list, ok := node.(*ast.SequenceNode); ok {
		var errs []error
		for _, e := range slices.Backward(list.Values) {
			errs = append(errs, d.merge(e, v, parent))
		}
		return errors.Join(errs...)
	}
	return d.value(node, v, parent)
}

// unknown says what to write in place of a key that is not among those there are.
func unknown(name, parent string, keys []Key, v reflect.Value) error {
	message := fmt.Sprintf("unknown key %q", name)
	if parent != "" {
		message += " of " + parent
	}
	if x, ok := v.Addr().Interface().(Explainer); ok && x.WhyNot(name) != "" {
		return fmt.Errorf("%s: %s", message, x.WhyNot(name))
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.Name)
	}
	if near := syntax.Nearest(name, slices.Values(names)); near != "" {
		return fmt.Errorf("%s; is it %s?", message, near)
	}
	return fmt.Errorf("%s; there are %s", message, strings.Join(names, ", "))
}

// wanted says what a value is, and what it must be.
func (d *decoder) wanted(what string, node ast.Node) error {
	is := "a text"
	switch node.(type) {
	case *ast.BoolNode:
		is = "true or false"
	case *ast.IntegerNode, *ast.FloatNode:
		is = "a number"
	case *ast.SequenceNode:
		is = "a list"
	case ast.MapNode:
		is = "a mapping of keys"
	}
	if is == what {
		is = "a fraction"
	}
	return d.At(firstToken(node), fmt.Errorf("%s is wanted here, and not %s", what, is))
}

// Key is one that a mapping may have.
type Key struct {
	Name  string
	Type  reflect.Type // of the value, without pointers
	Index []int        // of the field
}

// KeysOf lists the keys of a struct in the order in which it has them, inline ones in
// their place.
func KeysOf(t reflect.Type) (all []Key) {
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case !f.IsExported() || name == "-":
		case options == "inline":
			for _, k := range KeysOf(f.Type) {
				k.Index = append(slices.Clone(f.Index), k.Index...)
				all = append(all, k)
			}
		default:
			all = append(all, Key{name, Indirect(f.Type), f.Index})
		}
	}
	return all
}

// Indirect is a type without the pointer to it.
func Indirect(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Pointer {
		return t.Elem()
	}
	return t
}

// IsText reports whether values of a type are written as one text.
func IsText(t reflect.Type) bool {
	return reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}
