# Everything from a fresh clone: `make quickstart`, `make test`. Needs CPython 3.10 to 3.12 and nothing else.
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that it is this version. The build is that of pip's index: some serve one with CUDA libraries of
# several GB, https://download.pytorch.org/whl/cpu one without (README, Development).
TESTED_TORCH := torch==2.13.0
# Another one: make setup TORCH=... What was asked for is kept, so that later calls need not (TORCH= undoes it).
ASKED := $(shell cat $(VENV)/.torch-asked 2>/dev/null)
TORCH ?= $(ASKED)
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-all lint clean
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
	@test "$(TORCH)" = "$(ASKED)" || $(BIN)/python -m pip uninstall -qq --yes torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(or $(TORCH),$(TESTED_TORCH))"
	@echo "$(TORCH)" > $(VENV)/.torch-asked
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,eval,synthesis]"
	@touch $@

quickstart: setup
	$(BIN)/slm quickstart

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
