# make demo       set up and run the main job on two local ranks
# make test       set up and run the tests; make test-all adds the slow ones
# make test-gpu   set up and run the tests that need a GPU, on one
# make check      ruff and mypy
# make docs       build the documentation's pages into build/site
# make golden     write the golden graph diffs anew, for review with git diff
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
CONFIG ?= configs/prefill.yaml
ARGS ?= sp=2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
# A test's own ranks share the cores with those of the other workers: one thread each, and none that spins.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
READY := $(VENV)/.installed

.PHONY: demo test test-all test-gpu check docs golden clean

demo: $(READY)
	$(BIN)/sp-compile run $(CONFIG) $(ARGS)

test: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

test-gpu: $(READY)
	$(PYTEST) --numprocesses 1 -m cuda $(PYTEST_ARGS)

# mypy cannot see that the folder passes/ is the package sp_compile.passes; a tree of links can show it.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/sp_compile
	ln -s $(CURDIR)/sp_compile/* $(CURDIR)/passes build/types/sp_compile/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p sp_compile

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

golden: $(READY)
	$(BIN)/python -m pytest tests/test_golden.py tests/test_gpu_graphs.py -k 'what_the_passes_change or graphs_for_a_gpu' --update-golden $(PYTEST_ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "Python 3.11 or newer is needed, %s is %d.%d; name another: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, which is large, and then the rest"
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@# torch's builds for GPUs bring the Triton that fits; without one, tests interpret its code
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps triton==3.7.1
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
