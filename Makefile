# Each target first prepares an environment of its own in $(VENV), once for each version of pyproject.toml.
# To use one that exists instead: make test PYTHON=/path/to/python
VENV ?= .venv
# On Linux a bare "torch" brings its CUDA libraries along. To choose a build: make test TORCH=...
TORCH ?= torch==2.13.0

# Triton kernels are interpreted on a CPU, which takes a process of its own.
KERNEL_TESTS := tests/test_decode_kernel.py tests/test_before_rope.py tests/test_prefill_kernel.py
OPTIMUM ?= .venv-optimum

OWN_PYTHON := $(VENV)/bin/python
PYTHON ?= $(OWN_PYTHON)
READY := $(if $(filter $(OWN_PYTHON),$(PYTHON)),$(VENV)/.installed)

.PHONY: help demo test test-slow lint test-gpu test-optimum clean
help:
	@echo "make demo      the whole method on the bundled model, within five minutes"
	@echo "make test      ruff and the test suite, without its slow tests"
	@echo "make test-slow the slow tests"
	@echo "make lint      ruff"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-optimum  an exported graph in Optimum, in an environment of its own"
	@echo "make clean     remove $(VENV) and caches"

demo: $(READY)
	@$(PYTHON) -m rotatekv_fx.cli demo

test: $(READY)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m pytest -m "not slow"
	@TRITON_INTERPRET=1 $(PYTHON) -m pytest -m "not slow" $(KERNEL_TESTS)
	@echo "make test: style and tests are clean."

test-slow: $(READY)
	@$(PYTHON) -m pytest -m slow
	@TRITON_INTERPRET=1 $(PYTHON) -m pytest -m slow $(KERNEL_TESTS)

lint: $(READY)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

# pytest's status 5 means that no test was collected.
test-gpu: $(READY)
	@$(PYTHON) -m pytest -m gpu || { status=$$?; \
		test $$status -eq 5 && echo "make test-gpu: no test is marked gpu." || exit $$status; }

# optimum-onnx needs transformers below 4.58, this package 5.17: they cannot share an environment.
test-optimum: $(READY) $(OPTIMUM)/.installed
	@rm -rf $(OPTIMUM)/graph
	@PYTHONPATH=. $(PYTHON) tests/optimum_check.py export $(OPTIMUM)/graph
	@PYTHONPATH=. $(OPTIMUM)/bin/python tests/optimum_check.py run $(OPTIMUM)/graph

$(OPTIMUM)/.installed:
	@$(PYTHON) -m venv --clear $(OPTIMUM)
	@$(OPTIMUM)/bin/python -m pip install --quiet "$(TORCH)"
	@$(OPTIMUM)/bin/python -m pip install --quiet "optimum-onnx[onnxruntime]>=0.1"
	@touch $@

clean:
	rm -rf $(OPTIMUM) $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

$(VENV)/.installed: pyproject.toml
	@set -e; base=; \
	for candidate in python3.12 python3.11 python3; do \
		if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then base=$$candidate; break; fi; \
	done; \
	if test -z "$$base"; then \
		echo "Python 3.11 or newer, with its venv module, is needed: install python3.12 and python3.12-venv." >&2; \
		exit 1; \
	fi; \
	echo "Preparing $(VENV) with $$($$base --version)"; \
	$$base -m venv --clear $(VENV); \
	$(OWN_PYTHON) -m pip install --quiet "$(TORCH)"; \
	$(OWN_PYTHON) -m pip install --quiet -e ".[dev,bench]"
	@touch $@
