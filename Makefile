# make quickstart | test | evidence | lint.  Each makes .venv when there is none; the second call is quick.
# PYTHON=python3.12 make test picks the interpreter of a new .venv, JOBS=N the test processes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?=
JOBS ?= 2
RUN_DIR ?= outputs/quickstart
DATA ?= $(or $(SAM_TRAIN_DATA),$(wildcard ../shared/data),data)
BIN := .venv/bin

.PHONY: help quickstart test evidence lint postgresql

help:
	@sed -n '1,2s/^# //p' Makefile

.venv/made:
	@for python in $(PYTHON) python3.12 python3.11 python3.13 python3.14 python3; do \
	  [ -x $(BIN)/python ] && break; \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  $$python -m venv .venv 2>/dev/null || rm -rf .venv; \
	done
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "no Python 3.11 or newer with the venv module: install one, or say PYTHON=PATH"; exit 2; }
	@$(BIN)/python -m ensurepip >/dev/null 2>&1 || true
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "no uv: going on with pip"
	@touch $@

# uv first with the torch build for this machine (on one without a GPU a tenth of the size), then with
# whatever the package index has, then pip.
define install
	@echo "installing $(1) into .venv with $$($(BIN)/python -V): minutes on a fresh machine"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto -e '$(1)' 2>/dev/null \
	  || $(BIN)/uv pip install --quiet --python $(BIN)/python -e '$(1)' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '$(1)'
	@touch $@
endef

.venv/core: .venv/made pyproject.toml
	$(call install,.[cpu])

.venv/dev: .venv/made pyproject.toml
	$(call install,.[dev])

quickstart: .venv/core
	$(BIN)/sam-train experiment=quickstart run_dir=$(RUN_DIR)
	$(BIN)/sam-eval checkpoint=$(RUN_DIR)/checkpoints/best.ckpt data=synthetic protocol=clicks
	@echo "The bar that needs no learning, a flood fill by colour from the same first click:"
	@$(BIN)/python benchmarks/flood_fill.py --images 50 | tail -n 1
	@if ls "$(DATA)"/coco_panoptic/val-*.tar >/dev/null 2>&1; then \
	  echo "The same model, which saw scenes only, on photographs:"; \
	  $(BIN)/sam-eval checkpoint=$(RUN_DIR)/checkpoints/best.ckpt data=coco_panoptic protocol=clicks; fi
	@echo
	@echo "The run:          $(RUN_DIR) (metrics.csv, metrics.json, train.log)"
	@echo "Curves, pictures: $(RUN_DIR)/figures"
	@echo "The evaluation:   $(RUN_DIR)/eval"
	@echo "The model:        $(RUN_DIR)/checkpoints/best.ckpt"

# The tests marked postgres start a server of their own; where it cannot be installed they are skipped, and say so.
postgresql:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
	  || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	  || { export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null 2>&1 \
	  || echo "no PostgreSQL: its tests are skipped"

test: lint postgresql
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu and not network and not evidence" $(TESTS)

# distillation.py compares models that have to be trained first.
evidence: .venv/dev
	$(BIN)/python -m pytest -q -m "(slow or evidence) and not gpu and not network"
	@for script in $(filter-out benchmarks/distillation.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
