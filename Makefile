# The one entry point: `make demo` and `make test` set up a bare Debian machine and do what they say.
# A second run does only what changed: stamps in .venv/ stand for the steps that take time.
# CONTRIBUTING.md says what each gate is for and how long each suite may take.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The gates share .venv and target/, and their output is read in order.
.NOTPARALLEL:

export PYTHON ?= python3
# Ordinary users lack the sbin directories, where mkfs.ext4 and sfdisk live.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
export PIP_CONSTRAINT := $(CURDIR)/requirements/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export VIRTUAL_ENV := $(CURDIR)/.venv
# One interpreter for every build, or the shim is rebuilt at each change of command.
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python

BIN := .venv/bin
STAMPS := .venv/stamps
PYTHON_SOURCES := src tests $(wildcard bench) $(wildcard fuzz) $(wildcard tools)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates \( -name '*.rs' -o -name Cargo.toml \) -not -path '*/tests/*')
# nextest isolates each test in a process of its own; cargo test runs the same tests without it.
CARGO_TEST := $(shell if cargo nextest --version >/dev/null 2>&1; then echo "nextest run"; else echo test; fi)
PYTEST := $(BIN)/python -m pytest
# Most tests wait for a server, a mount or a kill as long as they compute.
PYTEST_PROCESSES ?= 2

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name text; \
	    do printf '  make %-12s %s\n' "$$name" "$$text"; done

# --- What a user runs -------------------------------------------------------------------------------------------

.PHONY: demo
demo: setup-demo build ## See it work on a real disk: serve, snapshot, change, prove, restore (no root needed)
	@$(BIN)/python -m stillblock demo

.PHONY: test
test: gates test-rust ## Everything, exactly what CI runs: the gates, then every suite
	@# Last, so that pytest's closing line closes the run.
	$(PYTEST) --numprocesses $(PYTEST_PROCESSES) --dist worksteal -m "not long"

# --- What a developer runs --------------------------------------------------------------------------------------

.PHONY: check
check: gates ## Format, lint, types, layers and the fast tests
	cargo test --quiet --lib --package stillblock-core --package stillblock-fuse
	$(PYTEST) -m "not slow and not long" tests/unit

.PHONY: format
format: setup-test ## Rewrite the sources in the one format
	cargo fmt --all
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/ruff check --fix-only --quiet $(PYTHON_SOURCES)

.PHONY: test-long
test-long: setup-test build ## The deep model runs and soak tests; takes the better part of an hour
	@tools/bootstrap long
	HYPOTHESIS_PROFILE=deep $(PYTEST) --timeout 3600

.PHONY: soak
soak: ## Stop the simulated machine at every step of ever new programs, until you stop it
	cargo test --locked --release --package stillblock-core --features simulation --test simulation \
	    -- --ignored --nocapture soak

.PHONY: bench
bench: setup-test build ## Compare with the peers on this machine; prints one table
	$(BIN)/python -m bench

.PHONY: docs
docs: setup-test build ## Write docs/cli.md anew from the program
	$(BIN)/python -m stillblock.cli.reference > docs/cli.md

.PHONY: wheel
wheel: setup-demo $(STAMPS)/run ## The abi3 wheel that users install, in dist/
	$(BIN)/maturin build --release --locked --out dist

.PHONY: test-wheel
test-wheel: setup-test wheel ## Install the wheel in a clean environment and run the demo from it
	tools/test-wheel dist

.PHONY: lock
lock: ## Take the newest versions of all Python dependencies into requirements/constraints.txt
	env -u PIP_CONSTRAINT tools/lock

.PHONY: clean
clean: ## Remove everything that was built or installed here
	rm -rf .venv .tools target dist src/stillblock/_native*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# --- Gates ------------------------------------------------------------------------------------------------------

.PHONY: gates
gates: fmt lint types border layers

.PHONY: fmt
fmt: setup-test
	cargo fmt --all --check
	$(BIN)/ruff format --quiet --check $(PYTHON_SOURCES)

.PHONY: lint
lint: setup-test
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
	cargo clippy --quiet --locked --package stillblock-core --features simulation --test simulation -- -D warnings
	$(BIN)/ruff check --quiet $(PYTHON_SOURCES)

.PHONY: types
types: setup-test
	$(BIN)/mypy

.PHONY: border
border: setup-test build
	$(BIN)/python -m mypy.stubtest stillblock._native --allowlist tools/stubtest-allowlist.txt

.PHONY: layers
layers: setup-test
	PYTHONPATH=src $(BIN)/lint-imports --no-logo

.PHONY: test-rust
test-rust: setup-test
	@# Not the shim: it is a module of an interpreter and does not link alone. Python's tests test it.
	cargo $(CARGO_TEST) --locked --package stillblock-core --package stillblock-fuse
	@# The same engine in the machine that is stopped at every step: docs/reliability.md.
	cargo $(CARGO_TEST) --locked --package stillblock-core --features simulation --test simulation
	cargo test --quiet --locked --doc --package stillblock-core

# --- Set-up -----------------------------------------------------------------------------------------------------

# Looking for what is missing takes a quarter of a second; a stamp would not notice what was removed.
.PHONY: setup-demo
setup-demo:
	@tools/bootstrap demo

.PHONY: setup-test
setup-test: $(STAMPS)/dev
	@tools/bootstrap test

.PHONY: build
build: $(STAMPS)/native

.venv/bin/python:
	@tools/bootstrap demo
	@$(PYTHON) -m venv .venv

$(STAMPS)/run: requirements/run.txt requirements/constraints.txt .venv/bin/python
	@mkdir -p $(@D)
	@echo "installing Python packages into .venv" >&2
	@$(BIN)/python -m pip install --quiet -r requirements/run.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/run
	@$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	@touch $@

# In release mode always: what is tested and shown is what users get.
$(STAMPS)/native: $(RUST_SOURCES) pyproject.toml $(STAMPS)/run
	@echo "building the Rust core, in release mode" >&2
	@PIP_QUIET=1 CARGO_TERM_QUIET=true $(BIN)/maturin develop --release --locked --quiet
	@touch $@
