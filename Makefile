# Frequent tasks. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo farm test quick test-one check guest oracles world-long kill-long exchange-long bench bench-full bench-instructions fio

help: ## prints this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## builds the programs diffdisk and diffdiskd in target/release
	cargo build --release --bins

demo: ## runs a virtual machine on a child of a golden image (about a minute)
	@vm-images/demo.sh

farm: ## runs 64 guests on children of one image, which nearly fill a file system of 8 GiB (about 20 minutes; needs root)
	.ci/install full
	vm-images/build-guest.sh full
	cargo build --release --bins
	vm-images/farm.sh

guest: ## builds the Linux guest that the tests boot, in vm-images/cache
	.ci/install full
	vm-images/build-guest.sh full

oracles: ## installs the independent programs that the tests compare with, in target/oracles
	.ci/install full
	tests/oracles/install.sh

test: guest oracles ## runs all tests; installs the programs that they need (20 minutes)
	cargo test --features sim,mutants -- --show-output

quick: ## runs the tests that need no other programs (one minute after the build)
	cargo test --features sim,mutants --lib --test floors --test golden --test model
	DIFFDISK_SECONDS=10 cargo test --features sim,mutants --test world random_work

test-one: ## runs one test target, for example T=verbs; F=TEXT selects the tests whose names contain TEXT; see CONTRIBUTING.md
	cargo test --features sim,mutants $(if $(filter lib,$(T)),--lib,--test $(or $(T),$(error T= names a test target, for example T=verbs))) -- $(F)

world-long: ## runs the crash tests for hours: all workloads of six actions, and 1,000,000,000 random states
	DIFFDISK_WORLD_K=6 DIFFDISK_WORLD_ACTS=500 DIFFDISK_STATES=500000000 DIFFDISK_SECONDS=86400 \
	cargo test --release --features sim,mutants --test world -- --nocapture --test-threads 1

kill-long: ## runs a guest for ten minutes and kills its disk daemon every 200 ms
	DIFFDISK_KILL_SECONDS=600 cargo test --release --features sim --test kill a_guest -- --nocapture

exchange-long: ## opens and merges images for two minutes while their folders, files and links are exchanged
	DIFFDISK_EXCHANGE_SECONDS=60 \
	cargo test --release --features sim,mutants --test verbs exchange -- --nocapture --test-threads 1

check: ## checks formatting, lints and documentation
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features sim,mutants -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --features sim,mutants
	if command -v shellcheck >/dev/null; then shellcheck .ci/install .ci/run vm-images/init vm-images/*.sh vm-images/jobs/*.sh tests/oracles/install.sh benches/*.sh benches/fio/run.sh; fi

bench: ## compares the speed with QEMU's programs and dd; installs the programs that it needs (four minutes)
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve
	cargo bench --bench tools

bench-full: ## runs the benchmarks of `bench` longer and more often
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve -- --full
	cargo bench --bench tools -- --full

bench-instructions: ## counts the instructions of a look-up and of a whole request with valgrind
	.ci/install bench
	benches/instructions.sh

fio: ## runs fio in the guest on a chain, on a flat image, and on a qcow2 chain that qemu-storage-daemon serves
	.ci/install full
	vm-images/build-guest.sh full
	cargo build --release --bins
	benches/fio/run.sh
