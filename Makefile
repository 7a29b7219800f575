# `make demo` and `make test` need only Python 3.11 or newer, make and a package index; set-up that is done is not redone.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# For every pip call, such as: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" (torch without CUDA)
PIP_FLAGS ?=
# Two test files at a time; most of a test is one thread, or waiting for a process of its own
PYTEST_FLAGS ?= -n 2 --dist loadfile
READY = $(VENV)/.ready

.PHONY: help venv demo demo-clean test test-all test-gpu style lint docs bench bench-gpu checkpoints
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

venv: $(READY) ## set up .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: with a range, pip may take a newer build with gigabytes of GPU libraries
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY) ## SFT, reward model, PPO, DPO and their comparison on the embedded world; minutes on two CPU cores
	$(BIN)/python launch/pipeline.py

demo-clean: ## remove the runs of the demo
	rm -rf runs/demo

test: $(READY) ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_FLAGS)

test-all: $(READY) ## all tests but those that need a GPU, and what they cover
	$(BIN)/python -m pytest -m "not gpu" --cov $(PYTEST_FLAGS)

test-gpu: $(READY) ## the tests that need a GPU
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/python -m pytest -m gpu tests/integration/test_gpu.py

style: $(READY) ## format the code, and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY) ## ruff and pyright: what .ci/run checks before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY) ## build the documentation site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## our PPO, TRL 1.12's and a bare loop: speed and memory in bench/results.md; about 25 minutes, with SmolLM2 50
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python -m bench

bench-gpu: $(READY) ## PPO on one GPU beside GRPO, RLOO and TRL 1.12's PPO, and the tests that need a GPU; 8 minutes
	$(BIN)/python -m bench.gpu

checkpoints: $(READY) ## make the embedded checkpoints again
	$(BIN)/python -m rlhf_trl.tasks.demo.build
	$(BIN)/python -m rlhf_trl.tasks.shapes.build
