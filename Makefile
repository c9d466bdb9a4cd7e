# One local environment, built from nothing on first use and again when the requirements change.
#
#   make demo    calibrate, export, build and run the bundled sample model
#   make test    the test suite
#   make lint    ruff, mypy, clang-format
#
# Variables: PYTHON (interpreter for the environment), TORCH_ARGS (extra pip arguments for PyTorch, such as
# --index-url of its CPU wheels), EXTRAS (extras for test and lint), JOBS (test processes).

PYTHON     ?= python3
TORCH_ARGS ?=
EXTRAS     ?= dev,tensorrt-rtx
JOBS       ?= 2

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
REQUIREMENTS := pyproject.toml setup.py constraints.txt
# Neither is there for Windows, nor for newer Pythons.
HAS_TRITON   := $(shell $(PYTHON) -c "import sys; print(sys.platform == 'linux' and sys.version_info < (3, 13))")
TRITON       := $(if $(filter True,$(HAS_TRITON)),$(VENV)/triton/.installed)
CPP_SOURCES   = $(shell find $(wildcard plugins tests benchmarks) -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python examples/01_demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typecheck.py
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES))

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch goes first and by itself: TORCH_ARGS decide on its build, and what follows keeps it.
$(VENV)/.installed: $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) --editable .
	touch $@

# A real Triton server for the tests. Its package asks for older libraries than the rest needs but runs with those; its
# Python models alone need numpy 1 (newer ones are silently corrupted), which lies in a folder of its own for them.
$(VENV)/triton/.installed: $(VENV)/.installed
	$(PIP) --no-deps nvidia-pytriton tritonclient
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(VENV)/triton numpy==1.26.4
	touch $@

# FlashInfer is here for its CUDA headers alone, which need none of the packages that its Python part needs.
$(VENV)/.installed-dev: $(VENV)/.installed $(TRITON)
	$(PIP) --editable ".[$(EXTRAS)]"
	$(PIP) --no-deps flashinfer-python
	touch $@
