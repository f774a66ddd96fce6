module github.com/imdsgate/imdsgate

go 1.26.0

toolchain go1.26.8

require (
	github.com/cilium/ebpf v0.22.0 // BPF programs without a C compiler
	github.com/coreos/go-iptables v0.8.0 // which iptables there is, and its counters
	github.com/coreos/go-systemd/v22 v22.7.0 // ports from the socket unit, readiness, the journal
	github.com/cpuguy83/go-md2man/v2 v2.0.7 // manual pages
	github.com/creack/pty v1.1.24 // tests: a terminal on which questions are answered
	github.com/elastic/go-seccomp-bpf v1.6.0 // tests: the system calls that the unit leaves the daemon
	github.com/goccy/go-yaml v1.19.2 // the configuration, with carets in its errors
	github.com/google/go-cmp v0.7.0 // tests: differences one can read
	github.com/mattn/go-isatty v0.0.20 // whether somebody looks at the progress of a search
	github.com/oklog/ulid/v2 v2.1.2 // ids of events, in the order of time
	github.com/pelletier/go-toml/v2 v2.4.3 // rule files
	github.com/prometheus/client_golang v1.25.0 // counters, as Prometheus reads them
	github.com/prometheus/procfs v0.23.0 // what the daemon uses; tests: a second reader of /proc
	github.com/rogpeppe/go-internal v1.16.0 // what imdsgate fmt would change, as diff(1) shows it
	github.com/rs/zerolog v1.35.1 // the operator's own log
	github.com/safchain/ethtool v0.7.0 // counters of network drivers
	github.com/santhosh-tekuri/jsonschema/v6 v6.0.3 // tests: the published schema of the configuration
	github.com/spf13/cobra v1.10.2 // the verbs of imdsgate, help and completion
	github.com/vishvananda/netlink v1.3.1 // links, routes and notifications of the kernel
	github.com/vishvananda/netns v0.0.5 // the lab's network namespaces
	go.etcd.io/bbolt v1.5.0 // what rules have seen for the first time, beyond a restart
	go.uber.org/goleak v1.3.0 // tests: goroutines that were left behind
	golang.org/x/net v0.61.0 // a bound for the connections of who reads counters
	golang.org/x/sys v0.50.0 // system calls
	golang.org/x/time v0.15.0 // requests a second of one caller
)

require (
	github.com/BurntSushi/toml v1.6.0 // indirect
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/kylelemons/godebug v1.1.0 // indirect
	github.com/mattn/go-colorable v0.1.14 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/russross/blackfriday/v2 v2.1.0 // indirect
	github.com/spf13/pflag v1.0.10 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/exp/typeparams v0.0.0-20260209203927-2842357ff358 // indirect
	golang.org/x/mod v0.42.0 // indirect
	golang.org/x/sync v0.25.0 // indirect
	golang.org/x/telemetry v0.0.0-20261010193011-f71dc92da45e // indirect
	golang.org/x/text v0.44.0 // indirect
	golang.org/x/tools v0.52.0 // indirect
	golang.org/x/vuln v1.9.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
	honnef.co/go/tools v0.8.2 // indirect
)

tool (
	golang.org/x/vuln/cmd/govulncheck
	honnef.co/go/tools/cmd/staticcheck
)
