# Two commands do everything on a fresh machine: `make demo` and `make test`. Both stand on `make install`.
PYTHON ?= python3
# A CPU build where the package index has one; a GPU machine wants another: make install TORCH=torch
TORCH ?= torch==2.13.0
# One more thread a process only fights for the same cores.
export OMP_NUM_THREADS ?= 1

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test lint types layers tests clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(INSTALLED)

demo: install
	$(BIN)/moeroute demo --out out/demo

test: lint types layers tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

tests: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf .venv build out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
