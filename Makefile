PYTHON ?= python3.11

.PHONY: demo test test-oldest test-lmms-eval matrix clean

demo: .venv/installed
	.venv/bin/shortv demo

test: .venv/installed
	.venv/bin/python -m pytest

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

test-lmms-eval: .venv-lmms-eval/lmms-eval
	.venv-lmms-eval/bin/python -m pytest tests/test_lmms_eval.py

# pyenv, where there is one, shows the Pythons it is told to.
matrix: export PYENV_VERSION := $(shell pyenv versions --bare 2>/dev/null | paste -sd:)
matrix:
	$(PYTHON) .ci/matrix.py

# Servers and the web page are of the newest transformers alone.
.venv/installed: EXTRAS = test,serve,web
.venv/installed: constraints.txt pyproject.toml
	$(call install,.venv,constraints.txt)

.venv-oldest/installed: EXTRAS = test
.venv-oldest/installed: constraints-oldest.txt pyproject.toml
	$(call install,.venv-oldest,constraints-oldest.txt)

.venv-lmms-eval/installed: EXTRAS = test
.venv-lmms-eval/installed: constraints.txt pyproject.toml
	$(call install,.venv-lmms-eval,constraints.txt)

# Without most of what lmms-eval asks for: that is for other models, for videos and for judges.
.venv-lmms-eval/lmms-eval: PIP = .venv-lmms-eval/bin/python -m pip install --quiet --disable-pip-version-check
.venv-lmms-eval/lmms-eval: .venv-lmms-eval/installed constraints-lmms-eval.txt
	$(PIP) --constraint constraints-lmms-eval.txt loguru pytablewriter pytz sacrebleu tenacity
	$(PIP) --constraint constraints-lmms-eval.txt --no-deps lmms_eval
	touch $@

# torch is installed by name: found that way, its CPU build is taken where there is one.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable '.[$(EXTRAS)]'
	touch $@
endef

clean:
	rm -rf .venv .venv-oldest .venv-lmms-eval demo-output
