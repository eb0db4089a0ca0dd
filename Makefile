# `make demo` shows the endpoint at work, `make test` tests it; both need Python 3.11 and nothing else installed.
PYTHON ?= python3.11
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# Threads that wait for each other sleep instead of spinning: small models on shared cores are several times faster.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-oldest parity parity-oldest lint bench third-party clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: .venv/complete ## an ECG image in, an answer out, on a small random checkpoint, without a GPU
	.venv/bin/python -m demo

test: .venv/complete ## the tests on the newest supported libraries
	.venv/bin/python -m pytest -m "not parity"

test-oldest: .venv-oldest/complete ## the same tests on the stock container's transformers
	.venv-oldest/bin/python -m pytest -m "not parity"

parity: .venv/complete ## token for token against the official code, in an environment of its own
	.venv/bin/python -m pytest -m parity

parity-oldest: .venv-oldest/complete ## the same on the stock container's transformers
	.venv-oldest/bin/python -m pytest -m parity

lint: .venv/complete ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/complete ## start, answer, memory and preprocessing of the demo; loading of about 1 GB
	.venv/bin/python -m benchmarks.bench_demo
	.venv/bin/python -m benchmarks.bench_loading --dtype float16
	.venv/bin/python -m benchmarks.bench_loading --dtype float32

third-party: .venv/complete ## the commentary client against a server that is not ours, transformers serve
	.venv/bin/python scripts/show_third_party_service.py

clean: ## remove what the targets above made
	rm -rf build .venv .venv-oldest .venv-oracle .venv-serving

define environment
@echo "Installing the environment $(1) (a few minutes the first time)"
@$(PYTHON) -m venv --clear $(1)
@$(1)/bin/python $(PIP_INSTALL) -r requirements-dev.txt -c $(2)
@touch $@
endef

.venv/complete: requirements.txt requirements-dev.txt constraints.txt
	$(call environment,.venv,constraints.txt)

.venv-oldest/complete: requirements.txt requirements-dev.txt constraints-oldest.txt
	$(call environment,.venv-oldest,constraints-oldest.txt)
