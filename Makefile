# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu bench-gpu lint check format clean

demo: $(INSTALLED)
	$(BIN)/latte-flow demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# On a machine with an NVIDIA GPU. GPU packages replace the CPU ones in an environment of their own.
GPU_INSTALLED := .venv-gpu/.installed

test-gpu: $(GPU_INSTALLED)
	.venv-gpu/bin/python -m pytest -m gpu

bench-gpu: $(GPU_INSTALLED)
	.venv-gpu/bin/latte-flow doctor || true
	.venv-gpu/bin/latte-flow bench provider cuda --out bench-gpu

$(GPU_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[gpu,export,rtx,test]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/yamllint --strict -d "{extends: default, rules: {document-start: disable, line-length: {max: 120}}}" deploy
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes.yaml

check: lint test

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,export,rtx,triton,test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist demo bench-gpu *.egg-info
