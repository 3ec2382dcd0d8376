# Everything works on a machine with Python 3.11 or newer and make: each target sets up .venv itself.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= hf,demo,dev
BIN     = $(VENV)/bin
comma := ,
# A linker for the compiled code: the machine's own compiler, else the one that comes as a package.
CC_EXTRA := $(if $(or $(shell command -v cc),$(shell command -v gcc),$(shell command -v clang)),,$(comma)cc)
JOBS   ?= auto
# Tests draw their numbers by this seed: a tree passes or fails, and the next one draws others.
SEED   ?= $(shell printf '%d' 0x$$(git rev-parse --short=8 HEAD^{tree} 2>/dev/null || echo 1))
STAMP   = $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))

.PHONY: setup edge-runtime lint format test demo bench docs clean help

help:
	@echo "make demo    set up, then rewrite, fit, compile, verify and time a real sentence encoder"
	@echo "make test    set up, then run all tests with coverage"
	@echo "make lint    format check, ruff, mypy --strict"
	@echo "make bench   set up with the peers (ONNX Runtime, OpenVINO), then run benchmarks/"
	@echo "make docs    write the generated tables of docs/ anew"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "attention-rewriter needs Python 3.11 or newer; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: an open range would pull gigabytes of CUDA libraries
	$(BIN)/pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e ".[$(EXTRAS)$(CC_EXTRA)]"
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/pytest -n $(JOBS) --randomly-seed=$(SEED) --cov --cov-report=term-missing:skip-covered

demo: setup
	$(BIN)/rewriter demo

bench:
	$(MAKE) setup EXTRAS=hf,demo,bench,dev
	$(BIN)/python -m benchmarks

# TVM's aarch64 runtime, for the tests that run edge code under qemu-user.
edge-runtime: setup
	$(BIN)/python -m codegen.edge.fetch

docs: setup
	$(BIN)/python -m rewriter.docs
	$(BIN)/python -m tests.zoo.table

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .coverage*
