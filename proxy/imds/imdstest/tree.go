package imdstest

import (
	"slices"
	"strings"
	"time"
)

// A page is what a GET of one path answers.
type page struct {
	body        []byte
	contentType string
	modified    time.Time
}

// A tree holds every page below a version, directories included, by path without slashes at its ends.
type tree struct {
	pages, folded map[string]*page // folded: by path in lower case
	root          *page
}

func (t *tree) find(p place, r Reading) *page {
	switch {
	case p.version == "":
		return t.root
	case r == Lenient:
		return t.folded[p.path]
	default:
		return t.pages[p.path]
	}
}

// grow makes the tree of an instance.
func (i *instance) grow() *tree {
	leaves := i.leaves()
	for path, value := range i.documents() {
		leaves[path] = value
	}
	for path, value := range i.Data {
		leaves[path] = value
	}
	t := &tree{
		pages: make(map[string]*page), folded: make(map[string]*page),
		root: i.page(strings.Join(versions, "\n")),
	}
	listings := map[string][]string{}
	for path, value := range leaves {
		t.pages[path] = i.page(value)
		if strings.Contains(path, "credentials") {
			t.pages[path].modified = i.issuedAt
		}
		for child, isDir := path, false; child != ""; isDir = true {
			dir, name := "", child
			if cut := strings.LastIndexByte(child, '/'); cut >= 0 {
				dir, name = child[:cut], child[cut+1:]
			}
			if entry := listed(dir, name, isDir); !slices.Contains(listings[dir], entry) {
				listings[dir] = append(listings[dir], entry)
			}
			child = dir
		}
	}
	for dir, entries := range listings {
		slices.Sort(entries)
		t.pages[dir] = i.page(strings.Join(entries, "\n"))
	}
	if p := t.pages["user-data"]; p != nil {
		p.contentType = "application/octet-stream"
	}
	for path, p := range t.pages {
		t.folded[strings.ToLower(path)] = p
	}
	return t
}

// listed returns how a directory shows an entry: sub-trees with a slash, but for those of a version, and keys with
// their names.
func listed(dir, name string, isDir bool) string {
	switch {
	case dir == "meta-data/public-keys":
		return name + "=" + keyName
	case isDir && dir != "":
		return name + "/"
	}
	return name
}

func (i *instance) page(value string) *page {
	return &page{body: []byte(value), contentType: "text/plain", modified: i.launched}
}
