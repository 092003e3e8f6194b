# make run    a small 32->8->4->2->1-bit chain on scikit-learn's digits: installs, trains, prints a table, saves a plot
# make test   the default test suite; make test-all also runs the tests that take more than ten seconds each
# make lint   style, formatting, types
# make docs   the documentation, into site/; warnings are errors
# make clean  removes the environment and the caches; runs/ stays
#
# Everything is installed into .venv, by uv where it is on PATH, else by pip. Settings:
#   PYTHON=python3.12     the Python that .venv is made from (default: the first of 3.11 to 3.13 that is found)
#   EXTRAS=cuda12         further extras of setup.py, for a machine with an accelerator
#   TEST_WORKERS=2        test processes
#   TEST_OPTIONS=         further options of pytest

VENV ?= .venv
TEST_WORKERS ?= 2
TEST_MARKS ?= not slow
comma := ,
extras = $(1)$(if $(EXTRAS),$(comma)$(EXTRAS))

.PHONY: run test test-all lint docs clean
.DEFAULT_GOAL := run

run: $(VENV)/.installed-$(call extras,report)
	$(VENV)/bin/python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
	$(VENV)/bin/python launch.py --config=configs/quickstart.py --workdir=runs/quickstart --mode=report

# The tests need no accelerator, and several processes would fight for the memory of one.
test: $(VENV)/.installed-$(call extras,report$(comma)test)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/python -m pytest -q -m "$(TEST_MARKS)" -n $(TEST_WORKERS) --dist loadfile $(TEST_OPTIONS)

test-all:
	$(MAKE) test TEST_MARKS=

lint: $(VENV)/.installed-$(call extras,dev$(comma)report$(comma)test)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist site *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One stamp for each set of extras, so that only a change of setup.py installs again. uv has settings of its own, so where
# it cannot reach the package index that pip is set up for, pip takes over.
$(VENV)/.installed-%: setup.py | $(VENV)/.created
	@echo "Installing into $(VENV), once; this takes a minute or two ..."
	@if command -v uv >/dev/null && uv pip install --quiet --python $(VENV)/bin/python --editable '.[$*]'; then :; \
	else $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'; fi
	@touch $@

# A candidate is run, not only looked up: a shim can exist without a Python behind it.
$(VENV)/.created:
	@usable() { "$$1" -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $$2))" 2>/dev/null; }; \
	if [ -n "$(PYTHON)" ]; then \
	  usable "$(PYTHON)" 99 || { echo "PYTHON=$(PYTHON): is not a Python of version 3.11 or later"; exit 1; }; \
	  found="$(PYTHON)"; \
	else \
	  for name in python3 python3.13 python3.12 python3.11 python; do \
	    if usable $$name 14; then found=$$name; break; fi; \
	  done; \
	  [ -n "$$found" ] || { echo "no Python 3.11, 3.12 or 3.13 found: install one, or name it: make PYTHON=/path/to/python"; exit 1; }; \
	fi; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$$found -m venv failed: install its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	@touch $@
