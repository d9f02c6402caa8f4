# Everything runs in .venv, made from python3 (or PYTHON=python3.12 make …), with the tested
# versions of constraints.txt.  `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
ARGS   ?=

.PHONY: demo test lint format test-slow mutants test-newest test-oldest calibration conformance docs notebooks wheel clean help
.DEFAULT_GOAL := help

demo: $(VENV)/.installed ## the main analysis on the shipped models, into ./demo
	$(BIN)/hooked-vlm demo $(ARGS)

# pytest stands last: the final line says how many tests passed.
test: lint ## linter, formatter, type checker, tests (ARGS="-n 2": two processes)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test ## the first three of these alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-test ## mend what linter and formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/.installed-test ## the tests marked slow, which `make test` leaves out
	$(BIN)/python -m pytest -m slow $(ARGS)

mutants: $(VENV)/.installed-test ## do tests notice 200 small faults in the code? (an hour; continues mutants.jsonl)
	$(BIN)/python tests/mutants.py --n 200 --out mutants.jsonl $(ARGS)

test-newest: $(VENV)-newest/.installed ## tests with the newest version of everything
	$(VENV)-newest/bin/python tests/compatibility.py newest $(ARGS)

test-oldest: $(VENV)-oldest/.installed ## tests with the oldest versions that pyproject.toml allows
	$(VENV)-oldest/bin/python tests/compatibility.py oldest $(ARGS)

calibration: $(VENV)/.installed-test ## how often verdicts claim what is not there (half an hour on one core)
	$(BIN)/python tests/calibration.py $(ARGS)

conformance: $(VENV)/.installed-test ## every architecture of transformers against every law (under half an hour)
	$(BIN)/python tests/conformance/run.py --write docs/measured/conformance.md $(ARGS)

docs: $(VENV)/.installed ## the documentation's site, into ./site
	$(PIP) -e '.[docs]'
	$(BIN)/python -m zensical build --clean --strict # with this folder on the path

notebooks: $(VENV)/.installed-test ## run docs/notebooks and store what comes out (ARGS="first-steps": one)
	$(BIN)/python tests/notebooks.py $(ARGS)

wheel: $(VENV)/.installed-test ## wheel and source distribution, into ./dist
	$(BIN)/python -m hatchling build -d dist

clean: ## remove the environments and everything that was made
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest demo site dist .pytest_cache .ruff_cache .hypothesis

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: there is no '$(PYTHON)' on the path. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python make $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); hooked_vlm needs Python 3.11 or newer. Name one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV) with $$("$(PYTHON)" --version)"
	"$(PYTHON)" -m venv $(VENV)

# One stamp for what a user needs, one for what a developer needs on top: with the stamps there,
# nothing is asked of the network.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hooked_vlm into $(VENV) (a few minutes the first time)"
	@$(BIN)/python tests/download_size.py $(MAKECMDGOALS)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

# The canaries have environments of their own, so that `make test` keeps the tested versions.
$(VENV)-newest/.installed $(VENV)-oldest/.installed: pyproject.toml | $(BIN)/python
	@rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --upgrade pip uv
	$(@D)/bin/uv pip install --python $(@D)/bin/python --resolution $(if $(findstring oldest,$@),lowest-direct,highest) -e '.[test]'
	@touch $@
