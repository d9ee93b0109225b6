# Every target makes .venv first, from setup.cfg and constraints.txt, if it is missing or older than they are.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
# The Python to make .venv with: the first usable one, or `make test PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.10; do \
	$$p -c '$(CHECK)' 2>/dev/null && { echo $$p; break; }; done)
CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PY := $(VENV)/bin/python
SOURCES := $(wildcard ppvae tests examples benchmarks docs/conf.py)

.PHONY: help demo test test-slow test-all lint format docs bench clean clean-all

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(VENV)/.installed: setup.cfg constraints.txt
	@$(or $(PYTHON),false) -c '$(CHECK)' 2>/dev/null || { \
		echo "ppvae needs Python 3.10 to 3.13 with venv and pip; found: $$($(or $(PYTHON),python3) --version 2>&1 || true)"; \
		echo "Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3"; \
		exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --progress-bar off -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.installed ## train a conditional VAE on real digits; pictures and a report in out/demo
	$(PY) examples/cvae.py --data digits --out out/demo --overwrite

test: $(VENV)/.installed ## the fast tests and every docstring example
	$(PY) -m pytest -q -m "not slow and not cuda"

test-slow: $(VENV)/.installed ## only the slow tests
	$(PY) -m pytest -q -m "slow and not cuda"

test-all: $(VENV)/.installed ## all tests; those that need a GPU are skipped where there is none
	$(PY) -m pytest -q

lint: $(VENV)/.installed ## ruff (rules and format) and mypy
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

format: $(VENV)/.installed ## rewrite the sources as ruff wants them
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

docs: $(VENV)/.installed ## the site, in docs/_build/html, and the examples on its pages
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(PY) -m sphinx -q -W --keep-going -b doctest docs docs/_build/doctest

bench: $(VENV)/.bench ## run benchmarks/speed*.py; installs NumPyro and JAX to compare with
	@found=0; for script in benchmarks/speed*.py; do \
		test -e "$$script" || continue; found=1; \
		echo "== $$script"; $(PY) "$$script"; done; \
	test $$found = 1 || { echo "no benchmarks/speed*.py here"; exit 1; }

clean: ## remove caches and what was built
	rm -rf build dist ./*.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard ppvae tests examples benchmarks docs) -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv and out
	rm -rf $(VENV) out
