package policytest

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// Report is what was found, in the order of files and cases.
type Report struct {
	Passed  int      `json:"passed"`
	Failed  int      `json:"failed"`
	Files   int      `json:"files"`
	Results []Result `json:"results"`
}

// Add counts the results of a file.
func (r *Report) Add(results []Result) {
	r.Files++
	r.Results = append(r.Results, results...)
	for i := range results {
		if results[i].OK {
			r.Passed++
		} else {
			r.Failed++
		}
	}
}

// title is a result in one line, as no other of its file has it.
func (r *Result) title() string {
	return fmt.Sprintf("%s:%d: %s: %s", r.File, r.Line, r.Name, r.Request)
}

// why is what has failed, a line for each.
func (r *Result) why() string {
	var b strings.Builder
	for _, d := range r.Wrong {
		fmt.Fprintf(&b, "%s: expected %s, got %s\n", d.Key, d.Expected, d.Got)
	}
	if r.Reason != "" {
		fmt.Fprintf(&b, "reason: %s\n", r.Reason)
	}
	return b.String()
}

// WriteJSON writes the report as one object.
func (r *Report) WriteJSON(w io.Writer) error {
	whole := *r
	if whole.Results == nil {
		whole.Results = []Result{}
	}
	return json.NewEncoder(w).Encode(whole)
}

// WriteTAP writes the report in the Test Anything Protocol (testanything.org). All of
// it is as version 14 has it; it says 13, because readers of 14 take that, and the prove
// of Debian 12 refuses whatever says 14.
func (r *Report) WriteTAP(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "TAP version 13\n1..%d\n", len(r.Results))
	for i := range r.Results {
		result := &r.Results[i]
		verdict := "ok"
		if !result.OK {
			verdict = "not ok"
		}
		fmt.Fprintf(&b, "%s %d - %s\n", verdict, i+1, tapText(result.title()))
		if result.OK {
			continue
		}
		// A block of YAML, indented by two.
		block, err := yaml.Marshal(struct {
			Message string       `yaml:"message"`
			File    string       `yaml:"file"`
			Line    int          `yaml:"line"`
			Subject string       `yaml:"subject"`
			Wrong   []Difference `yaml:"wrong"`
		}{strings.TrimSpace(result.why()), result.File, result.Line, result.Subject, result.Wrong})
		if err != nil {
			return fmt.Errorf("write a failure: %w", err)
		}
		b.WriteString("  ---\n")
		for line := range strings.Lines(string(block)) {
			b.WriteString("  " + line)
		}
		b.WriteString("  ...\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

// tapText escapes a description: a hash begins a directive.
func tapText(s string) string {
	return strings.NewReplacer(`\`, `\\`, "#", `\#`, "\n", " ", "\r", " ").Replace(s)
}

// JUnit's elements, as Jenkins and GitLab read them (llg.cubic.org/docs/junit).
type junitSuites struct {
	XMLName  xml.Name     `xml:"testsuites"`
	Name     string       `xml:"name,attr"`
	Tests    int          `xml:"tests,attr"`
	Failures int          `xml:"failures,attr"`
	Errors   int          `xml:"errors,attr"`
	Time     string       `xml:"time,attr"` // seconds
	Suites   []junitSuite `xml:"testsuite"`
}

type junitSuite struct {
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Errors   int         `xml:"errors,attr"`
	Skipped  int         `xml:"skipped,attr"`
	Time     string      `xml:"time,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Name    string        `xml:"name,attr"`
	Class   string        `xml:"classname,attr"`
	File    string        `xml:"file,attr"`
	Line    int           `xml:"line,attr"`
	Time    string        `xml:"time,attr"`
	Failure *junitFailure `xml:"failure"`
}

type junitFailure struct {
	Message string `xml:"message,attr"`
	Type    string `xml:"type,attr"`
	Text    string `xml:",chardata"`
}

// WriteJUnit writes the report as JUnit's XML: a suite for each file.
func (r *Report) WriteJUnit(w io.Writer) error {
	all := junitSuites{Name: "imdsgate test", Tests: len(r.Results), Failures: r.Failed}
	var total time.Duration
	took := map[string]time.Duration{}
	for i := range r.Results {
		result := &r.Results[i]
		if n := len(all.Suites); n == 0 || all.Suites[n-1].Name != result.File {
			all.Suites = append(all.Suites, junitSuite{Name: result.File})
		}
		suite := &all.Suites[len(all.Suites)-1]
		c := junitCase{
			Name: result.Name + ": " + result.Request, Class: result.File, File: result.File, Line: result.Line, Time: seconds(result.Took),
		}
		if !result.OK {
			c.Failure = &junitFailure{Message: strings.SplitN(result.why(), "\n", 2)[0], Type: "policy", Text: "subject: " + result.Subject + "\n" + result.why()}
			suite.Failures++
		}
		suite.Tests++
		suite.Cases = append(suite.Cases, c)
		took[suite.Name] += result.Took
		suite.Time = seconds(took[suite.Name])
		total += result.Took
	}
	all.Time = seconds(total)
	out, err := xml.MarshalIndent(all, "", "  ")
	if err != nil {
		return fmt.Errorf("write JUnit's XML: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s%s\n", xml.Header, out)
	return err
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.6f", d.Seconds()) }

// WriteText writes what failed, for a person, and a summary; with all also what passed.
func (r *Report) WriteText(w io.Writer, all bool) error {
	var b bytes.Buffer
	for i := range r.Results {
		result := &r.Results[i]
		if result.OK {
			if all {
				fmt.Fprintf(&b, "ok    %s\n", result.title())
			}
			continue
		}
		fmt.Fprintf(&b, "FAIL  %s\n", result.title())
		fmt.Fprintf(&b, "      by       %s\n", result.Subject)
		for _, d := range result.Wrong {
			fmt.Fprintf(&b, "      %-8s expected %s, got %s\n", d.Key, d.Expected, d.Got)
		}
		if result.Reason != "" {
			fmt.Fprintf(&b, "      because  %s\n", result.Reason)
		}
		result.explain(&b)
	}
	fmt.Fprintf(&b, "%d passed, %d failed, in %s\n", r.Passed, r.Failed, plural(r.Files, "file"))
	_, err := w.Write(b.Bytes())
	return err
}

// explain tells what has part in a decision: the rules that match with their clauses,
// and of each grant by what it misses.
func (r *Result) explain(b *bytes.Buffer) {
	for _, f := range r.RuleFindings {
		if !f.Matches {
			continue
		}
		fmt.Fprintf(b, "      rule     %s matches\n", f.Name)
		for _, c := range f.Clauses {
			if c.Holds {
				fmt.Fprintf(b, "                 + %.160s\n", c.Text)
			}
		}
	}
	for _, g := range r.GrantFindings {
		if g.Allows {
			fmt.Fprintf(b, "      grant    %s covers it\n", g.Name)
		} else {
			fmt.Fprintf(b, "      grant    %s does not cover it: %s\n", g.Name, strings.Join(g.Missed, "; "))
		}
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
