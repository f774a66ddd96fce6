package config

import (
	"os"
	"strings"
	"testing"
)

func TestFormat(t *testing.T) {
	for _, c := range []struct{ name, src, want string }{
		{"nothing", "", ""},
		{"a comment", "# nothing yet\n", "# nothing yet\n"},
		{"already", "mode: audit\n\nlog:\n  level: info # loud\n", "mode: audit\n\nlog:\n  level: info # loud\n"},
		{"indentation", "log:\n        level:    info     # loud\nlimits:   {connections:  3}\n", "log:\n  level: info # loud\nlimits: {connections: 3}\n"},
		{"the order of a grant, and lines between two", `grants:
# the application
- reason: "it signs"   # with the role
  # by whom
  owner: o
  executable: [/opt/a,   /opt/b]
  name: app
  unit: app.service
- name: b
  executable:
  - /opt/x
  user: "7"
  owner: o
  reason: r
`, `grants:
  # the application
  - name: app
    executable: [/opt/a, /opt/b]
    unit: app.service
    # by whom
    owner: o
    reason: "it signs" # with the role

  - name: b
    executable:
      - /opt/x
    user: "7"
    owner: o
    reason: r
`},
		{"comments of the file, of what follows and of what is before", `# what this is

# the mode
mode: audit
grants:
    - name: a
      executable: /opt/a
      user: x
      owner: o
      reason: r
    # - name: not yet


    # and more
# the end of it
log: {level: info}

# until here
`, `# what this is

# the mode
mode: audit
grants:
  - name: a
    executable: /opt/a
    user: x
    owner: o
    reason: r
  # - name: not yet

  # and more
# the end of it
log: {level: info}

# until here
`},
		{"several empty lines", "mode: audit\n\n\n\nposture: strict\n", "mode: audit\n\nposture: strict\n"},
		{"a comment before the first key in its new place", "grants:\n- executable: /opt/a\n  # its name\n  name: a\n  user: x\n  owner: o\n  reason: r\n",
			"grants:\n  # its name\n  - name: a\n    executable: /opt/a\n    user: x\n    owner: o\n    reason: r\n"},
		{"lines of text", "grants:\n- name: a\n  executable: /opt/a\n  user: x\n  owner: o\n  reason: |\n      one\n\n        two\n", "grants:\n  - name: a\n    executable: /opt/a\n    user: x\n    owner: o\n    reason: |\n      one\n\n        two\n"},
		{"carriage returns", "mode: audit\r\n# x\r\nposture: strict\r\n", "mode: audit\n# x\nposture: strict\n"},
		{"carriage returns alone", "mode: audit\r\r# x\rposture: strict\r", "mode: audit\n\n# x\nposture: strict\n"},
	} {
		got, err := Format("c.yaml", []byte(c.src))
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.name, err, got, c.want)
		}
	}
	for _, c := range []struct{ name, src, err string }{
		{"a comment in brackets", "classes: {\n  inventory: strict, # x\n  token: default}\n", "c.yaml:2:"},
		{"an anchor", "log: &x {level: info}\n", "anchor"},
		{"a merge", "log:\n  <<: {level: info}\n", "merge"},
		{"a wrong key", "mdoe: audit\n", "is it mode?"},
	} {
		if got, err := Format("c.yaml", []byte(c.src)); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v\n%s", c.name, err, got)
		}
	}
}

// The example that is shipped is in the form that is asked of others.
func TestFormatExample(t *testing.T) {
	b, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Format("packaging/config.yaml", b)
	if err != nil || string(got) != string(b) {
		t.Errorf("%v\n%s", err, got)
	}
}

// What is formatted means the same and has the same comments, or is refused: Format
// sees to that itself, so that what is to be found here is a crash, or that it does not.
func FuzzFormat(f *testing.F) {
	b, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("grants:\n- reason: |\n    x\n  name: a # b\n  # c\n"))
	f.Add([]byte("rules: {paths: [a, 'b', \"c\"]}\n#\nlog:\n  level: >\n   x\n"))
	f.Add([]byte("- - a: b\n  -\n ? c\n : d\n"))
	f.Add([]byte("\r\r#"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		once, err := Format("fuzz", b)
		if err != nil {
			return
		}
		before, errBefore := Parse("before", b)
		after, errAfter := Parse("after", once)
		before.layers, after.layers = nil, nil
		if errBefore != nil || errAfter != nil || !sameConfig(before, after) {
			t.Errorf("%q became %q: %v, %v", b, once, errBefore, errAfter)
		}
		if twice, err := Format("twice", once); err != nil || string(once) != string(twice) {
			t.Errorf("%q, then %q: %v", once, twice, err)
		}
	})
}
