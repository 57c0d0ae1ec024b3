# `make demo` and `make test` work from a clean clone; both install what is missing into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo install install-dev test test-fast lint docs clean

help:
	@echo "make demo       run the default config: a sensitivity report of the demo model"
	@echo "make test       all tests that this machine can run"
	@echo "make test-fast  unit tests without the slow ones"
	@echo "make lint       linters, formatters and the type checker"
	@echo "make docs       regenerate what is generated: schemas, config/README.md, format registry"

$(VENV)/.installed: envs/snakemake.txt envs/report.txt envs/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r envs/snakemake.txt -r envs/cpu.txt
	$(PIP) --no-deps --editable .
	touch $@

# ultralytics (AGPL-3.0) is there for the tests alone.
$(VENV)/.installed-dev: $(VENV)/.installed envs/dev.txt envs/yolo.txt
	$(PIP) -r envs/dev.txt
	$(PIP) --no-deps -r envs/yolo.txt
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/snakemake --cores $(CORES)

test: install-dev
	$(BIN)/python -m pytest

test-fast: install-dev
	$(BIN)/python -m pytest -m "not slow and not workflow and not slurm and not gpu"

lint: install-dev
	$(BIN)/ruff check workflow tests benchmarks
	$(BIN)/ruff format --check workflow tests benchmarks
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/Snakefile workflow/rules
	$(BIN)/snakemake --lint

docs: install-dev
	$(BIN)/python -m layersense.quantization.generate_registry
	$(BIN)/python -m layersense.config_docs
	$(BIN)/python -m layersense.manifests.json_schema
