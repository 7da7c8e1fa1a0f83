# Every chore of the project. `make` lists them. Needs make and Python >= 3.10; the rest is installed into .venv.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP) ## make .venv with everything for development

$(STAMP): pyproject.toml setup.py constraints.txt scripts/make_venv.sh
	@sh scripts/make_venv.sh $(VENV)
	@touch $@

demo: setup ## export a small model, ask it about a picture, prove that the bundle is the model
	@sh scripts/demo.sh $(BIN)/moiie

test: lint ## lint, then every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: setup ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types && ln -sfn ../../runtime build/types/moiie_runtime && ln -sfn ../../recipes build/types/moiie_recipes && ln -sfn ../../plugins build/types/moiie_plugins
	$(BIN)/mypy

fmt: setup ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## speed beside other engines; tests/bench/README.md says what else can be measured
	$(BIN)/python tests/bench/bench.py shapes $(BENCH_ARGS)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
