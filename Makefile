# Two commands: `make quickstart` and `make test`. Each makes the virtual environment first and takes up where an
# earlier one stopped.
#
# Variables:
#   PYTHON   the Python that makes the virtual environment, 3.11 or newer           make test PYTHON=python3.12
#   VENV     where the environment lies
#   MARKS    which tests run (pytest -m); "gpu" on a machine that has one           make test MARKS=gpu
#   TESTS    files or folders of tests                                             make test TESTS=tests/data
#   PIP_EXTRA_INDEX_URL   pip's own variable: on a machine without a GPU, give it the address of PyTorch's index of
#            CPU builds and torch takes a tenth of the space. Everything runs with any build of torch.

PYTHON ?= python3
VENV ?= .venv
MARKS ?= not gpu and not long
TESTS ?= tests

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test check format clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   raw text to two trained models and a plot of both, on this machine"
	@echo "make test         the tests"
	@echo "make check        format, lint, types"
	@echo "make format       puts format and lint right where a tool can"
	@echo "make clean        removes the environment and all caches; keeps runs and shards"

quickstart: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" bash launch/quickstart.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "$(MARKS)" --durations=10 $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find brt_dist preprocessing tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment, in steps that are each made once ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"Python 3.11 or newer is needed; $(PYTHON) is {v}" if sys.version_info < (3, 11) else 0)'
	@echo "== environment 1/4: $(VENV), by $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone: once the pinned build is there, no other package's requirement replaces it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "== environment 2/4: torch"
	$(PIP) torch
	@touch $@

$(VENV)/.installed: setup.py constraints.txt $(VENV)/.torch
	@echo "== environment 3/4: brt_dist and what it needs"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== environment 4/4: the tools of the tests"
	$(PIP) -e ".[dev]"
	@touch $@
