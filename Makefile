# Everything a contributor runs. Needs GNU make and Python 3.11 or newer; the rest is installed into .venv.
#   make demo    a tour of Trocar on a small model, ending in report.html
#   make test    every test, in two processes; JOBS=0 for one, ARGS="-k words" for some
#   make check   what CI runs: format, lint, types, layers, docs, tests
#   make sizes   lengths of functions and files;   make bench   benchmarks;   make docs   the site in site/
#   make lock    writes constraints.txt and server.lock, the versions that are installed

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
# As variables they also reach what pip installs to build the package; the second name is that of pip 25.3 and later.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check
# What is installed follows from these files alone.
PINS := pyproject.toml constraints.txt
# Two threads on small tensors cost more than one saves, and results must not depend on the machine.
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED ?= 0
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types layers docs reference sizes bench lock clean

help:
	@sed -n '2,7s/^# *//p' Makefile

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One pip command: the constraint on torch must hold before anything else can pull another build of it.
$(VENV)/.dev: $(PINS) | $(VENV)/bin/python
	$(PIP) install --quiet --quiet -e ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: $(PINS) | $(VENV)/bin/python
	$(PIP) install --quiet --quiet -e ".[server,demo]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/trocar demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: format lint types layers docs test

format: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(VENV)/.dev
	$(BIN)/python scripts/docs_reference.py

sizes: $(VENV)/bin/python
	@$(BIN)/python scripts/sizes.py

bench: $(VENV)/.dev
	@$(BIN)/python scripts/benches.py $(ARGS)

lock: $(VENV)/bin/python
	$(PIP) install --quiet uv
	$(BIN)/python scripts/lock.py $(ARGS)

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
