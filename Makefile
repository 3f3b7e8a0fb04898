# lexmill: `make demo` makes a language model and talks about it; `make test` runs the fast tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_OPTIONS ?=
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-slow test-gpu check lint types house bench docs clean

$(VENV)/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing lexmill and its pinned dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e ".[runtimes,test,dev,plots,chinese]"
	@touch $@

demo: $(VENV)/ready
	@$(BIN)/lexmill run recipes/quickstart.toml
	@echo "(In a new shell, first: source $(BIN)/activate)"

test: $(VENV)/ready
	@$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/ready
	@$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/ready
	@$(BIN)/python -m pytest tests/gpu

lint: $(VENV)/ready
	@$(BIN)/ruff format --check src tests bench examples recipes
	@$(BIN)/ruff check src tests bench examples recipes

types: $(VENV)/ready
	@$(BIN)/mypy

house: $(VENV)/ready
	@$(BIN)/python -m pytest tests/house

check: lint types test

bench: $(VENV)/ready
	@$(BIN)/python bench/training.py

docs: $(VENV)/ready
	@$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
