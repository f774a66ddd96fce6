package policytest

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/proxy/imds"
)

// check says what is wrong with a file that could be read, all of it at once.
func (f *File) check() error {
	var errs []error
	wrong := func(p, format string, args ...any) { errs = append(errs, f.wrong(p, format, args...)) }
	ref := func(p string, r Ref) {
		if r.In != nil {
			f.checkSubject(wrong, p, r.In)
		} else if _, ok := f.Subjects[r.Name]; r.Name != Nobody && !ok {
			wrong(p, "there is no subject %q; there are %s", r.Name, f.subjects())
		}
	}
	refs := func(p string, all []Ref) {
		for i, r := range all {
			ref(element(p, i), r)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f.Subjects)) {
		s := f.Subjects[name]
		p := "subjects." + name
		if name == Nobody || name == own || name == unknown || name == "" || strings.HasPrefix(name, "/") {
			wrong(p, "a subject cannot be named %q, which means something else", name)
		}
		f.checkSubject(wrong, p, &s)
	}
	if name := f.circle(); name != "" {
		wrong("subjects."+name, "subject %q is its own parent, or like itself", name)
	}
	if len(f.Cases) == 0 && len(errs) == 0 {
		wrong("", "there are no cases")
	}
	for i := range f.Cases {
		c, p := &f.Cases[i], element("cases", i)
		if c.Name == "" {
			wrong(p, "a case needs a name")
		}
		if !c.Subject.set() {
			wrong(p, "case %q does not say who asks (subject)", c.Name)
		} else {
			ref(p+".subject", c.Subject)
		}
		refs(p+".others", c.Others)
		if len(c.Others) > 0 && c.Subject.Name == Nobody {
			wrong(p+".others", "where nobody is known there are no others: leave it out, or subject")
		}
		if len(c.Request) == 0 {
			wrong(p, "case %q does not say what is asked (request)", c.Name)
		}
		for j := range c.Request {
			f.checkRequest(wrong, element(p+".request", j), &c.Request[j])
		}
		for j := range c.Before {
			step, p := &c.Before[j], element(p+".before", j)
			if step.Subject.set() {
				ref(p+".subject", step.Subject)
			}
			switch {
			case step.Request != nil:
				f.checkRequest(wrong, p+".request", step.Request)
			case step.Subject.Name == Nobody || !step.Subject.set() && c.Subject.Name == Nobody:
				wrong(p, "a program that starts is somebody: say which subject")
			}
			if j > 0 && step.Ago > c.Before[j-1].Ago {
				wrong(p+".ago", "this was before the step above it: write the oldest first")
			}
			if step.Times > maxTimes {
				wrong(p+".times", "times is from 1 to %d", maxTimes)
			}
		}
		if e := c.Expect; reflect.ValueOf(e).IsZero() {
			wrong(p, "case %q expects nothing: say which verdict, rule, grant, class, alert, matches or reason", c.Name)
		} else if e.Class != "" && !slices.ContainsFunc(imds.Classes(), func(c imds.Class) bool { return c.String() == e.Class }) {
			wrong(p+".expect.class", "there is no class %q; there are %v", e.Class, imds.Classes())
		}
	}
	return errors.Join(errs...)
}

// element is the key of an element of a list.
func element(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }

// maxTimes bounds the repetitions of a step.
const maxTimes = 10000

func (f *File) checkSubject(wrong func(string, string, ...any), p string, s *Subject) {
	if s.Like != "" {
		if _, ok := f.Subjects[s.Like]; !ok {
			wrong(p+".like", "there is no subject %q; there are %s", s.Like, f.subjects())
			return
		}
	}
	for i, r := range s.Parent {
		if r.In != nil {
			f.checkSubject(wrong, element(p+".parent", i), r.In)
		} else if _, ok := f.Subjects[r.Name]; r.Name != Nobody && !ok {
			wrong(element(p+".parent", i), "there is no subject %q; there are %s", r.Name, f.subjects())
		}
	}
	if how := or(s.Ancestry, "birth"); !slices.Contains([]string{"birth", "snapshot", "present"}, how) {
		wrong(p+".ancestry", "ancestry %q is none of birth, snapshot, present", how)
	}
	if s.Executable == nil && s.Like == "" && !or(s.Unreadable, false) {
		wrong(p, "which program is it? Say executable, or like with the name of another subject")
	}
}

func (f *File) checkRequest(wrong func(string, string, ...any), p string, r *Request) {
	if r.Path == "" {
		wrong(p, "what is asked for? Write GET /latest/meta-data/, or path")
	}
	for name, value := range r.Headers {
		if strings.ContainsAny(name+value, "\r\n") {
			wrong(p+".headers", "a header is one line")
		}
	}
	if strings.ContainsAny(r.Method+r.Path, "\r\n") {
		wrong(p, "method and path are one line")
	}
	if _, ok := f.Subjects[r.Token]; r.Token != "" && r.Token != own && r.Token != unknown && !ok {
		wrong(p+".token", "whose token? Say own, unknown, or the subject to whom it was issued: %s", f.subjects())
	}
}

// circle is the first subject that leads back to itself, as its own parent or by like;
// "" if there is none.
func (f *File) circle() string {
	const under, done = 1, 2
	state := map[string]int{}
	var leads func(s *Subject) bool
	visit := func(name string) bool {
		s, ok := f.Subjects[name]
		switch {
		case !ok || state[name] == done:
			return false
		case state[name] == under:
			return true
		}
		state[name] = under
		circular := leads(&s)
		state[name] = done
		return circular
	}
	leads = func(s *Subject) bool {
		return s.Like != "" && visit(s.Like) || slices.ContainsFunc(s.Parent, func(r Ref) bool {
			if r.In != nil {
				return leads(r.In)
			}
			return visit(r.Name)
		})
	}
	for _, name := range slices.Sorted(maps.Keys(f.Subjects)) {
		if visit(name) {
			return name
		}
	}
	return ""
}

func (f *File) subjects() string {
	names := slices.Sorted(maps.Keys(f.Subjects))
	if len(names) == 0 {
		return "none in this file"
	}
	return strings.Join(names, ", ")
}
