# Every target does its own set-up: the first call makes a virtual environment and installs what the target needs (some
# minutes, mostly downloads), later calls find it done. Python >= 3.11 and make are all that has to be there.

# Which jax to install: cpu, cuda12, cuda13 or tpu. Each has its own environment, so switching never mixes two builds.
JAX ?= cpu
# The interpreter that makes the environment; found by itself when not given.
PYTHON ?=
VENV ?= $(if $(filter cpu,$(JAX)),.venv,.venv-$(JAX))
# What is passed on to the program behind the target.
ARGS ?=
DEMO_ARGS ?= --word great --samples 320 --stages forward_kl:9600:160 forward_kl:6400:140 jensen_shannon:12800:300 \
	--minibatch-size 64 --lora-rank 2 --learning-rate 2e-3 --decay --exact-samples 128 --eval-every 60 --eval-samples 512

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench mutants set-up clean

ifeq ($(filter cpu cuda12 cuda13 tpu,$(JAX)),)
$(error JAX=$(JAX) is not a build of jax that fjax knows; choose cpu, cuda12, cuda13 or tpu)
endif

# Whoever asks for an accelerator gets it or an error, never the CPU in silence.
ifneq ($(JAX),cpu)
JAX_PLATFORMS ?= $(JAX:cuda%=cuda),cpu
export JAX_PLATFORMS
endif

PY := $(VENV)/bin/python
# Installed is known by the content of the requirements, not by the date of their file: a fresh checkout or a change
# of tool settings needs no network.
KEY := $(shell sed '/^\[tool\./q' pyproject.toml | cksum | cut -d' ' -f1)
installed = $(VENV)/.fjax-$(1)-$(JAX)-$(KEY)
stamp = $(firstword $(wildcard $(call installed,set-up)) $(call installed,$(1)))

EXTRAS_demo := experiments
EXTRAS_test := experiments,test
EXTRAS_lint := experiments,test,lint
EXTRAS_docs := docs
EXTRAS_set-up := experiments,test,lint,docs

# An environment whose interpreter has gone, after an upgrade of Python say, counts as absent.
ifneq ($(shell $(PY) -c 'print(1)' 2>/dev/null),1)
ABSENT := absent
else ifneq ($(PYTHON),)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(call version,$(PY)),$(call version,$(PYTHON)))
ifneq ($(filter demo test lint format docs bench mutants set-up,$(MAKECMDGOALS)),)
$(error $(VENV) has Python $(call version,$(PY)), not $(PYTHON): add VENV=another-folder, or `make clean` first)
endif
endif
endif

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  JAX=cpu|cuda12|cuda13|tpu  the build of jax ($(JAX))      VENV=folder    the environment ($(VENV))"
	@echo "  ARGS=\"...\"                 passed on to the program      PYTHON=python  the interpreter (found by itself)"

demo: $(call stamp,demo) ## Align the built-in GPT-2 to a word, from start to plots: make demo ARGS="--word great"
	$(PY) -m experiments.lexical_constraint $(strip $(DEMO_ARGS) $(ARGS))
	@echo "Your own word, your own model: $(PY) -m experiments.lexical_constraint --help"
	@echo "All that there is: $(PY) -m experiments"

test: $(call stamp,test) ## All tests: make test ARGS="-k divergence -x"
	$(PY) -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: $(call stamp,lint) ## Style (ruff) and types (pyright)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

format: $(call stamp,lint) ## Mend what ruff can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs: $(call stamp,docs) ## The site of docs/, into build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

bench: $(call stamp,demo) ## Time of each phase on this machine
	$(PY) -m experiments bench $(ARGS)

mutants: $(call stamp,test) ## Break the code on purpose, and see which breaks no test notices
	$(PY) -m tests.mutate $(ARGS)

set-up: $(call installed,set-up) ## What all of these need, at once; otherwise each installs its own

clean: ## Remove the environment and all caches; runs stay
	@[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	@find fjax experiments tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: absent
$(VENV)/.fjax-%-$(JAX)-$(KEY): $(ABSENT)
	@$(ensure_python)
	@echo "Installing what 'make $*' needs into $(VENV) (jax for $(JAX)); this is done once and takes some minutes."
	@$(PY) -m pip install --disable-pip-version-check --editable ".[$(EXTRAS_$*),$(JAX)]"
	@touch $@

# The standard library's venv, with the first suitable Python, and the newest pip, for one of 2023 takes twice as long.
# `ensurepip` mends an environment left half made.
define ensure_python
if ! $(PY) -c '' 2>/dev/null; then \
  python=; \
  for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
      python=$$candidate; break; \
    fi; \
    seen="$$seen $$candidate ($$($$candidate -V 2>/dev/null || echo not there))"; \
  done; \
  if [ -z "$$python" ]; then \
    echo "fjax needs Python 3.11 or newer with its venv module. Looked at:$$seen." >&2; \
    echo "Install one (Debian, Ubuntu: apt install python3-venv; macOS: brew install python)," >&2; \
    echo "or name one: make PYTHON=/path/to/python3.13 ..." >&2; \
    exit 1; \
  fi; \
  echo "Making $(VENV) with $$($$python -V)."; \
  clear=; if [ -f $(VENV)/pyvenv.cfg ]; then clear=--clear; fi; \
  $$python -m venv $$clear $(VENV) || exit 1; \
  $(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip || true; \
fi; \
$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
endef
