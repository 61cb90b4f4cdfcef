# `make` lists the verbs. A fresh machine needs Python 3.11 or newer, a C++ compiler and a package registry.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
NB ?=
# Files of tests side by side
JOBS ?= 2

# beside other load, OpenMP threads that spin stall each other; on an idle machine sleeping ones are slow to wake
test soak: export OMP_WAIT_POLICY ?= PASSIVE
# the code around inductor's kernels, not the kernels: without optimisation it compiles in two thirds of the time
test: export AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL ?= O0

.PHONY: help demo test test-workers soak docs save export lint clean

help:
	@echo 'make demo     run the example from a trained Learner to a compiled file and back'
	@echo 'make test     run every test and every notebook'
	@echo 'make test-workers  install the workers (16 GB, some minutes), test them, write benchmarks/results/workers.json'
	@echo 'make soak     run the long test'
	@echo 'make export   write the package from the notebooks'
	@echo 'make save     run the notebooks and store their outputs (NB="nbs/x.ipynb" for some of them)'
	@echo 'make docs     write docs/ and README.md from the notebooks'
	@echo 'make lint     ruff and mypy'
	@echo 'make clean    remove builds and caches'

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer found: name one with `make PYTHON=/path/to/python`.'; exit 1; }
	@echo '==> making .venv with $(PYTHON)'
	$(PYTHON) -m venv .venv

$(STAMP): settings.ini pyproject.toml setup.py | $(BIN)/python
	@echo '==> installing fastai_compile and its development tools into .venv (some minutes the first time)'
	$(BIN)/python -m pip install --no-compile -e '.[dev]'
	@echo '==> compiling the Python files, all cores at once'
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true # files that are templates or tests of syntax fail
	@touch $@

demo: $(STAMP)
	@echo '==> running examples/demo.py'
	$(BIN)/python examples/demo.py

test: $(STAMP)
	@echo '==> running the tests'
	$(BIN)/python tools/tests.py --jobs $(JOBS)

test-workers: $(STAMP)
	@echo '==> installing the workers and testing them'
	$(BIN)/python benchmarks/workers.py

soak: $(STAMP)
	@echo '==> running tests/soak.py'
	$(BIN)/python tests/soak.py

export: $(STAMP)
	@echo '==> exporting nbs/ to fastai_compile/'
	$(BIN)/nbdev-export

save: $(STAMP)
	@echo '==> running the notebooks and storing their outputs'
	$(BIN)/python tools/save.py $(NB)

docs: $(STAMP)
	@echo '==> rendering docs/ and README.md'
	$(BIN)/python tools/docs.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info _proc site demo_out .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
