# make test   everything that a change must pass     make test-all   the slow tests too
# make demo   the main job: table and report.html    make lint       style and types only
#
# PyTorch is installed before anything else, so that no other package picks its build. On Linux
# the default build carries several GB of CUDA libraries. Where there is no GPU, pass pip the index
# of the CPU build, which PyTorch's own install page names:
#     make test TORCH_PIP="--index-url ADDRESS"
PYTHON    ?= python3
TORCH     ?= torch==2.13.0
TORCH_PIP ?=
# `make test COV=` runs the tests without measuring coverage.
COV       ?= --cov=regard.core --cov-report=term --cov-fail-under=95
PYTEST    ?= -q

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install test test-all lint format demo clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp file: a second make installs nothing unless pyproject.toml has changed.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_PIP) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all,dev]"
# Two packages that tests compare with. Without what they need: that is torchvision, for one, whose
# build would have to fit PyTorch's, and no test uses it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps timm natten
	touch $@

install: $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest $(PYTEST) -m "not slow" $(COV)

test-all: lint
	$(BIN)/python -m pytest $(PYTEST) $(COV)

demo: $(STAMP)
	$(BIN)/regard compare --sample --html report.html

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
