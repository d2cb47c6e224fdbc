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

.PHONY: setup test test-all test-lab test-newest test-oldest test-ecosystem test-transformers test-vllm check demo docs dist format clean

setup: $(STAMP)

$(STAMP): pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(PIP_ARGS) -c constraints.txt pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]" -e lab
	touch $(STAMP)

# The demo needs a part of that: a download of some hundred megabytes less.
DEMO := $(VENV)/.installed-demo
$(DEMO): pyproject.toml constraints.txt
	test -f $(STAMP) || $(PYTHON) -m venv $(VENV)
	test -f $(STAMP) || $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[demo]"
	touch $@

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

# Trainers and adapters, and transformers' own tests, need packages that nothing else here does. They stand in a folder
# of their own, without what they need: the pinned torch and transformers serve them.
ECOSYSTEM := $(VENV)/ecosystem
$(ECOSYSTEM): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --target $@ --no-deps \
	  "trl>=1.16,<2" "peft>=0.21" "bitsandbytes>=0.50" "liger-kernel>=0.8" "parameterized>=0.9"

test-ecosystem: $(ECOSYSTEM)  ## trainers and adapters: TRL, PEFT, bitsandbytes, Liger, two processes
	OMP_NUM_THREADS=1 PYTHONPATH=$(ECOSYSTEM) $(BIN)/python -m pytest tests/ecosystem tests/convert/test_ecosystem.py

test-transformers: $(ECOSYSTEM)  ## transformers' own tests; TRANSFORMERS_CHECKOUT names a copy of its repository
	OMP_NUM_THREADS=1 PYTHONPATH=$(ECOSYSTEM):$(CURDIR) $(BIN)/python lab/transformers_suite/run.py

# The plugin in the CPU build of vLLM, which is installed beside what .venv holds: two minutes, and as many for the tests.
test-vllm: $(STAMP)
	PIP_ARGS="$(PIP_ARGS)" lab/scripts/vllm_environment.sh $(VENV)/vllm $(VENV)
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(VENV)/vllm/bin/python -m pytest -m "not slow" tests/serving

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(DEMO)
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
