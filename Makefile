# `make train` and `make test` set up what they need. PYTHON=python3.12 selects another
# Python, ARGS="..." goes to the command, and `make` alone lists the targets.

# A name on the path may be a shim without a Python behind it, so each is tried.
DEFAULT_PYTHON := $(shell for name in python3.11 python3; do \
	$$name -c "" 2>/dev/null && echo $$name && break; done)
ifndef PYTHON
PYTHON := $(or $(DEFAULT_PYTHON),python3)
endif

version_of = $(if $(1),$(shell $(1) -c \
	'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
VERSION := $(call version_of,$(PYTHON))
OTHER := $(filter-out $(call version_of,$(DEFAULT_PYTHON)),$(VERSION))

# An environment for each version, and the version in the stamp too: packages of one
# are never used by another, not even if the default Python changes.
VENV := .venv$(addprefix -,$(OTHER))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(VERSION)

SOURCES := $(wildcard shardkit models examples tests benchmarks train.py)
TESTS := --doctest-modules --doctest-glob=README.md tests shardkit models README.md

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## Set up the environment, as the targets below do by themselves

.PHONY: train
train: $(INSTALLED) ## Train on real text while devices come and go, and compare
	$(BIN)/python train.py configs/tiny.toml --twin $(ARGS)

.PHONY: test
test: $(INSTALLED) ## Run the tests and the doctests, or what ARGS names
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(or $(ARGS),$(TESTS))

.PHONY: soak
soak: $(INSTALLED) ## Run the long tests: hundreds of random changes
	$(BIN)/python -m pytest -m slow $(ARGS)

.PHONY: lint
lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: bench
bench: $(INSTALLED) ## Measure a step beside hand-written loops
	$(BIN)/python benchmarks/step_overhead.py $(ARGS)

.PHONY: clean
clean: ## Remove environments and caches; runs stay
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis dist
	find shardkit models examples tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# What is left of another version or of an interrupted set-up is made anew; `--group`
# needs pip 25.1.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"PYTHON=$(PYTHON) must be Python 3.11 or newer, found: $(or $(VERSION),none)." \
		"Name another, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV), which takes a few minutes the first time"
	@$(BIN)/python -m pip --version 2>/dev/null | grep -qF '(python $(VERSION))' \
		|| $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt \
		-e '.[tensorboard,plots,parity]' --group dev
	@touch $@
