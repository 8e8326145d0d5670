# Paddock's development tasks. Each one sets up what it needs; what is set up already costs nothing the second time.
#   PYTHON=python3.12            the Python to build .venv with, 3.11 or 3.12
#   TORCH_INDEX=URL              a package index to take torch from; without a GPU, https://download.pytorch.org/whl/cpu saves gigabytes
#   HUB=1                        fetch models from the Hugging Face hub, not from the package index
#   PYTEST_ARGS="-k scheduler"   what pytest is told
#   GPU_ARGS="-k attention"      what pytest is told of the kernels' tests on a GPU: mostly compilation, so eight at a time
#   SANITIZER=/path/to/it        compute-sanitizer, where it is not on the path

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
DISTRIBUTIONS := $(shell sed -n '/^distributions = \[/,/\]/p' pyproject.toml | grep -o '"[^"]*"' | tr -d '"')
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Bytecode is written as modules are first imported: most of torch's and transformers' never is. `pip install` of what requirements/
# lists for tests took 123 s on two cores, and 72 without it (once each, by hand).
INSTALL := $(PIP) install --no-compile
unexport PYTHONDONTWRITEBYTECODE
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
GPU_ARGS ?= --numprocesses 8 --dist worksteal
SANITIZER ?= compute-sanitizer
TOOLS := .tools

.PHONY: help setup tools models assets demo test gpu-test memcheck lint format types wheels lock clean

help: ## say what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMPS)/workspace ## build .venv: torch, the pinned packages, the workspace

tools: $(TOOLS)/installed ## install into .tools the quantisation tools that tests of formats are held to; without it these skip

models: setup ## fetch the model that the demo and the tests use
	@$(BIN)/python -m tests.assets.smollm2 $(if $(HUB),--hub)

assets: models ## fetch what the tests of quality use beside it: stories15M, the evaluation sets, a long text
	@$(BIN)/python -m tests.assets.stories15m
	@$(BIN)/python -m tests.assets.evaluation_sets

demo: models ## let a real model answer a few prompts at once
	@$(BIN)/python docs/examples/demo.py

test: models ## run every test
	$(PYTEST) $(PYTEST_ARGS)

gpu-test: models ## run every test that needs a GPU, and every test of the kernels, on this machine's GPU
	$(PYTEST) -m gpu $(GPU_ARGS) plugins/triton
	$(PYTEST) -m gpu --ignore plugins/triton

memcheck: setup ## run a small slice of the kernels' tests under compute-sanitizer
	OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --target-processes application-only \
	  --error-exitcode 1 $(BIN)/python -m pytest -m memcheck plugins/triton

lint: setup ## check style, formatting and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config pyproject.toml

format: setup ## put the formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## check types, strictly, in every distribution and its tests
	$(BIN)/mypy $(DISTRIBUTIONS:%=%/src) $(DISTRIBUTIONS:%=%/tests) tests docs/examples

wheels: setup ## build every distribution as a wheel into dist/
	rm -rf dist
	for folder in $(DISTRIBUTIONS); do $(BIN)/python -m build --wheel --no-isolation --outdir dist "$$folder"; done
	@ls -l dist

lock: setup ## pin in requirements/dev.txt what .venv holds
	sed -n '/^#/p' requirements/dev.txt > requirements/dev.txt.new
	$(PIP) freeze --all --exclude-editable 2>/dev/null | grep -viE '^(torch|triton|pip|nvidia-[^=]*|cuda-[^=]*|paddock[^=]*)==' >> requirements/dev.txt.new
	mv requirements/dev.txt.new requirements/dev.txt

clean: ## remove what was built, but not .venv, .tools and models/
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(DISTRIBUTIONS) tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The set-up, one stamp a stage. pip leaves alone what fits already, so an environment that equals the pins is proved, not rebuilt.
$(STAMPS)/python:
	@supported='import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; \
	if ! $(BIN)/python -c "$$supported" 2>/dev/null; then \
	  for python in $${PYTHON:-python3 python3.12 python3.11}; do \
	    if "$$python" -c "$$supported" 2>/dev/null; then chosen=$$python; break; fi; \
	  done; \
	  if [ -z "$${chosen:-}" ]; then \
	    echo "Paddock needs Python 3.11 or 3.12 with pip, found: $$("$${PYTHON:-python3}" --version 2>&1 || true)" >&2; \
	    echo "  fix: install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	  fi; \
	  echo "create $(VENV) with $$chosen"; "$$chosen" -m venv --clear $(VENV); \
	fi
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/python
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement requirements/torch.txt
	@touch $@

# A CUDA build of torch brings the triton it was built with; a CPU build brings none, and the kernels' tests run in its interpreter.
$(STAMPS)/triton: requirements/triton.txt $(STAMPS)/torch
	$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) --no-deps --requirement requirements/triton.txt
	@touch $@

$(STAMPS)/packages: requirements/dev.txt $(STAMPS)/triton
	$(INSTALL) --no-deps --requirement requirements/dev.txt
	$(PIP) check
	@touch $@

# Beside .venv, not in it: the tools' own pins of torch and transformers contradict it and one another. conftest.py looks there last.
$(TOOLS)/installed: requirements/tools.txt $(STAMPS)/packages
	rm -rf $(TOOLS)
	$(INSTALL) --no-deps --no-build-isolation --target $(TOOLS) --requirement requirements/tools.txt
	@touch $@

$(STAMPS)/workspace: pyproject.toml $(DISTRIBUTIONS:%=%/pyproject.toml) $(STAMPS)/packages
	$(INSTALL) --quiet --no-deps --no-build-isolation $(DISTRIBUTIONS:%=--editable %)
	@touch $@
