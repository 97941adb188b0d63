SHELL := /bin/bash
PYTHON ?= python3
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VERSION := $(call VERSION_OF,$(PYTHON))

# Each Python has an environment of its own; python3's is `.venv`.
VENV ?= $(if $(filter $(VERSION),$(call VERSION_OF,python3)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Axolotl 0.19 is the last that runs on Python 3.11; later Pythons get the newest that the tests run with.
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py3.11-axolotl0.19,py3.12-axolotl0.21).txt

# No network is needed once the environment is there. Without the second, Axolotl's telemetry waits for one at the end.
OFFLINE := HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false

# Two processes, each with whole files of tests: what a file shares is made once.
WORKERS ?= -n 2 --dist loadfile

# What depends on the host, for a second version of it. Of the launcher's stages, the two that differ most.
HOST_TESTS := tests/hosts tests/test_patches.py tests/test_examples.py tests/end_to_end tests/distributed
HOST_STAGES := not zero1 and not zero2

.PHONY: quickstart test test-host test-matrix test-slow check clean

# Torch first: Axolotl takes what it finds. DeepSpeed would compile its operations without the variable.
$(INSTALLED): $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c $(CONSTRAINTS) torch
	DS_BUILD_OPS=0 $(BIN)/pip install -c $(CONSTRAINTS) -e ".[axolotl,deepspeed,ray,dev]"
	touch $@

quickstart: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m quickstart.run

test: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-host: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(HOST_TESTS) -k '$(HOST_STAGES)' $(ARGS)

test-matrix: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -m 'matrix or not matrix' -v $(ARGS)

test-slow: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed/test_ray.py -m slow -v $(ARGS)

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
