# What people type most. Every target sets up .venv on its first use.
#
#   make train ARGS="--data DATA --recipe karma_text"
#   make serve RUN=runs/latest
#   make test TESTS=tests/data

PYTHON ?= python3
RUN ?= runs/latest
ARGS ?=
TESTS ?=

BIN := .venv/bin
STAMP := .venv/.installed
CODE := karma_ray jobs benchmarks tune_spaces tests

.PHONY: install train test test-oldest test-slow serve lint format format-check types clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/install.sh
	PYTHON="$(PYTHON)" bash .ci/install.sh
	@touch $@

train: install
	$(BIN)/python jobs/train.py $(ARGS)

serve: install
	$(BIN)/python jobs/serve.py $(RUN) $(ARGS)

# The fast tier and the tier on a local Ray, in two processes that take a file of tests each.
test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations=25 $(TESTS)

# The fast tier with the lowest versions that pyproject.toml allows: before a release.
test-oldest:
	PYTHON="$(PYTHON)" bash .ci/oldest.sh $(TESTS)

# Raw logs to endpoint, faults, interrupted runs: before a release.
test-slow: install
	$(BIN)/python -m pytest -m slow $(TESTS)

lint: install
	$(BIN)/ruff check $(CODE)

format: install
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

format-check: install
	$(BIN)/ruff format --check $(CODE)

types: install
	$(BIN)/python -m mypy

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
