# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv.
#
# The pinned torch is a CPU build where pip is set up for one. On any other machine:
#   make test PIP_ARGS="--extra-index-url URL_OF_PYTORCH_CPU_WHEELS"
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
WORKERS  ?= 2
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed

.PHONY: setup test test-all test-lab test-newest test-oldest check demo docs dist format clean

setup: $(STAMP)

$(STAMP): pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(PIP_ARGS) -c constraints.txt pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]" -e lab
	touch $(STAMP)

test: $(STAMP)  ## the product, a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests

test-lab: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal lab/tests

# The laboratory first and by itself: it registers mixers that the product's tests must not meet.
test-all: test-lab  ## everything: the laboratory, and the product with its slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

# The model and cache tests with another release of transformers, installed beside the pinned one.
VERSION_TESTS := tests/models tests/convert tests/mixers tests/test_cache.py

test-oldest test-newest: test-%: $(STAMP)
	PIP_ARGS="$(PIP_ARGS)" BIN=$(BIN) .ci/with-transformers $* -n $(WORKERS) --dist worksteal -m "not slow" $(VERSION_TESTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(STAMP)
	$(BIN)/python examples/demo.py

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

dist: $(STAMP)  ## wheel and sdist of both distributions, in dist/
	rm -rf dist build lab/build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist lab

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site runs demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
