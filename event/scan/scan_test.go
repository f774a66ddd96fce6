package scan

import (
	"encoding/json"
	"strings"
	"testing"
)

// FuzzSkip compares what is skipped with what encoding/json takes.
func FuzzSkip(f *testing.F) {
	for _, text := range []string{`{"a":[1,-2.5e+3,"\u0041\\",true,null,{}],"b":false}`, `01`, `-`, `[1,]`, `"\x"`, "\"\x01\"", `{"a" 1}`, `1 2`, "\x00", "[1]\x00", " "} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		j := JSON{Line: text, MaxDepth: 64}
		j.Skip()
		j.End()
		if valid := json.Valid(text); valid != (j.Err == nil) && !(valid && strings.Contains(j.Err.Error(), "in each other")) {
			t.Errorf("%q: %v, and valid is %v", text, j.Err, valid)
		}
	})
}

// FuzzValues compares what single values say with what encoding/json makes of them.
func FuzzValues(f *testing.F) {
	for _, text := range []string{`"a\u00e9\ud83d\n"`, `"\ud83d\ude00"`, `12`, `-9223372036854775808`, `01`, `1e3`, `true`, `null`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var s string
		j := JSON{Line: text, MaxDepth: 64}
		got := j.Text()
		if j.End(); j.Err == nil {
			if err := json.Unmarshal(text, &s); err != nil || string(got) != s && !strings.Contains(s, "\uFFFD") {
				t.Errorf("text %q: %q, %q, %v", text, got, s, err)
			}
		}
		var n int64
		j = JSON{Line: text, MaxDepth: 64}
		i := j.Int()
		if j.End(); j.Err == nil {
			if err := json.Unmarshal(text, &n); err != nil || n != i {
				t.Errorf("int %q: %d, %d, %v", text, i, n, err)
			}
		}
		var b bool
		j = JSON{Line: text, MaxDepth: 64}
		is := j.Bool()
		if j.End(); j.Err == nil {
			if err := json.Unmarshal(text, &b); err != nil || b != is {
				t.Errorf("bool %q: %v, %v, %v", text, is, b, err)
			}
		}
	})
}
