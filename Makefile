PYTHON ?= python3.11

.PHONY: demo test test-oldest clean

demo: .venv/installed
	.venv/bin/shortv demo

test: .venv/installed
	.venv/bin/python -m pytest

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

.venv/installed: constraints.txt pyproject.toml
	$(call install,.venv,constraints.txt)

.venv-oldest/installed: constraints-oldest.txt pyproject.toml
	$(call install,.venv-oldest,constraints-oldest.txt)

# torch is installed by name: found that way, its CPU build is taken where there is one.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable '.[test]'
	touch $@
endef

clean:
	rm -rf .venv .venv-oldest demo-output
