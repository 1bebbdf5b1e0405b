# make demo: set up everything and train on the embedded digits.  make test: set up everything and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-long lint docs bench results clean

help:
	@echo "make demo       set up everything, train on the embedded digits, write a report"
	@echo "make test       set up everything, run the tests"
	@echo "make test-long  the tests that take minutes (DATA=folder: of MNIST, Fashion-MNIST and CIFAR-10)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make results    judge the committed results of the studies again, without a run"
	@echo "make bench      speed and memory beside floors and other libraries; 15 minutes"
	@echo "make clean      remove the virtual environment and what tools left"

demo: $(READY)
	$(BIN)/moe-engine run --plugins saturation,switch_aux

test: $(READY)
	$(BIN)/python -m pytest

test-long: $(READY)
	$(BIN)/python -m pytest -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build  # mypy can't follow the editable install's mapping of core/ and plugins/: it reads a copy
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p moe_engine

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "python -m http.server --directory build/site   shows it, its search too"

bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	missed=; for one in experts memory step growth startup; do $(BIN)/python benchmarks/$$one.py || missed=1; done; \
		$(BIN)/python benchmarks/page.py; test -z "$$missed"

results: $(READY)
	for folder in docs/results/*/; do \
		$(BIN)/moe-engine study $$(basename $$folder) --check --out $$folder || missed=1; \
	done; test -z "$$missed"

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moe-engine needs Python 3.11 or newer: make demo PYTHON=python3.12, say" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "a virtual environment can't be made here: install Python's venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing moe-engine and what it needs into $(VENV); PyTorch is large, so this takes minutes."
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --editable ".[dask,dev,lightning,transformers,tensorboard]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
