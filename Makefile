# Developer commands; `make help` lists them. Everything runs in $(VENV), which the first command that needs it makes.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PYTHON ?= python3
PROTO_FILES := $(shell find protos/lmd -name '*.proto' | sort)
# One process for each core; a file's tests stay together, because they share fixtures.
PARALLEL := -n logical --dist loadfile
SOURCES := registry/lmd daemon/lmd cli/lmd protos/lmd tests bench tools

.PHONY: help docs demo test test-slow check lint types imports protos protos-check fmt dev build clean
.PHONY: bench bench-serving bench-gateway bench-residency
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# The product alone: what a user needs. Editable, so that a checkout runs its own code.
$(VENV)/.product: pyproject.toml constraints.txt tools/preflight.sh
	@tools/preflight.sh $(PYTHON)
	@echo "installing into $(VENV) (the first time this builds llama.cpp: about 7 minutes on two cores)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt pip
	@$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.product
	@$(BIN)/python -m pip install -q -c constraints.txt --group test
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(BIN)/python -m pip install -q -c constraints.txt --group dev
	@touch $@

dev: $(VENV)/.dev ## install everything a developer needs

demo: $(VENV)/.test ## a minute's tour on a private daemon that leaves nothing behind
	@$(BIN)/python -m tools.demo

test: $(VENV)/.test ## run the tests
	@$(BIN)/python -m pytest -q $(PARALLEL)

test-slow: $(VENV)/.test ## run all tests, also those that take minutes
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "not gpu and not network"

check: lint types imports protos-check ## everything CI checks beside the tests

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev
	@$(BIN)/mypy $(SOURCES)

imports: $(VENV)/.dev
	@$(BIN)/lint-imports

fmt: $(VENV)/.dev ## format code and protos
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .
	@cd protos && $(BIN)/buf format -w

protos: $(VENV)/.dev ## regenerate the stubs from protos/lmd
	@cd protos && PATH="$(BIN):$$PATH" && \
	  $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. $(PROTO_FILES:protos/%=%) && \
	  $(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. \
	    $(filter %_service.proto,$(PROTO_FILES:protos/%=%))

docs: $(VENV)/.test ## regenerate the references that come from the code
	@$(BIN)/python -m tests.support.cli_docs
	@$(BIN)/python -m tests.support.parameter_docs
	@$(BIN)/python -m tests.support.metric_docs
	@$(BIN)/python -m tests.support.compatibility
	@$(BIN)/python -m lmd.daemon.config_docs reference > docs/reference/configuration.md
	@$(BIN)/python -m lmd.daemon.config_docs example > docs/reference/config.example.toml

protos-check: $(VENV)/.dev
	@cd protos && $(BIN)/buf lint && $(BIN)/buf format -d --exit-code
	@tools/protos_drift.sh $(VENV)

build: $(VENV)/.dev ## build the wheel and the source distribution
	@$(BIN)/python -m pip install -q -c constraints.txt build
	@$(BIN)/python -m build -o dist .

bench: $(VENV)/.test ## measure against the named peers; run on an idle machine
	@$(BIN)/python -m bench.cli
	@$(BIN)/python -m bench.pull
	@$(BIN)/python -m bench.stream
	@$(BIN)/python -m bench.stream --big
	@$(BIN)/python -m bench.engine tests/data/stories260K.gguf
	@$(BIN)/python -m bench.memory
	@$(BIN)/python -m bench.create
	@$(MAKE) --no-print-directory bench-serving
	@$(MAKE) --no-print-directory bench-gateway
	@$(MAKE) --no-print-directory bench-residency

bench-serving: $(VENV)/.test ## measure serving against llama-server, which is built first: 10 minutes, then 15
	@PYTHON=$(BIN)/python tools/build_llama_server.sh
	@$(BIN)/python -m bench.serving

bench-gateway: $(VENV)/.test ## measure the HTTP gateway against gRPC and llama-cpp-python's server: 5 minutes
	@$(BIN)/python -m bench.gateway

bench-residency: $(VENV)/.test ## measure estimates, swaps against llama-server's router, scarce memory, the planner: 20 minutes
	@PYTHON=$(BIN)/python tools/build_llama_server.sh
	@$(BIN)/python -m bench.residency

clean: ## remove what the other commands made, the environment too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
