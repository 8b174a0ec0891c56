# Every target works on a machine that has only Python >= 3.11 and make.
# Another interpreter gets a virtual environment of its own: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
MARKED ?=
# What pip has not compiled is compiled by the first process that imports it, not by each of them.
export PYTHONDONTWRITEBYTECODE :=
BENCHMARKS := $(notdir $(basename $(wildcard tests/benchmarks/[a-z]*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-single test-double lint bench clean

help:
	@echo 'make demo   train on the handwritten digits, print the result, write a page with pictures'
	@echo 'make test   run the test suite, in single and in double precision'
	@echo 'make lint   ruff (lint and format) and mypy'
	@echo 'make bench  print the benchmark tables beside JAX, optax and scikit-learn'
	@echo 'make clean  remove the virtual environments, caches and built pages'

demo: $(VENV)/.installed-notebooks
	@$(BIN)/python notebooks/execute.py notebooks/softmax_regression.ipynb --page build/softmax_regression.html

test: test-single test-double

test-single: $(VENV)/.installed-test
	@echo '== single precision'
	@$(BIN)/python -m pytest -m '$(MARKED)'

test-double: $(VENV)/.installed-test
	@echo '== double precision (JAX_ENABLE_X64=1)'
	@JAX_ENABLE_X64=1 $(BIN)/python -m pytest tests -m 'not single and not notebook'

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed-test
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra; it is renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo 'Installing jaxsoftmax[$*] and what it needs into $(VENV); the first time takes a minute or two ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$*]'
	@touch $@
	@echo 'Installed.'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'jaxsoftmax needs Python 3.11 or newer, and $(PYTHON) is not. Name one: make ... PYTHON=python3.12'; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo 'The venv module is missing or incomplete; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
