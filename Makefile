# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment that is made on first use: no activation needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# LOCKED=no installs requirements*.txt without verifying hashes, from an index of other files.
LOCKED ?= yes
KIND := $(if $(filter no,$(LOCKED)),txt,lock)

.PHONY: help demo test test-all lint format types lock audit clean

help:
	@echo "make demo    train BalPoE on long-tailed digits and write a report (about a minute)"
	@echo "make test    run the tests;  make test-all: also those that take long"
	@echo "make lint    check style and format;  make format: mend them;  make types: check types"
	@echo "make lock    pin everything anew, with hashes;  make audit: ask for known vulnerabilities"
	@echo "make clean   remove the virtual environment and the demo's run"

demo: $(VENV)/.run
	$(BIN)/python -m balpoe_jax.main --config=configs/digits_lt.py --workdir=runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --all

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
	if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi

$(VENV)/.run: requirements.$(KIND) launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements.$(KIND)
	@touch $@

$(VENV)/.dev: requirements-dev.$(KIND) requirements.$(KIND) launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements-dev.$(KIND)
	@touch $@ $(VENV)/.run
