# Each target prepares .venv by itself. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

# The operators that have a bench.
OPERATORS := $(filter $(basename $(notdir $(wildcard vitprune/ops/*.py))),$(basename $(notdir $(wildcard bench/*.py))))

.PHONY: demo test test-long bench bench-card sanitize lint

demo: .venv/demo.stamp
	$(BIN)/vitprune demo

# Triton's interpreter is switched on for a whole process, so its tests run in processes of their own; one process a core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
test: .venv/test.stamp
	$(PYTEST) -m "not long and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not long"

test-long: .venv/test.stamp
	$(PYTEST) -m "not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter"

bench: .venv/test.stamp
	set -e; for op in $(OPERATORS); do $(BIN)/python -m bench.$$op; done
	$(BIN)/python -m bench.shares
	$(BIN)/python -m bench.train_step
	$(BIN)/vitprune bench deit_small_patch16_224 --tokens 0.7 --heads 0.5 --hidden 0.5 --batch 1 8

# At most ten minutes; writes bench/results/card-NAME.json.
bench-card: .venv/test.stamp
	$(BIN)/python -m bench.card

# On a GPU, with NVIDIA's compute-sanitizer: what reads or writes out of bounds, and what races, of every kernel at a few sizes and in all
# tests of edges. Compiled before, outside of it.
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
EDGES := -m pytest -q -k "edges and cuda and not emulated"
sanitize: .venv/test.stamp
	$(BIN)/python tests/sanitize.py
	$(BIN)/python $(EDGES)
	set -e; for tool in memcheck racecheck; do \
	  $(SANITIZER) --tool $$tool $(BIN)/python tests/sanitize.py; \
	  $(SANITIZER) --tool $$tool $(BIN)/python $(EDGES); done

lint: .venv/lint.stamp
	$(BIN)/ruff check .

# An editable install sees changed Python at once; it is repeated when what is compiled or depended on changes.
.venv/%.stamp: $(NATIVE) | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "vitprune needs Python 3.10 or newer; set it with make PYTHON=..., this is $$($(PYTHON) --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
