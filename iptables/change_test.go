package iptables

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// small is a plan that is easy to read.
var small = FamilyPlan{
	Chains: []Chain{{"filter", "IMDSGATE-INPUT", []string{"-p tcp -j DROP"}}, {"nat", "IMDSGATE-OUTPUT", []string{"-j RETURN", "-p tcp -j REDIRECT --to-ports 254"}}},
	Jumps: []Jump{
		{"filter", "INPUT", 1, "-d 127.0.0.1/32 -j IMDSGATE-INPUT"},
		{"nat", "OUTPUT", 1, "-d 10.0.0.1/32 -j IMDSGATE-OUTPUT"},
		{"nat", "OUTPUT", 2, "-d 10.0.0.2/32 -j IMDSGATE-OUTPUT"},
	},
}

const smallInPlace = `*filter
:INPUT ACCEPT [0:0]
:IMDSGATE-INPUT - [0:0]
-A INPUT -d 127.0.0.1/32 -j IMDSGATE-INPUT
-A INPUT -i lo -j ACCEPT
-A IMDSGATE-INPUT -p tcp -j DROP
COMMIT
*nat
:OUTPUT ACCEPT [0:0]
:IMDSGATE-OUTPUT - [0:0]
-A OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT
-A OUTPUT -d 10.0.0.2/32 -j IMDSGATE-OUTPUT
-A OUTPUT -j DOCKER
-A IMDSGATE-OUTPUT -j RETURN
-A IMDSGATE-OUTPUT -p tcp -j REDIRECT --to-ports 254
COMMIT
`

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name   string
		have   string // smallInPlace after these replacements
		edits  []string
		words  []string
		script string
	}{
		{name: "in place"},
		{
			name:  "rule altered and one more",
			edits: []string{"-A IMDSGATE-OUTPUT -j RETURN\n", "-A IMDSGATE-OUTPUT -j ACCEPT\n-A IMDSGATE-OUTPUT -j RETURN\n"},
			words: []string{
				`IPv4 nat IMDSGATE-OUTPUT: rule 1 altered; have "-j ACCEPT"; want "-j RETURN"`,
				`IPv4 nat IMDSGATE-OUTPUT: rule 2 altered; have "-j RETURN"; want "-p tcp -j REDIRECT --to-ports 254"`,
				`IPv4 nat IMDSGATE-OUTPUT: rule 3 not in the plan; have "-p tcp -j REDIRECT --to-ports 254"`,
			},
			script: "*nat\n:IMDSGATE-OUTPUT - [0:0]\n-A IMDSGATE-OUTPUT -j RETURN\n-A IMDSGATE-OUTPUT -p tcp -j REDIRECT --to-ports 254\nCOMMIT\n",
		},
		{
			name:   "chain flushed",
			edits:  []string{"-A IMDSGATE-INPUT -p tcp -j DROP\n", ""},
			words:  []string{`IPv4 filter IMDSGATE-INPUT: rule 1 missing; want "-p tcp -j DROP"`},
			script: "*filter\n:IMDSGATE-INPUT - [0:0]\n-A IMDSGATE-INPUT -p tcp -j DROP\nCOMMIT\n",
		},
		{
			name:  "somebody came first",
			edits: []string{"-A OUTPUT -d 10.0.0.1/32", "-A OUTPUT -j FIRST\n-A OUTPUT -d 10.0.0.1/32"},
			words: []string{
				`IPv4 nat OUTPUT: jump at place 2 instead of 1; have "-d 10.0.0.1/32 -j IMDSGATE-OUTPUT"`,
				`IPv4 nat OUTPUT: jump at place 3 instead of 2; have "-d 10.0.0.2/32 -j IMDSGATE-OUTPUT"`,
			},
			script: "*nat\n-D OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-D OUTPUT -d 10.0.0.2/32 -j IMDSGATE-OUTPUT\n" +
				"-I OUTPUT 1 -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-I OUTPUT 2 -d 10.0.0.2/32 -j IMDSGATE-OUTPUT\nCOMMIT\n",
		},
		{
			name: "twice, one lost, one of an older plan and one in a foreign chain",
			edits: []string{
				"-A OUTPUT -d 10.0.0.2/32 -j IMDSGATE-OUTPUT\n", "-A OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-A OUTPUT -g IMDSGATE-OLD\n",
				":IMDSGATE-OUTPUT - [0:0]", ":THEIRS - [0:0]\n:IMDSGATE-OUTPUT - [0:0]\n:IMDSGATE-OLD - [0:0]",
				"-A OUTPUT -j DOCKER\n", "-A THEIRS -p udp -j IMDSGATE-OLD\n",
			},
			words: []string{
				`IPv4 nat OUTPUT: jump missing; want "-d 10.0.0.2/32 -j IMDSGATE-OUTPUT"`,
				`IPv4 nat OUTPUT: jump not in the plan; have "-d 10.0.0.1/32 -j IMDSGATE-OUTPUT"`,
				`IPv4 nat OUTPUT: jump not in the plan; have "-g IMDSGATE-OLD"`,
				`IPv4 nat THEIRS: jump not in the plan; have "-p udp -j IMDSGATE-OLD"`,
				`IPv4 nat IMDSGATE-OLD: chain not in the plan`,
			},
			script: "*nat\n-D OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-D OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-D OUTPUT -g IMDSGATE-OLD\n" +
				"-I OUTPUT 1 -d 10.0.0.1/32 -j IMDSGATE-OUTPUT\n-I OUTPUT 2 -d 10.0.0.2/32 -j IMDSGATE-OUTPUT\n" +
				"-D THEIRS -p udp -j IMDSGATE-OLD\n:IMDSGATE-OLD - [0:0]\n-X IMDSGATE-OLD\nCOMMIT\n",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			have, err := parseSave(strings.NewReplacer(c.edits...).Replace(smallInPlace))
			if err != nil {
				t.Fatal(err)
			}
			got := compare(have, small)
			var words []string
			for _, d := range got.differences {
				words = append(words, d.String())
			}
			if diff := cmp.Diff(c.words, words); diff != "" {
				t.Errorf("in words, - expected, + got:\n%s", diff)
			}
			if diff := cmp.Diff(c.script, got.script()); diff != "" {
				t.Errorf("as commands, - expected, + got:\n%s", diff)
			}
		})
	}
}

// A removal takes the guard first and the door of the listeners last.
func TestCompareRemoval(t *testing.T) {
	have, err := parseSave(smallInPlace)
	if err != nil {
		t.Fatal(err)
	}
	const want = `*nat
-D OUTPUT -d 10.0.0.1/32 -j IMDSGATE-OUTPUT
-D OUTPUT -d 10.0.0.2/32 -j IMDSGATE-OUTPUT
:IMDSGATE-OUTPUT - [0:0]
-X IMDSGATE-OUTPUT
COMMIT
*filter
-D INPUT -d 127.0.0.1/32 -j IMDSGATE-INPUT
:IMDSGATE-INPUT - [0:0]
-X IMDSGATE-INPUT
COMMIT
`
	if diff := cmp.Diff(want, compare(have, FamilyPlan{}).script()); diff != "" {
		t.Errorf("- expected, + got:\n%s", diff)
	}
}
