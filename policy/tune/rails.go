package tune

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/imdsgate/imdsgate/policy"
)

// rail is why there is no grant for something that looks legitimate, and what the
// operator can do instead. The zero value is none.
type rail struct{ why, instead string }

type refusal struct {
	groups []*group
	rail
}

const ownUnit = "run it as a system unit of its own, with a user of its own; or put a program of your own, that does this one thing, in the place of the script"

// rail is what keeps a group from being proposed.
func (g *group) rail() rail {
	name, tool := policy.Tool(g.executable)
	unit := g.place()
	switch {
	case g.executable == "":
		return rail{"what it runs could not be read", "look at the events, and at what runs there"}
	case strings.ContainsFunc(g.executable+g.unit+g.user+g.parent, func(r rune) bool { return !unicode.IsPrint(r) }):
		return rail{"its name, or that of its unit, user or parent, has characters that do not show", "look at the events: such names are made to be overlooked"}
	case strings.Contains(g.executable+g.parent, "*") || strings.Contains(g.unit, "@."):
		return rail{"its name, or that of its unit or parent, means more than one in a grant", "rename what has a * in its name, or write the grant by hand"}
	case g.is(deleted):
		return rail{"its file was replaced or removed while it ran, so that it is not the host's own any more", "restart the service when its files are replaced"}
	}
	if err := policy.CheckExecutable(g.executable); err != nil {
		why, _, _ := strings.Cut(err.Error(), ": install ")
		return rail{why, "install it as root where only root can write, and run it as a unit of its own"}
	}
	switch {
	case g.contained() && g.container == "":
		return rail{"it runs in the pod's cgroup and in none of its containers", "it belongs to the runtime: a grant for it takes the runtime's unit"}
	case g.contained():
		return rail{}
	case builds(unit):
		return rail{"it runs in " + unit + ", where whoever may start a build runs what he likes", "give builds a role of their own (OpenID Connect of GitHub and GitLab, or AssumeRole from a job that holds nothing else), and the host none that is worth stealing"}
	case !g.is(hostVerified):
		return rail{"it is not the file that the host has under this path", "run it in the host's own mount namespace; or, if that is a container, have the runtime name it in its cgroup"}
	case !g.is(rootOwned):
		return rail{"others than root can change the file, or a directory above it", "have root own it and all directories above: deploy as root, and run it as somebody else"}
	case unit == "" && tool:
		return rail{fmt.Sprintf("%s does whatever it is told, and nothing that the caller cannot choose says who tells it: %s", name, g.unitless()), ownUnit}
	case unit == "" && !g.is(oneUser):
		return rail{"it changes its user, and runs in no unit that a grant can rest on", ownUnit}
	case tool && !g.is(oneUser):
		return rail{fmt.Sprintf("%s does whatever it is told, and has more than one user here, so that a grant cannot say whose it is", name), "have it change all of its users (setpriv, User= of the unit), and run no interpreter by a setuid program"}
	}
	return rail{}
}

// unitless says why there is no unit that a grant can rest on.
func (g *group) unitless() string {
	if g.unit == "" {
		if g.subject.UserUnit != "" {
			return fmt.Sprintf("the unit %s is its user's to name", g.subject.UserUnit)
		}
		return "it runs in no unit"
	}
	return fmt.Sprint(policy.CheckUnit(g.unit))
}

// rail is what keeps a candidate as a whole from being proposed.
func (c *candidate) rail() rail {
	if c.contained {
		ids := c.each(func(g *group) string { return cmp.Or(g.pod, g.container) })
		if len(ids) > 1 {
			return rail{fmt.Sprintf("it ran in %d containers, and their ids are new with each start", len(ids)),
				"give the task or pod a role of its own (task roles of ECS, pod identities of EKS) and keep it from the instance's; or have what starts the container write the grant"}
		}
	}
	paths := c.each(func(g *group) string { return g.paths })
	if slices.Contains(c.classes(), "unknown") && (len(paths) > maxPaths || slices.ContainsFunc(paths, func(p string) bool { return !plain(p) })) {
		return rail{"it asks for paths that are in no catalogue, and for more of them than a grant should list", "find out what it looks for; a grant with paths can be written by hand"}
	}
	return rail{}
}

// findings makes findings of refusals, one for those that are alike.
func findings(refused []*refusal) []Finding {
	type key struct{ who, why string }
	groups, instead := map[key][]*group{}, map[key]string{}
	var order []key
	for _, r := range refused {
		for _, g := range r.groups {
			k := key{g.who(), r.why}
			if groups[k] == nil {
				order = append(order, k)
			}
			groups[k], instead[k] = append(groups[k], g), r.instead
		}
	}
	all := []Finding{}
	for _, k := range order {
		all = append(all, Finding{Who: k.who, Evidence: evidence(groups[k]), Why: k.why, Instead: instead[k], Suspect: groups[k][0].why != ""})
	}
	slices.SortStableFunc(all, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Who, b.Who))
	})
	return all
}
