# `make` alone lists the targets.
PYTHON ?= python3
PY := .venv/bin/python
DEMO ?= multirun/demo
STUDY ?= multirun/study
.DEFAULT_GOAL := help
.PHONY: help setup demo paper plan quantize prune merge test test-slow lint format report readme ui rate study clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## .venv, the package, the embedded model, MT-bench's files; a second call does nothing
	@$(PYTHON) scripts/setup.py

demo: setup ## quantized inference, fine-tuning, evaluation and report on the embedded model (8 to 12 minutes on two cores)
	$(PY) infer.py -m experiment=demo quant=none,nf4,int8 hydra.sweep.dir=$(DEMO)/infer
	$(PY) evaluate.py -m judge=local judge.mode=both limit=2 baseline=$(DEMO)/infer/none answers=$(DEMO)/infer/nf4,$(DEMO)/infer/int8 hydra.sweep.dir=$(DEMO)/judge
	$(PY) evaluate.py task=text hydra.run.dir=$(DEMO)/before
	$(PY) train.py experiment=handbook hydra.run.dir=$(DEMO)/train
	$(PY) evaluate.py task=text adapter_path=$(DEMO)/train hydra.run.dir=$(DEMO)/after
	$(PY) -m llm_at_home.reporting

paper: setup ## every row of the paper, what is missing of it: make paper [MODEL=smollm2_135m] [--dry-run] [ARGS="full=true"]
	+@command -v $(PY) >/dev/null || $(PYTHON) scripts/setup.py
	+$(PY) -m llm_at_home.tasks.paper $(if $(MODEL),model=$(MODEL)) $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry-run) $(ARGS)

quantize: setup ## make a quantized checkpoint ahead of its use: make quantize ARGS="quant=gptq quant.bits=3"
	$(PY) -m llm_at_home.tasks.quantize $(ARGS)

prune: setup ## make a pruned checkpoint ahead of its use: make prune ARGS="prune=wanda prune.pattern=2:4"
	$(PY) -m llm_at_home.tasks.prune $(ARGS)

plan: setup ## what to run, and what it takes of a GPU: make plan ARGS="task=chat gpu=rtx4090", ARGS="model=llama2_7b quant=nf4 gpu=t4"
	$(PY) -m llm_at_home.planning $(ARGS)

merge: setup ## merge an adapter into its base: make merge ARGS="adapter_path=RUN_FOLDER out=my-model gguf=Q8_0"
	$(PY) -m llm_at_home.tasks.merge $(ARGS)

test: setup ## the tests (under 15 minutes on two cores)
	$(PY) -m pytest -n 2 --dist worksteal

test-slow: setup ## the tests that take minutes, the demo among them
	$(PY) -m pytest -m slow --timeout=1800 -n 2 --dist worksteal

lint: setup ## ruff (style, imports, docstrings) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## let ruff mend style and imports
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

report: setup ## tables and figures from all records: reports/index.html; make report ARGS="--prices my-prices.yaml"
	$(PY) -m llm_at_home.reporting $(ARGS)

readme: setup ## write the tables of README.md, docs/quantization.md and docs/claims.md from the records in results/
	$(PY) -m llm_at_home.reporting.readme README.md docs/quantization.md docs/claims.md

ui: setup ## MLflow on http://127.0.0.1:5000, and the address of its view with the columns to compare
	@echo "compare: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=llm-at-home"
	MLFLOW_DISABLE_TELEMETRY=true $(PY) -m mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

rate: setup ## people grade answers, blind, on a page: make rate RUNS="FOLDER FOLDER" [STUDY=FOLDER ARGS="--raters 8"]
	$(PY) -m llm_at_home.human.serve $(RUNS) --study $(STUDY) $(ARGS)

study: setup ## the tables of their grades: make study [STUDY=FOLDER JUDGE="RUN ..." FIDELITY="RUN ..."]
	$(PY) -m llm_at_home.tasks.study $(STUDY) --judge $(JUDGE) --fidelity $(FIDELITY) $(ARGS)

clean: ## remove .venv (runs, records and caches stay)
	rm -rf .venv
