PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m qwen3_dist.ops.cpu
	touch $(READY)

install: $(READY)  ## create .venv with the pinned versions

serve: $(READY)  ## serve the bundled model on two CPU ranks and show a sample answer
	$(BIN)/qwen3-dist serve --layout tp=2,ep=2 --sample

demo: $(READY)  ## as serve, but end after the sample answer
	$(BIN)/qwen3-dist serve --layout tp=2,ep=2 --sample --exit-after-sample

bench: $(READY)  ## measure collectives, kernels, step overhead, time to the first token, shares of the limits
	$(BIN)/python -m benchmarks.collectives
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.first_token
	$(BIN)/python -m benchmarks.shares

chaos: $(READY)  ## kill and stop ranks and replicas under load, and compare each answer with the undisturbed one
	$(BIN)/python -m benchmarks.chaos $(ARGS)

load: $(READY)  ## half an hour of mixed load with bad clients, then goodput at 1, 2, 4 and 10 times the capacity
	$(BIN)/python -m benchmarks.load $(ARGS)

bench-compare: $(READY)  ## this project against transformers and, with VLLM_PYTHON= and LLAMA_PYTHON=, its peers
	$(BIN)/python -m benchmarks.compare $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) \
		$(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON)) $(ARGS)

bench-cost-model: $(READY)  ## calibrate, run layouts, and compare with the cost model's predictions
	$(BIN)/python -m benchmarks.cost_model

gpu-check:  ## on GPUs, before anything else: stages of checks, then a verdict; needs no .venv (GPU_PYTHON=, ARGS=)
	PYTHONPATH=. $(or $(GPU_PYTHON),$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

eval-bundled: $(READY)  ## measure the bundled model on held-out examples
	PYTHONPATH=. $(BIN)/python tools/eval_bundled.py

format: $(READY)  ## format and sort imports
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: $(READY)  ## build the documentation into build/docs; a broken link fails
	PYTHONPATH=. $(BIN)/python tools/settings_page.py > docs/settings.md
	$(BIN)/zensical build

render: $(READY)  ## make the example files for clusters in cluster/deploy/ anew
	PYTHONPATH=. $(BIN)/python tools/render_examples.py

check: $(READY)  ## format, lint, types, spelling, documentation, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/zensical build
	$(BIN)/pytest -q $(CHECKS)

# Three lanes run at once. What starts Ray, or asks a service, waits most of the time and is the first lane: one Ray at a
# time is enough for two cores. Kernels, ranks and the server without Ray are the second, in two runs because some files
# of two folders have the same name; `check` and all other tests the third. `tests/test_lanes.py` fails if a file runs
# never or twice, or starts Ray in another lane than the first.
RAY_TESTS := $(addprefix tests/cluster/test_,nodes.py ray_cluster.py two_nodes.py) \
	$(addprefix tests/qwen3_dist/test_,executors.py cards_ray.py ray_ranks.py two_hosts.py)
SERVICE_TESTS := $(sort $(wildcard tests/serve_app/test_serve_*.py) \
	$(addprefix tests/serve_app/test_,cli.py bench_serve.py recorded_clients.py prometheus.py))
RANK_TESTS := $(addprefix tests/qwen3_dist/test_,kernels.py triton_attention.py triton_kernels.py triton_codes.py \
	gpu_steps.py gpu_compiles.py gpu_moves.py gpu_check.py gpu_path.py model_parity.py communicators.py \
	sampling_state.py expert_placement.py regrouping.py quantized.py cut_blocks.py rounding.py \
	products_with_codes.py deterministic_ops.py)
CHECKS := tests/test_imports.py tests/test_docs.py tests/test_lanes.py
OF_OTHER_VERBS := tests/soak tests/clients tests/page
SERVE_APP_TESTS := tests/serve_app $(addprefix --ignore=,$(SERVICE_TESTS))
OTHER_TESTS := tests $(addprefix --ignore=,tests/serve_app $(RAY_TESTS) $(RANK_TESTS) $(CHECKS) $(OF_OTHER_VERBS))
LANE := pytest -q --durations 12

# Hundreds of processes import our modules, and would compile them each.
test: export PYTHONDONTWRITEBYTECODE =

test: $(READY)  ## everything CI runs
	{ $(MAKE) check && nice $(BIN)/$(LANE) $(OTHER_TESTS); } > .venv/others.log 2>&1 & others=$$!; \
	{ nice $(BIN)/$(LANE) $(SERVE_APP_TESTS); app=$$?; nice $(BIN)/$(LANE) $(RANK_TESTS) && exit $$app; } \
		> .venv/ranks.log 2>&1 & ranks=$$!; \
	$(BIN)/$(LANE) $(SERVICE_TESTS); service=$$?; $(BIN)/$(LANE) $(RAY_TESTS); ray=$$?; \
	wait $$ranks; ranks=$$?; wait $$others; others=$$?; cat .venv/ranks.log .venv/others.log; \
	exit $$((service + ray + ranks + others))

soak: $(READY)  ## thousands of random requests with aborts, and every layout on the fake card (many minutes)
	$(BIN)/pytest -q -s tests/soak
	$(BIN)/pytest -q -m slow tests/qwen3_dist
	$(BIN)/pytest -q -m slow tests/serve_app

dashboards: $(READY)  ## scrape a loaded service by Debian's Prometheus and ask it all queries of the dashboards (2 min)
	$(BIN)/pytest -q -s -m slow tests/serve_app/test_prometheus.py

CLIENTS := .venv/clients

clients: $(READY)  ## install real clients (npm and pip) and run a tool loop of each against the service (slow)
	mkdir -p $(CLIENTS) && cp tests/clients/package.json $(CLIENTS)
	npm install --prefix $(CLIENTS) --no-audit --no-fund
	test -x $(CLIENTS)/litellm/bin/python || $(PYTHON) -m venv $(CLIENTS)/litellm
	$(CLIENTS)/litellm/bin/pip install --quiet litellm==1.110.2
	$(BIN)/pytest -q -m slow tests/clients

page-check: $(READY)  ## click through the page at / in the system's Chromium; screenshots go to build/page (slow)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,page]'
	$(BIN)/pytest -q tests/page

.PHONY: help install serve demo docs bench chaos load bench-compare bench-cost-model gpu-check eval-bundled format render check test soak dashboards clients page-check
.DEFAULT_GOAL := help
