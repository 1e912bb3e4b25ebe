# Two commands are enough:  make serve   make test       (make help lists the rest)

SHELL := /bin/sh
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= bundled
ARGS ?=
TORCH ?= auto
TORCH_INDEX ?=
PIP_ARGS ?=
ONLY ?=
SHAPES ?=
FORMATS ?=
BATCH ?=
ROUNDS ?=

# The first Python of at least 3.11 that runs; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

BIN := .venv/bin
INSTALL = $(if $(strip $(PYTHON)),$(PYTHON),$(error weft needs Python 3.11 or newer; say make PYTHON=/path/to/python)) \
	tools/install.py --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)" --pip-args "$(PIP_ARGS)"

.DEFAULT_GOAL := help
.PHONY: help serve chat test test-long sanitize check format install install-test rivals clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  settings: HOST, PORT, MODEL (bundled, a folder or a hub id), ARGS (more flags of weft serve),"
	@echo "            PYTHON, TORCH (auto, cpu, cuda), TORCH_INDEX (URL), PIP_ARGS; of rivals:"
	@echo "            ONLY, SHAPES, FORMATS, BATCH, ROUNDS; within 10 minutes once llama.cpp is installed:"
	@echo "            make rivals ONLY=llama.cpp SHAPES=qwen2.5-0.5b FORMATS=bf16,int8 BATCH=1,16"

serve: install ## install, then serve the bundled model on 127.0.0.1:8000
	@exec $(BIN)/weft serve "$(MODEL)" --host "$(HOST)" --port "$(PORT)" $(ARGS)

chat: install ## install, then chat with the bundled model in the terminal
	@exec $(BIN)/weft chat "$(MODEL)" $(ARGS)

test: install-test ## install with the test tools, then every check and test
	@$(BIN)/python -m tools.checks

test-long: install-test ## tests that take minutes; the outcome is kept in bench/results/test-long.json
	@$(BIN)/python -m tools.checks --long

sanitize: install-test ## tests of the kernels with checks of memory and of undefined behaviour in them
	@$(BIN)/python -m tools.sanitize

check: install-test ## style and types only
	@$(BIN)/python -m tools.checks --only style,format,types

format: install-test ## let ruff format the code and mend what it can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

install: ## make .venv and install weft, once
	@$(INSTALL)

install-test: ## the same with the test tools
	@$(INSTALL) --extra test

rivals: install ## measure weft beside other engines (each in an environment of its own); takes long
	@exec $(BIN)/python -m bench.rivals $(if $(ONLY),--only "$(ONLY)") $(if $(SHAPES),--shapes "$(SHAPES)") \
		$(if $(FORMATS),--formats "$(FORMATS)") $(if $(BATCH),--batch "$(BATCH)") $(if $(ROUNDS),--rounds "$(ROUNDS)") \
		$(if $(PIP_ARGS),--pip-args="$(PIP_ARGS)") $(ARGS)

clean: ## remove .venv and every cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
