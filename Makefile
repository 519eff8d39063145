# Everything one does with this repository. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
LOCK := $(UV) compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet

# Several processes import the same large packages; byte code that is never written is compiled by each.
unexport PYTHONDONTWRITEBYTECODE
export UV_LINK_MODE ?= copy

.DEFAULT_GOAL := help
.PHONY: help run up test soak check fmt docs bench weaviate lock clean

help: ## List these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

run: $(VENV)/ready ## Answer, embed, keep and search, each as a Prefect flow run: make run [DOCS=folder] [CONFIG=sekha.yaml]
	@$(BIN)/sekha $(if $(CONFIG),--config $(CONFIG)) run $(if $(DOCS),--docs $(DOCS))

up: $(VENV)/ready ## Start the Prefect server, a worker and the deployments; Ctrl-C ends them all
	@$(BIN)/sekha $(if $(CONFIG),--config $(CONFIG)) up

test: $(VENV)/ready-dev ## Run the tests: ten to twenty minutes on two cores
	@$(BIN)/python -m pytest -m "not soak" --numprocesses 2 --dist loadgroup $(PYTEST)

soak: $(VENV)/ready-dev ## Run the long soaks and kill storms
	@$(BIN)/python -m pytest -m soak $(PYTEST)

check: $(VENV)/ready-dev ## Check style, types and that the generated docs are true
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python docs/generate.py --check

fmt: $(VENV)/ready-dev ## Format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

docs: $(VENV)/ready-dev ## Generate the docs that are drawn from the code
	@$(BIN)/python docs/generate.py

bench: $(VENV)/ready-dev ## Run every benchmark, and fail if one misses its bound
	@missed=; for benchmark in benchmarks/*.py benchmarks/gateway benchmarks/retrieval; do \
	  echo "== $$benchmark"; $(BIN)/python $$benchmark || missed="$$missed $$benchmark"; \
	done; test -z "$$missed" || { echo "a bound is missed:$$missed"; exit 1; }

weaviate: $(VENV)/ready-dev ## Run a Weaviate server for development, built once with Go; Ctrl-C ends it
	@$(BIN)/python -m tests.fixtures.weaviate

lock: $(VENV)/setup ## Resolve the locks anew: names, versions and hashes
	@$(LOCK) --upgrade --output-file requirements.lock
	@$(LOCK) --upgrade --group dev --constraint requirements.lock --output-file requirements-dev.lock

clean: ## Remove the environment and everything that runs left here
	@rm -rf $(VENV) .sekha .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

$(VENV)/setup: requirements-setup.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Sekha needs Python 3.11 or later, and $(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) from the lock …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-setup.lock
	@touch $@

$(VENV)/ready: $(VENV)/setup requirements.lock pyproject.toml
	@$(UV) install --quiet --require-hashes --requirement requirements.lock
	@$(UV) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.lock
	@$(UV) install --quiet --require-hashes --requirement requirements-dev.lock
	@touch $@
