package yamlfile

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

// doc has one of each kind that files have.
type doc struct {
	Text  string            `yaml:"text"`
	Yes   bool              `yaml:"yes"`
	Small uint8             `yaml:"small"`
	Large int               `yaml:"large"`
	Some  *int              `yaml:"some"`
	Wait  time.Duration     `yaml:"wait"`
	Day   day               `yaml:"day"`
	One   oneOrMore         `yaml:"one"`
	List  []string          `yaml:"list"`
	Names map[string]string `yaml:"names"`
	Below []doc             `yaml:"below"`
	More  `yaml:",inline"`
}

type More struct {
	Extra string `yaml:"extra"`
}

type day struct{ text string }

func (d *day) UnmarshalText(text []byte) error {
	if d.text = string(text); d.text == "never" {
		return fmt.Errorf("%q is no day", text)
	}
	return nil
}

type oneOrMore []string

func (*oneOrMore) OrOne() {}

func read(text string) (d doc, err error) {
	f, err := Parse("x.yaml", []byte(text))
	if err == nil {
		err = f.Decode(&d)
	}
	return d, err
}

func TestDecode(t *testing.T) {
	five := 5
	for _, c := range []struct {
		text string
		want doc
	}{
		{"", doc{}},
		{"---\n# nothing\n", doc{}},
		{"text: a\r\nyes: true\r\n", doc{Text: "a", Yes: true}},
		{"text: 'it''s'\nsmall: 255\nlarge: 0x10\nsome: 5\n", doc{Text: "it's", Small: 255, Large: 16, Some: &five}},
		{"text: ~\nyes:\nsome: null\nlist: []\n", doc{List: []string{}}},
		{"text: 0123\none: 5\nlist: [true, 1e5, 012345678901]\n", doc{Text: "0123", One: oneOrMore{"5"}, List: []string{"true", "1e5", "012345678901"}}},
		{"wait: 2s\nday: >-\n  1\n  2\none: [a, b]\nextra: x\n", doc{Wait: 2 * time.Second, Day: day{"1 2"}, One: oneOrMore{"a", "b"}, More: More{"x"}}},
		{"day: &d 2026-01-02\nbelow: [{day: *d}]\n", doc{Day: day{"2026-01-02"}, Below: []doc{{Day: day{"2026-01-02"}}}}},
		{"names: {a: b, c.d: e}\ntext: !!str 5\n", doc{Names: map[string]string{"a": "b", "c.d": "e"}, Text: "5"}},
		{"below:\n- &a {text: a, yes: true}\n- &b {text: b}\n- <<: [*b, *a]\n  small: 1\n- small: 2\n  text: own\n  <<: *a\n",
			doc{Below: []doc{{Text: "a", Yes: true}, {Text: "b"}, {Text: "b", Yes: true, Small: 1}, {Text: "own", Yes: true, Small: 2}}}},
	} {
		got, err := read(c.text)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v, %v", c.text, got, err)
		}
	}
}

func TestFaults(t *testing.T) {
	for text, want := range map[string][]string{
		"txt: a\nbelow: [{lst: []}]\n":     {"x.yaml:1:1: unknown key \"txt\"; is it text?", "x.yaml:2:10: unknown key \"lst\" of below; is it list?"},
		"yes: maybe\nsmall: [1]\n":         {":1:6: true or false is wanted here, and not a text", ":2:8: a number is wanted here, and not a list"},
		"small: 256\n":                     {":1:8: 256 is too large or too small"},
		"small: -1\n":                      {":1:8: -1 is too large or too small"},
		"large: -0x10\n":                   {":1:8: -16 is too large or too small"},
		"wait: -2s\n":                      {":1:7: -2s is negative"},
		"large: 18446744073709551615\n":    {":1:8: 18446744073709551615 is too large"},
		"large: 1.5\n":                     {":1:8: a number is wanted here, and not a fraction"},
		"text: {a: b}\nlist: a\n":          {":1:8: a text is wanted here, and not a mapping of keys", ":2:7: a list is wanted here, and not a text"},
		"names: [a]\n":                     {":1:8: a mapping of keys is wanted here, and not a list"},
		"- a\n":                            {":1:1: a mapping of keys is wanted here, and not a list"},
		"wait: soon\nday: never\n":         {":1:7: time: invalid duration", ":2:6: \"never\" is no day"},
		"text: *a\n":                       {":1:8: no anchor &a is above"},
		"text: !x a\n":                     {":1:7: !x is a tag, and none belongs here"},
		"below:\n- <<: *a\n":               {":2:8: no anchor &a is above"},
		"below:\n- <<: 5\n":                {":2:7: a mapping of keys is wanted here, and not a number"},
		"text: a\ntext: b\n":               {":2:1:", "text"},
		"text: a\n---\ntext: b\n":          {":3:1: a second document"},
		"text: [\n":                        {"x.yaml:1:"},
		"# a\n# b\n# c\nlist: [a, \"b\n":   {"    2 | # b\n", "    3 | # c\n", ">    4 | list"},
		"\x1b[31m: a\nyes: \"\x1b[31m\"\n": {"\uFFFD[31m"},
	} {
		_, err := read(text)
		for _, want := range want {
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("%q: %v\nis without %q", text, err, want)
			}
		}
	}
}

