package eql_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// TestSet asks random sets of stages about random events. Every stage must answer as
// it does alone, and as the definition says.
func TestSet(t *testing.T) {
	for seed := range uint64(300) {
		r := newRandom(seed)
		var sources []string
		var stages []*eql.Stage
		var trees []*syntax.Event
		for range 1 + r.IntN(40) {
			src := r.pick("any", "a", "b") + " where " + r.condition(3)
			switch r.IntN(4) {
			case 0:
				// What rules look like: common conditions, and then words.
				src = r.pick("a", "b") + ` where t == "a" and ` + r.field() + " " + r.pick(":", "like", "in") + " " + r.some(r.word) + " and " + r.condition(1)
			case 1:
				src = r.sequence()
			}
			tree, err := syntax.Parse("", src)
			if err != nil {
				t.Fatal(err)
			}
			q, err := eql.Compile(tree, letters)
			if err != nil {
				continue // a comparison that is never true, for instance
			}
			switch body := tree.Body.(type) {
			case *syntax.Event:
				trees = append(trees, body)
			case *syntax.Sequence:
				for _, it := range body.Items {
					trees = append(trees, it.Event)
				}
			}
			for _, s := range q.Stages() {
				stages, sources = append(stages, s), append(sources, src)
			}
		}
		set := eql.NewSet(stages...)
		m, other := set.NewMatcher(), set.NewMatcher()
		for _, e := range r.events(20) {
			var want []int
			for i, s := range stages {
				matches := s.Match(e)
				if slow := slowMatch(letters, trees[i], e); slow != matches {
					t.Fatalf("seed %d: %s is %v alone and %v by definition of\n%s", seed, sources[i], matches, slow, describe([]*event{e}))
				}
				if matches {
					want = append(want, i)
				}
			}
			differ(t, sources, m.Match(e), want, e)
			var some []int
			for i := range stages {
				if r.IntN(3) > 0 {
					some = append(some, i)
				}
			}
			want = slices.DeleteFunc(want, func(i int) bool { return !slices.Contains(some, i) })
			differ(t, sources, other.MatchOf(e, some), want, e)
		}
		if t.Failed() {
			t.Fatal("seed", seed)
		}
	}
}

