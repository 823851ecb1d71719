# Sallyway. `make help` lists the targets.
#
# Everything is built as the user who calls make, under "sudo make" too. Root is taken only for what needs it, through
# sudo where make does not run as root already.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory

PREFIX  ?= /usr/local
DESTDIR ?=
PUSH    ?=

# The tools of `make check`. Their modules are not ours: `go run` builds them apart from go.mod.
GOFUMPT     := mvdan.cc/gofumpt@v0.12.0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOLANGCI    := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
# What writes deb and rpm; not ours either, and the newest whose modules the proxy serves.
NFPM        := github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2

# Looked up when a recipe needs it, so that `make help` and `make clean` work without Go.
find_go    = go=$$(build/find-go.sh)
AS_CALLER := build/as-caller.sh
AS_ROOT   := build/as-root.sh

DAEMONS := gatewayd relayd platformd sallyway sallyway-license
# Commands that are built besides: the lab behind `make demo` and what is below bench/.
MAINS = $(addprefix ./,$(sort $(dir $(wildcard cmd/*/*.go bench/cmd/*/*.go internal/lab/cmd/*/*.go))))

# Tests that may be skipped in CI, as a regular expression of package.Test: those with the previous release, in a clone that does not have its commit, and nowhere else.
ALLOW_SKIP = $(if $(shell git -c safe.directory='$(CURDIR)' cat-file -e "$$(cut -d' ' -f2 build/previous-release)^{commit}" 2>/dev/null && echo there),,^sallyway/e2e\.(TestUpgrade|TestNewNodesOldPlatform)$$)
# Makes one line per package of what the tests say, and an error of a skip in CI.
REPORT = "$$go" run ./build/testreport -allow-skip '$(ALLOW_SKIP)'
# Unit packages, without the end-to-end suite and what packs the programs.
UNIT = $$($(AS_CALLER) "$$go" list ./... | grep -v '^sallyway/\(e2e\|images\)\(/\|$$\)')
# As root the tests run as they are; else they are compiled as the caller, and each test binary runs through sudo.
TEST_EXEC = $(if $(filter 0,$(shell id -u)),,-exec "$(CURDIR)/$(AS_ROOT)")

# Where the lab finds the programs: the demo, the end-to-end suite and the benchmarks run these.
export SALLYWAY_BIN := $(CURDIR)/bin

.DEFAULT_GOAL := build
.PHONY: build demo test unit e2e image image-test check layering lint bench bench-quick bench-failover bench-peers bench-platform bench-packages peers install dist packages containers nfpm clean help prerequisites

build: ## build the programs into bin/ (the default)
	@$(find_go)
	commit=$$($(AS_CALLER) git rev-parse --short=12 HEAD 2>/dev/null || true)
	if [ -n "$$commit" ] && ! $(AS_CALLER) git diff --quiet HEAD 2>/dev/null; then commit=$$commit-dirty; fi
	version=$$($(AS_CALLER) git describe --tags --match 'v[0-9]*' 2>/dev/null || true)
	$(AS_CALLER) mkdir -p bin
	CGO_ENABLED=0 $(AS_CALLER) "$$go" build -trimpath -buildvcs=false \
		-ldflags "-s -w -X sallyway/internal/version.Version=$$version -X sallyway/internal/version.Commit=$$commit" \
		-o bin/ $(MAINS)
	ls bin

demo: build ## lay out client, relays, gateway and a private host on this machine and show them work (root by sudo)
	@build/prerequisites.sh demo
	$(AS_ROOT) bin/labctl demo

test: prerequisites build ## run every test: unit tests with -race, then the end-to-end suite on the built programs
	@$(MAKE) unit
	$(MAKE) e2e
	$(MAKE) image-test

unit: build nfpm ## run the unit tests alone
	@$(find_go)
	packages=$(UNIT)
	# What packs the programs mostly waits for other programs, so it runs beside the rest, without the race detector.
	(CGO_ENABLED=0 "$$go" test -json -vet=off -timeout 15m $(TEST_EXEC) ./images/... | $(REPORT)) & images=$$!
	failed=
	CGO_ENABLED=1 "$$go" test -json -race -shuffle=on -vet=off -timeout 15m $(TEST_EXEC) $$packages | $(REPORT) || failed=yes
	wait $$images || failed=yes
	[ -z "$$failed" ]

# The suite runs some daemons with the race detector in them, which needs a C compiler.
e2e: build ## run the end-to-end suite alone (root by sudo)
	@$(find_go)
	if command -v gcc >/dev/null; then
		CGO_ENABLED=1 $(AS_CALLER) "$$go" build -race -trimpath -buildvcs=false -o bin/race/ ./cmd/...
		export SALLYWAY_RACE_BIN=$(CURDIR)/bin/race
	fi
	# Not there in a shallow clone: then the tests of upgrades say so.
	if $(AS_CALLER) build/previous-release.sh bin/previous; then export SALLYWAY_PREVIOUS_BIN=$(CURDIR)/bin/previous; fi
	"$$go" test -json -count=1 -vet=off -timeout 30m $(TEST_EXEC) $$("$$go" list ./e2e/... | grep -v '/e2e/appliance$$') | $(REPORT)

prerequisites: ## install the Debian packages that the tests use (root by sudo)
	@build/prerequisites.sh

check: layering ## format, vet, linters, go.mod, layering: what CI runs before the tests
	@$(find_go)
	bad=$$($(AS_CALLER) "$$go" run $(GOFUMPT) -l .)
	if [ -n "$$bad" ]; then echo "not formatted (gofumpt -w):"; echo "$$bad"; exit 1; fi
	$(AS_CALLER) "$$go" vet ./...
	for os in darwin windows; do GOOS=$$os CGO_ENABLED=0 $(AS_CALLER) "$$go" build -o /dev/null ./cmd/sallyway; done
	$(AS_CALLER) "$$go" run $(STATICCHECK) ./...
	$(AS_CALLER) "$$go" run $(GOLANGCI) run
	$(AS_CALLER) "$$go" mod tidy -diff
	$(AS_CALLER) "$$go" test -run 'TestDocument|TestCodes|TestCurrent' ./platform/api/... # what is generated from the API is current
	echo "check: ok"

layering: ## hold the imports against the table in layering_test.go
	@$(find_go)
	$(AS_CALLER) "$$go" test -count=1 -vet=off .

bench: build peers bench-packages ## run all benchmarks next to the peers that can be installed, more than an hour; results go to bench/results (root by sudo)
	@$(AS_ROOT) bin/bench

bench-quick: build ## a short look at every kind of topology, a few minutes (root by sudo)
	@build/prerequisites.sh demo
	$(AS_ROOT) bin/bench --quick

bench-failover: build peers bench-packages ## kill, cut, drain and block what is between open connections, 20 times each, and peers: about 50 minutes (root by sudo)
	@$(AS_ROOT) bin/bench failover --peers all

bench-peers: build peers bench-packages ## one short run through a relay next to the peers that can be installed (root by sudo)
	@$(AS_ROOT) bin/bench --quick --peers --scenario one-relay

bench-platform: build ## measure the platform: 10 000 connected nodes, a change of policy, grants, audit, pages; about 15 minutes (root by sudo)
	@build/prerequisites.sh
	$(AS_ROOT) bin/bench platform

bench-packages: ## install the Debian packages of the benchmarks' peers; a peer that cannot be had is named in the results
	@build/prerequisites.sh bench || echo "make: not all packages could be installed; bench names the peers that are missing"

peers: ## build the peers of the benchmarks that are Go modules of ours: wireguard-go
	@$(find_go)
	$(AS_CALLER) mkdir -p bin
	CGO_ENABLED=0 $(AS_CALLER) "$$go" build -trimpath -buildvcs=false -o bin/wireguard-go golang.zx2c4.com/wireguard

install: build ## install the programs into PREFIX/bin (DESTDIR is put before it)
	@for p in $(DAEMONS); do
		install -D -m 0755 "bin/$$p" "$(DESTDIR)$(PREFIX)/bin/$$p"
		echo "$(DESTDIR)$(PREFIX)/bin/$$p"
	done

dist: build ## pack the programs, README, LICENSE and docs into dist/
	@$(find_go)
	version=$$($(AS_CALLER) git describe --tags --always --match 'v[0-9]*' 2>/dev/null || echo devel)
	name=sallyway-$$version-$$("$$go" env GOOS)-$$("$$go" env GOARCH)
	epoch=$$($(AS_CALLER) git log -1 --format=%ct 2>/dev/null || echo 0)
	$(AS_CALLER) mkdir -p dist
	$(AS_CALLER) tar --create --gzip --file "dist/$$name.tar.gz" --sort=name --owner=0 --group=0 --numeric-owner \
		--mtime="@$$epoch" --transform "s,^bin/,," --transform "s,^,$$name/," \
		$(addprefix bin/,$(DAEMONS)) README.md LICENSE docs
	echo "dist/$$name.tar.gz"

# The version orders the images on an appliance's disk. IMAGE_KEYS are public keys that updates have to be signed by, with commas between them.
ARCH       ?= amd64
IMAGE_OUT  ?= dist
IMAGE_KEYS ?=
IMAGE_ARGS ?=

image: ## build the appliance's disk images into dist/ (ARCH=arm64 for that one)
	@$(find_go)
	build/prerequisites.sh image
	version=$$($(AS_CALLER) git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//; s/-\([0-9]*\)-g.*/.\1/' || true)
	version=$${IMAGE_VERSION:-$${version:-0.0.$$($(AS_CALLER) git rev-list --count HEAD)}}
	commit=$$($(AS_CALLER) git rev-parse --short=12 HEAD)
	$(AS_CALLER) mkdir -p bin "$(IMAGE_OUT)"
	CGO_ENABLED=0 $(AS_CALLER) "$$go" build -trimpath -buildvcs=false -o bin/mkimage ./images/appliance/mkimage
	CGO_ENABLED=0 $(AS_CALLER) env GOOS=linux GOARCH=$(ARCH) "$$go" build -tags noredis -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X sallyway/internal/version.Version=v$$version -X sallyway/internal/version.Commit=$$commit \
			-X sallyway/internal/appliance/update.Pinned=$(IMAGE_KEYS)" -o bin/appliance-$(ARCH) ./cmd/appliance
	$(AS_CALLER) env "PATH=$$(dirname "$$go"):$$PATH" bin/mkimage build --init bin/appliance-$(ARCH) --arch $(ARCH) --version "$$version" \
		--epoch "$$($(AS_CALLER) git log -1 --format=%ct)" --out "$(IMAGE_OUT)" --cache dist/cache $(IMAGE_ARGS)

image-test: prerequisites build ## build the appliance's image and boot it: directly, by BIOS and by UEFI (root by sudo)
	@$(find_go)
	$(AS_CALLER) rm -rf dist/image-test
	IMAGE_VERSION=1.0.0 $(MAKE) image ARCH=amd64 IMAGE_OUT=dist/image-test IMAGE_ARGS=--quick
	export SALLYWAY_IMAGES=$(CURDIR)/dist/image-test
	export SALLYWAY_IMAGE_COMMAND="PATH=$$(dirname "$$go"):$$PATH bin/mkimage build --init bin/appliance-amd64 --version 1.0.0 --epoch $$($(AS_CALLER) git log -1 --format=%ct) --cache dist/cache --quick"
	"$$go" test -json -count=1 -vet=off -timeout 15m $(TEST_EXEC) ./e2e/appliance | $(REPORT)
	cat dist/image-test/boot.txt

packages: nfpm ## pack deb and rpm of command line, gateway, relay and platform for amd64 and arm64 into dist/
	@$(find_go)
	$(AS_CALLER) "$$go" run ./images/packages --go "$$go" --nfpm bin/nfpm --out dist

containers: ## make container images of the programs for amd64 and arm64 into dist/containers; PUSH=registry.example/sallyway sends them there
	@$(find_go)
	version=$$($(AS_CALLER) git describe --tags --always --dirty --match 'v[0-9]*' 2>/dev/null || echo devel)
	commit=$$($(AS_CALLER) git rev-parse --short=12 HEAD 2>/dev/null || true)
	epoch=$${SOURCE_DATE_EPOCH:-$$($(AS_CALLER) git log -1 --format=%ct 2>/dev/null || echo 0)}
	$(AS_CALLER) env SOURCE_DATE_EPOCH="$$epoch" "$$go" run ./images/oci/cmd/ocibuild --go "$$go" --out dist/containers \
		--version "$$version" --commit "$$commit" --push "$(PUSH)"

nfpm: # the tests of the packages use it too
	@$(find_go)
	$(AS_CALLER) mkdir -p bin
	$(AS_CALLER) env GOBIN="$(CURDIR)/bin" "$$go" install $(NFPM)

clean: ## remove bin/ and dist/
	@rm -rf bin dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile

.ONESHELL:
