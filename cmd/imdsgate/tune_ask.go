package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/imdsgate/imdsgate/policy/tune"
)

// ask asks about each proposal, and returns those that were taken. Whoever quits has
// taken what he has said yes to; whoever closes the terminal, nothing.
func ask(r *tune.Report, stdin io.Reader, stdout io.Writer) (taken []*tune.Proposal, err error) {
	answers := bufio.NewScanner(stdin)
	p := &printer{w: stdout}
	for i, one := range r.Proposals {
		p.line("")
		p.text("%d of %d. %s  [risk %s]", i+1, len(r.Proposals), one.Grant.Name, one.Risk)
		p.proposal(one)
		for asking := true; asking; {
			fmt.Fprint(stdout, "\nGrant it? (y)es, (n)o, (d)etails, (q)uit: ")
			if !answers.Scan() {
				if err := answers.Err(); err != nil {
					return nil, fmt.Errorf("read the answer: %w", err)
				}
				return nil, errors.New("nothing is written: the answers ended before the proposals; (q)uit keeps what was taken so far")
			}
			switch strings.ToLower(strings.TrimSpace(answers.Text())) {
			case "y", "yes":
				taken, asking = append(taken, one), false
			case "n", "no":
				asking = false
			case "d", "details":
				p.details(one)
			case "q", "quit":
				return taken, p.err
			}
			if p.err != nil {
				return nil, p.err
			}
		}
	}
	return taken, nil
}