// bomb is a text in which each value stands for nine of those before it.
func bomb(first, each, ref string, levels int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "below:\n- &a0 %s\n", first)
	for i := range levels {
		refs := strings.TrimSuffix(strings.Repeat(fmt.Sprintf(ref, i)+",", 9), ",")
		fmt.Fprintf(&b, "- &a%d "+each+"\n", i+1, refs)
	}
	return b.String()
}

// hostile are files that take the YAML library, or a plain reader of what it has read,
// gigabytes or minutes.
func hostile() map[string]string {
	var deep, keys strings.Builder
	for i := range 1000 {
		deep.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	for i := range 100_000 {
		fmt.Fprintf(&keys, "k%d:\n", i)
	}
	return map[string]string{
		"[":                strings.Repeat("[", 200_000),
		"{":                strings.Repeat("{a: ", 200_000),
		"[ over lines":     strings.Repeat("[\n", 200_000),
		"-":                "list:\n  " + strings.Repeat("- ", 200_000),
		"?":                strings.Repeat("? ", 200_000),
		"- behind a tag":   strings.Repeat("!a - ", 100_000),
		"- behind a CR":    "text: a\r" + strings.Repeat("- ", 200_000),
		"tags":             "text: " + strings.Repeat("!a ", 200_000),
		"anchors":          "text: " + strings.Repeat("&a ", 200_000),
		"anchors on lines": "text: " + strings.Repeat("&a\n", 200_000),
		"lines":            deep.String(),
		"keys":             keys.String(),
		"empty lines":      "text: |\n a" + strings.Repeat("\n", 500_000),
		"lines of blanks":  "text: >\n a" + strings.Repeat("\n \t", 200_000),
		"tabs":             "text: \"" + strings.Repeat("\t ", 400_000) + "\"\n",
		"- in brackets":    "list: [" + strings.Repeat("- ", 400_000) + "]\n",
		"aliases":          bomb("{}", "{below: [%s]}", "*a%d", 300),
		"aliases of lists": "list: &l [" + strings.Repeat("a,", 100_000) + "a]\nbelow: [" + strings.Repeat("{list: *l },", 50_000) + "]\n",
		"merges":           bomb("{}", "{<<: [%s]}", "*a%d", 300),
		"size":             strings.Repeat("#\n", MaxSize/2+1),
	}
}

// Nobody's file keeps the reader for long, and what is refused is refused with a reason.
func TestHostile(t *testing.T) {
	for name, text := range hostile() {
		began := time.Now()
		_, err := read(text)
		if err == nil || !strings.Contains(err.Error(), "more than ") || len(err.Error()) > 2000 {
			t.Errorf("%s: %.500v", name, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
	for name, text := range map[string]string{
		"texts":          "below:\n" + strings.Repeat("- {day: a}\n", 20_000),
		"brackets":       "list: [\"" + strings.Repeat("[", 10_000) + "\"]\n# " + strings.Repeat("[", 1000),
		"a long line":    "list: [" + strings.Repeat("/opt/app, ", 10_000) + "]\n",
		"lists in a row": "below:\n" + strings.Repeat("- {list: [a]}\n", 10_000),
	} {
		began := time.Now()
		if _, err := read(text); err != nil {
			t.Errorf("%s: %.500v", name, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}

func TestFind(t *testing.T) {
	f, err := Parse("x.yaml", []byte("below:\n- text: a\n  one: [b,\n    c]\nnames:\n  a.b: x\n  c: &y\n    d: e\none: z\n"))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"below[0].text": "2:9 3", "below[0]": "2:3 2", "below[0].one[1]": "4:5 4", "below[0].none": "2:3 2", "below[7]": "1:1 1",
		"names.a.b": "6:8 3", "names.c.d": "8:8 3", "names.c": "7:3 2", "one[0]": "9:6 2", "none": "1:1 0",
	} {
		at, depth := f.Find(Path(key))
		if got := fmt.Sprintf("%d:%d %d", at.Position.Line, at.Position.Column, depth); got != want {
			t.Errorf("%s is at %s, want %s", key, got, want)
		}
	}
	if f.Length("below") != 1 || f.Length("below", "0", "one") != 2 || f.Length("none") != 0 || f.Length("one") != 0 {
		t.Error("wrong lengths")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("text: a\nbelow:\n- &a {text: a, list: [b]}\n- <<: *a\n  day: >-\n   x\n")
	f.Add("? a\n: b\nnames: {\"c\": !!str 5}\n")
	f.Add(bomb("{}", "{<<: [%s]}", "*a%d", 9))
	f.Add("below: [{text: |\n a\n\n, b: >-\n c}]\n")
	f.Fuzz(func(t *testing.T, text string) {
		began := time.Now()
		file, err := Parse("x.yaml", []byte(text))
		if err != nil {
			return
		}
		var d doc
		if err := file.Decode(&d); err == nil && file.Root == nil && !reflect.DeepEqual(d, doc{}) {
			t.Errorf("%q has no content, and is %+v", text, d)
		}
		file.Find([]string{"below", "0", "text"})
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%d bytes took %v", len(text), took)
		}
	})
}
