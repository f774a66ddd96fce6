package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Each finding that is in the source says what to do, and is in the documentation under its ID; and no others are there.
func TestFindings(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	set := token.NewFileSet()
	for _, file := range files {
		parsed, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				if method, ok := call.Fun.(*ast.SelectorExpr); !ok || method.Sel.Name != "find" || len(call.Args) != 4 {
					return true
				}
				id := literal(call.Args[0])
				if id == "" {
					t.Errorf("%v: a finding whose ID is not written out", set.Position(call.Pos()))
				}
				ids[id] = true
				if !says(f, call.Args[3]) {
					t.Errorf("%v: %s has no fix", set.Position(call.Pos()), id)
				}
				return true
			})
		}
	}
	doc, err := os.ReadFile("../../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "\n## IDs\n")
	section, _, _ = strings.Cut(section, "\n## ")
	documented := map[string]bool{}
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) > 2 { // the first column of a table
			line = cells[1]
		} else if strings.HasPrefix(line, "For ") {
			continue
		}
		for _, name := range regexp.MustCompile("`([a-z][a-z0-9-]+)`").FindAllStringSubmatch(line, -1) {
			documented[name[1]] = true
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(ids)), slices.Sorted(maps.Keys(documented))); diff != "" || len(ids) < 40 {
		t.Errorf("IDs, - in the source, + in docs/doctor.md:\n%s", diff)
	}
}

func literal(e ast.Expr) string {
	l, ok := e.(*ast.BasicLit)
	if !ok {
		return ""
	}
	s, _ := strconv.Unquote(l.Value)
	return s
}

// says reports whether an expression is a text whatever happens before it.
func says(f *ast.FuncDecl, e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return literal(e) != ""
	case *ast.BinaryExpr:
		return says(f, e.X) || says(f, e.Y)
	case *ast.SelectorExpr: // of a rule of somebody else
		return e.Sel.Name == "Fix"
	case *ast.CallExpr:
		of, ok := e.Fun.(*ast.SelectorExpr)
		return ok && (of.Sel.Name == "Fix" || of.Sel.Name == "Sprintf" && says(f, e.Args[0]))
	case *ast.Ident: // whatever it is set to
		set, empty := false, false
		ast.Inspect(f, func(n ast.Node) bool {
			a, ok := n.(*ast.AssignStmt)
			if !ok || len(a.Lhs) != len(a.Rhs) {
				return true
			}
			for i, to := range a.Lhs {
				if name, ok := to.(*ast.Ident); ok && name.Name == e.Name {
					set = true
					from := a.Rhs[i]
					if sum, ok := from.(*ast.BinaryExpr); ok && literal(sum.Y) != "" {
						continue // something is added to it
					}
					empty = empty || !says(f, from)
				}
			}
			return true
		})
		return set && !empty
	}
	return false
}
