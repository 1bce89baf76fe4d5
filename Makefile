# make train and make test set everything up by themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# A CPU build where the package index has one. On a machine with a GPU, set TORCH to the build for its driver.
TORCH ?= torch==2.13.0
CONFIG ?= configs/quickstart.yaml
# Processes that run tests side by side. Those that compare times run after them, alone.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

.PHONY: install train test test-all test-faults test-machines test-gpu bench lint docs wheelhouse
install: .venv/installed

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja py-cpuinfo numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

train: install
	$(BIN)/deepspeed ijepa_fast/train.py --config $(CONFIG) $(ARGS)

test: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not timing and not thorough" -n $(WORKERS) --dist loadfile $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m timing $(ARGS) || [ $$? -eq 5 ]  # 5: none of these tests is one

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not timing" $(ARGS)

test-faults: install
	FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults $(ARGS)

test-machines: install
	MACHINES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/machines $(ARGS)

test-gpu: install
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

bench: install
	$(BIN)/python bench/run.py --all $(ARGS)

lint: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/python -m pytest -q tests/test_types.py tests/test_layers.py

docs: install
	$(BIN)/mkdocs build --strict

wheelhouse: install
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w wheelhouse .
