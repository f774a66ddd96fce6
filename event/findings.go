package event

import (
	"maps"
	"slices"
)

// findings are what somebody may have done who made an event of the kind Integrity
// necessary, by State.Action: how grave it is, and the technique where it is one.
var findings = func() map[string]*Rule {
	of := func(id, name, severity string, technique ...string) *Rule {
		score, err := SeverityNumber(severity)
		if err != nil {
			panic(err)
		}
		r := &Rule{ID: "integrity." + id, Name: name, Ruleset: "imdsgate-builtin", Severity: severity, RiskScore: score}
		for _, t := range technique {
			r.Threat = append(r.Threat, Threat{Framework: "MITRE ATT&CK", TacticID: impairment.id, TacticName: impairment.name,
				TechniqueIDs: []string{t}, TechniqueNames: []string{techniques[t]}})
		}
		return r
	}
	const redirect, attribution = "Redirect of the metadata service tampered with", "Attribution of clients tampered with"
	return map[string]*Rule{
		"redirect-rule-changed":     of("redirect", redirect, "high", modifyFirewall),
		"redirect-contested":        of("redirect", redirect, "high", modifyFirewall),
		"redirect-evaded":           of("bypass", "Redirect of the metadata service evaded", "high", modifyFirewall),
		"imds-way-changed":          of("way", "Way to the metadata service changed", "medium"),
		"program-changed":           of("files", "Files of the daemon changed", "medium"),
		"configuration-changed":     of("files", "Files of the daemon changed", "medium"),
		"redirect-not-watched":      of("redirect", redirect, "medium"),
		"redirect-hook-not-taken":   of("redirect", redirect, "medium"),
		"redirect-restored":         of("redirect", redirect, "low"),
		"self-test-failed":          of("redirect", redirect, "medium"),
		"requests-unguarded":        of("absence", "Daemon of the metadata gate ended", "medium"),
		"requests-held":             of("absence", "Daemon of the metadata gate ended", "medium"),
		"requests-refused":          of("absence", "Daemon of the metadata gate ended", "medium"),
		"bpf-program-detached":      of("attribution", attribution, "high", modifyTools),
		"attribution-broken":        of("attribution", attribution, "high", modifyTools),
		"attribution-restored":      of("attribution", attribution, "low"),
		"imds-mark-forged":          of("bypass", "Redirect of the metadata service evaded", "high", modifyTools),
		"uncovered-imds-connection": of("bypass", "Redirect of the metadata service evaded", "medium"),
		"direct-imds-connection":    of("bypass", "Connection older than the redirect", "low"),
	}
}()

// Findings are the actions (State.Action) that events of the kind Integrity have, in order.
func Findings() []string { return slices.Sorted(maps.Keys(findings)) }

// Of MITRE ATT&CK v19, in which Impair Defenses (T1562) has become a tactic.
const (
	modifyTools    = "T1685"
	modifyFirewall = "T1686"
)

var (
	impairment = struct{ id, name string }{"TA0112", "Defense Impairment"}
	techniques = map[string]string{
		modifyTools:    "Disable or Modify Tools",
		modifyFirewall: "Disable or Modify System Firewall",
	}
)
