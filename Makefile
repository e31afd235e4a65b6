# Dray's commands. `make` alone lists them. Everything installs itself on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

DEVICE ?= cpu
VENV   ?= .venv
BIN    := $(VENV)/bin

# The Python that makes the environment: the one its lock was resolved for first. A version manager's shim can be on
# PATH without a Python behind it, and Debian ships Python without ensurepip, so each candidate is tried. Evaluated only
# when something is installed.
CANDIDATES := $(if $(filter gpu,$(DEVICE)),python3.12 python3.11,python3.11 python3.12) python3.13 python3.14 python3
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	"$$p" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	2>/dev/null && { command -v "$$p"; break; }; done)

# Stamps: written when a step is done, so that an interrupted one is taken up again. Each follows the file it depends on.
STAMPS  := $(VENV)/.setup
RUNTIME := $(STAMPS)/runtime-$(DEVICE)
PROJECT := $(STAMPS)/project
DEV     := $(STAMPS)/dev

INSTALL = python="$(PYTHON)"; if [ -z "$$python" ]; then \
	echo "Dray needs Python 3.11 to 3.14 with its venv module on PATH (or: make PYTHON=/path/to/python)." >&2; exit 1; fi; \
	"$$python" requirements/install.py --venv "$(VENV)"

.PHONY: help
help: ## List the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(PROJECT) ## Install Dray into .venv (DEVICE=gpu on a GPU host; VENV=<folder> for another place)

$(RUNTIME): requirements/$(DEVICE).txt
	@$(INSTALL) --device $(DEVICE) runtime
	@mkdir -p $(STAMPS) && touch $@

$(PROJECT): $(RUNTIME) pyproject.toml
	@$(INSTALL) project
	@mkdir -p $(STAMPS) && touch $@

$(DEV): $(PROJECT) requirements/dev.txt
	@$(INSTALL) dev
	@mkdir -p $(STAMPS) && touch $@

.PHONY: demo
demo: $(PROJECT) out/demo-input/questions/.made ## Answer 1,000 questions with a tiny model on this machine and check every answer
	$(BIN)/dray run conf/jobs/demo.yaml
	$(BIN)/python examples/check_answers.py out/demo

# Written once: a job refuses input that changes under it, and these files would be new at each run.
out/demo-input/questions/.made: examples/questions.py | $(PROJECT)
	@rm -rf $(@D) out/demo
	$(BIN)/python examples/questions.py $(@D)/questions.parquet --rows 1000 --files 4
	@touch $@

.PHONY: test
test: $(DEV) ## Run all tests: unit, golden, and local with real Ray, vLLM and S3 (GPU tests where there is one)
	@$(BIN)/pytest --numprocesses=2 --dist=loadscope --no-loadscope-reorder $(ARGS)

.PHONY: test-fast
test-fast: $(DEV) ## Run the quick unit and golden tests only
	@$(BIN)/pytest --numprocesses=2 -m 'not slow' --ignore=tests/local --ignore=tests/gpu --ignore=tests/proof $(ARGS)

.PHONY: chaos
chaos: $(DEV) ## Kill, starve and confuse runs at random moments, and count every row afterwards; hours (ARGS="--jobs 12")
	@$(BIN)/python -m tests.chaos $(ARGS)

.PHONY: chaos-short
chaos-short: $(DEV) ## One seeded trial each of eight faults of the chaos suite
	@$(BIN)/python -m tests.chaos --short --jobs 2 $(ARGS)

.PHONY: lint
lint: $(DEV) ## Check style, types and the import rules
	@status=0; for check in "ruff check" "ruff format --check" mypy lint-imports; do \
	  echo "lint: $$check"; $(BIN)/$$check || status=1; done; exit $$status

.PHONY: format
format: $(DEV) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(DEV) ## Run the benchmarks
	$(BIN)/python benchmarks/run.py $(ARGS)

.PHONY: lock
lock: ## Resolve requirements/*.txt and environment.yml anew from pyproject.toml (UPGRADE=1 lets present pins move)
	@python="$(PYTHON)"; "$${python:-python3}" requirements/lock.py $(if $(UPGRADE),--upgrade)
	@python="$(PYTHON)"; "$${python:-python3}" requirements/conda.py

.PHONY: clean
clean: ## Remove caches and the demo's output; .venv and other outputs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info out/demo out/demo-input
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
