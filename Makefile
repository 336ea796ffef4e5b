# Two commands do everything on a fresh machine:
#   make chat    environment, install, the starter model, the window
#   make test    environment, lint, types, and all tests on the built wheel
# For developers, on the working tree and without building anything first:
#   make check                          lint and types
#   make fix                            mends what ruff can mend, and formats
#   make one T=tests/hub/test_x.py      one test file, folder or FILE::test
#   make unit                           all tests
#   make snapshots                      draws the window's snapshots anew: look at the difference before you commit it
#   make screenshots, make bench        the pictures of the README; the figures of BENCHMARKS.md
# TORCH_INDEX=URL gives pip another index for torch: https://download.pytorch.org/whl/cpu saves some 3 GB on a laptop
# without a GPU. PYTHON=python3.12 names another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -P -m pip --disable-pip-version-check
ROOMS := core checkpoints hub engine tuning jobs serve chat tui cli
STARTER_HOME := $(CURDIR)/.test-cache
WHEEL_VENV := .test-cache/wheel-venv
TESTS := $(shell ls tests/conftest.py tests/*/conftest.py tests/*/test_*.py)
TEST_HELPERS := $(filter-out $(TESTS),$(shell ls tests/*.py tests/*/*.py benchmarks/*.py))
# Strict, but a test may replace what a module imports.
TEST_FLAGS := --implicit-reexport --no-warn-return-any
# Half the suite waits for processes, terminals and clocks, so two of it at once take little more than half the time, and
# threads of torch that wait for each other must not spin meanwhile. Each worker begins at its own end: files stay whole.
# WORKERS=0 runs them one after another, in one process.
WORKERS ?= 2
IN_PARALLEL = -n $(WORKERS) --dist worksteal
SNAPSHOTS = $(shell grep -l snap_compare tests/tui/test_*.py)

.PHONY: chat test check fix starter unit one snapshots wheel-test screenshots bench clean
.DELETE_ON_ERROR:

chat: $(VENV)/installed
	@$(BIN)/glmchat list -q | grep -qx smollm2 || $(BIN)/glmchat pull smollm2
	@echo "The command is $(BIN)/glmchat; after '. $(BIN)/activate' it is glmchat. 'glmchat run -c' goes on with the last conversation."
	@$(BIN)/glmchat

test: check wheel-test

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "glmchat needs Python 3.11 or later: install it, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "glmchat needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that TORCH_INDEX is asked for torch only.
$(VENV)/torch: $(VENV)/bin/python constraints.txt
	@echo "glmchat installs into $(VENV): torch (about 200 MB without GPU support, about 3 GB with it), 300 MB of other packages,"
	@echo "and 'make chat' then pulls a starter model of 93 MB."
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(shell grep -i '^torch==' constraints.txt) \
	  || { echo "torch could not be installed; pip's words are above. It needs the network once, and 5 GB of disk with GPU support." >&2; exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(wildcard engine/native/*.[ch]) constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/developed: $(VENV)/torch pyproject.toml setup.py $(wildcard engine/native/*.[ch]) constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	@# It is built against the torch that is there. Where it cannot be, the tests of it say so and are left out.
	@DS_BUILD_OPS=0 $(PIP) install --quiet -c constraints.txt --no-build-isolation deepspeed || echo "DeepSpeed could not be installed"
	@touch $@ $(VENV)/installed

# mypy wants to see the package under its name; the root itself is the package.
.typecheck/glmchat:
	mkdir -p .typecheck && ln -sfn .. $@

# Tests import what they share by name (`from fakes import FakeEngine`): mypy finds it in one folder of links.
.typecheck/helpers:
	mkdir -p $@

check: $(VENV)/developed .typecheck/glmchat .typecheck/helpers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .typecheck && ../$(BIN)/mypy $(addprefix -p glmchat.,$(ROOMS))
	@ln -sfn $(addprefix ../../,$(TEST_HELPERS)) .typecheck/helpers/
	@cd .typecheck && MYPYPATH=helpers ../$(BIN)/mypy $(TEST_FLAGS) $(addprefix glmchat/,$(TESTS))

# What cannot be mended without a person is said by `make check`.
fix: $(VENV)/developed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

starter: $(VENV)/developed
	@GLMCHAT_HOME=$(STARTER_HOME) $(BIN)/glmchat pull smollm2

unit: starter
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest $(IN_PARALLEL) --durations=10

one: $(VENV)/developed
	@test -n "$(T)" || { echo "which one? make one T=tests/house/test_house.py, or T=FILE::test_name" >&2; exit 1; }
	$(BIN)/pytest $(T)

snapshots: $(VENV)/developed
	$(BIN)/pytest $(SNAPSHOTS) --snapshot-update

# A forgotten sub-package works in editable mode and is missing from the wheel, so the tests run on the wheel, which is
# built from the sdist: what is missing there is missing here too. Its environment borrows the libraries of $(VENV) by path, which leaves the editable glmchat out. Of the editable install
# (which has just pulled the starter model) only where its code and data lie is left to be tested.
wheel-test: starter
	$(BIN)/pytest tests/house/test_wheel.py
	rm -rf .test-cache/dist $(WHEEL_VENV)
	$(BIN)/python -P -m build --outdir .test-cache/dist .
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -P -m pip --disable-pip-version-check install --quiet --no-deps .test-cache/dist/*.whl
	echo "$(CURDIR)/$(VENV)/lib/$$(ls $(VENV)/lib)/site-packages" > $$(echo $(WHEEL_VENV)/lib/python*/site-packages)/borrowed.pth
	GLMCHAT_TEST_WHEEL=1 OMP_WAIT_POLICY=PASSIVE $(WHEEL_VENV)/bin/python -P -m pytest $(IN_PARALLEL) --durations=20

screenshots: starter
	GLMCHAT_STARTER_HOME=$(STARTER_HOME) $(BIN)/python -P screenshots/make.py

bench: starter
	$(BIN)/python -P benchmarks/all.py

clean:
	rm -rf $(VENV) .test-cache .typecheck .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
