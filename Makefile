# Two commands do all the set-up: `make demo` and `make test`. They share one virtual environment: the demo installs
# what it needs, the tests add theirs. Python compiles modules when they are first imported, which is faster than
# compiling all of them at installation.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Images of containers often forbid it; then every process of the tests compiles torch anew, for half a minute.
export PYTHONDONTWRITEBYTECODE :=
PIP := -m pip install --quiet --no-compile --constraint constraints.txt --editable
DEMO_READY := $(VENV)/.demo
TEST_READY := $(VENV)/.test
TRITON_MODELS := $(wildcard model_repository/*/1/model.py)
# A kustomization is no resource of a cluster, and has no schema there.
KUBERNETES_FILES := $(filter-out %/kustomization.yaml,$(wildcard deploy/kubernetes*/*.yaml deploy/training/*.yaml))

.PHONY: demo data-emoji test test-gpu bench-gpu gpu-day gpu-packages lint check check-extras format clean

demo: $(DEMO_READY)
	$(BIN)/latte-flow demo --out demo

# 74 MB by npm, then a few minutes of drawing.
data-emoji: $(TEST_READY)
	$(BIN)/latte-flow data emoji data/emoji

# Two processes, each of which takes whole files: tests of a file share what is exported once for them. Threads of
# PyTorch that wait for work by spinning take the cores from the other process, which doubles the time of both.
test: $(TEST_READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# On a machine with an NVIDIA GPU. GPU packages replace the CPU ones in an environment of their own.
GPU_READY := .venv-gpu/.test

# Only the file with GPU tests: what other files import may not be installed there.
test-gpu: $(GPU_READY)
	.venv-gpu/bin/python -m pytest -m gpu tests/test_gpu.py

bench-gpu: $(GPU_READY)
	.venv-gpu/bin/latte-flow doctor || true
	.venv-gpu/bin/latte-flow bench provider cuda --out bench-gpu

# A first day on a GPU, on a machine that may have neither a network nor this project's packages: no environment is made.
gpu-day:
	$(PYTHON) -m export.benchmarks.gpu_day --out gpu-day.json

# What such a machine may lack beside PyTorch and transformers, to be taken there with the checkout (70 MB).
GPU_PYTHON ?= 3.12
BROUGHT := -m pip install --quiet --no-compile --target build/gpu-packages --upgrade --python-version $(GPU_PYTHON) \
  --only-binary=:all: --constraint constraints.txt

gpu-packages: $(TEST_READY)
	$(BIN)/python $(BROUGHT) pydantic typer rich pillow jinja2 requests importlib_metadata psutil
	$(BIN)/python $(BROUGHT) --no-deps diffusers accelerate onnx-ir

$(GPU_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python $(PIP) ".[gpu,tensorrt,rtx,export,test]"
	touch $@

# The sources of Triton models are all called model.py, so mypy checks them one by one.
lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy latte_flow.py
	for model in $(TRITON_MODELS); do $(BIN)/mypy $$model || exit 1; done
	$(BIN)/hadolint deploy/Dockerfile deploy/Dockerfile.gateway deploy/ray/Dockerfile
	bash -n deploy/training/train.slurm
	$(BIN)/yamllint --strict -d "{extends: default, rules: {document-start: disable, line-length: {max: 120}}}" deploy
	for file in $(KUBERNETES_FILES); do $(BIN)/kubernetes-validate --strict --quiet $$file || exit 1; done

check: lint test

# The extras that `make test` does not install, resolved against the registry: a version that does not exist is found
# here. TensorRT's libraries come from NVIDIA's own index, so of TensorRT only the pinned versions are looked up.
check-extras: $(TEST_READY)
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt ".[gpu]"
	for pin in $$(grep -o 'tensorrt-cu13==[0-9.]*' pyproject.toml); do \
	  $(BIN)/python -m pip install --quiet --dry-run --ignore-installed --no-deps $$pin || exit 1; done

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DEMO_READY): pyproject.toml constraints.txt emoji/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) ".[cpu,export]" --editable ./emoji
	touch $@

$(TEST_READY): $(DEMO_READY)
	$(BIN)/python $(PIP) ".[cpu,export,train,rtx,triton,test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build emoji/build emoji/*.egg-info dist demo bench-gpu gpu-day.json *.egg-info
