# `make demo` and `make test` work from a clean clone; both install what is missing into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command "make lock"

.PHONY: help demo install install-dev test test-fast fuzz lint docs lock clean

help:
	@echo "make demo       run the default config: a sensitivity report of the demo model"
	@echo "make test       all tests that this machine can run"
	@echo "make test-fast  unit tests without the slow ones"
	@echo "make fuzz       readers of foreign files on ten minutes of random input"
	@echo "make lint       linters, formatters and the type checker"
	@echo "make lock       pin all packages of envs/*.txt, with hashes, in envs/*.lock"
	@echo "make docs       regenerate what is generated: schemas, config/README.md, format registry"

# Every package is compared with the hash that its index gave when it was pinned.
$(VENV)/.installed: envs/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r envs/cpu.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# ultralytics (AGPL-3.0) is there for the tests alone.
$(VENV)/.installed-dev: $(VENV)/.installed envs/dev.lock envs/yolo.lock
	$(PIP) --require-hashes -r envs/dev.lock
	$(PIP) --require-hashes --no-deps -r envs/yolo.lock
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/snakemake --cores $(CORES)

test: install-dev
	$(BIN)/python -m pytest

test-fast: install-dev
	$(BIN)/python -m pytest -m "not slow and not workflow and not slurm and not gpu"

fuzz: install-dev
	$(BIN)/python tests/fuzz.py --minutes 10

lint: install-dev
	$(BIN)/ruff check workflow tests benchmarks
	$(BIN)/ruff format --check workflow tests benchmarks
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/Snakefile workflow/rules
	$(BIN)/snakemake --lint

# The first is the largest, and the others follow its versions.
lock: install-dev
	cd envs && ../$(LOCK) snakemake.txt dev.txt -o dev.lock
	cd envs && ../$(LOCK) --constraints dev.lock snakemake.txt cpu.txt -o cpu.lock
	cd envs && ../$(LOCK) --constraints dev.lock snakemake.txt cuda.txt -o cuda.lock
	cd envs && ../$(LOCK) --no-deps yolo.txt -o yolo.lock

docs: install-dev
	$(BIN)/python -m layersense.quantization.generate_registry
	$(BIN)/python -m layersense.config_docs
	$(BIN)/python -m layersense.manifests.json_schema
