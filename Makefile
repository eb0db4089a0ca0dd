# `make demo` shows the endpoint at work, `make test` tests it; both need Python 3.11 and cURL, and nothing else installed.
PYTHON ?= python3.11
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# Threads that wait for each other sleep instead of spinning: small models on shared cores are several times faster.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo serve train-demo evaluate-demo test test-oldest test-vllm parity parity-oldest lint load bench bench-engine bench-gpu bench-vllm soak rehearse-scale-out third-party clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

demo: .venv/complete ## an ECG image in, an answer about it out: a small trained model, without a GPU
	.venv/bin/python -m demo

serve: .venv/complete ## our own server on that model, at http://127.0.0.1:8080
	PULSE_DEVICE=cpu .venv/bin/python serve.py --model demo/checkpoint --ui 1

train-demo: .venv/complete ## train that model anew, into build/demo-training (two hours on two cores, minutes on a GPU; resumes)
	.venv/bin/python -m demo.train build/demo-training

evaluate-demo: .venv/complete ## grade it on 2,000 held-out images and a real recording, with plots in build/demo-evaluation
	.venv/bin/python -m demo.evaluate demo/checkpoint

# Most tests compute on one core.  Each file's stay together, since they share what they start, and in the files' order: few
# tests of a file may take as long as many.
IN_TWO = -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/complete ## the tests on the newest supported libraries
	.venv/bin/python $(IN_TWO) -m "not parity and not load"

# What transformers, accelerate and huggingface_hub have a part in; nothing else differs between the two environments.
ON_THEM = $(patsubst %,tests/test_%.py,call checkpoint deploy emulator engine* fast_decoder generation handler quantization sampling \
	serve_chat serve_process stock_container test_requests tokenizer vllm_settings)

test-oldest: .venv-oldest/complete ## the handler's tests on the stock container's transformers
	.venv-oldest/bin/python $(IN_TWO) -m "not parity and not load" $(ON_THEM)

parity: .venv/complete ## token for token against the official code, in an environment of its own
	.venv/bin/python -m pytest -m parity tests/parity

parity-oldest: .venv-oldest/complete ## the same on the stock container's transformers
	.venv-oldest/bin/python -m pytest -m parity tests/parity

test-vllm: .venv-vllm/complete ## the vLLM engine on a CPU: the engines' tests and parity, in an environment of its own
	.venv-vllm/bin/python -m pytest -m vllm tests/test_engines.py tests/test_vllm_engine.py tests/parity/test_parity_vllm.py

lint: .venv/complete ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/complete ## start, answer, memory and preprocessing of the demo; loading of about 1 GB
	.venv/bin/python -m benchmarks.bench_demo
	.venv/bin/python -m benchmarks.bench_loading --dtype float16
	.venv/bin/python -m benchmarks.bench_loading --dtype float32

load: .venv/complete ## our own server under two hundred connections that stall and drip; wants a quiet machine
	.venv/bin/python -m pytest -m load

bench-engine: .venv/complete ## the engine against the official code, plain generate and under traffic (half an hour)
	env -u OMP_WAIT_POLICY .venv/bin/python -m benchmarks.bench_engine

bench-gpu: .venv/complete ## a random 7B of the true shape against a GPU's limits; needs a GPU (three minutes)
	.venv/bin/python -m benchmarks.bench_gpu

bench-vllm: .venv-vllm/complete ## our engine, vLLM's own and ours on vLLM at concurrency 8, on a CPU
	.venv-vllm/bin/python -m benchmarks.bench_vllm

soak: .venv/complete ## 30 minutes of mixed traffic: nothing may leak, hang or change
	.venv/bin/python -m benchmarks.soak --minutes 30

rehearse-scale-out: .venv/complete ## two replicas behind HAProxy, restarted under traffic: none may be lost (wants haproxy)
	.venv/bin/python -m scripts.rehearse_scale_out

third-party: .venv/complete ## the commentary client against a server that is not ours, transformers serve
	.venv/bin/python scripts/show_third_party_service.py

clean: ## remove what the targets above made
	rm -rf build .venv .venv-oldest .venv-vllm .venv-oracle .venv-serving

define environment
@echo "Installing the environment $(1) (a few minutes the first time)"
@$(PYTHON) -m venv --clear $(1)
@$(1)/bin/python $(PIP_INSTALL) -r requirements-dev.txt -c $(2)
@touch $@
endef

.venv/complete: requirements.txt requirements-serve.txt requirements-quantization.txt requirements-dev.txt constraints.txt
	$(call environment,.venv,constraints.txt)

.venv-oldest/complete: requirements.txt requirements-serve.txt requirements-quantization.txt requirements-dev.txt constraints-oldest.txt
	$(call environment,.venv-oldest,constraints-oldest.txt)

.venv-vllm/complete: constraints-vllm.txt
	@echo "Installing the environment .venv-vllm (a few minutes and 3.5 GB the first time)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python $(PIP_INSTALL) --no-deps -r constraints-vllm.txt
	@touch $@
