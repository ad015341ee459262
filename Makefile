# What is done often, by name. `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test check guest oracles kill-long bench bench-full bench-instructions fio

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the programs diffdisk and diffdiskd, in target/release
	cargo build --release --bins

demo: ## a virtual machine works on a child of a golden image (about a minute)
	@vm-images/demo.sh

guest: ## the Linux guest that tests boot, in vm-images/cache
	.ci/install full
	vm-images/build-guest.sh full

oracles: ## the programs by others that tests compare with, in target/oracles
	.ci/install full
	tests/oracles/install.sh

test: guest oracles ## everything that can fail; installs what it needs
	cargo test --features sim

kill-long: ## ten minutes of a guest whose disk daemon is killed every 200 ms
	DIFFDISK_KILL_SECONDS=600 cargo test --release --features sim --test kill a_guest -- --nocapture

check: ## formatting, lints, documentation
	cargo fmt --check
	cargo clippy --all-targets --features sim -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --features sim
	if command -v shellcheck >/dev/null; then shellcheck .ci/install .ci/run vm-images/init vm-images/*.sh vm-images/jobs/*.sh tests/oracles/install.sh; fi

bench: ## speed beside qemu-storage-daemon, in two minutes; installs what it needs
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve

bench-full: ## the same, longer and more often
	.ci/install bench
	cargo bench --bench resolve
	cargo bench --bench serve -- --full

bench-instructions: ## instructions of a look-up and of a whole request, counted by valgrind
	.ci/install bench
	benches/instructions.sh

fio: ## fio in the guest on a chain, a flat image, and a chain of qcow2 by qemu-storage-daemon
	.ci/install full
	vm-images/build-guest.sh full
	cargo build --release --bins
	benches/fio/run.sh
