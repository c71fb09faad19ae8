# SPDX-License-Identifier: Apache-2.0
# Every target sets up .venv by itself; all it needs is python3 (>= 3.10) with venv, a C++ compiler
# and make.  PYTHON=python3.12 picks another interpreter for a new .venv.  PyPI's torch for Linux
# brings CUDA, gigabytes of it; a machine without a GPU can do with the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MINIATURE := model/miniature

# Small tensors gain nothing from more than four threads, and many cores then only wait.
THREADS := $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -gt 4 ] && echo 4 || echo $$n)

JOBS := $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -gt 8 ] && echo 8 || echo $$n)

.PHONY: help setup demo test lint bench bench-kernels bench-miniature tables gpu-check \
	train-miniature voice clean

help:
	@echo "make demo             a ten-second stream from bundled examples: out/demo.mp4"
	@echo "make test             all tests (ARGS='-k layering' or ARGS=--slow are passed on)"
	@echo "make lint             ruff, mypy, clang-format"
	@echo "make bench            every benchmark"
	@echo "make bench-kernels    every kernel beside its floor and its peers"
	@echo "make bench-miniature  the miniature's quality table and picture"
	@echo "make tables           README's table of kernels from bench/results/<gpu>.csv"
	@echo "make gpu-check        on a GPU: build, tests, sanitizer, kernels into OUT=folder; docs/gpu.md"
	@echo "make train-miniature  train the bundled weights again"
	@echo "make voice            speak the bundled voice again (needs espeak-ng)"
	@echo "make clean            remove .venv, build and out"

# The build tools go in first, so that the build runs with the pinned ones and without a second
# download.  Editable: Python edits count at once, a change of csrc or pins installs again.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit("reeltime needs Python >= 3.10, this is " \
	  + sys.version.split()[0] + ": make PYTHON=...") if sys.version_info < (3, 10) else 0'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt scikit-build-core pybind11 ninja cmake
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(BIN)/reeltime --version
	@touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)
	mkdir -p out
	$(BIN)/reeltime stream --out out/demo.mp4

# Files side by side, one per core; then, one after the other, those that look at a clock.
# Exit code 5: ARGS chose no test of this half.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not clock" $(ARGS) \
	  || [ $$? = 5 ]
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m clock $(ARGS) || [ $$? = 5 ]

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy python/reeltime model bench
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run --Werror

bench: bench-kernels bench-miniature

bench-kernels: $(STAMP)
	$(BIN)/reeltime bench $(ARGS)

bench-miniature: $(STAMP)
	$(BIN)/python -m reeltime.bench.bench_miniature --update-readme

tables: $(STAMP)
	$(BIN)/python -m reeltime.bench.tables --update README.md

# Takes the Python that has torch for the GPU, with what is installed beside it; no .venv, no network.
gpu-check:
	$(PYTHON) bench/gpu_check.py --out $(or $(OUT),out/gpu-check) \
	  $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

train-miniature: $(STAMP)
	$(BIN)/python -m reeltime.model.miniature.train

# Synthetic speech, about ten seconds, so that nobody's voice is in the repository.
voice:
	mkdir -p $(MINIATURE)/examples
	espeak-ng -v en-us -s 160 -w $(MINIATURE)/examples/voice.wav "Hello! I was drawn by a program, \
	and this voice was made by one too. Ask me to turn, to nod, to smile or to raise my hand, \
	and I will do it while I speak."

clean:
	rm -rf .venv build out
