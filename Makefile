# `make run` and `make test` work on a fresh clone with Python 3.11+ and pip alone.
PYTHON ?= python3
BIN := .venv/bin

export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: setup run test test-slow lint mutants bench

setup: .venv/installed

.venv/installed: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,tensorboard,privacy,onnx]'
	touch $@

run: setup
	$(BIN)/fedjets run

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Changes the maths line by line and looks whether a test fails; tests/mutants.toml lists who may survive, and why.
# Workers are forked: a second thread of torch's would hang in them.
mutants: setup
	rm -rf mutants
	OMP_THREAD_LIMIT=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/python -m tests.mutants

# One line a bound, ending in ok or MISS; a quiet machine and about an hour. Some only: make bench NAMES="round pfl"
bench: setup
	$(BIN)/python -m benchmarks $(NAMES)
