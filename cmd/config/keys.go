package config

import (
	"encoding"
	"reflect"
	"slices"
	"strings"
)

// key is one that a mapping of the configuration may have.
type key struct {
	name  string
	typ   reflect.Type // of the value, without pointers
	index []int        // of the field
}

// keysOf lists the keys of a struct in the order in which it has them, inline ones in
// their place.
func keysOf(t reflect.Type) (all []key) {
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case !f.IsExported() || name == "-":
		case options == "inline":
			for _, k := range keysOf(f.Type) {
				k.index = append(slices.Clone(f.Index), k.index...)
				all = append(all, k)
			}
		default:
			all = append(all, key{name, indirect(f.Type), f.Index})
		}
	}
	return all
}

func indirect(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Pointer {
		return t.Elem()
	}
	return t
}

var textType = reflect.TypeFor[encoding.TextUnmarshaler]()

// isText reports whether values of a type are written as one text.
func isText(t reflect.Type) bool { return reflect.PointerTo(t).Implements(textType) }
