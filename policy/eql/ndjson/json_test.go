package ndjson

import (
	"encoding/json"
	"strings"
	"testing"
)

// A line is JSON if encoding/json says so, wherever in it a character stands that means
// something, and however deep it nests.
func TestCursor(t *testing.T) {
	var lines []string
	for n := range 20 {
		before := strings.Repeat("é", n/2) + strings.Repeat("x", n%2)
		for _, at := range []string{"", `\"`, `\\`, `\/`, `\u00e9`, `\u00g9`, `\u00e`, `\x`, `\`, `"`, "\x1f", "\x00", "\x7f", "\x80", " ", "!", "#", "[", "]"} {
			for _, after := range []string{"", "y", "yyyyyyyyyyy"} {
				text := before + at + after
				lines = append(lines, `{"a":"`+text+`"}`, `{"`+text+`":1 , "a" : [ "x" ] }`, `{"a":"`+text)
			}
		}
	}
	for _, value := range []string{
		"0", "-0", "01", "-", "1.", ".5", "1.5", "1e5", "1E+5", "1e", "1e-", "-1.25e-07", "+1", "0x1", "1_0", "1a", "NaN",
		"true", "tru", "truee", "false", "null", "nul", "True", "{}", "[]", "[,]", "[1,]", "[1 2]", `{"b":1,}`, `{,}`, `{"b"}`, `{"b":}`, `{1:2}`,
		"{ \t\r\n}", "[\v]", "\u00a01", "1 2", "1]", "}", "",
	} {
		lines = append(lines, `{"a":`+value+`}`, `{"c":[`+value+`],"a":{"d":`+value+`}}`)
	}
	for _, depth := range []int{5, 9_999, 10_000, 10_001} {
		lines = append(lines, `{"a":`+strings.Repeat("[", depth-1)+strings.Repeat("]", depth-1)+`}`, strings.Repeat(`{"a":`, depth)+"1"+strings.Repeat("}", depth))
	}
	d := newClock(Roles{Timestamp: "a"})
	for _, line := range lines {
		if err := d.decode([]byte(line)); (err == nil) != json.Valid([]byte(line)) {
			t.Errorf("%.80q: %v", line, err)
		}
	}
}
