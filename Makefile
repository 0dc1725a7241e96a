# `make demo` and `make test` install everything they need; `make help` lists the other targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
# Only the modules that training imports; compiling all takes three times as long, on all cores.
COMPILE := $(BIN)/python -c 'import datasets, moelm.compare.report, moelm.data.prepare, moelm.train.setup, torch._dynamo'
# Compiled modules are kept, or each of the many processes of demo and tests would compile them again.
unexport PYTHONDONTWRITEBYTECODE
TESTS := not slow and not gpu

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format type check clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12

install: $(READY)  ## Create .venv and install moelm, pinned dependencies, test tools and optional extras

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	@$(COMPILE)
	@touch $(CORE) $@

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

demo: $(CORE)  ## Train the dense baseline and the mixture of experts, and compare them
	BIN=$(BIN) bash scripts/demo.sh

test: $(READY)  ## Run the fast tests
	$(BIN)/pytest -m "$(TESTS)" -n 3 --no-loadscope-reorder

test-slow: $(READY)  ## Run the slow tests: several processes, kills, the whole pipeline
	$(MAKE) test TESTS=slow

lint: $(READY)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY)  ## Check types
	$(BIN)/mypy

check: lint type test  ## Style, types and fast tests

clean:  ## Remove the environment and caches, but not data and runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
