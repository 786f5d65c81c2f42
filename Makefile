# Developer commands. `make help` lists them.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PROTO_FILES := $(shell find protos/lmd -name '*.proto' | sort)

.PHONY: help protos
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

protos: ## regenerate the stubs from protos/lmd
	cd protos && PATH="$(BIN):$$PATH" && \
	  $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. $(PROTO_FILES:protos/%=%) && \
	  $(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. \
	    $(filter %_service.proto,$(PROTO_FILES:protos/%=%))
