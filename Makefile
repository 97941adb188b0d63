SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# No network is needed once the environment is there. Without the second, Axolotl's telemetry waits for one at the end.
OFFLINE := HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-matrix check clean

# Torch first: Axolotl takes what it finds. DeepSpeed would compile its operations without the variable.
$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e ".[axolotl,deepspeed,dev]"
	touch $@

quickstart: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m quickstart.run

test: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-matrix: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -m 'matrix or not matrix' -v $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf quickstart/work quickstart/results.json quickstart/report.png
	find poft_plugin quickstart tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
