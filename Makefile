# make            what there is to make
# Every target builds the .venv and the library that it needs, and rebuilds only what changed. `make test PYTHON=python3.12`
# uses that interpreter and what it has installed, without a .venv (VENV=0 does the same with python3).

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

ifeq ($(origin PYTHON),command line)
VENV := 0
endif
PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),0)
PY := $(PYTHON)
VENV_READY :=
else
PY := $(abspath $(VENV))/bin/python
VENV_READY := $(VENV)/.ready
endif

export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHONUNBUFFERED := 1
# Wheels are for every GPU; what is built in place is for the GPU of this machine, or, without one, for a single architecture, since
# nothing here runs it.
WHEEL_ARCHS := $(or $(TORCH_CUDA_ARCH_LIST),All)
TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1),9.0)

SOURCES := $(shell find csrc -type f) setup.py pyproject.toml python/packops/_build.py
# One stamp and one folder of objects for one way to build: another interpreter or architecture builds again, and going back to
# the one before only links (--force: the library of another way is no younger than the sources, and no use). The stamp has the
# contents in its name, as times overlook an older file that is put back (cp -p, rsync -a) and one saved while it was compiled.
WAY := $(shell echo "$(PY) $(TORCH_CUDA_ARCH_LIST) $(PACKOPS_CUDA) $$($(PY) --version 2>&1)" | cksum | cut -d' ' -f1)
BUILT := build/stamps/library-$(WAY)-$(shell cksum $(SOURCES) | cksum | cut -d' ' -f1)

.PHONY: help
help:
	@echo "make demo      train the same small Llama padded, packed carelessly, and packed with packops"
	@echo "make test      build, then run the tests"
	@echo "make test-gpu  the GPU tests, built for the card and from PTX of 8.0; writes tests/gpu_record.json"
	@echo "make sanitize  the CUDA kernels under compute-sanitizer; adds to tests/gpu_record.json"
	@echo "make mutants   plant one bug after the other and see which tests find it; make mutants ARGS=rope for some"
	@echo "make bench     list the benchmarks; make bench ARGS=rope runs one against the peers that are installed"
	@echo "make cpp       build without Python (CMake), run the C++ tests and the CUDA kernels on an emulator"
	@echo "make lint      ruff, clang-format, mypy;  make format  mends what can be mended"
	@echo "make docs      build/site: the documentation, with an API reference from the docstrings"
	@echo "make wheel     dist/*.whl and dist/*.tar.gz"
	@echo "make wheels    dist/wheels/*.whl, for publishing, one for every Python on this machine"
	@echo "make clean     remove what was built (.venv stays; make distclean removes it too)"

$(VENV)/.ready: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "packops: $(VENV) needs Python 3.11 or newer, which $(PYTHON) is not. PYTHON=python3.12 make ... takes another one;"; \
	  echo "packops: make ... PYTHON=python uses an environment of your own instead, and makes no $(VENV)"; exit 1; }
	@echo "packops: preparing $(VENV) from requirements-dev.txt, once: some minutes, most of them for the download of torch"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-dev.txt
	@touch $@

$(BUILT): $(VENV_READY)
	@TORCH_CUDA_ARCH_LIST='$(TORCH_CUDA_ARCH_LIST)' $(PY) setup.py --quiet build_ext --inplace --force --build-temp build/objects-$(WAY)
	@mkdir -p $(@D) && rm -f $(@D)/library-* && touch $@

.PHONY: build
build: $(BUILT)

.PHONY: demo
demo: $(BUILT)
	@$(PY) -m packops demo $(ARGS)

.PHONY: test
test: $(BUILT)
	@$(PY) -m pytest $(ARGS)

# The whole GPU suite on two builds, two parts of one record: as built for the card, and as its driver compiles it from PTX of 8.0,
# which is the code of older cards. In several processes where pytest-xdist is installed: the tests keep the host busy, not the GPU.
GPU_PROCESSES ?= 8
.PHONY: test-gpu
test-gpu:
	@status=0; for build in card ptx; do $(MAKE) --no-print-directory test-gpu-$$build || status=1; done; exit $$status

.PHONY: test-gpu-card test-gpu-ptx
test-gpu-ptx: override TORCH_CUDA_ARCH_LIST := 8.0+PTX
test-gpu-ptx: export CUDA_CACHE_MAXSIZE := 4294967296
test-gpu-card test-gpu-ptx: export PACKOPS_CUDA := 1
test-gpu-card test-gpu-ptx: $(VENV_READY)
	@$(MAKE) --no-print-directory build TORCH_CUDA_ARCH_LIST='$(TORCH_CUDA_ARCH_LIST)'
	@$(if $(findstring ptx,$@),$(PY) tests/sanitize.py --warm-up)
	@parallel=$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_PROCESSES) --dist loadgroup" || true); \
	$(PY) -m pytest -m gpu $$parallel --gpu-record tests/gpu_record.json $(ARGS)

.PHONY: sanitize
sanitize: export PACKOPS_CUDA := 1
sanitize: $(BUILT)
	@$(PY) tests/sanitize.py $(ARGS)

.PHONY: mutants
mutants: $(VENV_READY)
	@$(PY) tests/mutants.py $(ARGS)

.PHONY: bench
bench: $(BUILT)
	@$(PY) -m packops bench $(ARGS)

.PHONY: lint
lint: $(VENV_READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) tools/clang_format.py --check

.PHONY: format
format: $(VENV_READY)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(PY) tools/clang_format.py

.PHONY: cpp
cpp: $(VENV_READY)
	@TORCH_CUDA_ARCH_LIST='$(TORCH_CUDA_ARCH_LIST)' cmake -S . -B build/cmake -DPACKOPS_PYTHON=$(PY)
	@MAKEFLAGS=--no-print-directory cmake --build build/cmake --parallel $$(nproc)
	@ctest --test-dir build/cmake --output-on-failure --parallel $$(nproc)

.PHONY: docs
docs: $(VENV_READY)
	@rm -rf build/docs && mkdir -p build/docs
	@cp -R --parents *.md docs examples bench/results tests/gpu_record.json tests/sanitize.py tests/emulator build/docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict > build/docs.log 2>&1 || { grep -v ^INFO build/docs.log; exit 1; }
	@echo "packops: the documentation is in build/site"

.PHONY: wheel
wheel: $(VENV_READY)  # the sdist, and a wheel built from it alone
	@rm -rf dist && mkdir -p build
	@TORCH_CUDA_ARCH_LIST='$(WHEEL_ARCHS)' $(PY) -m build --no-isolation > build/wheel.log || { cat build/wheel.log; exit 1; }
	@ls -l dist

.PHONY: wheels
wheels:
	@TORCH_CUDA_ARCH_LIST='$(WHEEL_ARCHS)' TORCH_INDEX='$(TORCH_INDEX)' tools/build_wheels.sh $(PYTHONS)

.PHONY: clean
clean:
	@rm -rf build dist demo_out python/*.egg-info python/packops/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean
	@rm -rf .venv
