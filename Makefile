# The verbs of the project. Everything runs in .venv, which `setup` builds once for each state of
# pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/setup-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))

.PHONY: setup demo test test-slow test-gpu check bench

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	rm -f .venv/setup-*
	touch $@

demo: setup
	$(BIN)/python jobs/finetune.py demo

test: setup
	$(BIN)/python -m pytest -m 'not slow and not gpu'

# pytest ends with 5 where no test is selected: that is no failure.
test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not gpu' || test $$? -eq 5

test-gpu: setup
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

# One of the list that `jobs/benchmark.py --help` gives.
BENCHMARK ?= train_step
bench: setup
	$(BIN)/python jobs/benchmark.py $(BENCHMARK)
