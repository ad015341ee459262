# Frequent tasks. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo farm test quick test-one check guest oracles world-long kill-long exchange-long bench bench-full bench-instructions fio

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the programs diffdisk and diffdiskd, in target/release
	cargo build --release --bins

demo: ## a virtual machine works on a child of a golden image (about a minute)
	@vm-images/demo.sh

farm: ## 64 guests on children of one image, on a file system of 8 GiB that they nearly fill (about 20 minutes; needs root)
	.ci/install full
	vm-images/build-guest.sh full
	cargo build --release --bins
	vm-images/farm.sh

guest: ## the Linux guest that tests boot, in vm-images/cache
	.ci/install full
	vm-images/build-guest.sh full

oracles: ## the programs by others that tests compare with, in target/oracles
	.ci/install full
	tests/oracles/install.sh

test: guest oracles ## everything that can fail; installs what it needs
	cargo test --features sim,mutants -- --show-output

quick: ## tests that need no other programs, a minute after the build
	cargo test --features sim,mutants --lib --test floors --test golden --test model
	DIFFDISK_SECONDS=10 cargo test --features sim,mutants --test world random_work

test-one: ## one test target: make test-one T=verbs, or with F= only tests whose names contain that; see CONTRIBUTING.md
	cargo test --features sim,mutants $(if $(filter lib,$(T)),--lib,--test $(or $(T),$(error T= names a test target, for example T=verbs))) -- $(F)

world-long: ## crashes for hours: all workloads of six acts, a thousand million random states
	DIFFDISK_WORLD_K=6 DIFFDISK_WORLD_ACTS=500 DIFFDISK_STATES=500000000 DIFFDISK_SECONDS=86400 \
	cargo test --release --features sim,mutants --test world -- --nocapture --test-threads 1

kill-long: ## ten minutes of a guest whose disk daemon is killed every 200 ms
	DIFFDISK_KILL_SECONDS=600 cargo test --release --features sim --test kill a_guest -- --nocapture

exchange-long: ## two minutes of folders, files and links that are exchanged while images are opened and merged
	DIFFDISK_EXCHANGE_SECONDS=60 \
	cargo test --release --features sim,mutants --test verbs exchange -- --nocapture --test-threads 1

check: ## formatting, lints, documentation
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features sim,mutants -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --features sim,mutants
	if command -v shellcheck >/dev/null; then shellcheck .ci/install .ci/run vm-images/init vm-images/*.sh vm-images/jobs/*.sh tests/oracles/install.sh benches/*.sh benches/fio/run.sh; fi

bench: ## speed beside QEMU's programs and dd, in four minutes; installs what it needs
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve
	cargo bench --bench tools

bench-full: ## the same, longer and more often
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve -- --full
	cargo bench --bench tools -- --full

bench-instructions: ## instructions of a look-up and of a whole request, counted by valgrind
	.ci/install bench
	benches/instructions.sh

fio: ## fio in the guest on a chain, a flat image, and a chain of qcow2 by qemu-storage-daemon
	.ci/install full
	vm-images/build-guest.sh full
	cargo build --release --bins
	benches/fio/run.sh
