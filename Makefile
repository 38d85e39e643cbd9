# Everything from a fresh clone: `make quickstart`, `make test`. Needs CPython 3.10 to 3.12 and nothing else.
# `make test-portable` runs the tests once for each kind of processor in VARIANTS, all of them even where one fails, and
# says at the end which passed. It takes as many times as long as `make test`.
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that it is this version. The build is that of pip's index: some serve one with CUDA libraries of
# several GB, https://download.pytorch.org/whl/cpu one without (README, Development).
TESTED_TORCH := torch==2.13.0
# Another one: make setup TORCH=... What was asked for is kept, so that later calls need not (TORCH= undoes it).
ASKED := $(shell cat $(VENV)/.torch-asked 2>/dev/null)
TORCH ?= $(ASKED)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One process a core, with one thread each: the models of the tests are too small for more. At most four, each of which
# needs 1.5 GB. One file's tests stay in one process, whose fixtures they share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# An older processor (AVX2), one without vector units (which the libraries tell apart each by its own variable), and
# this one as it is; with one thread, and with two, which add up in another order.
VARIANTS := \
  "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2" \
  "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1" \
  "OMP_NUM_THREADS=1" \
  "OMP_NUM_THREADS=2"

.PHONY: setup quickstart test test-all test-portable lint clean
ifneq ($(TORCH),$(ASKED))
.PHONY: $(VENV)/.setup-done
endif

setup: $(VENV)/.setup-done

$(VENV)/.setup-done: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "python %d.%d found, 3.10 to 3.12 needed: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed: install venv for $(PYTHON), or make $(MAKECMDGOALS) PYTHON=..."; rm -rf $(VENV); exit 1; }
	@rm -f $@
	@# What is there may satisfy the new wish too, such as a CPU build, and would stay.
	@test "$(TORCH)" = "$(ASKED)" || $(PIP) uninstall --yes torch
	@echo "Installing $(or $(TORCH),$(TESTED_TORCH)) and the packages of pyproject.toml into $(VENV); this may take minutes."
	@$(PIP) install "$(or $(TORCH),$(TESTED_TORCH))"
	@echo "$(TORCH)" > $(VENV)/.torch-asked
	@$(PIP) install -e ".[dev,eval,synthesis]"
	@# Source only: without a C compiler all else is there, and what measures names PESQ as missing.
	@$(PIP) install -e ".[pesq]" >$(VENV)/pesq.log 2>&1 || \
	  echo "Without PESQ: its package did not build ($(VENV)/pesq.log). With a C compiler: $(BIN)/pip install -e '.[pesq]'"
	@touch $@

quickstart: setup
	$(BIN)/slm quickstart

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m "slow or not slow"

test-portable: setup
	@said=; for variant in $(VARIANTS); do \
	  echo "== $$variant"; \
	  if env $$variant $(BIN)/python -m pytest -q; then verdict=passed; else verdict=FAILED; fi; \
	  said="$$said$$verdict  $$variant\n"; \
	done; printf "$$said"; case "$$said" in *FAILED*) exit 1;; esac

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
