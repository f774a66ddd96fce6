package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// What a grant must not rest on, because the caller chooses it. What can be told from
// the text of a grant is told here; what takes a look at the host's files is told by
// `imdsgate check`, and at each request by attribution.

// notInGrants are keys that somebody may look for in a grant, and why there are none
// of that name.
var notInGrants = map[string]string{
	"args":              "arguments are what the caller writes; name the unit that he runs in",
	"argv":              "arguments are what the caller writes; name the unit that he runs in",
	"command_line":      "a command line is what the caller writes; name the unit that he runs in",
	"cmdline":           "a command line is what the caller writes; name the unit that he runs in",
	"comm":              "a process names itself as it likes (prctl(2), PR_SET_NAME); use executable",
	"process":           "a process names itself as it likes (prctl(2), PR_SET_NAME); use executable",
	"cwd":               "the working directory is where the caller has gone; name his unit, or the executable of his parent",
	"working_directory": "the working directory is where the caller has gone; name his unit, or the executable of his parent",
	"user_agent":        "the User-Agent is what the caller writes into the request; use executable with unit or user",
	"headers":           "headers are what the caller writes into the request; for IMDSv2 alone there is api: v2",
	"env":               "the environment is what the caller starts the program with; use unit or user",
	"environment":       "the environment is what the caller starts the program with; use unit or user",
	"pid":               "a pid is soon another process's; use executable with unit or user",
	"port":              "the caller picks his port; use executable with unit or user",
	"address":           "addresses are those of whole namespaces; use container or pod",
	"cgroup":            "whoever a cgroup is delegated to names what is below it; use unit, container or pod, which count only where root owns the directories",
	"user_unit":         "the units of a user manager are that user's to write; use a system unit, or user",
	"sha256":            "a hash says what a file was, not who tells it what to do; files that only root can change are trusted by path",
	"hash":              "a hash says what a file was, not who tells it what to do; files that only root can change are trusted by path",
	"image":             "the name of an image is what the runtime was told; use container or pod",
	"namespace":         "names of Kubernetes are not in the cgroup that the kernel shows; use pod, with its UID",
}

// places are directories in which others than root can make files.
var places = []struct{ dir, whose string }{
	{"/tmp", "every user can put files"},
	{"/var/tmp", "every user can put files"},
	{"/dev/shm", "every user can put files"},
	{"/dev/mqueue", "every user can put files"},
	{"/run/lock", "every user can put files"},
	{"/var/lock", "every user can put files"},
	{"/var/crash", "every user can put files"},
	{"/run/user", "each user can put his own files"},
	{"/home", "each user can put his own files"},
	{"/proc", "the kernel shows files under names that each process has for itself"},
	{"/memfd:", "there are files in memory alone, which whoever makes them names"},
}

// outsider is why others than root have a say about what is at a path; "" if its name
// does not tell so.
func outsider(file string) string {
	for _, p := range places {
		if file == p.dir || strings.HasPrefix(file, p.dir+"/") || strings.HasSuffix(p.dir, ":") && strings.HasPrefix(file, p.dir) {
			return fmt.Sprintf("%q is below %s, where %s", file, strings.TrimSuffix(p.dir, ":"), p.whose)
		}
	}
	return ""
}

// CheckExecutable says what is wrong with the path of an executable. A wildcard may stand
// for a directory, such as that of a version: on the host what is there is root's, or the
// grant does not hold.
func CheckExecutable(file string) error {
	first, _, _ := strings.Cut(strings.TrimPrefix(file, "/"), "/")
	switch {
	case strings.ContainsAny(path.Base(file), "*?["):
		return fmt.Errorf("%q has a wildcard in the name of the program: list each, as in [/usr/bin/a, /usr/bin/b]", file)
	case strings.ContainsAny(file, "?[") || strings.Contains(file, "**") || strings.Contains(first, "*"):
		return fmt.Errorf("%q: of wildcards there is * for a part of the name of a directory below the first, as in /opt/app-*/bin/app", file)
	case !path.IsAbs(file) || path.Clean(file) != file || file == "/":
		return fmt.Errorf("%q is not an absolute, clean path, as the kernel has it: /usr/bin/x", file)
	}
	if isLoader(file) {
		return fmt.Errorf("%q is a dynamic loader, which runs whatever file it is given, so that no grant for it holds: name the program", file)
	}
	if why := outsider(file); why != "" {
		return fmt.Errorf("%s: install it where only root can write, such as /usr/local/bin or /opt", why)
	}
	return nil
}

// isLoader reports whether a file has the name of a dynamic loader.
func isLoader(file string) bool {
	return slices.ContainsFunc([]string{"ld-linux", "ld-musl-", "ld64.so", "ld.so"}, func(name string) bool { return strings.HasPrefix(path.Base(file), name) })
}

