.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest

.PHONY: help demo test acceptance lint format check bench simulation chaos clean

help: ## Show what there is
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

demo: $(BIN)/.installed ## Run the main job on an embedded server: files arrive, runs finish
	$(BIN)/orchestrator demo

test: $(BIN)/.installed ## Run the tests (under 10 minutes on two cores)
	$(PYTEST) -n auto

acceptance: $(BIN)/.installed ## Run the long tests with many real processes (up to 40 minutes)
	$(PYTEST) tests/acceptance --timeout 1200 -n 2 --dist loadfile

KILLS ?= 1000
MINUTES ?= 60
chaos: $(BIN)/.installed ## Kill one process at each named point, then KILLS=1000 at random under load (SEED, MINUTES)
	$(BIN)/python -m tests.chaos points
	$(BIN)/python -m tests.chaos --kills $(KILLS) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(CHAOS_OPTIONS)

lint: $(BIN)/.installed ## Check style, types, spelling and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell orchestrator workers triggers docs README.md CHANGELOG.md

format: $(BIN)/.installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## Lint and test

bench: $(BIN)/.installed ## Compare with plain Celery on the same server, and measure the triggers
	$(BIN)/python tests/benchmarks/bench.py $(BENCH_OPTIONS)
	$(BIN)/python -m tests.benchmarks.triggers

simulation: $(BIN)/.installed ## Compare how pools are sized with other rules, and draw docs/scaling.md anew
	$(BIN)/python -m tests.simulation --write docs/scaling.md

clean: ## Remove what was installed and cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
