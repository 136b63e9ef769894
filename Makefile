# Everything happens in .venv; both targets install what they need and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart masked-demo test lint tables keys site clean

quickstart: $(VENV)/.installed
	$(BIN)/compress run quickstart --out runs/quickstart

# The second run takes the model that the first has trained.
masked-demo: $(VENV)/.installed
	$(BIN)/compress run masked/digits --out runs/masked-digits
	$(BIN)/compress run masked/digits-4bit --out runs/masked-digits-4bit \
		--set model=runs/masked-digits/base
	$(BIN)/compress compare runs/masked-digits runs/masked-digits-4bit --overwrite \
		--out runs/masked-demo.html

# Two to four processes; each reads torch and the models once, about 1 GB.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/compress
	ln -s $(CURDIR)/compress/* $(CURDIR)/eval build/types/compress
	$(BIN)/pyrefly check --summarize-errors

tables: $(VENV)/.installed
	$(BIN)/python -m compress.eval.bench.tables README.md docs/benchmarks.md docs/learned-masks.md docs/masked.md docs/flatten.md docs/vib.md docs/dense_sparse.md docs/runtime.md

# build/site/index.html: the pages of docs/, with every link looked at.
site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'mkdocs>=1.6,<2'
	$(BIN)/python -m mkdocs build --strict --quiet

keys: $(VENV)/.installed
	$(BIN)/python -m compress.planning.reference docs/recipes.md

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
