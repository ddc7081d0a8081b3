# Every target makes its own environment first, so each works from a bare clone with no more than
# Python 3.11 or newer, make and git. `make setup` does that alone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 5 -c constraints-dev.txt
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal --benchmark-disable
# Threads that wait give their core away: several times faster where another program runs too.
PATIENT := OMP_WAIT_POLICY=PASSIVE
BENCHMARKS := import_time meta_memory rewrite_cost decode_step

# The first interpreter that runs and is new enough; `make PYTHON=/path/to/python3.12` overrides.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)

.PHONY: help setup demo test test-all lint format bench sweep legacy docs notebooks fuzz mutants \
	law-mutants clients exporters clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## make or update the environment in .venv

# torch comes first and alone: once it is there, no other requirement chooses a build of its own.
# ONNX Runtime's two wheels share their files, so an earlier one goes before the right one comes.
$(READY): pyproject.toml constraints-dev.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed; none was found." >&2; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment: install its venv module" \
		"(Debian, Ubuntu: the package python3-venv)." >&2; exit 1; }
	@$(PIP) torch
	@$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu 2>/dev/null
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(READY) ## train a small GPT, rewrite it, export it, generate text with torch and ONNX Runtime
	$(PATIENT) $(BIN)/python -m cachefree.demo $(ARGS)

test: lint ## lint, types and the quick tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint ## lint, types and every test
	$(PYTEST) $(ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## every benchmark, one after the other; results in benchmarks/results/
	@missed=; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || missed+=" $$name"; done; \
	[ -z "$$missed" ] || { echo "failed, or over its limit:$$missed" >&2; exit 1; }

sweep: $(READY) ## every architecture of transformers, a process each; the table is docs/transformers.md
	$(BIN)/python -m benchmarks.sweep $(ARGS)

legacy: $(READY) ## models of earlier versions of transformers; the table is docs/transformers-legacy.md
	$(BIN)/python -m benchmarks.sweep.legacy $(ARGS)

docs: $(READY) ## the documentation, built strictly into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs

# Exporters that are packages of their own: beside .venv, so that torch and what else it pins stay.
EXPORTERS := .exporters
$(EXPORTERS)/.ready: Makefile $(READY)
	rm -rf $(EXPORTERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(EXPORTERS) \
		openvino==2026.4.1 openvino-telemetry==2025.2.0 \
		executorch==1.5.1 ruamel.yaml==0.19.1 ruamel.yaml.clib==0.2.15 tabulate==0.10.0
	@touch $@

exporters: $(EXPORTERS)/.ready ## OpenVINO, ExecuTorch and every other exporter; the table is docs/exporters.md
	PYTHONPATH=$(EXPORTERS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.exporters

notebooks: $(EXPORTERS)/.ready ## run every notebook in place, each within two minutes
	PYTHONPATH=$(abspath $(EXPORTERS)) $(BIN)/python -m notebooks.run $(ARGS)

N ?= 1000
fuzz: $(READY) ## N random decoder modules with faults: each is refused, or equal to itself
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz programs $(N) $(ARGS)

mutants: $(READY) ## N wrong siblings of the test models: each is refused, or equal to itself
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz mutants $(N) $(ARGS)

law-mutants: $(READY) ## N mutants of the laws and the checker: each is noticed by a test, or printed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.source_mutants $(N) $(ARGS)

# The clients' packages want other versions of what .venv has, so each is in a place of its own.
CLIENTS := .clients
$(CLIENTS)/.ready: Makefile $(READY)
	$(BIN)/python -m venv --clear $(CLIENTS)/genai
	$(CLIENTS)/genai/bin/python -m pip install --quiet onnxruntime-genai==0.18.0 numpy
	$(BIN)/python -m venv --clear $(CLIENTS)/optimum
	$(CLIENTS)/optimum/bin/python -m pip install --quiet torch
	$(CLIENTS)/optimum/bin/python -m pip install --quiet optimum-onnx==0.1.0 'transformers<5' onnxruntime
	mkdir -p $(CLIENTS)/node && cd $(CLIENTS)/node && npm init --yes >/dev/null \
		&& npm install --silent --ignore-scripts @huggingface/transformers@4.3.1 puppeteer-core
	@touch $@

clients: $(CLIENTS)/.ready ## Optimum, onnxruntime-genai, transformers.js and a browser on exported folders
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --benchmark-disable tests/clients $(ARGS)

clean: ## remove what was built, the environment too
	rm -rf $(VENV) $(CLIENTS) $(EXPORTERS) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
