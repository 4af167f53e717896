# Everything is installed into .venv, and again only when pyproject.toml or constraints.txt changes.
# For another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

LOG := $(VENV)/install.log
DEMO := .[plot,serve]
EVERYTHING := .[dev,plot,quantized,serve,deepspeed,s3,polars]

# A step prints one line. The output of its command goes to a file, whose name is printed if the command fails.
quietly = @echo "$(1) (log: $(LOG))"; $(2) >$(LOG) 2>&1 \
  || { tail -n 5 $(LOG) >&2; echo "installation failed; the whole log is in $(LOG)" >&2; exit 1; }

# Two test files run at a time: most tests wait for processes that use one thread.
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

docs: $(VENV)/.package  ## write docs/tables.md and schemas/
	$(BIN)/python -m docs.write_tables
	$(BIN)/python -m docs.write_schemas

docs-check: $(VENV)/.package  ## fail if docs/tables.md or schemas/ are not current
	$(BIN)/python -m docs.write_tables --check
	$(BIN)/python -m docs.write_schemas --check

check: lint types docs-check

clean:
	rm -rf $(VENV) demo-run

# Tests drive the explorer in a real browser. Without Chromium, this installs Debian's where that is possible.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	  || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null \
	  || echo "cannot install Chromium: tests that need a browser are skipped" >&2

# One pip call per target: constraints.txt then also decides which build of torch is installed.
$(VENV)/.package: $(VENV)/.created pyproject.toml constraints.txt
	$(call quietly,installing backlens: this takes minutes the first time,$(PIP) -e "$(DEMO)")
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(call quietly,installing backlens and what its tests need: this takes minutes the first time,$(PIP) -e "$(EVERYTHING)")
	@touch $(VENV)/.package $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "backlens needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
