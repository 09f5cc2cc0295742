PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=
# processes that share the tests; on a GPU they would share its memory too
JOBS   ?= $(if $(shell command -v nvidia-smi),1,auto)
PY     ?= python3
OUT    ?= runs/gpu

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# the models of the demo and the tests are small: more threads than cores only get in each other's way
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: help install demo demo-base native test lint format mutants faults fuzz long-stream soak kernels bench report gpu \
	tune clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo
	@echo '  PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV)  ARGS="..." (passed on to what is run)'

install: $(STAMP) ## create .venv and install everything, once

# torch first and by name, then nothing may replace it
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python %d.%d found; Python 3.11 or newer is needed: make PYTHON=/path/to/python3" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--constraint $(VENV)/constraints.txt --editable ".[demo,test]"
	@touch $@

demo: $(STAMP) ## a tiny LLaVA learns four tasks one after another; report in runs/demo (ARGS="--seeds 3")
	$(BIN)/cllava-fast demo --overwrite $(ARGS)

demo-base: $(STAMP) ## pretrain the demo's tiny LLaVA again (about 5 minutes on two cores)
	$(BIN)/python -m cllava_fast.demo.pretrain --output cllava_fast/demo/base $(ARGS)

native: $(STAMP) ## build the native libraries in place, and csrc/cuda for the CPU, which is how the tests run it
	$(BIN)/python csrc/build.py --if-possible cpu emulated

test: native ## run the tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: $(STAMP) ## break the code in many ways and see the tests go red (ARGS="unpatch" for some)
	$(BIN)/python tests/mutants.py $(ARGS)

faults: $(STAMP) ## kill, stop and damage runs, resume them, compare to the bit; results in benchmarks/results/faults.json
	$(BIN)/python tests/faults.py --kills 58 --out benchmarks/results/faults.json $(ARGS)

kernels: $(STAMP) ## compile every kernel for sm_80 and sm_90 (Triton, nvcc), no GPU needed: registers, shared memory, spills
	$(BIN)/python -m cllava_fast.ops.kernel_table
	$(BIN)/python csrc/build.py cuda
	$(BIN)/python -m cllava_fast.ops.native_table

fuzz: $(STAMP) ## feed the readers of strangers' input with mutated files; findings in runs/fuzz (ARGS="--seconds 600 image")
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: native ## time the ops against their rivals; results in benchmarks/results (ARGS="--quick" for less)
	$(BIN)/python -m pytest -q benchmarks $(ARGS)

report: $(STAMP) ## draw the benchmarks' results files and fill in the pages' tables
	$(BIN)/python -m benchmarks.report

long-stream: $(STAMP) ## what 200 tasks cost, one by one (a quarter of an hour); fills in docs/long-streams.md
	$(BIN)/python -m benchmarks.long_stream --jobs 3 $(ARGS)

soak: $(STAMP) ## train and generate for an hour, and fail if memory or open files grow (ARGS="--minutes 5")
	$(BIN)/python -m benchmarks.soak $(ARGS)

gpu: ## check everything on a GPU, with that machine's own Python (PY=python3 OUT=runs/gpu); installs nothing
	$(PY) tests/gpu.py --out $(OUT) $(ARGS)

tune: ## measure tiles and backends on a GPU, with that machine's own Python (PY=python3); commit the table that it writes
	@$(PY) -c 'import sys; from benchmarks.tune import missing; sys.exit(missing())'
	$(PY) csrc/build.py --if-possible cpu cuda
	$(PY) -m benchmarks.tune $(ARGS)

clean: ## remove what was built or run here (not .venv)
	rm -rf build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