// tools are programs that do whatever they are told, or fetch whatever they are asked
// for: that one of them runs says nothing about who wants what. Versions are left out.
var tools = []string{
	"ash", "bash", "csh", "dash", "elvish", "fish", "ksh", "lksh", "mksh", "nu", "posh", "pwsh", "rbash", "sh", "tcsh", "xonsh", "yash", "zsh",
	"busybox", "toybox",
	"awk", "gawk", "mawk", "original-awk", "beam.smp", "bun", "deno", "dotnet", "erl", "escript", "expect", "groovy", "guile",
	"java", "jjs", "jrunscript", "jshell", "julia", "lua", "luajit", "mono", "node", "nodejs", "osascript", "perl", "php", "php-cgi", "php-fpm", "pypy", "python",
	"r", "rscript", "ruby", "jruby", "tclsh", "wish",
	"aria2c", "axel", "curl", "ftp", "lftp", "links", "lynx", "wget", "w3m", "xh", "git-remote-http", "git-remote-https", "rclone",
	"nc", "ncat", "netcat", "socat", "ssh", "telnet", "openssl",
	"gdb", "lldb", "ltrace", "strace",
	"emacs", "nvim", "vim", "vim.basic", "vim.nox",
	"env", "xargs", "rc", "aws", "http", "lwp-request",
}

// Tool is the name of a program that does whatever it is told, whatever its version:
// "python" for /usr/bin/python3.11, "java" for /usr/lib/jvm/java-17/bin/java. A grant
// for one needs a unit or container, and a purpose.
func Tool(file string) (name string, ok bool) {
	name = strings.ToLower(path.Base(file))
	// "perl5.36-x86_64-linux-gnu", "nc.openbsd", "gawk-5.2", "python3.11d"
	for _, suffix := range []string{".openbsd", ".traditional", "-x86_64-linux-gnu", "-aarch64-linux-gnu", "-static", ".static", ".exe", ".bin"} {
		name = strings.TrimSuffix(name, suffix)
	}
	if slices.Contains(tools, name) {
		return name, true
	}
	if i := strings.IndexAny(name, "0123456789"); i > 0 && strings.Trim(name[i:], "0123456789.-_dmtubg") == "" {
		name = strings.TrimRight(name[:i], ".-_")
	}
	return name, slices.Contains(tools, name)
}

// Template is the unit of which another is an instance: "app@.service" of
// "app@one.service"; "" if it is none. Only root instantiates system units.
func Template(unit string) string {
	name, instance, ok := strings.Cut(unit, "@")
	i := strings.LastIndexByte(instance, '.')
	if !ok || i <= 0 {
		return ""
	}
	return name + "@" + instance[i:]
}

func isTool(file string) bool {
	_, ok := Tool(file)
	return ok
}

// CheckUnit says why a unit is not one that a grant can rest on.
func CheckUnit(unit string) error {
	name, isScope := strings.CutSuffix(unit, ".scope")
	switch {
	case strings.Contains(unit, "/"):
		return fmt.Errorf("%q is the path of a cgroup: name the unit alone, as in app.service", unit)
	case strings.HasPrefix(unit, "user@") || strings.HasPrefix(unit, "user-runtime-dir@"):
		return fmt.Errorf("%q is a user's own manager, below which he names units as he likes: use a system unit, or user", unit)
	case strings.HasPrefix(unit, "session-") && isScope:
		return fmt.Errorf("%q is one login, with all that a person runs there, and another number the next time: use user", unit)
	case strings.HasSuffix(unit, ".slice"):
		return fmt.Errorf("%q is a slice, in which there are many units: name one, as in app.service", unit)
	case strings.ContainsAny(unit, "*?["):
		return fmt.Errorf("%q has a wildcard: a grant is for one unit, or with app@.service for every instance of a template", unit)
	case isScope && len(name) > 64 && isHex(name[len(name)-64:]):
		return fmt.Errorf("%q is a container: write container: %s", unit, name[len(name)-64:])
	case !isScope && !strings.HasSuffix(unit, ".service"):
		return fmt.Errorf("%q is not the whole name of a unit with processes: %s.service, or .scope?", unit, unit)
	}
	return nil
}

const minContainer = 12 // as docker ps shows; fewer, and others have the same digits

func checkContainer(id string) error {
	if len(id) < minContainer || len(id) > 64 || !isHex(id) {
		return fmt.Errorf("%q is not a container's ID, nor the first %d or more of its 64 hexadecimal digits; a container's name is not in what the kernel shows", id, minContainer)
	}
	return nil
}

func checkPod(uid string) error {
	digits := strings.ReplaceAll(uid, "-", "")
	if len(digits) == 32 && isHex(digits) && len(uid) == 36 && uid[8] == '-' && uid[13] == '-' && uid[18] == '-' && uid[23] == '-' {
		return nil
	}
	return fmt.Errorf("%q is not the UID of a pod, as kubectl get pod NAME -o jsonpath={.metadata.uid} prints it: 8-4-4-4-12 hexadecimal digits", uid)
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// isNumber reports whether a user or group is named by its number.
func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
