# Everything lives in .venv, and what stands there is not installed again until pyproject.toml or
# constraints.txt changes. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

LOG := $(VENV)/install.log
EXTRAS := .[dev,plot,quantized,serve,deepspeed,s3]

# One line for a step; all that its command prints is in a file, which is named if it fails.
quietly = @echo "$(1) (what pip says is in $(LOG))"; $(2) >$(LOG) 2>&1 \
  || { tail -n 5 $(LOG) >&2; echo "this failed; all that was said is in $(LOG)" >&2; exit 1; }

# Two files at a time: most tests wait for processes that work on one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: demo test quick lint format types docs docs-check check clean browser

demo: $(VENV)/.package  ## run the bundled demo into ./demo-run
	$(BIN)/backlens run
	@echo "backlens is in $(VENV): source $(BIN)/activate"

test: $(VENV)/.dev browser  ## the whole test suite
	$(PYTEST)

quick: $(VENV)/.dev  ## the tests that take seconds
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.package  ## write docs/tables.md
	$(BIN)/python -m docs.write_tables

docs-check: $(VENV)/.package
	$(BIN)/python -m docs.write_tables --check

check: lint types docs-check

clean:
	rm -rf $(VENV) demo-run

# The explorer is tested in a real browser: Debian's, if there is none yet and it can be had.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	  || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null \
	  || echo "no Chromium could be installed: the tests that need a browser will be skipped" >&2

# One pip call each, so that the pins decide which build of torch is taken.
$(VENV)/.package: $(VENV)/.created pyproject.toml constraints.txt
	$(call quietly,installing backlens: some minutes the first time,$(PIP) -e .)
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(call quietly,installing backlens with what its tests need: some minutes the first time,$(PIP) -e "$(EXTRAS)")
	@touch $(VENV)/.package $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "backlens needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
