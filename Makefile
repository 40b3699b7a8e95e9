# make quickstart   train and measure the built-in example; ARGS="--key value" changes settings
# make test         run the tests; ARGS="-k name" and the like go to pytest
# make test-all     run the slow tests too
# make test-extras  install the optional extras, and run the tests that need them
# make docs         build the pages of docs/ and the API reference into site/
# make lint         check style and types
# make format       put the code in shape
# make clean        delete caches and build outputs (make clean-venv: the environment too)
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." goes to every pip install (for instance an index that has
# torch's CPU build), THREADS=4 sets the CPU threads of training, and the processes of the tests.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
RUN := $(VENV)/bin/python

.PHONY: help quickstart test test-all test-extras docs lint format clean clean-venv check-python
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -11

check-python:
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON); give one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "tct_hf needs Python 3.10 or newer, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1); give another with make PYTHON=python3.12" >&2; \
		exit 1; }

# A stamp is written only after pip has ended well; pip itself is safe to run again after an interruption. The
# environment is made anew when its pip does not work, which is what an interrupted `python -m venv` leaves behind.
define install
	@rm -f "$@"
	@"$(RUN)" -m pip --version >/dev/null 2>&1 || { \
		echo "Creating the environment $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear "$(VENV)" || { \
			echo "The venv module does not work here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo "Installing tct_hf[$(1)] into $(VENV): torch is the largest part; 2 to 10 minutes, most of it downloads"
	@"$(RUN)" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(1)]"
	@touch "$@"
endef

$(VENV)/.installed-quickstart: pyproject.toml constraints.txt | check-python
	$(call install,quickstart)

$(VENV)/.installed-dev: pyproject.toml constraints.txt | check-python
	$(call install,dev$(comma)quickstart)

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	"$(RUN)" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[docs]"
	@touch "$@"

comma := ,

# Without a launcher, whose traceback would hide the line that Ctrl-C prints; a GPU is used where there is one.
quickstart: $(VENV)/.installed-quickstart
	@OMP_NUM_THREADS=$(THREADS) "$(RUN)" recipes/train.py recipes/quickstart.yaml $(ARGS)

test: $(VENV)/.installed-dev
	"$(RUN)" -m pytest -n $(THREADS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: ARGS += -m "not data and not network and not gpu"
test-all: test

# The browser test also needs Debian's or Ubuntu's chromium, and is skipped without.
$(VENV)/.installed-extras: $(VENV)/.installed-dev
	"$(RUN)" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]" playwright
	@touch "$@"

EXTRAS := demo,mteb,pyterrier
EXTRA_TESTS := evaluation/test_tasks.py evaluation/test_page.py hub/test_space.py retrieval/test_pyterrier.py

test-extras: $(VENV)/.installed-extras
	"$(RUN)" -m pytest -n $(THREADS) --dist loadfile --no-loadscope-reorder -m "not data and not network and not gpu" \
		$(addprefix tests/,$(EXTRA_TESTS)) $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 "$(RUN)" -m mkdocs build --strict

lint: $(VENV)/.installed-dev
	"$(RUN)" -m ruff check .
	"$(RUN)" -m ruff format --check .
	"$(RUN)" -m mypy
	"$(VENV)/bin/lint-imports"

format: $(VENV)/.installed-dev
	"$(RUN)" -m ruff check --fix .
	"$(RUN)" -m ruff format .

clean:
	rm -rf build dist site .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	find . -maxdepth 1 -name "*.egg-info" -print0 | xargs -0 rm -rf

clean-venv: clean
	rm -rf "$(VENV)"
