# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment that is made on first use: no activation needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint format types clean

help:
	@echo "make demo    train BalPoE on long-tailed digits and write a report (about a minute)"
	@echo "make test    run the tests"
	@echo "make lint    check style and format;  make format: mend them;  make types: check types"
	@echo "make clean   remove the virtual environment and the demo's run"

demo: $(VENV)/.run
	$(BIN)/python -m balpoe_jax.main --config=configs/digits_lt.py --workdir=runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf runs/demo
	if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi

$(VENV)/.run: requirements.txt launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt launch/setup.sh
	@sh launch/setup.sh "$(PYTHON)" "$(VENV)" requirements-dev.txt
	@touch $@ $(VENV)/.run
