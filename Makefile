# Needs Python 3.10 or newer, make, and pip's network: everything else goes into .venv.
PYTHON ?= python3
RANKS ?= 2
JOBS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What torchrun would choose itself for several ranks, less its warning; the config sets the threads anyway.
export OMP_NUM_THREADS ?= 1

.PHONY: help train test lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(INSTALLED)  ## train on Fashion-MNIST; RANKS=2 processes, ARGS="schedule.epochs=2" overrides
	$(BIN)/largebatch data fetch fashion-mnist
	$(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) -m largebatch train fashion_mnist $(ARGS)

test: $(INSTALLED)  ## run all tests, JOBS=2 files at a time; ARGS="-k name" chooses
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(INSTALLED)  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and what tools left; data and runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut short is taken up again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "largebatch needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
