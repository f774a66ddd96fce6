# make demo     installs what is missing, and shows imdsgate at work
# make test     installs what is missing, and runs every check
# make build    builds bin/imdsgated and bin/imdsgate
# make bench    compares with the direct path, haproxy and nginx
# make bench-attribution  times the naming of a connection's owner, beside ss and lsof
# make test-load  12,000 connections for two minutes, while the service fails
# make test-clients  runs AWS's SDKs and others, unmodified, and writes docs/clients.md
# make test-boot  boots a Debian with our units: cloud-init, firewalld, restarts, crashes, a full disk
# make test-soak  an hour of requests, while rules are reloaded and tables flushed
# make test-vm   boots a Debian with its own kernel (Linux 6.1) under qemu: attacks, power cuts, clocks, suspend
# make packages  deb, rpm and tarball for amd64 and arm64, in bin/packages
# make test-packages  runs their linters, and what images are made with, in a Debian of 900 MB
# make install  onto this host, make uninstall takes it off again

GO := ./test/go.sh
VERSION := $(shell ./packaging/version.sh 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
export CGO_ENABLED := 0
# One Go for everything below, also for what tests build.
export PATH := $(CURDIR)/bin/toolchain:$(PATH)

DESTDIR :=
PREFIX := /usr

.PHONY: build packages demo test test-boot test-vm test-packages test-load test-soak test-clients bench bench-attribution deps lint unit race fuzz boot long install uninstall clean

build: bin/toolchain/go
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/imdsgated ./cmd/imdsgate
	./packaging/licenses.sh >bin/third-party-licenses

# A command called go that is the toolchain of go.mod.
bin/toolchain/go: test/go.sh go.mod
	@mkdir -p bin/toolchain
	@printf '#!/bin/sh\nPATH=$$(echo "$$PATH" | sed "s|$(CURDIR)/bin/toolchain:||g") exec $(CURDIR)/test/go.sh "$$@"\n' >$@
	@chmod +x $@

deps:
	@./test/deps.sh

demo: deps build
	go run ./test/demo

bench: deps build
	go run ./test/bench

bench-attribution: deps bin/toolchain/go
	go run ./test/bench attribution

# Installs 2 GB into bin/clients the first time.
test-clients: deps bin/toolchain/go
	./test/clients/install.sh bin/clients
	@mkdir -p docs
	go run ./test/compat --doc docs/clients.md bin/clients

test: deps build lint unit boot long

lint: bin/toolchain/go
	test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -d $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	GOOS=darwin go vet ./policy/... ./event/... ./cmd/imdsgate
	GOOS=windows go vet ./policy/... ./event/... ./cmd/imdsgate
	GOARCH=arm64 go vet ./...
	go tool staticcheck ./...
	./test/vuln.sh
	! command -v shellcheck >/dev/null || shellcheck $$(git ls-files '*.sh') .ci/run

# What searches the host comes first, and alone: where others start programs all the time
# its answer is that it could not keep up. What fills the host with descriptors and
# connections comes last, and alone: at the lower levels others' searches go through all
# of them.
unit: bin/toolchain/go
	go test -count=1 -p 1 ./attribution/...
	go test -count=1 -timeout 20m $$(go list ./... | grep -v -e /attribution -e /test/attacks$$ -e /test/boot$$ -e /test/chroot$$ -e /test/load$$ -e /test/soak$$ -e /test/vm$$)
	go test -count=1 -p 1 ./test/attacks ./test/load
	cd test/clients && go vet ./... && go build -o /dev/null ./...

# The race detector needs cgo. What is concurrent runs under it.
race: bin/toolchain/go
	CGO_ENABLED=1 go test -count=1 -race -p 1 ./attribution/...
	CGO_ENABLED=1 go test -count=1 -race ./policy ./policy/eql/ndjson ./policy/firstseen ./event/... ./control ./proxy ./proxy/loop ./proxy/imds/...

# Every parser, a few seconds each; go test -fuzz takes one target at a time.
fuzz: bin/toolchain/go
	./test/fuzz.sh 5s

# The soak needs time, and little of the machine; what runs beside it gives way. Repairs may
# take twice as long there as on a machine of its own.
long: bin/toolchain/go
	go test -c -o bin/soak.test ./test/soak
	(cd test/soak && exec ../../bin/soak.test -test.v -test.timeout 20m -for 10m -repaired 2s) >bin/soak.log 2>&1 & soak=$$!; \
	trap "kill $$soak" INT TERM; failed=0; \
	nice -n 19 $(MAKE) race fuzz || failed=1; \
	wait $$soak || failed=1; cat bin/soak.log; exit $$failed

test-boot: deps boot

# The trees are made once, in bin/boot and bin/boot-trixie: 300 MB and a minute or two each. The second is for what a later
# systemd (257) does otherwise: since 254 a crash fires OnFailure= although the unit is started again; and for cloud-init
# of a single process. To install, upgrade and remove the packages takes no more than the first; what else test/chroot has,
# make test-packages.
boot: packages
	./test/boot/tree.sh bin/boot
	./test/boot/tree.sh bin/boot-trixie trixie
	go test -count=1 -v -timeout 15m ./test/boot
	IMDSGATE_BOOT_TREE=../../bin/boot-trixie go test -count=1 -v -timeout 5m -run 'FirstBoot|Killed|CrashLoop' ./test/boot
	go test -count=1 -v -timeout 5m -run 'Deb|RPM|Tarball|Sysusers' ./test/chroot -args -tree $(CURDIR)/bin/boot/root -packages $(CURDIR)/bin/packages

# Puts 700 MB into bin/boot and bin/vm the first time. Where the processor has to be emulated
# it takes half an hour or so.
test-vm: deps
	./test/vm/deps.sh
	./test/boot/tree.sh bin/boot
	./test/vm/tree.sh bin/vm bin/boot
	ARCHES=amd64 ./packaging/packages.sh
	go test -count=1 -v -timeout 2h ./test/vm

test-load: deps bin/toolchain/go
	go test -count=1 -v ./test/load -args -for 2m -idle 10000

test-soak: deps bin/toolchain/go
	go test -count=1 -v -timeout 90m ./test/soak -args -for 1h

packages: bin/toolchain/go
	./packaging/packages.sh

# Puts 900 MB into bin/chroot the first time, which takes 3 minutes or more, and that is why CI, which begins with an empty
# bin, leaves it out: lintian, rpmlint, the compilers of SELinux and AppArmor, cloud-init, Packer and Ansible.
test-packages: deps packages
	./test/chroot/tree.sh bin/chroot
	go test -count=1 -v ./test/chroot -args -tree $(CURDIR)/bin/chroot/root -packages $(CURDIR)/bin/packages

install:
	./packaging/install.sh '$(DESTDIR)' '$(PREFIX)'

uninstall:
	./packaging/uninstall.sh '$(DESTDIR)' '$(PREFIX)'

clean:
	rm -rf bin
