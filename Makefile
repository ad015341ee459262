# What is done often, by name. `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test check guest world-long

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the programs diffdisk and diffdiskd, in target/release
	cargo build --release --bins

demo: ## a virtual machine works on a child of a golden image (about a minute)
	@vm-images/demo.sh

guest: ## the Linux guest that tests boot, in vm-images/cache
	.ci/install full
	vm-images/build-guest.sh full

test: guest ## everything that can fail; installs what it compares with
	cargo test --features sim,mutants

world-long: ## crashes for hours: all workloads of six acts, a thousand million random states
	DIFFDISK_WORLD_K=6 DIFFDISK_WORLD_ACTS=500 DIFFDISK_STATES=500000000 DIFFDISK_SECONDS=86400 \
	cargo test --release --features sim,mutants --test world -- --nocapture --test-threads 1

check: ## formatting, lints, documentation
	cargo fmt --check
	cargo clippy --all-targets --features sim,mutants -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --features sim,mutants
	if command -v shellcheck >/dev/null; then shellcheck .ci/install .ci/run vm-images/init vm-images/*.sh vm-images/jobs/*.sh; fi
