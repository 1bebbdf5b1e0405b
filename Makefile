# make demo: install moe-engine and train on the embedded digits.  make test: install the rest and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# two stamps: moe-engine and what it needs; on top of it, what the tests, the linters and the site need
DEMO := $(VENV)/.ready-demo
TEST := $(VENV)/.ready-test
WORKERS ?= 2
MINUTES ?= 60
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-long torture lint docs bench results clean

help:
	@echo "make demo       install moe-engine, train on the bundled digits, write a report"
	@echo "make test       install what the tests need, run them on two processes (WORKERS=8: on eight)"
	@echo "make test-long  the tests that take minutes (DATA=folder: of MNIST, Fashion-MNIST and CIFAR-10)"
	@echo "make torture    kill, starve and damage runs for an hour (MINUTES=5: for five); stopped, it goes on"
	@echo "make lint       ruff, mypy and the structure of core/"
	@echo "make docs       build the documentation site, in build/site"
	@echo "make results    re-evaluate the criteria of the studies on the committed results"
	@echo "make bench      speed and memory, compared with lower bounds and other libraries; 15 minutes"
	@echo "make clean      remove the virtual environment and files left by tools"

demo: $(DEMO)
	$(BIN)/moe-engine run --plugins saturation,switch_aux

# with bytecode: without, the tests' hundreds of processes compile moe-engine again and again
test test-long: export PYTHONDONTWRITEBYTECODE =

test: $(TEST)
	$(PYTEST)

test-long: $(TEST)
	$(PYTEST) -m long

torture: $(TEST)
	cd tests && ../$(BIN)/python -m torture ../build/torture $(MINUTES)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build  # mypy can't follow the editable install's mapping of core/ and plugins/: it reads a copy
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p moe_engine
	$(BIN)/python tools/structure.py

docs: $(TEST)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "python -m http.server --directory build/site   shows it, its search too"

bench: $(TEST)
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	missed=; for one in experts memory step growth startup adopted; do $(BIN)/python benchmarks/$$one.py || missed=1; done; \
		$(BIN)/python benchmarks/page.py; test -z "$$missed"

results: $(DEMO)
	for folder in docs/results/*/; do \
		$(BIN)/moe-engine study $$(basename $$folder) --check --out $$folder || missed=1; \
	done; test -z "$$missed"

$(DEMO): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moe-engine needs Python 3.11 or newer: make demo PYTHON=python3.12, say" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "a virtual environment can't be made here: install Python's venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing moe-engine and what it needs into $(VENV); PyTorch is large, so this takes minutes."
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST): $(DEMO)
	@echo "Installing what the tests need, too."
	$(BIN)/python -m pip install --quiet --editable ".[dask,dev,lightning,transformers,tensorboard]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
