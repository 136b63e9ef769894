# Everything happens in .venv; both targets install what they need and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint tables clean

quickstart: $(VENV)/.installed
	$(BIN)/compress run quickstart --out runs/quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tables: $(VENV)/.installed
	$(BIN)/python -m eval.bench.tables README.md docs/benchmarks.md

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
