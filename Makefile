# Every target makes its own environment first, once: a virtual environment in $(VENV) with qtool installed editable.
# The stamp follows pyproject.toml and constraints.txt, so that a second run installs nothing and needs no network.
#
#   make demo                                                    quantize, convert, evaluate and serve the bundled model
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu   PyTorch's CPU wheels, where the registry has CUDA ones
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130 PyTorch's wheels for a given CUDA
#   make test VENV=/path/to/environment                          an environment that is already there

PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?=
ARGS        ?=

STAMP := $(VENV)/.qtool-installed
PIP   := $(VENV)/bin/python -m pip --disable-pip-version-check

# Without it `python -m` puts the checkout's folders on the path, where `kernels` hides Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install demo bench bench-gpu test test-slow test-all lint format clean

help:
	@echo 'make demo       quantize, convert, evaluate and serve the bundled model (about 3 minutes after the install)'
	@echo 'make test       the tests                       (ARGS="-k gptq" goes to pytest)'
	@echo 'make test-all   the tests, with the slow ones'
	@echo 'make bench      the benchmarks, beside their peers: hours (ARGS="--quick --only claims")'
	@echo 'make bench-gpu  kernels and engine on this GPU: 9 minutes (ARGS="--rows linears")'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     let ruff rewrite what it can'
	@echo 'make clean      remove the environment, caches and build output'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Error: qtool needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}\nhint: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip setuptools
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/qtool demo $(ARGS)

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/all.py $(ARGS)

bench-gpu: $(STAMP)
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

# One thread each: the models here are so small that a second one only adds waiting.
test test-slow test-all: export OMP_NUM_THREADS := 1

test: $(STAMP)
	$(VENV)/bin/pytest -q -m "not gpu and not slow" $(ARGS)

test-slow: $(STAMP)
	$(VENV)/bin/pytest -q -m "slow and not gpu" $(ARGS)

test-all: $(STAMP)
	$(VENV)/bin/pytest -q -m "not gpu" $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy scripts

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