func differ(t *testing.T, sources []string, got, want []int, e *event) {
	t.Helper()
	for i, src := range sources {
		if has, must := slices.Contains(got, i), slices.Contains(want, i); has != must {
			t.Errorf("stage %d of %s is %v in the set and %v alone of\n%s", i, src, has, must, describe([]*event{e}))
		}
	}
	if !t.Failed() && !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestSetOfWords looks at how words are looked up: those that begin one another, that
// end one another, that overlap, and globs about each of their parts.
func TestSetOfWords(t *testing.T) {
	for seed := range uint64(200) {
		r := newRandom(seed)
		letter := func() string { return r.pick("a", "a", "b", "A", "é", "/", "?") }
		word := func() string {
			w := ""
			for range r.IntN(6) {
				w += r.pick(letter(), letter(), letter(), "*")
			}
			return r.pick("", "", "*") + w + r.pick("", "*", "*")
		}
		var stages []*eql.Stage
		var sources []string
		for range 30 {
			src := "any where s " + r.pick(":", "like", "in", "in~", "like~") + " " + r.some(func() string { return `"` + word() + `"` })
			if r.IntN(4) == 0 {
				src = "any where " + r.pick("startsWith", "startsWith~", "endsWith", "endsWith~", "stringContains", "stringContains~") + `(s, "` + strings.ReplaceAll(word(), "*", "") + `")`
			}
			stages, sources = append(stages, compile(t, letters, src).Stages()[0]), append(sources, src)
		}
		m := eql.NewSet(stages...).NewMatcher()
		for range 40 {
			var values []any
			for range 1 + r.IntN(2) {
				values = append(values, strings.NewReplacer("*", "b", "?", "x").Replace(word()+word()))
			}
			e := newEvent(letters, map[string][]any{"s": values})
			var want []int
			for i, s := range stages {
				if s.Match(e) {
					want = append(want, i)
				}
			}
			differ(t, sources, m.Match(e), want, e)
		}
		if t.Failed() {
			t.Fatal("seed", seed)
		}
	}
}

// TestSetOfRules asks rules as they are written, all at once: our own, Elastic's, and
// those of the benchmark.
func TestSetOfRules(t *testing.T) {
	r := newRandom(1)
	sources := slices.Collect(maps.Values(elasticRules(t)))
	for range 50 {
		sources = append(sources, r.rule())
	}
	var stages []*eql.Stage
	var names []string
	for _, src := range sources {
		for _, s := range compile(t, linux, src).Stages() {
			stages, names = append(stages, s), append(names, src)
		}
	}
	m := eql.NewSet(stages...).NewMatcher()
	found := map[int]bool{}
	for _, e := range r.linuxEvents(20_000, 300) {
		var want []int
		for i, s := range stages {
			if s.Match(e) {
				want = append(want, i)
				found[i] = true
			}
		}
		differ(t, names, m.Match(e), want, e)
		if t.Failed() {
			break
		}
	}
	if len(found) < len(stages)/2 {
		t.Errorf("only %d of %d stages ever match: the events are not like the rules", len(found), len(stages))
	}
}

func TestSetWithoutStages(t *testing.T) {
	if got := eql.NewSet().NewMatcher().Match(newEvent(letters, nil)); len(got) > 0 {
		t.Error(got)
	}
}

func TestSplit(t *testing.T) {
	for seed := range uint64(200) {
		r := newRandom(seed)
		src := r.pick("any", "a") + " where (" + r.condition(2) + ") and (" + r.condition(2) + ") and (" + r.condition(1) + ")"
		q, err := tryCompile(letters, "", src)
		if err != nil {
			continue
		}
		whole := q.Stages()[0]
		fixed := func(f eql.Field) bool { return f.Name < "n" }
		first, second := whole.Split(fixed)
		for _, f := range first.Fields() {
			if !fixed(f) {
				t.Errorf("%s: the first part reads %s", src, f.Name)
			}
		}
		if _, any := second.Category(); !any {
			t.Errorf("%s: the second part asks for the category", src)
		}
		for _, e := range r.events(20) {
			if got, want := first.Match(e) && second.Match(e), whole.Match(e); got != want {
				t.Fatalf("%s: the parts say %v of\n%s", src, got, describe([]*event{e}))
			}
		}
	}
}

// FuzzSet is TestSet with any queries.
func FuzzSet(f *testing.F) {
	r := newRandom(4)
	for seed := range uint64(20) {
		f.Add("any where "+r.condition(3), "a where "+r.condition(2), r.sequence(), seed)
	}
	f.Fuzz(func(t *testing.T, a, b, c string, seed uint64) {
		var stages []*eql.Stage
		for _, src := range []string{a, b, c} {
			if q, err := tryCompile(letters, "fuzz", src); err == nil {
				stages = append(stages, q.Stages()...)
			}
		}
		m := eql.NewSet(stages...).NewMatcher()
		for _, e := range newRandom(seed).events(10) {
			got := m.Match(e)
			for i, s := range stages {
				if want := s.Match(e); slices.Contains(got, i) != want {
					t.Errorf("stage %d is %v alone of\n%s", i, want, describe([]*event{e}))
				}
			}
		}
	})
}

// linux has the fields that rules about Linux hosts read most.
var linux = func() schema {
	types := map[string]eql.Type{
		"process.pid": eql.Long, "process.args_count": eql.Long, "process.parent.pid": eql.Long, "source.ip": eql.IP,
		"process.interactive": eql.Boolean, "process.user.id": eql.Keyword,
	}
	for _, name := range []string{
		"container.id", "event.outcome", "file.extension", "file.name", "file.path", "file.Ext.original.name", "file.Ext.original.path",
		"process.entry_leader.entry_meta.type", "process.env_vars", "process.parent.args", "process.parent.command_line",
		"user.id", "http.response.status_code", "data_stream.dataset", "url.original",
	} {
		types[name] = eql.Keyword
	}
	for name, f := range host {
		types[name] = f.Type
	}
	return newSchema(types)
}()

// The words of which rules and events of Linux hosts are made. The programs that run
// most often come first.
var (
	programs = strings.Fields(`sh sed grep cat ls bash systemd dash date awk runc ps sleep find rm python3 logger id head tail cut tr sort uniq wc stat
		dirname basename readlink uname hostname chmod cp mv mkdir ln touch env tee df free ip ss iptables sshd sudo cron systemctl containerd dockerd
		docker kubelet nginx java node amazon-ssm-agent cloud-init snapd dpkg apt rpm dnf git make gcc cc vi vim nano less more ssh scp rsync
		curl wget php php8.2 perl ruby python python2.7 python3.11 lua postgres mysqld redis-server apache2 httpd logrotate journalctl dbus-daemon polkitd
		init kworker agent top pgrep pkill kill netstat whoami printenv mount umount tar gzip zip unzip base64 xargs dd su passwd crontab at service
		zsh ksh tcsh fish ash busybox nc ncat socat telnet openssl base32 xxd od hexdump mawk gawk chown chattr sftp nohup setsid insmod modprobe rmmod
		lsmod nsenter unshare kubectl useradd usermod ifconfig nft tcpdump nmap masscan hydra gdb strace ltrace pip npm yum
		export history auditctl setenforce sshpass ftp`)
	directories = strings.Fields(`/usr/bin/ /usr/sbin/ /bin/ /sbin/ /usr/local/bin/ /tmp/ /var/tmp/ /dev/shm/ /run/ /var/run/ /home/admin/ /root/ /opt/app/
		/etc/ /etc/cron.d/ /etc/init.d/ /etc/update-motd.d/ /etc/systemd/system/ /var/www/html/ /srv/ /usr/lib/ /proc/ /boot/ /var/log/ ./`)
	arguments = strings.Fields(`-c -i -e -l -p -r -f -n -t -v -x -o --help -la -rf +x 777 0.0.0.0 -d --decode /etc/passwd /etc/shadow .ssh/id_rsa .aws/credentials
		/dev/tcp/10.0.0.1/4444 http://169.254.169.254/latest/meta-data/ -O- import socket exec eval pty.spawn /bin/bash /bin/sh LD_PRELOAD= /proc/self/maps
		memfd /dev/null install update start stop enable --user root setcap cap_setuid+ep`)
	actions = strings.Fields("exec fork end start executed process_started connection_attempted creation rename deletion exec_event ProcessRollup2")
)

// rule is one as they are written for Linux hosts: the shapes, and how often each
// field is read, are those of the published ones; the words are chance's.
func (r random) rule() string {
	if r.IntN(287) < 62 {
		return fmt.Sprintf("sequence by host.id, process.%s with maxspan=%ds\n  [%s]\n  [%s]",
			r.pick("entity_id", "parent.entity_id", "entity_id"), 1+r.IntN(60), r.exec(), r.pick(r.exec(), r.connect(), r.fileChange()))
	}
	if r.IntN(287) < 35 {
		return r.fileChange()
	}
	return r.exec()
}

func (r random) exec() string {
	all := []string{`host.os.type == "linux"`}
	often := func(of287 int, condition string) {
		if r.IntN(287) < of287 {
			all = append(all, condition)
		}
	}
	often(241, `event.type == "start"`)
	often(255, r.pick(`event.action == "exec"`, `event.action in ("exec", "exec_event", "start")`, `event.action in ("exec", "exec_event", "start", "ProcessRollup2", "executed", "process_started")`))
	// A rule that is worth a look names at least two things.
	for general := len(all); len(all) < general+2; {
		all = all[:general]
		often(210, r.likely("process.name", r.programs))
		often(90, r.likely("process.parent.name", r.programs))
		often(50, r.likely("process.executable", r.places))
		often(130, r.likely("process.args", r.args))
		often(50, r.likely("process.command_line", r.commands))
		often(30, r.likely("process.parent.executable", r.places))
		often(30, r.likely("process.parent.args", r.args))
		often(20, r.likely("process.working_directory", r.places))
		often(30, fmt.Sprintf("(%s or (%s and %s))", r.likely("process.name", r.programs), r.likely("process.name", r.programs), r.likely("process.args", r.args)))
	}
	often(30, "process.parent.executable != null")
	often(27, "process.args_count "+r.pick("==", ">=", "<")+r.pick(" 1", " 2", " 4"))
	often(110, "not "+r.likely(r.pick("process.parent.executable", "process.executable"), r.places))
	often(90, "not "+r.pick(r.likely("process.parent.name", r.programs), r.likely("?process.parent.args", r.args), r.likely("?process.working_directory", r.places)))
	often(15, `not user.id == "0"`)
	return "process where " + strings.Join(all, " and ")
}

func (r random) connect() string {
	return `network where host.os.type == "linux" and event.type == "start" and event.action == "connection_attempted" and ` +
		r.pick(r.likely("process.name", r.programs), r.likely("process.executable", r.places)) + r.pick(
		` and not cidrmatch(destination.ip, "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "::1", "FE80::/10")`,
		` and destination.ip != null and destination.ip != "127.0.0.1"`, ` and destination.port in (22, 4444, 8080)`)
}

func (r random) fileChange() string {
	return `file where host.os.type == "linux" and event.action in ("creation", "rename", "file_create_event") and ` + r.pick(
		r.likely("file.path", r.places)+" and not "+r.likely("process.executable", r.places),
		r.likely("file.path", r.places)+" and not "+r.likely("process.name", r.programs),
		r.likely("file.extension", func() string { return `("so", "sh", "service", "timer")` })+" and "+r.likely("file.path", r.places))
}

// likely is a condition on a field of the kinds that such fields have.
func (r random) likely(field string, words func() string) string {
	list := words()
	op := " in "
	if strings.ContainsAny(list, "*?") {
		op = r.pick(" like ", " like ", " : ", " like~ ")
	} else if !strings.Contains(list, ",") {
		op = " == "
	}
	return field + op + list
}

func (r random) list(most int, word func() string) string {
	var all []string
	for range 1 + r.IntN(most) {
		all = append(all, `"`+word()+`"`)
	}
	return "(" + strings.Join(all, ", ") + ")"
}

func (r random) programs() string {
	return r.list(14, func() string {
		p := r.pick(programs...)
		if r.IntN(8) == 0 {
			p = strings.TrimRight(p, "0123456789.") + "*"
		}
		return p
	})
}

func (r random) places() string {
	return r.list(12, func() string {
		switch r.IntN(6) {
		case 0:
			return r.pick(directories...) + r.pick(programs...)
		case 1:
			return "*/" + r.pick(programs...)
		case 2:
			return r.pick(directories...) + "*/" + r.pick(programs...) + "*"
		}
		return r.pick(directories...) + r.pick("", r.pick(programs...)) + "*"
	})
}

func (r random) args() string {
	return r.list(8, func() string { return r.pick("", "", "", "*") + r.pick(arguments...) + r.pick("", "", "*") })
}

func (r random) commands() string {
	return r.list(10, func() string {
		return "*" + r.pick(arguments...) + "*" + r.pick("", "", r.pick(arguments...)+"*")
	})
}

// usual picks one word, the first ones most often.
func (r random) usual(words []string) string {
	x := r.Float64()
	return words[int(float64(len(words))*x*x*x)]
}

// linuxEvents are a mixed stream: four of five are programs that start, one is
// a connection, three of ten of these to the metadata service. Programs have as many
// parents as given.
func (r random) linuxEvents(n, parents int) []*event {
	events, at := make([]*event, n), epoch
	for i := range events {
		p, parent := r.usual(programs), r.usual(programs)
		args := []any{p}
		for range r.IntN(6) {
			args = append(args, r.pick(arguments...)+r.pick("", "", "/data", ".txt"))
		}
		var words []string
		for _, a := range args {
			words = append(words, a.(string))
		}
		who := r.IntN(parents)
		plain := map[string][]any{
			"host.id": {"i-1"}, "host.os.type": {"linux"}, "process.name": {p}, "process.executable": {r.usual(directories) + p},
			"process.entity_id": {fmt.Sprint("e", i)}, "process.parent.entity_id": {fmt.Sprint("p", who)}, "process.pid": {int64(1000 + i)}, "user.id": {r.pick("0", "1000")},
		}
		switch {
		case i%5 == 4:
			plain["event.category"], plain["event.type"], plain["event.action"] = []any{"network"}, []any{"start"}, []any{"connection_attempted"}
			address := "169.254.169.254"
			if i/5%10 >= 3 {
				address = fmt.Sprintf("%d.0.%d.1", 1+r.IntN(200), r.IntN(200))
			}
			plain["destination.ip"], plain["destination.port"] = []any{netip.MustParseAddr(address)}, []any{int64(80)}
		case i%40 == 3:
			plain["event.category"], plain["event.type"], plain["event.action"] = []any{"file"}, []any{"change"}, []any{r.pick("creation", "rename")}
			plain["file.path"], plain["file.extension"] = []any{r.usual(directories) + p}, []any{r.pick("so", "sh", "txt")}
		default:
			plain["event.category"], plain["event.type"], plain["event.action"] = []any{"process"}, []any{"start"}, []any{r.pick("exec", "exec", "exec", "exec", "fork", "start", r.pick(actions...))}
			plain["process.args"], plain["process.args_count"] = args, []any{int64(len(args))}
			plain["process.command_line"] = []any{strings.Join(words, " ")}
			plain["process.parent.name"], plain["process.parent.executable"] = []any{parent}, []any{r.usual(directories) + parent}
			plain["process.working_directory"] = []any{strings.TrimSuffix(r.usual(directories), "/")}
			plain["process.parent.args"] = []any{parent, r.pick(arguments...)}
		}
		at = at.Add(1000 * 1000)
		events[i] = newEvent(linux, plain)
		events[i].id, events[i].at = i+1, at
	}
	return events
}
