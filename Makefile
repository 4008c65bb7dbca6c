# Every target makes its own virtual environment, .venv, and needs nothing but Python 3.11 or later,
# a C++20 compiler and make.
#   make demo      train a small GPT for about two minutes on the CPU
#   make test      the test suite          make test-all   with the slower sweeps
#   make lint      formatting, style, types
#   make bench     a few minutes of benchmarks beside every peer that is installed; out/bench/report.html
#   make compare   the same cases under pytest-benchmark, saved, compared with the run before
#   make gpu       on a GPU machine, with the PyTorch that is there: tests, benchmarks, one report
#   make rehearse  what `make gpu` does, on the CPU at toy sizes

PYTHON ?= python3
# The CPU build where pip knows of one for this version; any PyTorch from 2.11 on will do.
TORCH ?= torch==2.13.0
# What `make gpu` may take.
MINUTES ?= 25
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: demo test test-all lint bench compare gpu rehearse clean

.venv/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11
	touch $@

# The package, editable, with its kernels compiled against the PyTorch above (a few minutes).
.venv/.installed: .venv/.tools $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

demo: .venv/.installed
	$(BIN)/fastgpt train --config examples/demo.toml

test: .venv/.dev
	$(BIN)/python -m pytest

test-all: .venv/.dev
	$(BIN)/python -m pytest -m ""

lint: .venv/.dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: .venv/.dev
	$(BIN)/python -m bench all --quick --plot --out out/bench

compare: .venv/.dev
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-autosave --benchmark-compare

# No virtual environment of ours: a machine with a GPU has its own PyTorch, and may be offline.
gpu:
	$(PYTHON) -m bench gpu --budget-minutes $(MINUTES) --out out/gpu

rehearse: .venv/.dev
	$(BIN)/python -m bench gpu --rehearse --out out/rehearsal

clean:
	rm -rf .venv build dist *.egg-info fastgpt/*.so out
