# make demo   the main analysis on both shipped models, into ./demo
# make test   linter, formatter, type checker, tests
# make lint   the first three alone
# make conformance   every architecture of transformers against every law (under half an hour)
#
# Everything runs in .venv, made from python3 (or PYTHON=python3.12 make …).  A machine
# without an NVIDIA GPU can spare itself the CUDA build of torch:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
ARGS   ?=

.PHONY: demo test lint format conformance docs clean help
.DEFAULT_GOAL := help

demo: $(VENV)/.installed
	$(BIN)/hooked-vlm demo $(ARGS)

# pytest stands last: the final line says how many tests passed.
test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

conformance: $(VENV)/.installed-test
	$(BIN)/python tests/conformance/run.py --write docs/conformance.md $(ARGS)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo site .pytest_cache .ruff_cache .hypothesis

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no '$(PYTHON)' on the path. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); hooked_vlm needs Python 3.11 or newer. Name one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# One stamp for what a user needs, one for what a developer needs on top.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hooked_vlm into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@
