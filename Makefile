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
SOURCES := $(wildcard ppvae tests examples benchmarks docs/conf.py docs/figures.py docs/course/checks.py)

.PHONY: help demo test test-arviz1 test-intake test-slow test-all faults lint format docs figures look bench gpu coverage dist clean clean-all

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# What ppvae itself needs; .installed adds the tests, the docs and the tools.
$(VENV)/.runtime: setup.cfg constraints.txt
	@$(or $(PYTHON),false) -c '$(CHECK)' 2>/dev/null || { \
		echo "ppvae needs Python 3.10 to 3.13 with venv and pip; found: $$($(or $(PYTHON),python3) --version 2>&1 || true)"; \
		echo "Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3"; \
		exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --progress-bar off -c constraints.txt -e .
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime
	$(PIP) install --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --progress-bar off -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.runtime ## train a conditional VAE on digits of 28 x 28; pictures and a report in out/demo
	$(PY) examples/cvae.py --data typeset --latent-dim 5 --hidden 512 --epochs 30 --out out/demo --overwrite

test: $(VENV)/.installed ## the fast tests and every docstring example
	$(PY) -m pytest -q -m "not slow and not cuda"

test-slow: $(VENV)/.installed ## only the slow tests; SHARD=1/8 for the first eighth of them
	$(PY) -m pytest -q -m "slow and not cuda" $(if $(SHARD),--shard $(SHARD))

test-intake: $(VENV)/.installed ## containers and stores of polars, AnnData, Arrow, zarr and Hugging Face, with these installed
	$(PIP) install --progress-bar off -c constraints.txt -e '.[intake]'
	$(PY) -m pytest -q tests/test_intake.py tests/test_table.py tests/test_verbs.py tests/test_stored.py

test-all: $(VENV)/.installed ## all tests; those that need a GPU are skipped where there is none
	$(PY) -m pytest -q

# ArviZ 1.x needs Python 3.12 or later, constraints.txt has 0.x: it has an environment of its own.
ARVIZ1 := .venv-arviz1
ARVIZ1_PYTHON ?= $(shell for p in python3.13 python3.12 python3 $(foreach v,3.13 3.12,$(wildcard $(HOME)/.pyenv/versions/$(v)*/bin/python)); do \
	$$p -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

$(ARVIZ1)/.installed: constraints.txt
	@test -n "$(ARVIZ1_PYTHON)" || { echo "ArviZ 1.x needs Python 3.12 or 3.13: make test-arviz1 ARVIZ1_PYTHON=/path/to/python3.13"; exit 1; }
	$(ARVIZ1_PYTHON) -m venv --clear $(ARVIZ1)
	grep -vE '^(arviz|xarray)' constraints.txt > $(ARVIZ1)/constraints.txt
	$(ARVIZ1)/bin/python -m pip --disable-pip-version-check install --progress-bar off -c $(ARVIZ1)/constraints.txt \
		'arviz>=1,<2' torch pyro-ppl matplotlib scikit-learn pooch pandas tqdm zuko h5netcdf h5py pytest hypothesis
	@touch $@

test-arviz1: $(ARVIZ1)/.installed ## diagnostics with ArviZ 1.x, on Python 3.12 or 3.13
	$(ARVIZ1)/bin/python -m pytest -q -m "not slow and not cuda" tests/test_arviz.py tests/test_calibration.py tests/test_reference.py

# Some of them: make faults FAULTS='pairs.py elbo'; whether the lines still stand: FAULTS=--check
faults: $(VENV)/.installed ## break the package line by line, and see whether the tests notice; an hour or two
	$(PY) tests/faults/run.py $(FAULTS)

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

# Some of them: make figures FIGURES='mixture_em constrained'; what makes which: FIGURES=--list
figures: $(VENV)/.installed ## the pictures in docs/figures again, each by its command; all take many hours
	$(PY) docs/figures.py $(FIGURES)

# It drives the Chromium that is installed; CHROMIUM=/path/to/chrome names another one.
look: $(VENV)/.installed ## open every page of the built site in Chromium: dead links, errors, cut-off tables
	$(PIP) install --progress-bar off -c constraints.txt -e '.[browser]'
	$(PY) docs/look.py docs/_build/html $(LOOK_ARGS)

# `make bench BENCH_ARGS=--quick` tries all of it; `make bench BENCH_ARGS='--device cuda' BENCH_OUT=out/cuda.jsonl`.
BENCH_OUT := out/bench.jsonl
bench: $(VENV)/.bench ## compare speed with NumPyro, pythae, stock Pyro and hand-written PyTorch; resumes
	$(PY) -m pytest -q tests/test_benchmarks.py -m "not slow and not cuda"
	@for name in speed speed_scaling speed_factor speed_nvae speed_fit speed_many speed_build evidence data_path; do \
		echo "== benchmarks/$$name.py"; \
		$(PY) benchmarks/$$name.py --out $(BENCH_OUT) $(BENCH_ARGS); done

# Exit status: 0 well, 1 a test or the smoke failed, 2 no CUDA, 3 a target is missed, 4 out of time.
GPU_OUT := out/gpu
# Without .venv it takes the machine's own Python and this folder: no network is needed.
gpu: ## on a machine with a GPU: does the CUDA path work, and what is it worth? Ten minutes
	PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(or $(wildcard $(PY)),python3) benchmarks/gpu.py --out $(GPU_OUT) --seconds 570

coverage: $(VENV)/.installed ## which lines the fast tests run; out/coverage/index.html
	$(PIP) install --progress-bar off -c constraints.txt coverage
	$(PY) -m coverage run --source=ppvae -m pytest -q -m "not slow and not cuda"
	$(PY) -m coverage html -d out/coverage
	$(PY) -m coverage report --skip-covered

dist: $(VENV)/.installed ## sdist and wheel in dist/, checked as an index would; packaging/try_wheel.sh tries the wheel
	$(PIP) install --progress-bar off -c constraints.txt build twine
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) -m twine check --strict dist/*

clean: ## remove caches and what was built
	rm -rf build dist ./*.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard ppvae tests examples benchmarks docs) -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv and out
	rm -rf $(VENV) $(ARVIZ1) out
