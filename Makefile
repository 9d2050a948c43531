# Every target does its own set-up; nothing but Python, make and a C compiler is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help

.PHONY: help
help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

.PHONY: install
install: $(VENV)/.installed  ## the package and its tools in .venv

.PHONY: quickstart
quickstart: install  ## train, evaluate, sample and export a small model of code
	@# Two worker processes on the CPU, which every machine has; a single GPU would be one worker.
	CUDA_VISIBLE_DEVICES= $(BIN)/trainwright train examples/quickstart.yaml

.PHONY: swarm-demo
swarm-demo: install  ## four peers train together: one is killed, and one lies
	$(BIN)/python examples/swarm_demo.py

.PHONY: test
test: install check  ## checks and all tests but the long proofs
	@# Two at a time, whole files: much of the time of one is waiting. Long files come first.
	$(BIN)/python -m pytest -m 'not prove' -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quick
quick: install  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not prove and not slow'

.PHONY: prove
prove: install  ## the long proofs
	$(BIN)/python -m pytest -m prove

.PHONY: check
check: install  ## lint, format, types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: install  ## rewrite the code as the checks want it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: install  ## the generated pages of docs/
	$(BIN)/python -m trainwright.recipe.schema_export docs/recipe.md
	$(BIN)/python -m trainwright.planner.parallelism_page docs/parallelism.md
