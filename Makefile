# `make run` and `make test` work on a fresh clone with Python 3.11+ and pip alone.
PYTHON ?= python3
BIN := .venv/bin

export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: help setup run check lint format test test-slow mutants mutants-rounds bench lock

help: ## list what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

setup: .venv/installed ## make .venv with all that development needs

.venv/installed: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,tensorboard,privacy,onnx]'
	touch $@

run: setup ## one run on the bundled digits, a minute or so
	$(BIN)/fedjets run

check: lint test ## what CI runs

lint: setup ## style, types, and that imports only go down
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite what a formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## the tests that take seconds, and the documents' quick commands; under 10 minutes
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup ## deployments, kills, whole presets, the documents' long commands; an hour
	$(BIN)/python -m pytest -m slow

# tests/mutants.toml lists which changes may survive, and why.
# Workers are forked: a second thread of torch's would hang in them.
mutants: setup ## change the maths line by line; a test must fail; half an hour
	rm -rf mutants
	OMP_THREAD_LIMIT=1 $(BIN)/mutmut run --max-children 2 "client_app*" "fedjets_flwr*" "strategies*"
	$(BIN)/python -m tests.mutants

# Only whole runs see what a change of the rounds does.
mutants-rounds: setup ## the same for the order of a round; two hours
	rm -rf mutants
	OMP_THREAD_LIMIT=1 $(BIN)/mutmut run --max-children 2 "server_app*"
	$(BIN)/python -m tests.mutants

# One line a bound, ending in ok or MISS. Some only: make bench NAMES="round pfl"
bench: setup ## measure against bounds and rivals; a quiet machine and an hour
	$(BIN)/python -m benchmarks $(NAMES)

lock: setup ## write down the exact versions that are installed here, as constraints for pip
	( echo "# Versions that the tests passed with: pip install --constraint requirements.lock ..."; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' ) > requirements.lock
