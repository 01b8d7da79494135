# make demo | test | bench | lint | clean. Each sets up .venv first, where that is not done or something it depends on changed.
# make bench-gpu PYTHON=python3 runs the tests and benchmarks of the kernels on a GPU, in the environment of that Python, and
# writes benchmarks/results/<gpu>.json; BENCH_FLAGS='--device cpu --small --results FILE' tries the command without one.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
RESULTS ?= benchmarks/latest.json
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

demo: .venv/.installed
	.venv/bin/dllm demo

test: .venv/.installed .venv/triton-3.6 .venv/evalplus
	.venv/bin/python -m pytest $(PYTEST_FLAGS)

bench: .venv/.installed
	.venv/bin/python -m pytest benchmarks --benchmark-json=$(RESULTS) $(PYTEST_FLAGS)
	.venv/bin/python benchmarks/gate.py $(RESULTS)

bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(BENCH_FLAGS)

lint: .venv/.installed
	.venv/bin/ruff check .

clean:
	rm -rf .venv build dist dllm.egg-info dllm_kernels/_native.so demo $(RESULTS)

# Without build isolation, so that setup.py finds torch and builds the extension; hence torch and the build tools come first.
.venv/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"dllm needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; run make PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# The oldest Triton that the kernels are compiled with, beside the one installed.
.venv/triton-3.6: .venv/.installed
	$(PIP) install --quiet --no-deps --upgrade --target $@ triton==3.6.0 || { rm -rf $@; echo "Triton 3.6 cannot be installed here"; }
	@touch -c $@

# EvalPlus, which a test compares verdicts with; without its dependencies, for these cannot be installed beside ours.
.venv/evalplus: .venv/.installed
	$(PIP) install --quiet --no-deps --upgrade --target $@ evalplus==0.3.1 appdirs tempdir wget || { rm -rf $@; echo "EvalPlus cannot be installed here"; }
	@touch -c $@

.PHONY: demo test bench bench-gpu lint clean
