# Needs Python 3.11 or later, make and a package index; everything else goes into .venv.
#
#   make demo     compress the small model in tests/data, then score it against the original
#   make test     run the whole test suite
#   make lint     ruff and mypy
#   make docs     refresh the generated parts of the pages, build the site into site/
#   make clean    remove .venv, out/demo* and what the tools left behind
#
#   TORCH=...     a requirement installed before anything else, to choose a build of torch
#   PIP_ARGS=...  handed to every `pip install`, as `-c .ci/constraints.txt`
#   PYTEST_ARGS=  handed to pytest; two workers by default

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2

BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet $(PIP_ARGS)
SOURCES := $(shell find cli passes kernels formats -name '*.py')
MODEL := tests/data/stories260K
TEXT := tests/data/tinystories.txt
HELD_OUT := tests/data/tinystories_heldout.txt

# Recipes find the venv's commands first. Threads that wait must not spin: on a busy machine that costs several times
# the work itself.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.DELETE_ON_ERROR:
.PHONY: demo test lint docs clean

demo: out/demo.txt
	@cat out/demo.txt

out/demo.txt: out/demo/rewright.json $(HELD_OUT)
	rewright eval out/demo --text $(HELD_OUT) --compare $(MODEL) --sample 100 > $@

out/demo/rewright.json: $(SOURCES) $(TEXT) $(wildcard $(MODEL)/*) | .venv/.installed
	rewright chain --update $(MODEL) out/demo compress --bits 4 --group-size 32 --sparsity 0.25 --calibration-text $(TEXT)

# One thread for each worker; the tests that need several set them. Tests drive a make of their own, which must not
# take itself for a part of this one.
test: .venv/.test
	env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS OMP_NUM_THREADS=1 python -m pytest $(PYTEST_ARGS)

lint: .venv/.dev
	ruff check .
	ruff format --check .
	mypy

docs: .venv/.docs
	python docs/reference.py
	mkdocs build --strict --quiet

.venv/.installed: pyproject.toml
	@$(if $(PYTHON),,echo "Python 3.11 or later is needed; name one with PYTHON=..." >&2; exit 1)
	@echo "installing Rewright into .venv"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(if $(TORCH),$(PIP) $(TORCH))
	@$(PIP) -e .
	@touch $@

# The tools of one purpose on top of the installation: .venv/.test, .venv/.dev, .venv/.docs.
.venv/.%: .venv/.installed
	@echo "installing the tools of '$*' into .venv"
	@$(PIP) -e '.[$*]'
	@touch $@

clean:
	rm -rf .venv out/demo out/demo.partial out/demo.lock out/demo.txt site build dist \
		.mypy_cache .ruff_cache .pytest_cache .hypothesis .src/rewright.egg-info
