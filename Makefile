# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment that is made on first use: no activation needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The newest versions of what pyproject.toml names, on a Python that the newest JAX runs on.
PYTHON_NEWEST ?= $(shell for python in python3.13 python3.12; do \
	$$python -c '' 2> /dev/null && echo $$python && break; done)
VENV_NEWEST := .venv-newest
# LOCKED=no installs requirements*.txt without verifying hashes, from an index of other files.
LOCKED ?= yes
KIND := $(if $(filter no,$(LOCKED)),txt,lock)

# A file's tests share what they train and compile; `tests/conftest.py` puts the long files first.
SPREAD := --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all test-newest notebooks lint format types lock audit clean

help:
	@echo "make demo    train BalPoE on long-tailed digits and write a report (about a minute)"
	@echo "make test    run the tests;  make test-all: also those that take long"
	@echo "make test-newest   run the tests with the newest versions that pyproject.toml allows"
	@echo "make notebooks  execute the notebooks in docs/notebooks as they are (about five minutes)"
	@echo "make lint    check style and format;  make format: mend them;  make types: check types"
	@echo "make lock    pin everything anew, with hashes;  make audit: ask for known vulnerabilities"
	@echo "make clean   remove the virtual environments and the demo's run"

demo: $(VENV)/.run
	$(BIN)/python -m balpoe_jax.main --config=configs/digits_lt.py --workdir=runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(SPREAD) -m 'not slow'

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(SPREAD) -m '' --all

test-newest: $(VENV_NEWEST)/.dev
	$(VENV_NEWEST)/bin/python -m pytest -n 2 $(SPREAD) -m 'not slow'

# In a folder of its own, and not here: a notebook writes its data and runs where it is executed.
notebooks: $(VENV)/.dev
	rm -rf runs/notebooks && mkdir -p runs/notebooks && cp docs/notebooks/*.ipynb runs/notebooks
	PYTHONPATH="$(CURDIR)" $(BIN)/jupyter execute --inplace runs/notebooks/*.ipynb

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/mypy

# For Python 3.11 to 3.13, with the hashes of PyPI's files whatever index this machine uses.
lock: $(VENV)/.dev
	for file in requirements requirements-dev .ci/audit; do $(BIN)/uv pip compile --quiet --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-header \
		--default-index https://pypi.org/simple $$file.txt --output-file $$file.lock || exit; done

audit:
	PYTHON="$(PYTHON)" .ci/audit

clean:
	rm -rf runs/demo
	for venv in "$(VENV)" "$(VENV_NEWEST)"; do \
		if [ -f "$$venv/pyvenv.cfg" ]; then rm -rf "$$venv"; fi; done

$(VENV)/.run: requirements.$(KIND) launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements.$(KIND)
	@touch $@

$(VENV)/.dev: requirements-dev.$(KIND) requirements.$(KIND) launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements-dev.$(KIND)
	@touch $@ $(VENV)/.run

# Newer versions than it has come by `make clean`, or by removing it.
$(VENV_NEWEST)/.dev: requirements-newest.txt pyproject.toml launch/setup.sh
	@sh launch/setup.sh "$(PYTHON_NEWEST)" "$(VENV_NEWEST)" requirements-newest.txt
	@touch $@
